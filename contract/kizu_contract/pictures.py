"""Pictures from files and bytes to uint8 [H, W, C]: the one decoding that training and the edge share."""

import os
from pathlib import Path
from typing import Literal

import cv2
import numpy as np
from numpy.typing import NDArray

from kizu_contract.errors import PictureError

Colour = Literal["grey", "rgb"]
"""Colour space of a graph's tiles: `grey` has one channel, `rgb` three."""

PICTURE_SUFFIXES = frozenset({".bmp", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"})
"""File name endings, in lower case, that are taken for pictures."""

MAX_PICTURE_BYTES = 256 * 2**20
"""A larger file is refused before it is read."""
_ROWS_AT_ONCE = 64


def channels_of(colour: Colour) -> int:
    """Channels C of a colour space: 1 or 3."""
    return 1 if colour == "grey" else 3


def read_picture(path: Path, colour: Colour) -> NDArray[np.uint8]:
    """Read the picture at `path` as uint8 [H, W, C] in `colour`; 16-bit pictures are reduced to 8 bits.

    Raises PictureError, naming the file, when it is missing, too large or not a picture.
    """
    try:
        size = path.stat().st_size
        if size > MAX_PICTURE_BYTES:
            raise PictureError(f"{path}: {size} bytes; pictures may have at most {MAX_PICTURE_BYTES}")
        data = path.read_bytes()
    except OSError as exc:
        raise PictureError(f"{path}: cannot be read: {exc.strerror or exc}") from exc
    try:
        return to_colour(decode_picture(data), colour)
    except PictureError as exc:
        raise PictureError(f"{path}: {exc}") from exc


def decode_picture(data: bytes) -> NDArray[np.uint8]:
    """Decode an encoded picture to uint8 [H, W, 1] (grey file) or [H, W, 3] RGB. Raises PictureError."""
    if not data:
        raise PictureError("the file is empty")
    try:
        picture = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_ANYCOLOR)
    except cv2.error as exc:
        raise PictureError(f"is damaged: {exc.err}") from exc
    if picture is None:
        raise PictureError("is not a picture that OpenCV can decode, or is damaged")
    if picture.ndim == 2:
        return np.asarray(picture, np.uint8)[:, :, None]
    return swap_red_and_blue(np.asarray(picture, np.uint8))


def swap_red_and_blue(picture: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Turn `picture` uint8 [H, W, 3] from BGR, as OpenCV decodes, to RGB, or back: in place, and the same array.

    A second array of the picture's size would have to be given by the kernel, page by page, for each frame: that took
    as long as decoding.
    """
    for top in range(0, len(picture), _ROWS_AT_ONCE):
        rows = picture[top : top + _ROWS_AT_ONCE]
        rows[:] = cv2.cvtColor(rows, cv2.COLOR_BGR2RGB)
    return picture


def to_colour(picture: NDArray[np.uint8], colour: Colour) -> NDArray[np.uint8]:
    """Bring uint8 [H, W, 1 or 3 (RGB)] to `colour`; the same array when it is there already.

    Raises PictureError for any other form.
    """
    if picture.dtype != np.uint8 or picture.ndim != 3 or picture.shape[2] not in (1, 3) or 0 in picture.shape:
        raise PictureError(f"a picture must be uint8 [H, W, 1 or 3], not {picture.dtype} {list(picture.shape)}")
    if picture.shape[2] == channels_of(colour):
        return picture
    if colour == "grey":
        return np.asarray(cv2.cvtColor(picture, cv2.COLOR_RGB2GRAY), np.uint8)[:, :, None]
    return np.repeat(picture, 3, axis=2)


def list_pictures(folder: Path) -> list[Path]:
    """All picture files below `folder`, hidden ones left out, sorted by their relative path. Raises OSError."""
    return [folder / name for name in picture_names(folder)]


def picture_names(folder: Path) -> list[str]:
    """The relative paths of `list_pictures` as plain strings, for those who list for years.

    pathlib enters each part of each path into CPython's table of interned strings, which grows by it or, where names
    come and go, is laid out anew again and again. A folder below that may not be read is passed over, `folder` itself
    not. Raises OSError.
    """
    top = os.fspath(folder)

    def refuse(error: OSError) -> None:
        if error.filename == top or not isinstance(error, PermissionError):
            raise error

    found: list[str] = []
    for where, folders, files in os.walk(top, onerror=refuse):
        folders[:] = [name for name in folders if not name.startswith(".")]
        named = (name for name in files if not name.startswith(".") and _is_named_as_picture(name))
        below = "" if where == top else os.path.relpath(where, top)
        found += (os.path.join(below, name) for name in named if os.path.isfile(os.path.join(where, name)))
    return sorted(found, key=lambda name: name.split(os.sep))


def _is_named_as_picture(name: str) -> bool:
    return os.path.splitext(name)[1].lower() in PICTURE_SUFFIXES
