"""Synthetic defects on good tiles, with soft labels: what the segmentation learns from.

Ideas: CutPaste (Li et al., 2021), DRAEM (Zavrtanik et al., 2021), NSA (Schlüter et al., 2022). A shape
(synthetic_shapes) and a fill (synthetic_fills) are drawn independently, so that kinds multiply. The label of a pixel is
a logistic of how much it changed, measured against the variation around it: what cannot be seen is not asked for, and
faint marks such as good pictures carry become negatives by themselves.
"""

from dataclasses import dataclass, field
from typing import Protocol

import cv2
import numpy as np
from numpy.typing import NDArray

from kizu_train.nets.synthetic_fills import FILLS, Plane
from kizu_train.nets.synthetic_nuisance import Nuisance
from kizu_train.nets.synthetic_shapes import LINES, SPOTS, Mask

_LINE_FILLS = ("shade", "shade", "relief", "flat", "foreign", "noise")
"""Named twice, a fill is drawn twice as often."""
_SPOT_FILLS = ("foreign", "foreign", "flat", "flat", "shade", "shade", "moved", "noise", "blur", "relief", "dent")


@dataclass(frozen=True)
class Label:
    """From a change to a label: 1/2 at `visible` grey levels + `variation` × the local deviation of the good tile."""

    visible: float = 4.0
    variation: float = 0.4

    def __post_init__(self) -> None:
        if not (self.visible > 0 and self.variation >= 0):
            raise ValueError("visible > 0 and variation >= 0 are needed")

    def of(self, good: Plane, spoilt: Plane) -> Mask:
        """Labels float32 [T, T], 0–1, of `spoilt` against `good`, both float32 [T, T, C]."""
        # The difference is blurred before its absolute value is taken: grain for other grain is no change.
        change = _largest(np.abs(_blurred(spoilt - good, 1.0)))
        limit = self.visible + self.variation * _deviation(_largest(_blurred(good, 1.0)))
        soft = 1 / (1 + np.exp(np.clip(4 - 4 * cv2.GaussianBlur(change, (0, 0), 1.2) / limit, -30, 30)))
        return np.where(soft > 0.03, soft, 0).astype(np.float32)


@dataclass(frozen=True)
class Spoiling:
    """`clean_share` of the tiles stay good; the others get one to `most` defects, `line_share` of them lines.

    `known_share`: of the defects, where a user gave known ones.
    """

    clean_share: float = 0.25
    most: int = 4
    line_share: float = 0.3
    known_share: float = 0.3
    label: Label = field(default_factory=Label)
    nuisance: Nuisance = field(default_factory=Nuisance)

    def __post_init__(self) -> None:
        if not all(0 <= share <= 1 for share in (self.clean_share, self.line_share, self.known_share)):
            raise ValueError("clean_share, line_share and known_share must lie between 0 and 1")
        if self.most < 1:
            raise ValueError("most must be at least 1")


class Known(Protocol):
    """Known defects to paste."""

    def paste(self, tile: Plane, random: np.random.Generator) -> tuple[Plane, Mask]:
        """`tile` float32 [T, T, C] with a known defect on it, and its mask float32 [T, T]."""


def spoil(
    tiles: NDArray[np.uint8], settings: Spoiling, random: np.random.Generator, known: Known | None = None
) -> tuple[NDArray[np.uint8], NDArray[np.float32]]:
    """Spoil good tiles uint8 [N, T, T, C]: tiles uint8 [N, T, T, C] and labels float32 [N, T, T], 0–1."""
    good = [settings.nuisance.before(tile.astype(np.float32), random) for tile in tiles]
    donors = random.integers(0, len(tiles), len(tiles))
    found = [_spoil_one(tile, good[donor], settings, random, known) for tile, donor in zip(good, donors, strict=True)]
    return np.stack([tile for tile, _ in found]), np.stack([label for _, label in found])


def _spoil_one(
    good: Plane, donor: Plane, settings: Spoiling, random: np.random.Generator, known: Known | None
) -> tuple[NDArray[np.uint8], Mask]:
    spoilt, sure = good, np.zeros(good.shape[:2], np.float32)
    if random.random() >= settings.clean_share:
        for _ in range(int(random.integers(1, settings.most + 1))):
            if known is not None and random.random() < settings.known_share:
                spoilt, mask = known.paste(spoilt, random)
                sure = np.maximum(sure, mask)
            else:
                spoilt = _with_defect(spoilt, donor, settings, random)
    good, spoilt = settings.nuisance.after([good, spoilt], random)
    seen = np.clip(spoilt, 0, 255)
    label = settings.label.of(np.clip(good, 0, 255), seen)
    return np.round(seen).astype(np.uint8), np.maximum(label, sure)


def _with_defect(tile: Plane, donor: Plane, settings: Spoiling, random: np.random.Generator) -> Plane:
    is_line = random.random() < settings.line_share
    shapes, fills = (LINES, _LINE_FILLS) if is_line else (SPOTS, _SPOT_FILLS)
    mask = shapes[list(shapes)[random.integers(len(shapes))]](len(tile), random)
    return FILLS[fills[random.integers(len(fills))]](tile, mask, donor, random)


def _largest(tile: Plane) -> Mask:
    """The largest channel, float32 [T, T]; numpy takes ten times as long along an axis of three."""
    first, *others = cv2.split(tile)
    for other in others:
        first = cv2.max(first, other)
    return np.asarray(first, np.float32)


def _blurred(tile: Plane, sigma: float) -> Plane:
    seen = cv2.GaussianBlur(tile, (0, 0), sigma, borderType=cv2.BORDER_REFLECT_101)
    return np.asarray(seen, np.float32).reshape(tile.shape)


def _deviation(plane: Mask) -> Mask:
    """Standard deviation float32 [T, T] within 13 × 13 px around each pixel."""
    plane = plane - plane.mean(dtype=np.float32)
    mean, square = (cv2.blur(item, (13, 13), borderType=cv2.BORDER_REFLECT_101) for item in (plane, plane * plane))
    return np.asarray(np.sqrt(np.maximum(square - mean * mean, 0)), np.float32)
