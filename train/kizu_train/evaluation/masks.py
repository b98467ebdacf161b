"""Ground truth: which pixels of a picture are defective."""

from contextlib import suppress
from pathlib import Path

import cv2
import numpy as np
from numpy.typing import NDArray

from kizu_contract.errors import PictureError


def read_mask(path: Path, height: int, width: int) -> NDArray[np.bool_]:
    """Read a ground-truth mask as bool [H, W], true where any colour channel is above 0.

    Raises PictureError when it is missing, damaged or not of the picture's size.
    """
    try:
        data = np.fromfile(path, np.uint8)
    except OSError as exc:
        raise PictureError(f"{path}: the mask cannot be read: {exc.strerror}") from exc
    mask = None
    # A damaged file makes OpenCV return None or raise, depending on the format.
    with suppress(cv2.error):
        # Unchanged: a reduction to 8 bits or to grey would lose small values such as class numbers.
        mask = cv2.imdecode(data, cv2.IMREAD_UNCHANGED) if data.size else None
    if mask is None:
        raise PictureError(f"{path}: the mask is not a picture that OpenCV can decode, or is damaged")
    if mask.shape[:2] != (height, width):
        raise PictureError(f"{path}: the mask has {mask.shape[1]} × {mask.shape[0]} px, its picture {width} × {height}")
    colours = mask.reshape(height, width, -1)[:, :, :3]
    return np.asarray((colours > 0).any(axis=2))
