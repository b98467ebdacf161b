"""The picture people read: the frame's map laid over the frame, in colours that mean the same everywhere."""

import cv2
import numpy as np
from numpy.typing import NDArray

from kizu_contract.judging import Thresholds
from kizu_contract.pictures import to_colour

_MAX_OPACITY = 0.6


def overlay(
    picture: NDArray[np.uint8], frame_map: NDArray[np.float32], thresholds: Thresholds, width: int | None = None
) -> NDArray[np.uint8]:
    """Lay `frame_map` float32 [H, W] over `picture` uint8 [H, W, 1 or 3]; RGB uint8, at most `width` wide.

    Colour and opacity follow map ÷ reject threshold: nothing up to half the warn threshold, yellow at the reject
    threshold, deep red from twice that on. Without a fixed scale every good part would show a red spot.
    """
    height, full = picture.shape[:2]
    if width is not None and width < full:
        size = (width, max(1, round(height * width / full)))
        picture = np.asarray(cv2.resize(picture, size, interpolation=cv2.INTER_AREA), np.uint8)
        picture = picture if picture.ndim == 3 else picture[:, :, None]
        # The map is enlarged or shrunk by its maximum's neighbourhood: a thin defect must stay visible.
        frame_map = shrink_by_maximum(frame_map, size)
    base = to_colour(picture, "rgb").astype(np.float32)
    low = 0.5 * thresholds.warn
    heat = np.clip((frame_map - low) / max(2 * thresholds.reject - low, 1e-12), 0, 1)
    heat = np.nan_to_num(heat, nan=1.0)
    ramp = np.asarray(cv2.applyColorMap((heat * 255).astype(np.uint8), cv2.COLORMAP_TURBO), np.uint8)[:, :, ::-1]
    alpha = (np.minimum(1.0, 3 * heat) * _MAX_OPACITY)[:, :, None]
    return np.asarray(base * (1 - alpha) + ramp * alpha, np.uint8)


def shrink_by_maximum(frame_map: NDArray[np.float32], size: tuple[int, int]) -> NDArray[np.float32]:
    """Shrink float32 [H, W] to `size` (width, height), keeping about the maximum of each cell."""
    height, width = frame_map.shape
    kernel = (max(1, -(-width // size[0])), max(1, -(-height // size[1])))
    highest = cv2.dilate(frame_map, np.ones(kernel[::-1], np.uint8)) if kernel != (1, 1) else frame_map
    return np.asarray(cv2.resize(highest, size, interpolation=cv2.INTER_NEAREST), np.float32)
