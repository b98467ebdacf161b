"""The texture mixture on generated products, its filters and its expectation maximisation."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.mixture import GaussianMixture

from kizu_train.errors import UsageError
from kizu_train.fit import FitRequest, fit
from kizu_train.nets.filters import FilterBank, blob_filter, gabor_pairs
from kizu_train.nets.mixture import fit_mixture
from kizu_train.recipes import resolve_recipe
from kizu_train.runs import build_detector, open_run

QUICK = (
    "grid.tile_px=64",
    "grid.stride_px=48",
    "grid.margin_px=0",
    "reduction.smooth_sigma_px=2.0",
    "mixture.sample=4000",
    "mixture.count=4",
    "mixture.steps=10",
)


@pytest.mark.parametrize(("kind", "channels"), [("weave", 1), ("part", 3)])
def test_separates_planted_defects(
    make_product: Callable[..., Path], stand_trial: Callable[..., Any], tmp_path: Path, kind: str, channels: int
) -> None:
    """It ranks spoilt pictures above good ones and finds the spots, as a bundle; opened again it scores alike."""
    trial = stand_trial("texture_gmm", make_product(tmp_path / kind, kind, channels=channels, train=20), *QUICK)
    assert trial.image_auroc > 0.97
    assert trial.pixel_auroc > 0.9
    again = open_run(trial.run.path)
    tiles = torch.from_numpy(trial.run.golden_tiles)
    assert torch.equal(trial.run.scorer(tiles)[1], again.scorer(tiles)[1])


def test_fitting_again_gives_the_same_numbers(fitted: Path, tmp_path: Path) -> None:
    """The same seed gives the same weights, and both kinds score finite numbers of at least 0."""
    request = FitRequest(resolve_recipe("texture_gmm", QUICK), fitted.parent / "weave", tmp_path / "run", device="cpu")
    fit(request)
    assert (fitted / "weights.safetensors").read_bytes() == (tmp_path / "run/weights.safetensors").read_bytes()
    for kind in ("nearest", "likelihood"):
        run = open_run(fitted, kind)
        for tiles in (run.golden_tiles, np.zeros_like(run.golden_tiles), np.full_like(run.golden_tiles, 255)):
            score, cells = run.scorer(torch.from_numpy(tiles))
            assert cells.shape == (16, 16, 16)
            assert torch.isfinite(cells).all()
            assert (cells >= 0).all()
            assert torch.equal(score, cells.amax((1, 2)))


def test_borders_look_no_worse(
    make_product: Callable[..., Path], border_share: Callable[..., float], tmp_path: Path
) -> None:
    """The maxima of good pictures do not gather at their borders. Light, steepest there, is left out."""
    data = make_product(tmp_path / "weave", side=128, train=12, tests=16)
    sets = (*QUICK[3:], "filters.relative_contrast=true", *QUICK[:3])
    fit(FitRequest(resolve_recipe("texture_gmm", sets), data, tmp_path / "run", device="cpu"))
    share = border_share(open_run(tmp_path / "run"), data)
    assert share < 0.75, share


@pytest.fixture(scope="module")
def fitted(make_product: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run on eight pictures."""
    folder = tmp_path_factory.mktemp("weave")
    data = make_product(folder / "weave", train=8, tests=1)
    fit(FitRequest(resolve_recipe("texture_gmm", QUICK), data, folder / "run", device="cpu"))
    return folder / "run"


@pytest.mark.parametrize("kind", ["nearest", "likelihood"])
def test_scores_are_those_of_the_mixture(fitted: Path, kind: str) -> None:
    """The graph's cells are what the learned mixture's densities say of the features."""
    run = open_run(fitted, kind)
    model: Any = run.scorer.model
    tiles = torch.from_numpy(run.golden_tiles[:2])
    features = ((model.features(tiles) - model.mean) / model.deviation).flatten(2).transpose(1, 2).flatten(0, 1)
    count = features.shape[1]
    whiten = model.whiten[:, :, 0, 0].reshape(-1, count, count).double()
    means = torch.linalg.solve(whiten, -model.offset.double().reshape(-1, count, 1))[:, :, 0]
    spreads = torch.linalg.inv(whiten.mT @ whiten)
    densities = torch.stack(
        [
            torch.distributions.MultivariateNormal(mean, (spread + spread.mT) / 2).log_prob(features.double())
            for mean, spread in zip(means, spreads, strict=True)
        ],
        1,
    )
    peaks = torch.stack([-0.5 * torch.logdet(2 * math.pi * spread) for spread in spreads])
    if kind == "nearest":
        wanted = (2 * (peaks - densities)).amin(1) / count
    else:
        wanted = -torch.logsumexp(densities - peaks + model.peak[:, 0, 0].double(), 1) / count
    typical = model.typical[("nearest", "likelihood").index(kind)]
    assert float(typical.mean()) == pytest.approx(1, rel=0.01)
    assert typical[0].mean() > typical[8].mean()
    torch.testing.assert_close((run.scorer(tiles)[1] * typical).flatten(), wanted.float(), rtol=2e-3, atol=2e-3)


def test_mixture_is_as_likely_as_scikit_learns() -> None:
    """On three clusters it reaches the likelihood that scikit-learn's mixture reaches."""
    random = np.random.default_rng(0)
    clusters = [random.normal(0, 1, (600, 3)) @ random.normal(0, 1, (3, 3)) + 6 * random.normal(0, 1, 3) for _ in "abc"]
    vectors = np.concatenate(clusters)
    vectors = (vectors - vectors.mean(0)) / vectors.std(0)
    found: list[float] = []
    fit_mixture(
        torch.from_numpy(vectors),
        3,
        steps=40,
        shrinkage=1e-6,
        generator=torch.Generator().manual_seed(0),
        after_step=lambda _step, likelihood: bool(found.append(likelihood)),
    )
    wanted = GaussianMixture(3, n_init=3, random_state=0).fit(vectors).score(vectors)
    assert found[-1] > wanted - 0.05
    assert found[-1] > found[0] - 1e-3


def test_filters_answer_to_their_wave() -> None:
    """A wave of 4 px gives the largest energy in its own direction and none to an even surface."""
    bank = FilterBank(1, 4, octaves=1, orientations=4, relative_contrast=False)
    x = torch.arange(32) * (math.pi / 2)
    wave = (0.5 + 0.2 * torch.cos(x + 0.3))[None, None, None, :].expand(1, 1, 32, 32)
    energies = bank(wave)[0, 1:5].exp().mean((1, 2))
    assert int(energies.argmax()) == 0
    assert float(energies[0]) == pytest.approx(0.2**2, rel=0.1)
    assert bank(wave.transpose(2, 3))[0, 1:5].mean((1, 2)).argmax() == 2
    even = bank(torch.full((1, 1, 32, 32), 0.7))
    torch.testing.assert_close(even[0, 1:].exp(), torch.full((5, 8, 8), (2 / 255) ** 2), rtol=1e-3, atol=0)
    torch.testing.assert_close(gabor_pairs(6).sum((1, 2)), torch.zeros(12), rtol=0, atol=1e-6)
    assert abs(float(blob_filter().sum())) < 1e-6


def test_relative_contrast_leaves_light_out() -> None:
    """Brighter or weaker light hardly changes the features; without the option it does."""
    generator = torch.Generator().manual_seed(0)
    picture = torch.rand(1, 1, 64, 64, generator=generator) * 0.4
    changes = {}
    for is_relative in (True, False):
        bank = FilterBank(1, 4, octaves=3, orientations=6, relative_contrast=is_relative)
        changes[is_relative] = float((bank(picture * 2 + 0.1) - bank(picture)).abs().mean())
    assert changes[True] < 0.1 * changes[False]


@pytest.mark.parametrize("override", ["filters.octaves=0", "mixture.count=0", "mixture.shrinkage=0.0"])
def test_settings_that_make_no_sense(override: str) -> None:
    """Settings are refused by name."""
    with pytest.raises(UsageError, match="needed"):
        resolve_recipe("texture_gmm", [override])


def test_octaves_must_fit_the_cells() -> None:
    """Cells must be whole pixels of the coarsest octave."""
    with pytest.raises(UsageError, match=r"filters\.octaves"):
        build_detector(resolve_recipe("texture_gmm", ["filters.octaves=4"]), "grey", 0)
