"""What differs between good pictures and is no defect: light, focus, sensor noise, small movements."""

from dataclasses import dataclass

import cv2
import numpy as np
from numpy.typing import NDArray

from kizu_train.nets.synthetic_shapes import log_uniform

Plane = NDArray[np.float32]


@dataclass(frozen=True)
class Nuisance:
    """How far good pictures may differ, as strengths from 0 (not at all); 1 suits a line with steady light.

    `light`: gain, offset, gamma and slopes of brightness. `focus`: slight blur and sharpening. `noise`: the sensor's.
    `movement`: shifts, turns and sizes, about 2 px, 2° and 2 %. `flips`: mirrored and quarter-turned tiles are as good
    as upright ones; true only of textures without direction.
    """

    light: float = 1.0
    focus: float = 1.0
    noise: float = 1.0
    movement: float = 1.0
    flips: bool = False

    def __post_init__(self) -> None:
        if not all(0 <= strength <= 5 for strength in (self.light, self.focus, self.noise, self.movement)):
            raise ValueError("light, focus, noise and movement must lie between 0 and 5")

    def before(self, tile: Plane, random: np.random.Generator) -> Plane:
        """Another view of the good `tile` float32 [T, T, C], 0–255, before anything happens to it."""
        if self.flips:
            tile = np.ascontiguousarray(np.rot90(tile, int(random.integers(4)))[:: random.choice((-1, 1))])
        if self.movement and random.random() < 0.4:
            tile = _moved(tile, self.movement, random)
        return _lit(tile, self.light, random) if self.light and random.random() < 0.7 else tile

    def after(self, tiles: list[Plane], random: np.random.Generator) -> list[Plane]:
        """The same lens and sensor for all `tiles`, spoilt or not."""
        if self.focus and random.random() < 0.35:
            sigma, amount = random.uniform(0.35, 0.9), random.choice((-0.5, 1.0, 1.0)) * min(self.focus, 1.0)
            tiles = [_focused(tile, sigma, amount) for tile in tiles]
        if self.noise and random.random() < 0.4:
            spread = np.float32(log_uniform(random, 0.5, 4) * self.noise)
            grain = random.standard_normal(tiles[0].shape, np.float32) * spread
            tiles = [tile + grain for tile in tiles]
        return tiles


def _moved(tile: Plane, strength: float, random: np.random.Generator) -> Plane:
    side = len(tile)
    turn, size = strength * random.normal(0, 1), 1 + strength * random.normal(0, 0.01)
    warp = cv2.getRotationMatrix2D((side / 2 - 0.5, side / 2 - 0.5), turn, size)
    warp[:, 2] = warp[:, 2] + strength * random.normal(0, 1, 2)
    seen = cv2.warpAffine(tile, warp, (side, side), flags=cv2.INTER_LINEAR, borderMode=cv2.BORDER_REFLECT_101)
    return np.asarray(seen, np.float32).reshape(tile.shape)


def _lit(tile: Plane, strength: float, random: np.random.Generator) -> Plane:
    side, channels = tile.shape[0], tile.shape[2]
    gain = np.float32(1 + strength * random.normal(0, 0.05)) + random.normal(0, 0.012 * strength, channels)
    offset = strength * random.normal(0, 4)
    lit = tile * gain.astype(np.float32) + np.float32(offset)
    if random.random() < 0.5:
        coarse = (1 + strength * random.normal(0, 0.05, (3, 3))).astype(np.float32)
        lit *= cv2.resize(coarse, (side, side), interpolation=cv2.INTER_CUBIC)[:, :, None]
    if random.random() < 0.3:
        gamma = np.exp(strength * random.normal(0, 0.08))
        lit = 255 * (np.clip(lit, 0, 255) * np.float32(1 / 255)) ** np.float32(gamma)
    return np.asarray(lit, np.float32)


def _focused(tile: Plane, sigma: float, amount: float) -> Plane:
    """`amount` 1 blurs, below 0 sharpens."""
    smooth = cv2.GaussianBlur(tile, (0, 0), sigma, borderType=cv2.BORDER_REFLECT_101).reshape(tile.shape)
    return np.asarray(tile + np.float32(amount) * (smooth - tile), np.float32)
