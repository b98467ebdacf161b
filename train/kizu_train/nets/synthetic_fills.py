"""What a synthetic defect does to the pixels it covers: foreign or moved content, shade, relief, dents, lost material.

Letters: T tile side; C channels. Tiles are float32 [T, T, C], 0–255; values may leave that range and are clipped later.
"""

from collections.abc import Callable, Mapping
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from kizu_train.nets.synthetic_shapes import Mask, log_uniform

Plane = NDArray[np.float32]
"""A tile float32 [T, T, C], 0–255."""
Fill = Callable[[Plane, Mask, Plane, np.random.Generator], Plane]
"""Tile, mask, another good tile to take content from, randomness → the spoilt tile."""


def foreign(tile: Plane, mask: Mask, donor: Plane, random: np.random.Generator) -> Plane:
    """Content of another place or picture, resized and moved; half of the time its low frequencies are fitted.

    The fitted paste stands in for the Poisson blending of NSA (Schlüter et al., 2022): the gap along the border of the
    mask is spread into it smoothly, at a twentieth of the cost.
    """
    content = _displaced(donor, random, log_uniform(random, 0.7, 1.3))
    if random.random() < 0.5:
        content = content + _membrane(tile - content, mask)
    return _mix(tile, content, mask * np.float32(random.choice((1.0, random.uniform(0.3, 1.0)))))


def moved(tile: Plane, mask: Mask, _donor: Plane, random: np.random.Generator) -> Plane:
    """The tile's own structure, shifted, turned or mirrored."""
    return _mix(tile, _displaced(tile, random, random.uniform(0.85, 1.15)), mask)


def shade(tile: Plane, mask: Mask, _donor: Plane, random: np.random.Generator) -> Plane:
    """Brighter or darker, by adding or by taking a share, grey or in colour."""
    amount = log_uniform(random, 8, 160) * random.choice((-1, 1))
    tint = _tint(tile.shape[2], random) * np.float32(amount)
    if random.random() < 0.4:
        tint = tint * (tile + 30) * np.float32(1 / 140)
    return np.asarray(tile + mask[:, :, None] * tint, np.float32)


def flat(tile: Plane, mask: Mask, donor: Plane, random: np.random.Generator) -> Plane:
    """One colour of another place of the tile or of another picture: lost material, ground that shows through."""
    source = tile if random.random() < 0.7 else donor
    colours = source[tuple(random.integers(0, len(tile), (2, 8)))]
    colour = colours[0] if random.random() < 0.5 else _farthest(colours, tile, mask)
    spread = random.choice((0.0, random.uniform(0, 10)))
    content = colour + random.standard_normal(tile.shape, np.float32) * np.float32(spread)
    return _mix(tile, content, mask * np.float32(random.uniform(0.5, 1.0) ** 0.5))


def noise(tile: Plane, mask: Mask, _donor: Plane, random: np.random.Generator) -> Plane:
    """A texture of its own: noise of some grain, added, grey or in colour."""
    grain, side = log_uniform(random, 1, 10), len(tile)
    count, channels = max(2, round(side / grain)), 1 if random.random() < 0.7 else tile.shape[2]
    coarse = random.standard_normal((count, count, channels), np.float32)
    rough = cv2.resize(coarse, (side, side), interpolation=cv2.INTER_LINEAR).reshape(side, side, channels)
    content = tile + rough * np.float32(log_uniform(random, 6, 70)) + np.float32(random.normal(0, 15))
    return _mix(tile, np.asarray(content, np.float32), mask)


def blur(tile: Plane, mask: Mask, _donor: Plane, random: np.random.Generator) -> Plane:
    """Detail wiped out: worn, smeared, melted; sometimes overdrawn instead."""
    smooth = _smooth(tile, log_uniform(random, 1.0, 7))
    times = random.choice((0.0, 0.0, random.uniform(1.5, 3)))
    return _mix(tile, np.asarray(smooth + np.float32(times) * (tile - smooth), np.float32), mask)


def relief(tile: Plane, mask: Mask, _donor: Plane, random: np.random.Generator) -> Plane:
    """A groove or a bump under slanting light: one flank bright, the other dark."""
    across, down = _slope(cv2.GaussianBlur(mask, (0, 0), random.uniform(0.6, 1.6)))
    angle = random.uniform(0, 2 * np.pi)
    light = np.float32(np.cos(angle)) * across + np.float32(np.sin(angle)) * down
    light = light * np.float32(log_uniform(random, 12, 150) / max(float(np.abs(light).max()), 1e-3))
    return np.asarray(tile + light[:, :, None] + mask[:, :, None] * np.float32(random.normal(0, 15)), np.float32)


def dent(tile: Plane, mask: Mask, donor: Plane, random: np.random.Generator) -> Plane:
    """Structure pushed aside or drawn together, mostly with the shading of a dent."""
    across, down = _slope(cv2.GaussianBlur(mask, (0, 0), log_uniform(random, 1.5, len(tile) / 16)))
    strength = log_uniform(random, 1.5, len(tile) / 12) * random.choice((-1, 1))
    strength /= max(float(np.abs(across).max()), float(np.abs(down).max()), 1e-3)
    ys, xs = np.mgrid[: len(tile), : len(tile)].astype(np.float32)
    bent = cv2.remap(
        tile,
        xs + across * np.float32(strength),
        ys + down * np.float32(strength),
        cv2.INTER_LINEAR,
        borderMode=cv2.BORDER_REFLECT_101,
    )
    bent = np.asarray(bent, np.float32).reshape(tile.shape)
    return relief(bent, mask, donor, random) if random.random() < 0.5 else bent


FILLS: Mapping[str, Fill] = {
    "foreign": foreign,
    "moved": moved,
    "shade": shade,
    "flat": flat,
    "noise": noise,
    "blur": blur,
    "relief": relief,
    "dent": dent,
}


def _mix(tile: Plane, content: Plane, mask: Mask) -> Plane:
    return np.asarray(tile + mask[:, :, None] * (content - tile), np.float32)


def _farthest(colours: NDArray[np.float32], tile: Plane, mask: Mask) -> NDArray[np.float32]:
    """The colour of `colours` [K, C] that differs most from what `mask` covers."""
    covered = (tile * mask[:, :, None]).sum((0, 1)) / (mask.sum() + 1e-3)
    return np.asarray(colours[np.abs(colours - covered).sum(1).argmax()], np.float32)


def _tint(channels: int, random: np.random.Generator) -> NDArray[np.float32]:
    """How much each channel takes part, 1 on average; grey in most defects."""
    if channels == 1 or random.random() < 0.6:
        return np.ones(channels, np.float32)
    return np.asarray(random.normal(0.4, 0.8, channels), np.float32)


def _displaced(tile: Plane, random: np.random.Generator, scale: float) -> Plane:
    """`tile` resized, moved by up to half its side, and in half of the cases turned; mirrored beyond its edges."""
    side = len(tile)
    angle = random.uniform(-180, 180) if random.random() < 0.5 else 0.0
    warp = cv2.getRotationMatrix2D((side / 2, side / 2), angle, scale)
    far = random.choice((side / 2, side / 8))
    warp[:, 2] = warp[:, 2] + random.uniform(-far, far, 2)
    seen = cv2.warpAffine(tile, warp, (side, side), flags=cv2.INTER_LINEAR, borderMode=cv2.BORDER_REFLECT_101)
    return np.asarray(seen, np.float32).reshape(tile.shape)


def _membrane(gap: Plane, mask: Mask) -> Plane:
    """`gap` around the mask, spread smoothly into it."""
    outside = 1 - np.minimum(mask * 4, 1)
    near = outside * cv2.dilate((mask > 0.05).astype(np.float32), np.ones((5, 5), np.uint8))
    sigma = max(2.0, 0.35 * float(np.sqrt(mask.sum() + 1)))
    weight = cv2.GaussianBlur(near, (0, 0), sigma) + np.float32(1e-4)
    spread = _smooth(gap * near[:, :, None], sigma)
    return np.asarray(spread / weight[:, :, None], np.float32)


def _smooth(tile: Plane, sigma: float) -> Plane:
    seen = cv2.GaussianBlur(tile, (0, 0), sigma, borderType=cv2.BORDER_REFLECT_101)
    return np.asarray(seen, np.float32).reshape(tile.shape)


def _slope(mask: NDArray[Any]) -> tuple[Mask, Mask]:
    across = cv2.Scharr(mask, cv2.CV_32F, 1, 0)
    return np.asarray(across, np.float32), np.asarray(cv2.Scharr(mask, cv2.CV_32F, 0, 1), np.float32)
