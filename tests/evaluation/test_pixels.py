from contextlib import closing
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.ndimage import label
from sklearn.metrics import average_precision_score, roc_auc_score

from kizu_train.evaluation.metrics import Ranking, au_pro, auroc, average_precision
from kizu_train.evaluation.pixels import PixelPool, PixelRankings

Arrays = list[np.ndarray]


def slow_au_pro(maps: Arrays, masks: Arrays, limit: float) -> float:
    """AU-PRO by its definition: every distinct score a threshold, every region looked at for each."""
    labels = [label(mask, np.ones((3, 3)))[0] for mask in masks]
    regions = [
        (m, found == number) for m, found in zip(maps, labels, strict=True) for number in range(1, found.max() + 1)
    ]
    clear = np.concatenate([m[~mask] for m, mask in zip(maps, masks, strict=True)])
    rates, covers = [0.0], [0.0]
    for threshold in sorted(set(np.concatenate([m.ravel() for m in maps]).tolist()), reverse=True):
        rates.append(float(np.mean(clear >= threshold)))
        covers.append(float(np.mean([np.mean(m[region] >= threshold) for m, region in regions])))
    area = 0.0
    for x0, x1, y0, y1 in zip(rates, rates[1:], covers, covers[1:], strict=False):
        if x0 >= limit:
            break
        part = min(1.0, (limit - x0) / (x1 - x0)) if x1 > x0 else 1.0
        area += part * (x1 - x0) * (y0 + y0 + part * (y1 - y0)) / 2
    return area / limit


@st.composite
def picture_sets(draw: Any) -> tuple[Arrays, Arrays]:
    """Some small maps with many ties, each with its mask; one good picture at least and one defect at least."""
    seed, levels = draw(st.integers(0, 2**32 - 1)), draw(st.sampled_from([2, 5, 1000]))
    rng = np.random.default_rng(seed)
    sizes = draw(st.lists(st.tuples(st.integers(1, 9), st.integers(2, 9)), min_size=2, max_size=5))
    maps = [rng.integers(0, levels, size).astype(np.float32) / 7 for size in sizes]
    masks = [rng.random(size) < rng.uniform(0, 0.6) for size in sizes]
    masks[0][:] = False
    masks[1][0, 0], masks[1][0, 1] = True, False
    return maps, masks


def pool_of(maps: Arrays, masks: Arrays, kinds: list[str] | None = None, **limits: int) -> PixelRankings:
    """Rank the pixels of `maps`; an empty mask makes a good picture."""
    with closing(PixelPool(**limits)) as pool:
        for i, (frame_map, mask) in enumerate(zip(maps, masks, strict=True)):
            if mask.any():
                pool.add_defective(kinds[i] if kinds else "flaw", frame_map, mask)
            else:
                pool.add_good(frame_map)
        return pool.rankings()


def expect_figures(ranking: Ranking, maps: Arrays, masks: Arrays) -> None:
    """Compare with scikit-learn and brute force."""
    truth = np.concatenate([mask.ravel() for mask in masks])
    scores = np.concatenate([m.ravel() for m in maps])
    assert auroc(ranking) == pytest.approx(roc_auc_score(truth, scores), abs=1e-9)
    assert average_precision(ranking) == pytest.approx(average_precision_score(truth, scores), abs=1e-9)
    for limit in (0.05, 0.3, 1.0):
        assert au_pro(ranking, limit) == pytest.approx(slow_au_pro(maps, masks, limit), abs=1e-9)


@settings(deadline=None, max_examples=40)
@given(picture_sets(), st.sampled_from([7, 64, 2**20]))
def test_pooled_figures_are_those_of_the_definition(pictures: tuple[Arrays, Arrays], chunk_pixels: int):
    """AUROC and AP equal scikit-learn's, AU-PRO the brute-force one, with ties and whatever the chunk."""
    maps, masks = pictures
    ranked = pool_of(maps, masks, spool_bytes=256, chunk_pixels=chunk_pixels)
    assert ranked.regions == sum(label(mask, np.ones((3, 3)))[1] for mask in masks)
    expect_figures(ranked.pooled, maps, masks)


@settings(deadline=None, max_examples=40)
@given(picture_sets())
def test_a_kind_is_measured_against_all_good_pictures(pictures: tuple[Arrays, Arrays]):
    """The ranking of a kind is that of its pictures and the good ones alone."""
    maps, masks = pictures
    kinds = [f"kind{i % 2}" for i in range(len(maps))]
    ranked = pool_of(maps, masks, kinds)
    for kind, ranking in ranked.kinds.items():
        chosen = [i for i, mask in enumerate(masks) if not mask.any() or kinds[i] == kind]
        expect_figures(ranking, [maps[i] for i in chosen], [masks[i] for i in chosen])


def test_au_pro_by_hand():
    """A region found at no false alarm and one found after a fifth of the good pixels: ½ up to 0.2, 1 beyond."""
    frame_map = np.array([[9, 0, 8, 0, 7, 6, 1, 2, 3, 4, 5, 0]], np.float32)
    mask = np.zeros((1, 12), bool)
    mask[0, [0, 4]] = True
    # Good pixels, falling: 8, 6, 5, 4, 3, 2, 1, 0, 0, 0; the second region (7) comes after the first of ten.
    ranked = pool_of([frame_map], [mask])
    assert ranked.regions == 2
    assert au_pro(ranked.pooled, 0.3) == pytest.approx((0.1 * 0.5 + 0.2 * 1.0) / 0.3)
    assert au_pro(ranked.pooled, 0.05) == pytest.approx(0.5)


def test_au_pro_is_interpolated_at_the_limit():
    """A tie of a region with all good pixels is a straight rise, so the area up to 0.3 is 0.3² / 2, over 0.3."""
    mask = np.array([[True, False, False, False]])
    ranked = pool_of([np.ones((1, 4), np.float32)], [mask])
    assert au_pro(ranked.pooled, 0.3) == pytest.approx(0.15)


def test_small_regions_count_as_much_as_large_ones():
    """Missing a one-pixel region beside a found large one costs half of the AU-PRO."""
    mask = np.zeros((6, 6), bool)
    mask[:3, :5] = True
    mask[5, 5] = True
    frame_map = np.where(mask, 2, 1).astype(np.float32)
    frame_map[5, 5] = 0
    assert au_pro(pool_of([frame_map], [mask]).pooled, 0.3) == pytest.approx(0.5)


def test_regions_that_touch_at_a_corner_are_one():
    """Regions are 8-connected."""
    assert pool_of([np.zeros((3, 3), np.float32)], [np.eye(3, dtype=bool)]).regions == 1


def test_good_pictures_count_among_the_defect_free_pixels():
    """False alarms on a good picture lower the AU-PRO of a defect that is found on its own picture."""
    mask = np.array([[True, False]])
    flawed, alarm = np.array([[1.0, 0.0]], np.float32), np.array([[2.0, 2.0]], np.float32)
    assert au_pro(pool_of([flawed], [mask]).pooled, 0.3) == pytest.approx(1.0)
    assert au_pro(pool_of([flawed, alarm], [mask, mask & False]).pooled, 0.3) == pytest.approx(0.0)


def test_nothing_to_measure_without_a_region():
    """Good pictures alone have no ranking."""
    ranked = pool_of([np.ones((4, 4), np.float32)], [np.zeros((4, 4), bool)])
    assert (ranked.pooled, ranked.kinds, ranked.regions) == (None, {}, 0)


def test_a_map_that_is_not_finite_is_refused():
    """NaN has no rank, so it is refused and not sorted somewhere."""
    with closing(PixelPool()) as pool, pytest.raises(ValueError, match="not finite"):
        pool.add_good(np.full((2, 2), np.nan, np.float32))


def test_the_limit_of_au_pro_is_checked():
    """A limit outside (0, 1] is refused."""
    ranked = pool_of([np.ones((1, 2), np.float32)], [np.array([[True, False]])])
    with pytest.raises(ValueError, match="limit"):
        au_pro(ranked.pooled, 30)


def test_chunks_are_bounded():
    """However large the pictures, no more than a chunk of defect-free pixels is sorted at a time."""
    with closing(PixelPool(spool_bytes=64, chunk_pixels=10)) as pool:
        for number in range(4):
            pool.add_good(np.full((3, 7), number, np.float32))
            pool.add_defective("flaw", np.zeros((1, 2), np.float32), np.array([[True, False]]))
        sizes = [len(chunk) for chunk in pool._chunks(pool._groups[None])]
    assert sizes == [10] * 8 + [4]
