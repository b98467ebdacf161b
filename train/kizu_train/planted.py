"""Flaws drawn into good pictures to choose a detector by: simple ones, of another family than any that is trained on.

They are drawn at the size they would have in a whole picture and only as plain as they must be: a detector that finds
the faint ones is the better one. Whatever their kind, the mask holds the pixels that visibly changed. The kinds are
common in this literature (Cutout, DeVries & Taylor 2017; AugMix-like smears); what matters is that none of them is cut
from another picture, as those that `synthetic_defects` learns from mostly are.
"""

from collections.abc import Callable
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

Picture = NDArray[np.uint8]
"""uint8 [H, W, C]."""
Plane = NDArray[np.float32]
"""float32 [H, W]."""
Canvas = NDArray[np.float32]
"""The picture while a flaw is drawn: float32 [H, W, C], 0–255."""
Draw = Callable[[Canvas, Plane, float, np.random.Generator], Canvas]
"""A canvas, a soft region 0–1, a strength (1: usual) and a generator → the canvas with the flaw in the region."""

_VISIBLE = 6
"""Grey levels that a pixel must change by to count as flawed."""
_LEAST_PIXELS = 6
_TRIES = 8
_PLACES = 8


def plant(picture: Picture, size_px: float, random: np.random.Generator) -> tuple[Picture, NDArray[np.bool_], str]:
    """Draw one flaw of about `size_px` into `picture`: the spoilt picture, its mask bool [H, W], and its kind.

    The mask is never empty: a flaw that does not show is drawn again, stronger.
    """
    kind = str(random.choice(list(KINDS)))
    region_of, draw = KINDS[kind]
    canvas = picture.astype(np.float32)
    strength = 1.0
    for _ in range(_TRIES):
        region = region_of(_place(picture, size_px, random), picture.shape[:2], size_px, random)
        spoilt = np.clip(draw(canvas, region, strength, random), 0, 255).astype(np.uint8)
        mask = np.abs(spoilt.astype(np.int16) - picture).max(2) >= _VISIBLE
        if int(mask.sum()) >= _LEAST_PIXELS:
            return spoilt, mask, kind
        strength *= 1.5
    return _blot(picture, size_px, random)


def _blot(picture: Picture, size_px: float, random: np.random.Generator) -> tuple[Picture, NDArray[np.bool_], str]:
    """The plainest flaw, for pictures in which nothing else shows: half the range brighter or darker."""
    mask = _patch(_place(picture, size_px, random), picture.shape[:2], max(size_px, 4.0), random) > 0.5
    spoilt = picture.copy()
    spoilt[mask] = np.where(picture[mask] > 127, picture[mask] - 128, picture[mask] + 128)
    return spoilt, mask, "blot"


def _place(picture: Picture, size_px: float, random: np.random.Generator) -> tuple[float, float]:
    """A point (y, x) where there is something to see: the most varied surroundings of a few random ones."""
    height, width = picture.shape[:2]
    reach = max(2, round(size_px))
    points = np.column_stack([random.uniform(0, height, _PLACES), random.uniform(0, width, _PLACES)])
    spreads = [_around(picture, y, x, reach).std() for y, x in points.astype(int)]
    # The best of half of them: also quieter places get their share.
    order = random.permutation(_PLACES)[: _PLACES // 2]
    y, x = points[max(order, key=lambda index: spreads[index])]
    return float(y), float(x)


def _around(picture: Picture, y: int, x: int, reach: int) -> Picture:
    return picture[max(0, y - reach) : y + reach + 1, max(0, x - reach) : x + reach + 1]


def _patch(at: tuple[float, float], shape: tuple[int, ...], size_px: float, random: np.random.Generator) -> Plane:
    """A turned, uneven polygon with a soft edge."""
    angles = np.sort(random.uniform(0, 2 * np.pi, 9))
    radii = size_px / 2 * random.uniform(0.5, 1.2, 9)
    squeeze, turn = random.uniform(0.4, 1.0), random.uniform(0, np.pi)
    along, across = radii * np.cos(angles), radii * np.sin(angles) * squeeze
    x = at[1] + along * np.cos(turn) - across * np.sin(turn)
    y = at[0] + along * np.sin(turn) + across * np.cos(turn)
    region = np.zeros(shape[:2], np.float32)
    cv2.fillPoly(region, [np.round(np.column_stack([x, y]) * 16).astype(np.int32)], 1.0, cv2.LINE_8, shift=4)
    return np.asarray(cv2.GaussianBlur(region, (0, 0), 0.7), np.float32)


def _line(at: tuple[float, float], shape: tuple[int, ...], size_px: float, random: np.random.Generator) -> Plane:
    """A bent line, longer than a patch is wide and thin."""
    turn, half = random.uniform(0, np.pi), size_px * random.uniform(0.8, 1.6)
    t = np.linspace(-1, 1, 9)
    bend = random.uniform(-0.3, 0.3) * half * t**2
    x = at[1] + t * half * np.cos(turn) - bend * np.sin(turn)
    y = at[0] + t * half * np.sin(turn) + bend * np.cos(turn)
    region = np.zeros(shape[:2], np.float32)
    points = np.round(np.column_stack([x, y]) * 16).astype(np.int32)
    thick = max(1, round(size_px * random.uniform(0.06, 0.15)))
    cv2.polylines(region, [points], isClosed=False, color=1.0, thickness=thick, shift=4)
    return np.asarray(cv2.GaussianBlur(region, (0, 0), 0.6), np.float32)


def _dots(at: tuple[float, float], shape: tuple[int, ...], size_px: float, random: np.random.Generator) -> Plane:
    """A few small dots around a point."""
    region = np.zeros(shape[:2], np.float32)
    for _ in range(int(random.integers(1, 6))):
        y, x = np.array(at) + random.normal(0, size_px / 2, 2)
        radius = max(1.0, size_px * random.uniform(0.06, 0.16))
        centre = (round(x * 16), round(y * 16))
        cv2.circle(region, centre, round(radius * 16), 1.0, -1, cv2.LINE_8, shift=4)
    return np.asarray(cv2.GaussianBlur(region, (0, 0), 0.6), np.float32)


def _cut_out(canvas: Canvas, region: Plane, strength: float, random: np.random.Generator) -> Canvas:
    """Flat, in the mean shade of what was there, a little off."""
    inside = canvas[region > 0.3]
    shade = np.asarray(inside.mean(0) if len(inside) else canvas.mean((0, 1)), np.float32)
    return _over(canvas, shade + _off(strength, random, 8, 40), region)


def _shade(canvas: Canvas, region: Plane, strength: float, random: np.random.Generator) -> Canvas:
    """Brighter or darker, with the texture left."""
    return np.asarray(canvas + region[:, :, None] * _off(strength, random, 15, 60), np.float32)


def _smear(canvas: Canvas, region: Plane, strength: float, random: np.random.Generator) -> Canvas:
    """Wiped in one direction."""
    length = max(3, round(2 * strength * np.sqrt(region.sum() + 1)))
    kernel = np.zeros((2 * length + 1, 2 * length + 1), np.float32)
    turn = random.uniform(0, np.pi)
    ends = [(round(length + s * length * np.cos(turn)), round(length + s * length * np.sin(turn))) for s in (-1, 1)]
    cv2.line(kernel, ends[0], ends[1], 1.0)
    wiped = cv2.filter2D(canvas, -1, kernel / kernel.sum(), borderType=cv2.BORDER_REFLECT_101)
    return _over(canvas, wiped.reshape(canvas.shape), region)


def _deform(canvas: Canvas, region: Plane, strength: float, random: np.random.Generator) -> Canvas:
    """Pushed aside, as by a dent."""
    height, width = region.shape
    soft = cv2.GaussianBlur(region, (0, 0), max(1.0, 0.15 * float(np.sqrt(region.sum() + 1))))
    turn, far = random.uniform(0, 2 * np.pi), strength * random.uniform(0.25, 0.5) * float(np.sqrt(region.sum() + 1))
    y, x = np.mgrid[:height, :width].astype(np.float32)
    moved_x, moved_y = (x + soft * far * np.cos(turn)).astype(np.float32), (y + soft * far * np.sin(turn))
    moved = cv2.remap(canvas, moved_x, moved_y.astype(np.float32), cv2.INTER_LINEAR, borderMode=cv2.BORDER_REFLECT_101)
    return np.asarray(moved, np.float32).reshape(canvas.shape)


def _stripes(canvas: Canvas, region: Plane, strength: float, random: np.random.Generator) -> Canvas:
    """A fine grating laid over."""
    height, width = region.shape
    turn, period = random.uniform(0, np.pi), random.uniform(3, 8)
    y, x = np.mgrid[:height, :width]
    wave = np.sin((x * np.cos(turn) + y * np.sin(turn)) * 2 * np.pi / period).astype(np.float32)
    return np.asarray(canvas + (region * wave)[:, :, None] * abs(_off(strength, random, 12, 40)), np.float32)


def _over(canvas: Canvas, content: Any, region: Plane) -> Canvas:
    return np.asarray(canvas + region[:, :, None] * (content - canvas), np.float32)


def _off(strength: float, random: np.random.Generator, low: float, high: float) -> float:
    """So many grey levels up or down."""
    return float(strength * random.uniform(low, high) * random.choice((-1, 1)))


Region = Callable[[tuple[float, float], tuple[int, ...], float, np.random.Generator], Plane]
KINDS: dict[str, tuple[Region, Draw]] = {
    "cut_out": (_patch, _cut_out),
    "deformation": (_patch, _deform),
    "scratch": (_line, _shade),
    "shade": (_patch, _shade),
    "smear": (_patch, _smear),
    "spots": (_dots, _shade),
    "stripes": (_patch, _stripes),
}
"""Each kind's region and what is drawn there."""
