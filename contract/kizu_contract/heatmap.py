"""The picture people read: the frame's map laid over the frame, in colours that mean the same everywhere."""

import cv2
import numpy as np
from numpy.typing import NDArray

from kizu_contract.judging import Thresholds
from kizu_contract.pictures import to_colour

_MAX_OPACITY = 0.6
_YELLOW = 0.62
"""Where the colour map (Turbo) is yellow."""


def overlay(
    picture: NDArray[np.uint8], frame_map: NDArray[np.float32], thresholds: Thresholds, width: int | None = None
) -> NDArray[np.uint8]:
    """Lay `frame_map` float32 [H, W] over `picture` uint8 [H, W, 1 or 3]; RGB uint8, at most `width` wide.

    Colour and opacity follow map ÷ reject threshold: nothing up to half the warn threshold, yellow at the reject
    threshold, deep red from twice that on. Without a fixed scale every good part would show a red spot.
    """
    height, full = picture.shape[:2]
    # A map that is not a number is nothing to trust: it shows in the strongest colour.
    if np.isnan(frame_map.max()):
        frame_map = np.where(np.isnan(frame_map), np.float32(np.inf), frame_map)
    if width is not None and width < full:
        size = (width, max(1, round(height * width / full)))
        picture = np.asarray(cv2.resize(picture, size, interpolation=cv2.INTER_AREA), np.uint8)
        picture = picture if picture.ndim == 3 else picture[:, :, None]
        # Averaging would make a thin defect vanish.
        frame_map = shrink_by_maximum(frame_map, size)
    base = to_colour(picture, "rgb").astype(np.float32)
    limits = (0.5 * thresholds.warn, thresholds.reject, 2 * thresholds.reject)
    heat = np.interp(frame_map, limits, (0.0, _YELLOW, 1.0))
    ramp = np.asarray(cv2.applyColorMap((heat * 255).astype(np.uint8), cv2.COLORMAP_TURBO), np.uint8)[:, :, ::-1]
    alpha = (np.minimum(1.0, heat / _YELLOW) * _MAX_OPACITY)[:, :, None]
    return np.asarray(base * (1 - alpha) + ramp * alpha, np.uint8)


def shrink_by_maximum(frame_map: NDArray[np.float32], size: tuple[int, int]) -> NDArray[np.float32]:
    """Shrink float32 [H, W] to `size` (width, height), at most W and H: each pixel is at least its cell's maximum."""
    height, width = frame_map.shape
    kernel = np.ones((-(-height // size[1]), -(-width // size[0])), np.uint8)
    # The window hangs right and down from its pixel; a centred one would miss the last half cell of each row.
    highest = np.asarray(cv2.dilate(frame_map, kernel, anchor=(0, 0)), np.float32)
    rows, columns = np.arange(size[1]) * height // size[1], np.arange(size[0]) * width // size[0]
    return np.asarray(highest[rows[:, None], columns[None, :]], np.float32)
