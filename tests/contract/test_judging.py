"""Frame scores and verdicts."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kizu_contract.judging import (
    BorderGain,
    Reduction,
    ReductionKind,
    Thresholds,
    Verdict,
    reduce_frame,
    reduce_joined,
    score_frame,
)
from kizu_contract.tiles import TileGrid

NOT_FINITE = [math.nan, math.inf, -math.inf]
finite = st.floats(allow_nan=False, allow_infinity=False)


@pytest.mark.parametrize("score", NOT_FINITE)
def test_a_score_that_is_not_a_number_is_unknown(score: float) -> None:
    """`unknown` is never `ok`, nor is it a reject that stops a line."""
    assert Thresholds(1.0, 2.0).verdict(score) is Verdict.UNKNOWN


@given(st.floats(1e-6, 1e6), st.floats(1.0, 100.0), finite)
def test_verdicts_follow_the_thresholds(warn: float, factor: float, score: float) -> None:
    """At a threshold and above it the verdict is that threshold's, and ratio 1.0 is the reject limit."""
    limits = Thresholds(warn, warn * factor)
    wanted = Verdict.REJECT if score >= limits.reject else Verdict.WARN if score >= limits.warn else Verdict.OK
    assert limits.verdict(score) is wanted
    assert limits.verdict(limits.reject) is Verdict.REJECT
    assert limits.ratio(limits.reject) == 1.0
    assert (limits.ratio(score) >= 1.0) == (limits.verdict(score) is Verdict.REJECT)


@pytest.mark.parametrize(
    ("warn", "reject"), [(0.0, 1.0), (-1.0, 1.0), (2.0, 1.0), (math.nan, 1.0), (1.0, math.nan), (1.0, math.inf)]
)
def test_impossible_thresholds_are_refused(warn: float, reject: float) -> None:
    """Thresholds must be finite, positive and rising."""
    with pytest.raises(ValueError, match="thresholds"):
        Thresholds(warn, reject)


@pytest.mark.parametrize(("kind", "sigma"), [("median", 0.0), ("max", -1.0), ("max", math.nan), ("max", 101.0)])
def test_an_impossible_reduction_is_refused(kind: ReductionKind, sigma: float) -> None:
    """Unknown kinds and widths out of range raise ValueError."""
    with pytest.raises(ValueError, match="must"):
        Reduction(kind, sigma)


def test_each_reduction_takes_what_it_says() -> None:
    """Maximum and mean are of the stitched map, `tile_max` of the tile scores."""
    layout = TileGrid(2, 2).layout(2, 4)
    scores = np.array([10.0, 30.0], np.float32)
    maps = np.array([[[1, 2], [3, 4]], [[5, 6], [7, 8]]], np.float32)
    got = {kind: reduce_frame(layout, scores, maps, Reduction(kind)) for kind in ("max", "mean", "tile_max")}
    assert {kind: frame.score for kind, frame in got.items()} == {"max": 8.0, "mean": 4.5, "tile_max": 30.0}
    for frame in got.values():
        np.testing.assert_array_equal(frame.map, [[1, 2, 5, 6], [3, 4, 7, 8]])


@given(st.integers(1, 40), st.integers(1, 40), st.floats(0.1, 20), st.floats(-100, 100, width=32))
def test_smoothing_keeps_a_constant_map(height: int, width: int, sigma: float, level: float) -> None:
    """Mirrored borders: a constant map stays constant up to rounding, in pictures of every size."""
    layout = TileGrid(8, 8).layout(height, width)
    maps = np.full((layout.count, 8, 8), level, np.float32)
    frame = reduce_frame(layout, np.zeros(layout.count, np.float32), maps, Reduction("max", sigma))
    assert frame.map.shape == (height, width)
    np.testing.assert_allclose(frame.map, level, rtol=1e-5, atol=1e-5)


@given(st.integers(8, 90), st.integers(8, 90), st.integers(1, 9), st.integers(1, 12), st.sampled_from([1, 4]))
def test_gains_of_both_sides_divide_every_pixel(high: int, wide: int, step: int, count: int, cell: int) -> None:
    """In pictures smaller than the gains reach, too; neither tiles' maps nor the caller's joined one change."""
    layout = TileGrid(8, 8).layout(high, wide)
    draw = np.random.default_rng(high + wide)
    border = BorderGain(step, tuple(np.linspace(3, 1.5, count)))
    reduction = Reduction("max", 0.0, border)
    maps = draw.uniform(1, 2, (layout.count, 8 // cell, 8 // cell)).astype(np.float32)
    joined, kept = layout.join(maps), maps.copy()
    before = joined.copy()
    found = reduce_joined(layout, np.zeros(layout.count, np.float32), joined, reduction)
    wanted = layout.spread(before) / (border.along(high)[:, None] * border.along(wide)[None, :])
    np.testing.assert_allclose(found.map, wanted, rtol=1e-6)
    np.testing.assert_allclose(reduce_frame(layout, np.zeros(layout.count), maps, reduction).map, wanted, rtol=1e-6)
    np.testing.assert_array_equal(joined, before)
    np.testing.assert_array_equal(maps, kept)


def test_borders_are_divided_by_their_gain() -> None:
    """Half a step from a border the first gain holds, in corners both borders' gains; inside nothing changes."""
    layout = TileGrid(48, 48).layout(48, 48)
    border = BorderGain(4, (4.0, 2.0))
    frame = reduce_frame(layout, np.zeros(1), np.full((1, 48, 48), 8, np.float32), Reduction("max", 0.0, border))
    row = frame.map[24]
    assert [float(row[at]) for at in (0, 1, 24, 47)] == pytest.approx([2, 2, 8, 2])
    assert float(row[5] + row[6]) / 2 == pytest.approx(4, rel=0.05)
    assert float(frame.map[0, 0]) == pytest.approx(0.5)
    assert frame.score == 8
    np.testing.assert_allclose(frame.map, frame.map[::-1, ::-1])


@pytest.mark.parametrize(("step", "gains"), [(0, (2.0,)), (4, ()), (4, (0.5,)), (4, (math.nan,)), (4, (1e3,))])
def test_an_impossible_border_gain_is_refused(step: int, gains: tuple[float, ...]) -> None:
    """Steps and gains out of range raise ValueError; so does a gain that would amplify."""
    with pytest.raises(ValueError, match="gains"):
        BorderGain(step, gains)


def test_smoothing_spreads_a_spot_evenly_and_loses_nothing() -> None:
    """A spot in the middle becomes a symmetric Gaussian of the same sum and of the width asked for."""
    layout = TileGrid(41, 41).layout(41, 41)
    spot = np.zeros((1, 41, 41), np.float32)
    spot[0, 20, 20] = 1
    smooth = reduce_frame(layout, np.zeros(1, np.float32), spot, Reduction("max", 2.0)).map
    assert smooth.sum() == pytest.approx(1, rel=1e-5)
    np.testing.assert_allclose(smooth, smooth.T, atol=1e-7)
    np.testing.assert_allclose(smooth, smooth[::-1, ::-1], atol=1e-7)
    assert smooth[20, 22] / smooth[20, 20] == pytest.approx(math.exp(-0.5), rel=1e-4)


@pytest.mark.parametrize("kind", ["max", "mean"])
def test_a_nan_in_the_map_reaches_the_score(kind: ReductionKind) -> None:
    """A scorer that fails on one tile cannot leave a frame that looks good."""
    layout = TileGrid(2, 2).layout(2, 4)
    maps = np.ones((2, 2, 2), np.float32)
    maps[0, 0, 0] = np.nan
    frame = reduce_frame(layout, np.ones(2, np.float32), maps, Reduction(kind, 1.0))
    assert math.isnan(frame.score)


def test_a_nan_tile_score_reaches_the_frame_score() -> None:
    """The largest of tile scores with a NaN among them is NaN."""
    layout = TileGrid(2, 2).layout(2, 4)
    scores = np.array([np.nan, 1], np.float32)
    assert math.isnan(reduce_frame(layout, scores, np.ones((2, 2, 2), np.float32), Reduction("tile_max")).score)


def test_scores_of_another_number_of_tiles_are_refused() -> None:
    """Scores must be one for each tile."""
    layout = TileGrid(2, 2).layout(2, 4)
    with pytest.raises(ValueError, match="2 tiles"):
        reduce_frame(layout, np.ones(3, np.float32), np.ones((2, 2, 2), np.float32), Reduction("tile_max"))


def test_a_picture_is_scored_through_its_tiles() -> None:
    """`score_frame` cuts, scores and reduces: a bright spot is the frame's maximum, where it is."""
    picture = np.zeros((11, 13, 1), np.uint8)
    picture[7, 9] = 200
    frame = score_frame(
        picture, TileGrid(4, 3), Reduction(), lambda tiles: (np.zeros(len(tiles)), tiles[..., 0].astype(np.float32))
    )
    assert frame.score == pytest.approx(200)
    assert np.unravel_index(frame.map.argmax(), frame.map.shape) == (7, 9)
