"""From a frame's tile maps to its map, score and verdict: the arithmetic shared by evaluation and the edge."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from functools import lru_cache
from typing import Literal, NamedTuple

import cv2
import numpy as np
from numpy.typing import NDArray

from kizu_contract.tiles import TileGrid, TileLayout

ReductionKind = Literal["max", "mean", "tile_max"]


class Verdict(str, Enum):
    """What kizu says of a frame; `unknown` is never to be read as `ok`."""

    OK = "ok"
    WARN = "warn"
    REJECT = "reject"
    UNKNOWN = "unknown"


@dataclass(frozen=True)
class BorderGain:
    """By how much good frames' maps rise towards the frame's borders; the map is divided by it there.

    `gains[i]` holds at (i + ½)·step_px from a border, straight lines between and 1 beyond the last; where two borders
    are near, their gains multiply. Border pixels are covered by fewer tiles and averaged over fewer neighbours than
    others, so the maxima of good frames gather there unless that is taken off (see docs/decisions/0014).
    """

    step_px: int
    gains: tuple[float, ...]

    def __post_init__(self) -> None:
        if not (1 <= self.step_px <= 256 and 1 <= len(self.gains) <= 256):
            raise ValueError("1 <= step_px <= 256 and 1 to 256 gains are needed")
        if not all(1 <= gain <= 100 for gain in self.gains):
            raise ValueError(f"gains {self.gains!s:.100}; each must lie between 1 and 100")

    def along(self, length: int) -> NDArray[np.float32]:
        """The gain of each of `length` pixels between two borders, float32 [length]."""
        distance = np.minimum(np.arange(length), np.arange(length)[::-1]) + 0.5
        knots = (np.arange(len(self.gains) + 1) + 0.5) * self.step_px
        return np.interp(distance, knots, (*self.gains, 1.0)).astype(np.float32)


@dataclass(frozen=True)
class Reduction:
    """How a frame's map becomes one score.

    The stitched map is smoothed by a Gaussian of `smooth_sigma_px` (0: not at all) with mirrored borders, and divided
    by what good frames show at their borders (`border`, learned in training); that map is what users see. `max` and
    `mean` are taken of it; `tile_max` is the largest tile score (a picture is bad if any patch is: the rule of the
    patch VAE paper).
    """

    kind: ReductionKind = "max"
    smooth_sigma_px: float = 0.0
    border: BorderGain | None = None

    def __post_init__(self) -> None:
        if self.kind not in ("max", "mean", "tile_max"):
            raise ValueError(f"reduction kind {self.kind!r}; it must be max, mean or tile_max")
        if not 0 <= self.smooth_sigma_px <= 100:
            raise ValueError(f"smooth_sigma_px is {self.smooth_sigma_px}; it must lie between 0 and 100")


@dataclass(frozen=True)
class Thresholds:
    """Scores at which a frame is at least `warn` and at least `reject`; 0 < warn <= reject, both finite."""

    warn: float
    reject: float

    def __post_init__(self) -> None:
        if not (math.isfinite(self.warn) and math.isfinite(self.reject) and 0 < self.warn <= self.reject):
            raise ValueError(f"thresholds warn {self.warn}, reject {self.reject}; both finite and 0 < warn <= reject")

    def verdict(self, score: float) -> Verdict:
        """Judge `score`; one that is not a finite number is `unknown`."""
        if not math.isfinite(score):
            return Verdict.UNKNOWN
        if score >= self.reject:
            return Verdict.REJECT
        return Verdict.WARN if score >= self.warn else Verdict.OK

    def ratio(self, score: float) -> float:
        """Score over the reject threshold: 1.0 is the limit."""
        return score / self.reject


class FrameScore(NamedTuple):
    """`score` of a frame and its `map`, float32 [H, W], both higher where worse."""

    score: float
    map: NDArray[np.float32]


ScoreTiles = Callable[[NDArray[np.uint8]], tuple[NDArray[np.float32], NDArray[np.float32]]]
"""Tiles uint8 [N, T, T, C] → score float32 [N] and map float32 [N, T/m, T/m]."""


@lru_cache(maxsize=256)
def _raised(border: BorderGain, length: int) -> tuple[tuple[slice, NDArray[np.float32]], ...]:
    """Where the gain along `length` pixels is more than 1, and what it is there: only near borders must be divided."""
    gain = border.along(length)
    raised = np.flatnonzero(gain != 1)
    if not len(raised):
        return ()
    middle = length // 2
    first, last = raised[raised < middle], raised[raised >= middle]
    ends = slice(0, int(first[-1]) + 1 if len(first) else 0), slice(int(last[0]) if len(last) else length, length)
    return tuple((end, gain[end]) for end in ends)


def reduce_frame(
    layout: TileLayout, scores: NDArray[np.float32], maps: NDArray[np.float32], reduction: Reduction
) -> FrameScore:
    """Join tile `scores` [N] and `maps` [N, T/m, T/m] of one frame into its score and map.

    Raises ValueError when their shapes do not fit the layout. A NaN where the reduction looks makes the score NaN.
    """
    return _reduced(layout, scores, layout.spread(layout.join(maps)), reduction)


def reduce_joined(
    layout: TileLayout, scores: NDArray[np.float32], joined: NDArray[np.float32], reduction: Reduction
) -> FrameScore:
    """As `reduce_frame`, of tile maps that are joined already (`TileLayout.join`); they stay as they are."""
    whole = layout.spread(joined)
    return _reduced(layout, scores, whole.copy() if np.may_share_memory(whole, joined) else whole, reduction)


def _reduced(
    layout: TileLayout, scores: NDArray[np.float32], whole: NDArray[np.float32], reduction: Reduction
) -> FrameScore:
    """As `reduce_frame`, of a map [H, W] that may be written to."""
    if scores.shape != (layout.count,):
        raise ValueError(f"scores of shape {scores.shape} do not fit {layout.count} tiles")
    if reduction.smooth_sigma_px > 0:
        sigma = reduction.smooth_sigma_px
        size = 2 * math.ceil(3 * sigma) + 1
        whole = np.asarray(
            cv2.GaussianBlur(whole, (size, size), sigma, sigmaY=sigma, borderType=cv2.BORDER_REFLECT_101), np.float32
        )
    largest = float(scores.max()) if reduction.kind == "tile_max" else math.nan
    return _level(FrameScore(largest, whole), reduction)


def level_frame(found: FrameScore, reduction: Reduction) -> FrameScore:
    """The frame after the reduction's last steps: its smoothed map levelled at the borders, its score taken anew.

    `found` is a frame whose map is not levelled yet; with `tile_max` its score stays.
    """
    return _level(found if reduction.border is None else found._replace(map=found.map.copy()), reduction)


def _level(found: FrameScore, reduction: Reduction) -> FrameScore:
    """As `level_frame`, in place."""
    whole = found.map
    if reduction.border is not None:
        for near, gain in _raised(reduction.border, len(whole)):
            whole[near] /= gain[:, None]
        for near, gain in _raised(reduction.border, whole.shape[1]):
            whole[:, near] /= gain
    if reduction.kind == "tile_max":
        return FrameScore(found.score, whole)
    return FrameScore(float(whole.max() if reduction.kind == "max" else whole.mean(dtype=np.float64)), whole)


def score_frame(
    picture: NDArray[np.uint8], grid: TileGrid, reduction: Reduction, score_tiles: ScoreTiles
) -> FrameScore:
    """Score one picture uint8 [H, W, C] with the scorer `score_tiles`."""
    layout = grid.layout(*picture.shape[:2])
    return reduce_frame(layout, *score_tiles(layout.cut(picture)), reduction)
