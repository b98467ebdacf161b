"""The Gaussian of raw patches on generated products."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from kizu_train.detectors.base import TileShape
from kizu_train.detectors.raw_gaussian import Covariance, Distance, RawGaussianDetector, RawGaussianSettings
from kizu_train.errors import UsageError
from kizu_train.fit import FitRequest, fit
from kizu_train.nets.gaussian import Moments, shrink, whitening
from kizu_train.recipes import resolve_recipe
from kizu_train.runs import build_detector, open_run
from kizu_train.scoring import frame_scorer

QUICK = (
    "grid.tile_px=32",
    "grid.stride_px=16",
    "grid.margin_px=0",
    "reduction.smooth_sigma_px=2.0",
    "patches.scales=[1,2]",
)


@pytest.mark.parametrize(("kind", "channels"), [("weave", 1), ("part", 3)])
def test_separates_planted_defects(
    make_product: Callable[..., Path],
    stand_trial: Callable[..., Any],
    tmp_path: Path,
    kind: str,
    channels: int,
) -> None:
    """It ranks spoilt pictures above good ones and finds the spots, as a bundle; opened again it scores alike."""
    data = make_product(tmp_path / kind, kind, channels=channels)
    trial = stand_trial("raw_gaussian", data, *QUICK)
    assert trial.image_auroc > 0.97
    assert trial.pixel_auroc > 0.95


def test_borders_look_no_worse(
    make_product: Callable[..., Path], border_share: Callable[..., float], tmp_path: Path
) -> None:
    """The maxima of good pictures do not gather at their borders, though fewer patches cover a cell there.

    Brightness is left out: its slope across these pictures is steepest at their borders indeed.
    """
    data = make_product(tmp_path / "weave", side=160, train=12, tests=16)
    recipe = resolve_recipe(
        "raw_gaussian", ["grid.tile_px=64", "grid.stride_px=48", "covariance.keep_brightness=false"]
    )
    fit(FitRequest(recipe, data, tmp_path / "run", device="cpu"))
    share = border_share(open_run(tmp_path / "run"), data)
    assert share < 0.7, share


def test_distance_is_the_mahalanobis_distance() -> None:
    """The convolution gives, patch by patch, what the inverse of the covariance gives."""
    generator = torch.Generator().manual_seed(1)
    pixels = torch.rand(6, 2, 16, 16, generator=generator)
    distance = Distance(2, 4, 1, 4)
    moments = Moments()
    for part in pixels.split(4):
        moments.add(distance.patches(part))
    vectors = distance.patches(pixels).double()
    torch.testing.assert_close(moments.covariance(), torch.cov(vectors.T, correction=0))
    distance.learn(moments, Covariance(shrinkage=0.01))
    spread = shrink(moments.covariance(), 0.01, 1 / 12 / 255**2)
    centred = vectors - vectors.mean(0)
    wanted = (centred @ torch.linalg.inv(spread) * centred).sum(1) / 32
    torch.testing.assert_close(distance(pixels).flatten(), wanted.float(), rtol=1e-4, atol=1e-5)


def test_cells_average_the_patches_that_cover_them() -> None:
    """A constant distance stays constant up to the borders: nothing is padded."""
    distance = Distance(1, 8, 2, 4)
    distance.offset = torch.full_like(distance.offset, 3.0)
    cells = distance(torch.zeros(1, 1, 32, 32))
    torch.testing.assert_close(cells, torch.full((1, 8, 8), 9.0))


def test_brightness_may_be_left_out() -> None:
    """With `keep_brightness` false, adding the same to every pixel changes nothing."""
    generator = torch.Generator().manual_seed(2)
    pixels = torch.rand(6, 1, 16, 16, generator=generator) * 0.5
    distance = Distance(1, 4, 1, 4)
    moments = Moments()
    moments.add(distance.patches(pixels))
    distance.learn(moments, Covariance(keep_brightness=False))
    torch.testing.assert_close(distance(pixels + 0.3), distance(pixels), rtol=1e-3, atol=1e-3)
    distance.learn(moments, Covariance())
    assert (distance(pixels + 0.3) > 1.5 * distance(pixels)).all()


def test_whitening_makes_unit_covariance() -> None:
    """W Σ Wᵀ is the identity."""
    spread = torch.tensor([[4.0, 1.0], [1.0, 2.0]]).double()
    whiten = whitening(spread)
    torch.testing.assert_close(whiten @ spread @ whiten.mT, torch.eye(2).double())


def test_same_seed_same_scores(
    make_product: Callable[..., Path], stand_trial: Callable[..., Any], tmp_path: Path
) -> None:
    """A run opened twice scores to the bit alike, as what it was fitted with."""
    data = make_product(tmp_path / "weave", train=8, tests=1)
    run = stand_trial("raw_gaussian", data, *QUICK).run
    again = open_run(run.path)
    tiles = torch.from_numpy(run.golden_tiles)
    assert torch.equal(run.scorer(tiles)[1], again.scorer(tiles)[1])
    assert frame_scorer(run.scorer, run.grid, run.reduction)


@pytest.mark.parametrize(
    "override",
    ["patches.side_px=1", "patches.scales=[]", "covariance.shrinkage=0.0", "covariance.tiles=0"],
)
def test_settings_that_make_no_sense(override: str) -> None:
    """Settings are refused by name."""
    with pytest.raises(UsageError, match="needed"):
        resolve_recipe("raw_gaussian", [override])


@pytest.mark.parametrize(
    "override", ["patches.side_px=6", "patches.scales=[3]", "grid.tile_px=8", "patches.side_px=32"]
)
def test_patches_that_do_not_fit(override: str) -> None:
    """Patches off the cells, larger than a tile or too long a vector are refused before anything is learned."""
    recipe = resolve_recipe("raw_gaussian", [*QUICK, "grid.stride_px=4", "grid.margin_px=4", override])
    with pytest.raises(UsageError, match=r"patches\.side_px"):
        build_detector(recipe, "rgb", 0)


def test_default_detector_is_usable_before_it_learned() -> None:
    """Scores are finite and at least 0 from the start."""
    detector = RawGaussianDetector(RawGaussianSettings(), TileShape(64, 3, 4), 0)
    score, cells = detector.score_all(torch.zeros(2, 64, 64, 3, dtype=torch.uint8))["mahalanobis"]
    assert score.shape == (2,)
    assert torch.isfinite(cells).all()
    assert (cells >= 0).all()
