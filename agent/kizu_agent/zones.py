"""Zones: which parts of a picture are judged, by which thresholds, and how large a flaw must be to count.

Letters: H, W the inspected region's size. Maps are float32 [H, W] as the inspector gives them, higher where worse.

A zone's score without a least area is the map's maximum in it. With one it is the highest level at which some
8-connected piece of the zone reaches that area (the maximum of the map's area opening: Vincent, "Grayscale area
openings and closings", 1993), so that score and verdict never contradict each other: a speck that is too small gets
the score of what is large enough around it.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import cv2
import numpy as np
from numpy.typing import NDArray

from kizu_agent.camera_settings import Region, ZoneConfig
from kizu_agent.records import ZoneJudgement
from kizu_contract.judging import Thresholds, Verdict

_STEPS = 16
"""Halvings of the interval in which a score is looked for: within 1/65,536 of it."""
_RANK = (Verdict.OK, Verdict.WARN, Verdict.REJECT, Verdict.UNKNOWN)

Map = NDArray[np.float32]
Mask = NDArray[np.bool_]


@dataclass(frozen=True)
class View:
    """What of a camera's picture is judged, and at which scale: `mm_per_px`, None where it is not known."""

    region: Region | None = None
    zones: tuple[ZoneConfig, ...] = ()
    mm_per_px: float | None = None

    def judge(self, frame_map: Map, thresholds: Thresholds) -> "Zoned":
        """Judge the map of the region, float32 [H, W], by zones. Raises ValueError where a zone does not fit it."""
        return masks_of(self.zones, self.region, *frame_map.shape).judge(frame_map, thresholds, self.mm_per_px)

    def unjudged(self, thresholds: Thresholds) -> "tuple[ZoneJudgement, ...]":
        """What is said of the zones where nothing could be judged: all unknown, none where there are no zones."""
        return tuple(
            ZoneJudgement(zone.name, own_thresholds(zone, thresholds), math.nan, Verdict.UNKNOWN, 0)
            for zone in (judged_zones(self.zones) if self.zones else ())
        )


@dataclass(frozen=True, eq=False)
class Zoned:
    """The judgement of a whole frame: every zone's, and the worst one, which stands for the frame.

    `inside`: what was judged at all, bool [H, W].
    """

    zones: tuple[ZoneJudgement, ...]
    inside: Mask

    @property
    def worst(self) -> ZoneJudgement:
        """The zone with the worst verdict, of several the one with the largest ratio; unknown is worse than reject."""
        return max(self.zones, key=lambda zone: (_RANK.index(zone.verdict), zone.ratio))


class ZoneMasks:
    """The zones of one camera as masks of one size; see `masks_of`."""

    def __init__(self, zones: Sequence[ZoneConfig], region: Region | None, height: int, width: int) -> None:
        """Draw `zones` for a region of `height` × `width` px. Raises ValueError where a zone lies outside of it."""
        origin = (0, 0) if region is None else (region.x, region.y)
        excluded = np.zeros((height, width), bool)
        for zone in zones:
            if zone.kind == "exclude":
                excluded |= _draw(zone, origin, height, width)
        self.judged: list[tuple[ZoneConfig, Mask]] = []
        for zone in judged_zones(zones):
            mask = ~excluded if zone is REST else _draw(zone, origin, height, width) & ~excluded
            if not mask.any():
                raise ValueError(f"zone {zone.name}: nothing is left of it in the inspected region")
            self.judged.append((zone, mask))
        self.inside: Mask = np.logical_or.reduce([mask for _, mask in self.judged])
        """What is judged at all, bool [H, W]."""

    def judge(self, frame_map: Map, thresholds: Thresholds, mm_per_px: float | None = None) -> Zoned:
        """Judge `frame_map` by the camera's `thresholds`, times each zone's factor."""
        found = []
        for zone, mask in self.judged:
            least_px = least_area_px(zone, mm_per_px)
            found.append(_judge(zone.name, frame_map, mask, own_thresholds(zone, thresholds), least_px))
        return Zoned(tuple(found), self.inside)


REST = ZoneConfig(name="rest", kind="include", polygon=((0, 0), (1, 0), (0, 1)))
"""Stands for all that is not excluded, where no zone is included; its polygon is not used."""


def judged_zones(zones: Sequence[ZoneConfig]) -> list[ZoneConfig]:
    """The zones that get a judgement: the included ones, or the rest where none is."""
    return [zone for zone in zones if zone.kind == "include"] or [REST]


@lru_cache(maxsize=64)
def masks_of(zones: tuple[ZoneConfig, ...], region: Region | None, height: int, width: int) -> ZoneMasks:
    """The masks of `zones`, drawn once for each size of picture. Raises ValueError as ZoneMasks does."""
    return ZoneMasks(zones, region, height, width)


def own_thresholds(zone: ZoneConfig, thresholds: Thresholds) -> Thresholds:
    """The camera's `thresholds` as `zone` has them."""
    return Thresholds(thresholds.warn * zone.threshold_factor, thresholds.reject * zone.threshold_factor)


def least_area_px(zone: ZoneConfig, mm_per_px: float | None) -> int:
    """The pixels that a flaw in `zone` must have to count, at least 1; the larger of both settings holds."""
    least = max(1, zone.min_area_px)
    if zone.min_area_mm2 and mm_per_px:
        # The limit of 1e-9 takes back what a product of decimals is too large by.
        least = max(least, math.ceil(zone.min_area_mm2 / mm_per_px**2 - 1e-9))
    return least


def _judge(name: str, frame_map: Map, mask: Mask, thresholds: Thresholds, least_px: int) -> ZoneJudgement:
    inside = np.where(mask, frame_map, np.float32(-np.inf))
    highest = float(inside.max())  # NaN where one is inside: numpy's maximum keeps it
    if not math.isfinite(highest):
        return ZoneJudgement(name, thresholds, math.nan, Verdict.UNKNOWN, 0)
    area = largest_piece(inside, thresholds.warn) if highest >= thresholds.warn else 0
    score = highest if least_px == 1 or highest < thresholds.warn else _opened(inside, mask, thresholds, least_px, area)
    return ZoneJudgement(name, thresholds, score, thresholds.verdict(score), area)


def _opened(inside: Map, mask: Mask, thresholds: Thresholds, least_px: int, area: int) -> float:
    """The highest level at which some piece has `least_px`; `area` is the largest piece's at warn."""
    lowest, highest = float(inside[mask].min()), float(inside.max())
    # The levels that decide are tried themselves: no rounding of the search may move the verdict.
    if area < least_px:
        low, high = lowest, thresholds.warn
    elif highest < thresholds.reject or largest_piece(inside, thresholds.reject) < least_px:
        low, high = thresholds.warn, min(highest, thresholds.reject)
    else:
        low, high = thresholds.reject, highest
    if low >= high:
        return min(low, high)
    for _ in range(_STEPS):
        middle = (low + high) / 2
        if largest_piece(inside, middle) >= least_px:
            low = middle
        else:
            high = middle
    return low


def largest_piece(inside: Map, level: float) -> int:
    """Pixels of the largest 8-connected piece of `inside` at or above `level`."""
    # In double precision: a float32 map compared with a float64 level would be compared in float32.
    hot = (inside.astype(np.float64) >= level).astype(np.uint8)
    _, _, stats, _ = cv2.connectedComponentsWithStats(hot, connectivity=8)
    return int(stats[1:, cv2.CC_STAT_AREA].max(initial=0))


def _draw(zone: ZoneConfig, origin: tuple[int, int], height: int, width: int) -> Mask:
    """The zone's pixels, bool [H, W], its outline included. Raises ValueError where a corner lies outside."""
    corners = np.asarray(zone.polygon, np.int32) - np.asarray(origin, np.int32)
    if corners.min() < 0 or corners[:, 0].max() >= width or corners[:, 1].max() >= height:
        raise ValueError(f"zone {zone.name}: lies outside the inspected region of {width} × {height} px")
    mask = np.zeros((height, width), np.uint8)
    cv2.fillPoly(mask, [corners], 1)
    return mask.astype(bool)
