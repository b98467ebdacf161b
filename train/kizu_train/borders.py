"""How much good frames' maps rise towards the borders, measured on good pictures that nobody learned from.

A pixel at the border is covered by fewer tiles, seen from one side only, and averaged over fewer neighbours by the
smoothing: even where its map is not higher on average, it varies more, and the maximum of a good frame is drawn there.
What is taken off is the tail, not the mean: a high quantile at each distance against the same quantile inside.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from kizu_contract.judging import BorderGain

STEP_PX = 4
REACH_PX = 64
_QUANTILE = 0.99
_MOST = 10.0
_WORTH = 1.02
"""Gains below it are noise."""


def border_gain(maps: Sequence[NDArray[np.float32]]) -> BorderGain | None:
    """The gain that levels the borders of `maps`, float32 [H, W] of any sizes; None where borders are not higher.

    Measured up to 64 px inwards, at most a quarter of the smallest side. Corners are left out: they follow from both
    of their borders.
    """
    reach = min(REACH_PX, *(min(found.shape) // 4 for found in maps)) // STEP_PX * STEP_PX
    if reach == 0:
        return None
    inside = _tail([found[reach:-reach, reach:-reach] for found in maps])
    bands = [_tail([_band(found, at, reach) for found in maps]) for at in range(0, reach, STEP_PX)]
    if inside <= 0:
        return None
    gains = np.clip(np.array(bands) / inside, 1, _MOST)
    # Falling inwards: a band is never trusted more than one behind it.
    gains = np.maximum.accumulate(gains[::-1])[::-1]
    needed = int((gains >= _WORTH).sum())
    return BorderGain(STEP_PX, tuple(round(float(gain), 4) for gain in gains[:needed])) if needed else None


def _band(found: NDArray[np.float32], at: int, reach: int) -> NDArray[np.float32]:
    """The pixels `at` to `at` + step from each border, without corners."""
    turned = found.T
    near = slice(at, at + STEP_PX)
    parts = [side[near, reach:-reach] for side in (found, found[::-1], turned, turned[::-1])]
    return np.concatenate([part.ravel() for part in parts])


def _tail(parts: Sequence[NDArray[np.float32]]) -> float:
    return float(np.quantile(np.concatenate([part.ravel() for part in parts]), _QUANTILE))
