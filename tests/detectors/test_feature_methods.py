"""What every feature method must stand, with a backbone file and without: Gaussian, memory, dictionary."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from kizu_contract.pictures import read_picture
from kizu_train.detectors.base import Extras, TileShape
from kizu_train.detectors.gaussian_features import GaussianFeaturesDetector, GaussianFeaturesSettings
from kizu_train.errors import TrainError, UsageError
from kizu_train.fit import FitRequest, fit
from kizu_train.nets.backbone_files import weights_of
from kizu_train.nets.backbones import build_backbone
from kizu_train.nets.features import spectrum, whitening
from kizu_train.nets.features_detector import settled_weights
from kizu_train.nets.features_words import Words
from kizu_train.recipes import resolve_recipe
from kizu_train.runs import open_run
from kizu_train.scoring import frame_scorer

RECIPES = ("gaussian_features", "patch_memory", "feature_dictionary")
TILES = (
    "grid.tile_px=128",
    "grid.stride_px=128",
    "backbone.scales=[1,2]",
    'backbone.layers=["features.4", "features.6"]',
)
SMALL = {
    "gaussian_features": (),
    "patch_memory": ("memory.size=600", "memory.size_from_scratch=600", "memory.dimension=48"),
    "feature_dictionary": ("dictionary.words=150", "dictionary.dimension=48"),
}
QUICK = ("train.steps=1", "train.batch=2", "backbone.scales=[1]")
SCRATCH = ("train.steps=90", "train.batch=8", "scratch.widths=[16,32,48]", "scratch.crop_px=32", "scratch.embedding=8")


@pytest.fixture(scope="module")
def backbone_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file of the right names and shapes: weights as drawn before training, which already see edges and shades."""
    path = tmp_path_factory.mktemp("backbone") / "net.safetensors"
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(2)
        save_file(weights_of(build_backbone("squeezenet1_1", ("features.12",))), path)
    return path


@pytest.fixture(scope="module")
def weave(make_product: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_product(tmp_path_factory.mktemp("product") / "weave", "weave", side=128, train=24, tests=10)


@pytest.mark.parametrize("recipe", RECIPES)
def test_finds_defects_with_a_backbone(
    recipe: str, weave: Path, backbone_file: Path, stand_trial: Callable[..., Any], border_share: Callable[..., float]
) -> None:
    """As a bundle it separates spoilt pictures and finds the spots; maxima of good pictures lie anywhere."""
    trial = stand_trial(recipe, weave, *TILES, *SMALL[recipe], extras=Extras(backbone=backbone_file))
    assert trial.image_auroc > 0.95
    assert trial.pixel_auroc > 0.9
    assert border_share(trial.run, weave) < 0.8


@pytest.mark.parametrize("recipe", RECIPES)
def test_finds_defects_from_scratch(recipe: str, weave: Path, stand_trial: Callable[..., Any]) -> None:
    """A network taught by the pictures themselves does too."""
    trial = stand_trial(recipe, weave, *TILES, *SMALL[recipe], *SCRATCH)
    assert trial.image_auroc > 0.9
    assert trial.pixel_auroc > 0.9


@pytest.mark.parametrize("recipe", RECIPES)
def test_same_seed_same_scores(recipe: str, weave: Path, tmp_path: Path) -> None:
    """Two fits of one seed give one scorer to the bit, and another seed another; runs are opened from disk."""
    picture = read_picture(weave / "test/good/000.png", "grey")
    overrides = (*TILES, *SMALL[recipe], *SCRATCH, "train.steps=3", "sample.tiles=9", "sample.vectors=900")
    maps = []
    for index, seed in enumerate((4, 4, 5)):
        out = tmp_path / str(index)
        fit(FitRequest(resolve_recipe(recipe, overrides), weave, out, device="cpu", seed=seed))
        run = open_run(out)
        maps.append(frame_scorer(run.scorer, run.grid, run.reduction)(picture).map)
    assert np.array_equal(maps[0], maps[1])
    assert not np.array_equal(maps[0], maps[2])


@dataclass
class Surroundings:
    """A session that is told to stop after some questions."""

    stop_after: int
    saved: dict[int, dict[str, torch.Tensor]] = field(default_factory=dict)
    start: tuple[int, dict[str, torch.Tensor]] | None = None
    extras: Extras = field(default_factory=Extras)
    device: str = "cpu"
    seed: int = 0

    @property
    def should_stop(self) -> bool:
        self.stop_after -= 1
        return self.stop_after < 0

    def restore(self) -> tuple[int, dict[str, torch.Tensor]] | None:
        return self.start

    def save(self, step: int, tensors: Callable[[], dict[str, torch.Tensor]]) -> None:
        if self.stop_after < 0:
            self.saved = {step: {name: tensor.clone() for name, tensor in tensors().items()}}

    def report(self, *_: Any) -> None:
        pass


class Noise:
    """Tiles of noise."""

    count = 40

    def batch(self, step: int, size: int) -> Any:
        return np.random.default_rng(step).integers(0, 255, (size, 32, 32, 1), np.uint8)

    def sweep(self) -> Any:
        return iter(self.batch(index, 4) for index in range(10))


@pytest.mark.parametrize("stop_after", [0, 2, 4, 5])
def test_stops_when_asked_and_goes_on(stop_after: int) -> None:
    """Stopped in training or after, it scores; resumed, it ends where an uninterrupted fit ends."""
    settings = resolve_recipe("gaussian_features", (*SCRATCH, "train.steps=4", "backbone.scales=[1]")).settings
    ends = []
    stopped = Surroundings(stop_after)
    for session in (Surroundings(99), stopped, Surroundings(99)):
        if session is not stopped and stopped.saved:
            ((step, tensors),) = stopped.saved.items()
            session.start = (step, tensors)
        detector = GaussianFeaturesDetector(settings, TileShape(32, 1, 8), 0)
        detector.fit(Noise(), session)
        ends.append(detector.score_all(torch.from_numpy(Noise().batch(99, 2)))["distance"][1])
    assert stopped.saved
    assert torch.isfinite(ends[1]).all()
    assert torch.equal(ends[0], ends[2])


def test_edges_and_scales_are_levelled() -> None:
    """Good cells near an edge come down to those inside, quiet ones stay, and every scale's tail becomes 1."""
    maps = 5 * torch.rand((50, 16, 16), generator=torch.Generator().manual_seed(0))
    maps[:, [0, -1]] *= 4
    maps[:, 1:-1, [0, -1]] *= 4
    weights = settled_weights(maps, 4)
    settled = maps * weights
    assert float(torch.quantile(settled, 0.998)) == pytest.approx(1, abs=0.01)
    assert settled[:, 0].max() < 1.2 * settled[:, 5:-5, 5:-5].max()
    assert weights[0, 0] == pytest.approx(float(weights[8, 8]) / 4, rel=0.05)
    assert weights.max() == weights[8, 8]


def test_whitening_is_the_mahalanobis_distance() -> None:
    """Without shrinkage worth speaking of it agrees with the textbook's formula."""
    draw = torch.Generator().manual_seed(0)
    vectors = torch.randn((4000, 6), generator=draw) @ torch.randn((6, 6), generator=draw) + 5
    found = replace(spectrum(vectors), fourth=0.0)  # no noise to shrink by
    project, shrinkage = whitening(found, 1e-9)
    asked = 3 * torch.randn((50, 6), generator=draw) + 5
    away = (asked - vectors.mean(0)).double()
    wanted = (away @ torch.linalg.inv(torch.cov(vectors.T.double())) * away).sum(1)
    assert shrinkage == 0
    assert torch.allclose(project.of_vectors(asked).square().sum(1).double(), wanted, rtol=1e-3)


def test_shrinkage_grows_as_vectors_become_few() -> None:
    """Few vectors in many dimensions are shrunk towards a sphere."""
    draw = torch.Generator().manual_seed(0)
    found = [whitening(spectrum(torch.randn((count, 40), generator=draw)), 0.01)[1] for count in (30, 300, 30000)]
    assert found[0] > 0.8
    assert 0 <= found[2] <= 1


def test_words_are_searched_exactly() -> None:
    """The graph's distances are those of torch.cdist, over several chunks of words, also for several neighbours."""
    draw = torch.Generator().manual_seed(0)
    vectors = torch.randn((3000, 10), generator=draw)
    cells = torch.randn((2, 10, 4, 4), generator=draw)
    project, _ = whitening(spectrum(vectors), 0.01)
    words = project.of_vectors(vectors)
    distances = torch.cdist(project(cells).permute(0, 2, 3, 1).flatten(0, 2).double(), words.double())
    for nearest in (1, 3):
        wanted = distances.topk(nearest, largest=False).values
        found = Words(project, words, nearest)
        wanted = (wanted.square() + found.floor.double()).sqrt().mean(1)
        assert torch.allclose(found(cells).flatten().double(), wanted, rtol=1e-4)


def test_a_recipe_may_ask_for_a_file(weave: Path, tmp_path: Path, backbone_file: Path) -> None:
    """Without one it says where to get it; with one that would be ignored it says so."""
    ask = resolve_recipe("patch_memory", (*TILES, "backbone.source=file"))
    with pytest.raises(UsageError, match=r"--backbone FILE.*never downloads"):
        fit(FitRequest(ask, weave, tmp_path / "a", device="cpu"))
    scratch = resolve_recipe("patch_memory", (*TILES, "backbone.source=scratch"))
    with pytest.raises(UsageError, match="leave out one"):
        fit(FitRequest(scratch, weave, tmp_path / "b", device="cpu", extras=Extras(backbone=backbone_file)))


@pytest.mark.parametrize(
    ("override", "why"),
    [
        ("grid.tile_px=40", "multiple of 16"),
        ("grid.tile_px=16", "at least 32"),
        ("map_cell_px=3", "must divide"),
        ("backbone.average=2", "average must be odd"),
        ("backbone.scales=[3]", "powers of two"),
        ("backbone.scales=[1, 4]", "multiple of 32, at least 64"),
        ("sample.tiles=0", "1 <= tiles"),
        ("gaussian.ridge=0.0", "ridge must be above 0"),
        ("gaussian.dimension=0", "dimension at least 1"),
        ("scratch.crop_px=20", "crop_px must be"),
        ("planting.spots=0", "spots >= 1"),
    ],
)
def test_settings_are_checked(override: str, why: str, weave: Path, tmp_path: Path) -> None:
    """A setting that cannot be is refused in a sentence."""
    with pytest.raises(UsageError, match=why):
        _try(override, weave, tmp_path / "run")


def _try(override: str, data: Path, out: Path) -> None:
    request = resolve_recipe("gaussian_features", ("grid.tile_px=32", "grid.stride_px=16", *QUICK, override))
    fit(FitRequest(request, data, out, device="cpu"))


@pytest.mark.parametrize(
    ("recipe", "override"),
    [
        ("patch_memory", "memory.neighbours=0"),
        ("patch_memory", "memory.dimension=0"),
        ("feature_dictionary", "dictionary.nearest=501"),
        ("feature_dictionary", "dictionary.explained=0.0"),
    ],
)
def test_heads_settings_are_checked(recipe: str, override: str) -> None:
    """Likewise what belongs to one method."""
    with pytest.raises(UsageError, match=r"needed|must"):
        resolve_recipe(recipe, (override,))


def test_nothing_is_scored_before_learning() -> None:
    """A detector that neither fitted nor loaded says so; a file of two networks is none."""
    detector = GaussianFeaturesDetector(GaussianFeaturesSettings(), TileShape(32, 1, 8), 0)
    with pytest.raises(TrainError, match="nothing is learned"):
        detector.scorer("distance")
    with pytest.raises(KeyError, match="one backbone"):
        detector.load({"backbone.scratch.x": torch.zeros(1), "backbone.resnet18.y": torch.zeros(1)})
