"""A run made by hand around a small torch scorer, so that export is tested without training."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from torch import Tensor, nn

from kizu_contract.bundle import write_bundle
from kizu_contract.calibration import Calibration, Tail
from kizu_contract.judging import Reduction
from kizu_contract.manifest import BatchProfile, Graph, Provenance
from kizu_contract.tiles import TileGrid
from kizu_export.build import build_bundle
from kizu_export.evidence import Evidence
from kizu_train.data import TestPicture
from kizu_train.runs import Run

TILE_PX, CELL_PX = 16, 4


class SmallScorer(nn.Module):
    """A convolutional network that rebuilds tiles badly; the error per cell is the map."""

    def __init__(self, channels: int = 1) -> None:
        super().__init__()
        self.down = nn.Sequential(nn.Conv2d(channels, 8, 4, 2, 1), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten())
        self.middle = nn.Linear(8 * 8 * 8, 8 * 8 * 8)
        self.up = nn.ConvTranspose2d(8, channels, 4, 2, 1)
        self.pool = nn.AvgPool2d(CELL_PX)

    def forward(self, tiles: Tensor) -> tuple[Tensor, Tensor]:
        """Tiles uint8 [N, 16, 16, C] → score [N], map [N, 4, 4]."""
        pixels = tiles.permute(0, 3, 1, 2).float() / 255
        rebuilt = torch.sigmoid(self.up(self.middle(self.down(pixels)).reshape(-1, 8, 8, 8)))
        cells = self.pool((pixels - rebuilt) ** 2).mean(dim=1)
        return cells.amax(dim=(1, 2)), cells


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Torch on one thread: the tests share their machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def scorer() -> nn.Module:
    """The small scorer with fixed weights."""
    with torch.random.fork_rng():
        torch.manual_seed(3)
        return SmallScorer().eval()


@pytest.fixture
def graph() -> Graph:
    """The small scorer's interface."""
    return Graph(17, "fp32", ("tiles",), TILE_PX, 1, CELL_PX, BatchProfile(1, 64, 256))


@pytest.fixture
def tiles() -> np.ndarray:
    """Golden tiles uint8 [6, 16, 16, 1]."""
    return np.random.default_rng(4).integers(0, 256, (6, TILE_PX, TILE_PX, 1), dtype=np.uint8)


@pytest.fixture
def run(scorer: nn.Module, tiles: np.ndarray, tmp_path: Path) -> Run:
    """A run as kizu-train leaves it, around the small scorer."""
    return Run(
        path=tmp_path,
        name="small",
        recipe={"name": "small"},
        grid=TileGrid(TILE_PX, 8, 4),
        colour="grey",
        reduction=Reduction("max", 1.0),
        map_cell_px=CELL_PX,
        score="m",
        score_kinds=("m",),
        calibration=Calibration(20, ((0.5, 0.08), (0.99, 0.2)), Tail(0.15, 0.1, 0.0, 0.02)),
        warn_rate=0.01,
        reject_rate=0.001,
        scorer=scorer,
        golden_tiles=tiles,
        preview=np.zeros((20, 30, 3), np.uint8),
        provenance=Provenance("small", {"name": "small"}, 0, "0" * 64, 20, "0.1.0", {"loss": 0.5}),
        finished="2026-01-31T12:34:56.000Z",
        stopped_early=False,
    )


@pytest.fixture
def bundle_path(run: Run, tmp_path: Path) -> Path:
    """That run, exported."""
    path = tmp_path / "small.kizu"
    write_bundle(build_bundle(run).bundle, path)
    return path


@pytest.fixture
def with_scorer(run: Run) -> Callable[[nn.Module], Run]:
    """Gives the run another scorer."""
    return lambda other: replace(run, scorer=other.eval())


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """Good and flawed plates in MVTec layout, 40 × 48 pixels."""
    folder = tmp_path / "plates"
    for name, seeds in {"train/good": range(16), "test/good": range(20, 32), "test/dot": range(40, 52)}.items():
        (folder / name).mkdir(parents=True)
        for seed in seeds:
            draw = np.random.default_rng(seed)
            picture = 120 + 40 * np.sin(np.arange(48) / 3)[None, :] + draw.normal(0, 6, (40, 48))
            if "dot" in name:
                cv2.circle(picture, tuple(int(v) for v in draw.integers(8, 32, 2)), 2, 30.0, -1)
            cv2.imwrite(str(folder / name / f"{seed:03}.png"), picture.clip(0, 255).astype(np.uint8))
    return folder


@pytest.fixture
def evidence(pictures: Path) -> Evidence:
    """The plates: ten to learn from, six held out, 24 to judge."""
    good = sorted((pictures / "train/good").iterdir())
    tests = [(path, path.parent.name) for path in sorted((pictures / "test").glob("*/*.png"))]
    judged = tuple(TestPicture(path, kind, kind == "good", None) for path, kind in tests)
    return Evidence(tuple(good[:10]), tuple(good[10:]), judged, "grey", 0)
