"""The picture people read: the frame's map laid over the frame, in colours that mean the same everywhere."""

import cv2
import numpy as np
from numpy.typing import NDArray

from kizu_contract.judging import Thresholds
from kizu_contract.pictures import to_colour

_MAX_OPACITY = 0.6
_YELLOW = 158
"""Where the colour map (Turbo, 256 steps) is yellow."""
_TURBO = np.asarray(cv2.applyColorMap(np.arange(256, dtype=np.uint8)[None], cv2.COLORMAP_TURBO)[0, :, ::-1])
_OPACITY = (np.minimum(1.0, np.arange(256) / _YELLOW) * _MAX_OPACITY).astype(np.float32)[:, None]
_INK, _KEPT = _TURBO * _OPACITY, 1 - _OPACITY
"""What each step of heat puts on a pixel float32 [256, 3], and how much of the pixel it leaves [256, 1]."""


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
        picture = _shrink(picture, size)
        # Averaging would make a thin defect vanish.
        frame_map = shrink_by_maximum(frame_map, size)
    picture = to_colour(picture, "rgb").copy()
    limits = (0.5 * thresholds.warn, thresholds.reject, 2 * thresholds.reject)
    warm = np.flatnonzero(frame_map.max(axis=1) > limits[0])
    if len(warm):  # most rows of most pictures show nothing
        rows = slice(int(warm[0]), int(warm[-1]) + 1)
        heat = np.interp(frame_map[rows], limits, (0, _YELLOW, 255)).astype(np.uint8)
        picture[rows] = picture[rows] * _KEPT[heat] + _INK[heat]
    return picture


def _shrink(picture: NDArray[np.uint8], size: tuple[int, int]) -> NDArray[np.uint8]:
    """Shrink uint8 [H, W, C] to `size` (width, height) by averaging; by halves first, which is much faster."""
    height, width, channels = picture.shape
    if width % 2 == 0 and height % 2 == 0 and width >= 2 * size[0] and height >= 2 * size[1]:
        half = np.asarray(cv2.resize(picture, (width // 2, height // 2), interpolation=cv2.INTER_AREA), np.uint8)
        return _shrink(half.reshape(height // 2, width // 2, channels), size)
    small = np.asarray(cv2.resize(picture, size, interpolation=cv2.INTER_AREA), np.uint8)
    return small.reshape(size[1], size[0], channels)


def shrink_by_maximum(frame_map: NDArray[np.float32], size: tuple[int, int]) -> NDArray[np.float32]:
    """Shrink float32 [H, W] to `size` (width, height), at most W and H: each pixel is at least its cell's maximum."""
    height, width = frame_map.shape
    rows, columns = np.arange(size[1]) * height // size[1], np.arange(size[0]) * width // size[0]
    highest = frame_map[rows]
    for below in range(1, -(-height // size[1])):
        np.maximum(highest, frame_map[np.minimum(rows + below, height - 1)], out=highest)
    # The window hangs right from its pixel; a centred one would miss the last half cell of each row.
    kernel = np.ones((1, -(-width // size[0])), np.uint8)
    return np.asarray(np.asarray(cv2.dilate(highest, kernel, anchor=(0, 0)))[:, columns], np.float32)
