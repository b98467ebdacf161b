"""A detector without gradients plugs into recipes, fit, runs and scoring like any other."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from kizu_contract.pictures import read_picture
from kizu_train.detectors.base import DETECTORS, DetectorKind, Scores, Session, TileShape, TileSource
from kizu_train.fit import FitRequest, fit
from kizu_train.recipes import parse_recipe
from kizu_train.runs import open_run
from kizu_train.scoring import frame_scorer


@dataclass(frozen=True)
class Blur:
    """How much the covariance is regularised, relative to its mean variance."""

    ridge: float = 0.01


@dataclass(frozen=True)
class GaussianSettings:
    """Settings of the Gaussian of patches."""

    gaussian: Blur = field(default_factory=Blur)


class Mahalanobis(nn.Module):
    """Squared Mahalanobis distance of a tile to the learned Gaussian, spread evenly over its map."""

    def __init__(self, mean: Tensor, whiten: Tensor, cells: int) -> None:
        super().__init__()
        self.mean, self.whiten, self.cells = mean, whiten, cells

    def forward(self, tiles: Tensor) -> Scores:
        """Score `tiles`."""
        score = (((tiles.flatten(1).float() - self.mean) @ self.whiten) ** 2).sum(1)
        return score, (score / self.cells**2)[:, None, None].expand(-1, self.cells, self.cells)


class GaussianDetector:
    """One pass over all tiles: mean and covariance of the raw patches."""

    score_kinds: tuple[str, ...] = ("distance",)

    def __init__(self, settings: GaussianSettings, shape: TileShape, _seed: int) -> None:
        self.ridge, self.cells = settings.gaussian.ridge, shape.tile_px // shape.map_cell_px
        size = shape.tile_px**2 * shape.channels
        self.mean, self.whiten = torch.zeros(size), torch.eye(size)

    def fit(self, tiles: TileSource, session: Session) -> None:
        """Sweep once."""
        seen = torch.cat([torch.from_numpy(part).flatten(1).double() for part in tiles.sweep()])
        assert len(seen) == tiles.count
        covariance = torch.cov(seen.T)
        covariance += torch.eye(len(covariance)) * self.ridge * covariance.diagonal().mean()
        self.mean, self.whiten = seen.mean(0).float(), torch.linalg.cholesky(covariance.inverse()).float()
        session.report(1, 1, {"tiles": float(len(seen))})

    def tensors(self) -> dict[str, Tensor]:
        """Mean and whitening."""
        return {"mean": self.mean, "whiten": self.whiten}

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Take up what was learned."""
        self.mean, self.whiten = tensors["mean"], tensors["whiten"]

    def score_all(self, tiles: Tensor) -> dict[str, Scores]:
        """The one kind there is."""
        return {"distance": self.scorer("distance")(tiles)}

    def scorer(self, kind: str) -> nn.Module:
        """The module."""
        assert kind == "distance"
        return Mahalanobis(self.mean, self.whiten, self.cells).eval()


@pytest.fixture
def _registered() -> Iterator[None]:
    DETECTORS["gaussian"] = DetectorKind(GaussianSettings, GaussianDetector)
    yield
    del DETECTORS["gaussian"]


@pytest.mark.usefixtures("_registered")
def test_gaussian_of_patches(tmp_path: Path, draw_pictures: Callable[..., list[Path]]) -> None:
    """It is fitted in one sweep, calibrated, saved, opened, and finds a spot."""
    paths = draw_pictures(tmp_path / "parts", 12)
    raw = {"detector": "gaussian", "score": "distance", "gaussian": {"ridge": 0.1}}
    recipe = parse_recipe(raw | {"grid": {"tile_px": 8, "stride_px": 4, "margin_px": 0}})
    record = fit(FitRequest(recipe, tmp_path / "parts", tmp_path / "run", device="cpu"))
    assert not record.stopped_early
    run = open_run(tmp_path / "run")
    score = frame_scorer(run.scorer, run.grid, run.reduction)
    good = read_picture(paths[0], run.colour)
    bad = good.copy()
    bad[18:23, 30:35] = np.where(bad[18:23, 30:35] > 128, 0, 255)
    assert score(good).score < run.thresholds.warn < run.thresholds.reject < score(bad).score
    y, x = np.unravel_index(score(bad).map.argmax(), good.shape[:2])
    assert abs(int(y) - 20) < 8
    assert abs(int(x) - 32) < 8
