"""The local outlier factor of the graph against scikit-learn's, and its manners at the edges."""

import numpy as np
import pytest
import torch
from sklearn.neighbors import LocalOutlierFactor as Original
from torch import Tensor

from kizu_train.errors import TrainError
from kizu_train.nets.embedding import to_sphere
from kizu_train.nets.lof import LocalOutlierFactor, Lof, fit_lof, nearest


def _on_sphere(count: int, spread: float, seed: int) -> Tensor:
    """Two clusters of unequal density about two directions."""
    draw = torch.Generator().manual_seed(seed)
    centres = to_sphere(torch.randn(2, 16, generator=torch.Generator().manual_seed(0)))
    points = centres.repeat_interleave(count // 2, 0)
    scale = torch.tensor([1.0, 3.0]).repeat_interleave(count // 2)[:, None]
    return to_sphere(points + spread * scale * torch.randn(count, 16, generator=draw))


@pytest.mark.parametrize(("spread", "neighbours"), [(0.02, 20), (0.3, 20), (0.002, 5)])
def test_equals_scikit_learn(spread: float, neighbours: int) -> None:
    """With hard ties and no floor the factors of near and far points are scikit-learn's to 1e-4, in tight sets too."""
    good = _on_sphere(600, spread, 1)
    asked = torch.cat([_on_sphere(100, spread, 2), _on_sphere(100, 5 * spread, 3)])
    settings = Lof(neighbours=neighbours, tie_softness=1e-9, floor=0.0, resolution=0.0)
    found = fit_lof(good, settings)(asked).numpy()
    original = Original(n_neighbors=neighbours, novelty=True).fit(good.double().numpy())
    wanted = -original.score_samples(asked.double().numpy())
    assert np.abs(found / wanted - 1).max() < 1e-4
    assert np.median(found[100:]) > (1.5 if spread < 0.1 else 1.0) * np.median(found[:100])


def test_soft_ties_change_little_and_are_continuous() -> None:
    """Soft ties stay within some per cent of the source, and small errors move the factor little."""
    good, asked = _on_sphere(600, 0.1, 1), _on_sphere(2000, 0.1, 2)
    soft, hard = fit_lof(good, Lof()), fit_lof(good, Lof(tie_softness=1e-9, floor=0.0, resolution=0.0))
    assert (soft(asked) / hard(asked) - 1).abs().quantile(0.95) < 0.03
    noise = 1 + 1e-4 * torch.randn(asked.shape, generator=torch.Generator().manual_seed(3))
    moved = (soft(asked * noise) / soft(asked) - 1).abs().max()
    assert moved < 1e-3
    assert (hard(asked * noise) / hard(asked) - 1).abs().max() > 3 * moved


def test_what_two_engines_differ_by_moves_no_factor_of_collapsed_points() -> None:
    """Good points within 1e-4 of each other, as ArcFace leaves them: noise of 1e-6 moves factors by at most 3e-4."""
    good, asked = _on_sphere(600, 1e-5, 1), torch.cat([_on_sphere(200, 1e-5, 2), _on_sphere(200, 0.3, 2)])
    noise = 1e-6 * torch.randn(asked.shape, generator=torch.Generator().manual_seed(3))
    settled, bare = fit_lof(good, Lof()), fit_lof(good, Lof(resolution=0.0))
    assert (settled(asked + noise) / settled(asked) - 1).abs().max() < 3e-4
    assert (bare(asked + noise) / bare(asked) - 1).abs().max() > 1e-2
    assert settled(asked)[200:].min() > 2 * settled(asked)[:200].max()


def test_only_what_is_crowded_is_thinned() -> None:
    """Of a tight cluster among spread points k + 1 stay, fewer than a tile has candidates; the others all stay."""
    spread = _on_sphere(300, 0.3, 1)
    tight = to_sphere(spread[:1] + 1e-4 * torch.randn(200, 16, generator=torch.Generator().manual_seed(5)))
    lof = fit_lof(torch.cat([spread, tight]), Lof())
    kept = lof.references + lof.centre
    assert torch.allclose(kept[: len(spread)], spread, atol=1e-6)
    assert len(kept) == len(spread) + Lof().neighbours
    assert len(fit_lof(spread, Lof()).references) == len(spread)
    assert len(fit_lof(tight, Lof()).references) == Lof().neighbours + 1


def test_points_that_coincide_give_finite_factors() -> None:
    """Copies among the references, and tiles that equal them, give positive finite factors."""
    good = _on_sphere(40, 0.1, 1).repeat(10, 1)
    lof = fit_lof(good, Lof())
    found = lof(torch.cat([good[:5], -good[:5]]))
    assert found.isfinite().all()
    assert found.min() > 0
    assert found[5:].min() > found[:5].max()


@pytest.mark.parametrize("count", [2, 7])
def test_few_references(count: int) -> None:
    """With fewer references than neighbours all others count; with one there is an error that says what to do."""
    good = _on_sphere(20, 0.1, 1)[:count]
    assert fit_lof(good, Lof())(_on_sphere(20, 0.5, 2)).isfinite().all()
    with pytest.raises(TrainError, match="at least 2 good tiles"):
        fit_lof(good[:1], Lof())


def test_distance_is_the_mean_to_the_neighbours() -> None:
    """With hard ties it is the mean distance to the k nearest references."""
    good, asked = _on_sphere(200, 0.1, 1), _on_sphere(50, 0.3, 2)
    found = fit_lof(good, Lof(neighbours=7, tie_softness=1e-9, floor=0.0, resolution=0.0)).distance(asked)
    wanted = torch.cdist(asked.double(), good.double()).topk(7, dim=1, largest=False).values.mean(1)
    assert torch.allclose(found.double(), wanted, rtol=1e-5)


def test_learned_tensors_restore_it() -> None:
    """What `learned` gives makes a factor with the same bits."""
    lof = fit_lof(_on_sphere(100, 0.1, 1), Lof())
    asked = _on_sphere(50, 0.2, 2)
    assert torch.equal(LocalOutlierFactor(Lof(), lof.learned())(asked), lof(asked))


def test_nearest_keeps_the_digits_of_small_distances() -> None:
    """Distances of 1e-4 about a far origin are exact to 1e-5, where a product of matrices alone is off by far more."""
    references = torch.randn(50, 8, generator=torch.Generator().manual_seed(0))
    step = 1e-4 * to_sphere(torch.randn(50, 8, generator=torch.Generator().manual_seed(1)))
    asked = references + step
    index, distance = nearest(asked, references, 3)
    assert torch.equal(index[:, 0], torch.arange(50))
    assert torch.allclose(distance[:, 0], (asked.double() - references.double()).norm(dim=1).float(), rtol=1e-5)


@pytest.mark.parametrize(
    "wrong",
    [
        {"neighbours": 0},
        {"references": 20},
        {"tie_softness": 0.0},
        {"floor": 2.0},
        {"resolution": 2.0},
        {"references": 5000},
    ],
)
def test_settings_refuse_what_cannot_be(wrong: dict[str, float]) -> None:
    """Each is refused with a sentence."""
    with pytest.raises(ValueError, match="needed"):
        Lof(**wrong)  # type: ignore[arg-type]
