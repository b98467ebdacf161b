"""Where a synthetic defect lies: soft masks of specks, blobs, scratches, cracks, scars, pieces and clusters.

Every shape is drawn from two pixels up to about half a tile, anywhere in it, also half outside: defects do not keep to
tiles. Sizes are log-uniform, because small defects are the many and the hard ones.
"""

from collections.abc import Callable, Mapping

import cv2
import numpy as np
from numpy.typing import NDArray

Mask = NDArray[np.float32]
"""float32 [T, T], 0 outside, 1 where the defect covers all."""
Shape = Callable[[int, np.random.Generator], Mask]
"""Tile side T and randomness → where the defect is."""

_SHIFT = 4
"""Fractional bits of OpenCV's drawing coordinates."""


def log_uniform(random: np.random.Generator, low: float, high: float) -> float:
    """A number between `low` and `high` (both > 0), each octave as likely as the other."""
    return float(np.exp(random.uniform(np.log(low), np.log(high))))


def speck(side: int, random: np.random.Generator) -> Mask:
    """An ellipse, from a grain of dust to an eighth of the tile."""
    canvas, size = _canvas(side), log_uniform(random, 1.0, side / 8)
    _ellipse(canvas, _place(side, random), size, random)
    return _soften(canvas, random, size)


def blob(side: int, random: np.random.Generator) -> Mask:
    """An irregular spot or stain: smooth noise over a hill, cut off hard or softly."""
    size = round(log_uniform(random, 6, side * 0.7)) | 1
    bumps = int(random.integers(3, 8))
    noise = cv2.resize(random.random((bumps, bumps), np.float32), (size, size), interpolation=cv2.INTER_CUBIC)
    along = np.linspace(-1, 1, size, dtype=np.float32)
    hill = 1 - along[:, None] ** 2 - (along * random.uniform(1, 1.6))[None, :] ** 2
    steep = log_uniform(random, 1.5, 12)
    lump = np.clip((hill + 0.9 * (noise - 0.5) - random.uniform(0.1, 0.4)) * steep, 0, 1) * (hill > 0)
    return _placed(_turned(lump.astype(np.float32), random), side, random)


def scratch(side: int, random: np.random.Generator) -> Mask:
    """A thin bent line with tapered ends."""
    length, width = log_uniform(random, 6, side), log_uniform(random, 0.6, 5)
    t = np.linspace(-1, 1, 24)
    bend, wiggle = random.normal(0, 0.12, 2) * length
    across = bend * t**2 + wiggle * t**3
    taper = np.clip(1 - np.abs(t) ** random.uniform(1.5, 8), 0.05, 1) * random.uniform(0.8, 1.2, len(t))
    line = np.stack([t * length / 2, across], axis=1) @ _turn(random)
    normal = np.gradient(line, axis=0)[:, ::-1] * (1, -1)
    normal /= np.maximum(np.hypot(*normal.T)[:, None], 1e-6)
    half = normal * (0.5 * max(width, 1.0) * taper)[:, None]
    canvas = _canvas(side)
    outline = np.concatenate([line + half, (line - half)[::-1]]) + _place(side, random)
    cv2.fillPoly(canvas, [_fixed(outline)], 255, cv2.LINE_AA, _SHIFT)
    # OpenCV draws no line thinner than a pixel: a finer one covers less of each.
    return np.asarray(_soften(canvas, random, width) * np.float32(min(1.0, 0.4 + 0.6 * width)), np.float32)


def crack(side: int, random: np.random.Generator) -> Mask:
    """A random walk with a branch or two."""
    canvas = _canvas(side)
    at, heading = np.array(_place(side, random)), random.uniform(0, 2 * np.pi)
    step = log_uniform(random, 1.5, 7)
    for _ in range(int(random.integers(1, 4))):
        turns = heading + np.cumsum(random.normal(0, random.uniform(0.15, 0.6), int(random.integers(5, 25))))
        walk = at + np.cumsum(np.stack([np.cos(turns), np.sin(turns)], axis=1) * step, axis=0)
        thick = int(random.choice((1, 1, 1, 2, 3)))
        cv2.polylines(canvas, [_fixed(walk)], isClosed=False, color=255, thickness=thick, lineType=16, shift=_SHIFT)
        at, heading = walk[random.integers(len(walk))], heading + random.choice((-1, 1)) * random.uniform(0.5, 1.5)
    return _soften(canvas, random, 1.5)


def scar(side: int, random: np.random.Generator) -> Mask:
    """A turned rectangle, long and thin or not, as CutPaste cuts them; now and then a band across the whole tile."""
    length = 3.0 * side if random.random() < 0.1 else log_uniform(random, 4, side * 0.6)
    width = log_uniform(random, 1.5, min(length, side / 3))
    corners = np.array([(-length, -width), (length, -width), (length, width), (-length, width)]) / 2
    canvas = _canvas(side)
    cv2.fillConvexPoly(canvas, _fixed(corners @ _turn(random) + _place(side, random)), 255, cv2.LINE_AA, _SHIFT)
    return _soften(canvas, random, width)


def piece(side: int, random: np.random.Generator) -> Mask:
    """An irregular polygon: a chip, a break, something that lies on top."""
    size = log_uniform(random, 2.5, side / 3)
    angles = np.sort(random.uniform(0, 2 * np.pi, int(random.integers(4, 11))))
    radii = size * random.uniform(0.4, 1.2, len(angles))
    ring = np.stack([np.cos(angles) * radii, np.sin(angles) * radii * random.uniform(0.5, 1)], axis=1)
    canvas = _canvas(side)
    cv2.fillPoly(canvas, [_fixed(ring @ _turn(random) + _place(side, random))], 255, cv2.LINE_AA, _SHIFT)
    return _soften(canvas, random, size)


def cluster(side: int, random: np.random.Generator) -> Mask:
    """A handful of specks close to one another: pores, splashes, an abrasion."""
    canvas, centre = _canvas(side), _place(side, random)
    reach, size = log_uniform(random, 4, side / 5), log_uniform(random, 0.8, side / 24)
    for offset in random.normal(0, reach, (int(random.integers(3, 14)), 2)):
        _ellipse(canvas, (centre[0] + offset[0], centre[1] + offset[1]), size * random.uniform(0.6, 1.5), random)
    return _soften(canvas, random, size)


LINES: Mapping[str, Shape] = {"scratch": scratch, "crack": crack}
"""Shapes that are thinner than what surrounds them."""
SPOTS: Mapping[str, Shape] = {"speck": speck, "blob": blob, "scar": scar, "piece": piece, "cluster": cluster}
"""Shapes with an inside."""


def _canvas(side: int) -> NDArray[np.uint8]:
    return np.zeros((side, side), np.uint8)


def _place(side: int, random: np.random.Generator) -> tuple[float, float]:
    x, y = random.uniform(-2, side + 2, 2)
    return float(x), float(y)


def _turn(random: np.random.Generator) -> NDArray[np.float64]:
    angle = random.uniform(0, 2 * np.pi)
    return np.array([(np.cos(angle), np.sin(angle)), (-np.sin(angle), np.cos(angle))])


def _fixed(points: NDArray[np.float64]) -> NDArray[np.int32]:
    return np.round(points * (1 << _SHIFT)).astype(np.int32)


def _ellipse(canvas: NDArray[np.uint8], at: tuple[float, float], size: float, random: np.random.Generator) -> None:
    axes = np.maximum(np.array((size, size * random.uniform(0.35, 1.0))) * (1 << _SHIFT), 8).astype(int).tolist()
    centre = [round(value * (1 << _SHIFT)) for value in at]
    cv2.ellipse(canvas, centre, axes, random.uniform(0, 180), 0, 360, 255, -1, cv2.LINE_AA, _SHIFT)


def _soften(canvas: NDArray[np.uint8], random: np.random.Generator, size: float) -> Mask:
    """0–1, blurred: most edges as sharp as a lens draws them, some as soft as the defect is large."""
    sigma = random.uniform(0.2, 0.8) if random.random() < 0.7 else log_uniform(random, 0.5, max(0.6, size / 3))
    mask = canvas.astype(np.float32) * np.float32(1 / 255)
    return np.asarray(cv2.GaussianBlur(mask, (0, 0), sigma), np.float32) if sigma > 0.35 else mask


def _turned(lump: Mask, random: np.random.Generator) -> Mask:
    centre = (lump.shape[1] / 2 - 0.5, lump.shape[0] / 2 - 0.5)
    turn = cv2.getRotationMatrix2D(centre, random.uniform(0, 360), 1.0)
    return np.asarray(cv2.warpAffine(lump, turn, lump.shape[::-1]), np.float32)


def _placed(lump: Mask, side: int, random: np.random.Generator) -> Mask:
    """`lump` somewhere in a tile, cut off where it sticks out."""
    size = len(lump)
    x, y = (int(value) - size // 2 for value in _place(side, random))
    mask = np.zeros((side, side), np.float32)
    top, left, bottom, right = max(y, 0), max(x, 0), min(y + size, side), min(x + size, side)
    if top < bottom and left < right:
        mask[top:bottom, left:right] = lump[top - y : bottom - y, left - x : right - x]
    return mask
