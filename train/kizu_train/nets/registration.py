"""Registration of pictures by translation, and places: whole frames cut into tiles with an apron and put together."""

from collections.abc import Iterable, Sequence

import cv2
import numpy as np
from numpy.typing import NDArray

from kizu_contract.tiles import TileLayout

Plane = NDArray[np.float32]
"""A picture float32 [H, W, C], in grey levels."""

_BORDER = cv2.BORDER_REFLECT_101


def shift_between(reference: Plane, picture: Plane, most_px: float) -> tuple[float, float]:
    """By how many pixels (x, y) `picture` is moved against `reference`, each at most `most_px`.

    Phase correlation (Kuglin & Hines, 1975) under a Hann window finds whole pixels, the enhanced correlation
    coefficient (Evangelidis & Psarakis, 2008) the fraction. What they find counts only where it brings the pictures
    closer together: (0, 0) otherwise, as on an even surface.
    """
    high, wide = reference.shape[:2]
    window = cv2.createHanningWindow((wide, high), cv2.CV_32F)
    fixed, moving = _grey(reference), _grey(picture)
    # phaseCorrelate multiplies the window into its inputs where their size needs no padding: it gets copies.
    (x, y), _ = cv2.phaseCorrelate(fixed.copy(), moving.copy(), window)
    shift = _refined(fixed, moving, (float(x), float(y)))
    if not (np.isfinite(shift).all() and max(map(abs, shift)) <= most_px):
        return 0.0, 0.0
    closer = np.abs(moved_back(picture, shift) - reference).mean() < np.abs(picture - reference).mean()
    return shift if closer else (0.0, 0.0)


def _refined(fixed: Plane, moving: Plane, shift: tuple[float, float]) -> tuple[float, float]:
    """`shift` to a fraction of a pixel; itself where the search does not converge."""
    matrix = np.array([[1, 0, shift[0]], [0, 1, shift[1]]], np.float32)
    enough = (cv2.TERM_CRITERIA_EPS | cv2.TERM_CRITERIA_COUNT, 12, 1e-6)
    try:
        _, found = cv2.findTransformECC(fixed, moving, matrix, cv2.MOTION_TRANSLATION, enough)
    except cv2.error:
        return shift
    return float(found[0, 2]), float(found[1, 2])


def moved_back(picture: Plane, shift: tuple[float, float]) -> Plane:
    """`picture` moved back by `shift` (x, y), bilinear, mirrored at its edges."""
    x, y = shift
    matrix = np.array([[1, 0, x], [0, 1, y]], np.float32)
    size = (picture.shape[1], picture.shape[0])
    moved = cv2.warpAffine(picture, matrix, size, flags=cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP, borderMode=_BORDER)
    return np.asarray(moved, np.float32).reshape(picture.shape)


def gradient(picture: Plane) -> Plane:
    """Length of the gradient [H, W, C] in grey levels per pixel, by Sobel's operator."""
    across = cv2.Sobel(picture, cv2.CV_32F, 1, 0, scale=1 / 8, borderType=_BORDER)
    down = cv2.Sobel(picture, cv2.CV_32F, 0, 1, scale=1 / 8, borderType=_BORDER)
    return np.hypot(across, down).astype(np.float32).reshape(picture.shape)


def blurred(picture: Plane, sigma_px: float) -> Plane:
    """`picture` under a Gaussian, mirrored at its edges; itself for 0."""
    if sigma_px == 0:
        return picture
    found = cv2.GaussianBlur(picture, (0, 0), sigma_px, borderType=_BORDER)
    return np.asarray(found, np.float32).reshape(picture.shape)


def joined(layout: TileLayout, tiles: NDArray[np.uint8]) -> Plane:
    """The padded picture [H', W', C] that `tiles` uint8 [P, T, T, C] were cut from, in order of position."""
    rows, columns = _pixels(layout, 0)
    whole = np.empty((layout.padded_height, layout.padded_width, tiles.shape[3]), np.float32)
    whole[rows, columns] = tiles
    return whole


def cut_places(layout: TileLayout, picture: Plane, apron_px: int) -> Plane:
    """Every place [P, T + 2a, T + 2a, C] of a padded picture [H', W', C], with `apron_px` more on each side."""
    wide = cv2.copyMakeBorder(picture, apron_px, apron_px, apron_px, apron_px, _BORDER)
    rows, columns = _pixels(layout, apron_px)
    return np.asarray(wide, np.float32).reshape(*wide.shape[:2], picture.shape[2])[rows, columns]


def mean_of(pictures: Iterable[Plane]) -> Plane:
    """The mean of at least one picture."""
    total: NDArray[np.float64] | None = None
    count = 0
    for picture in pictures:
        total = picture.astype(np.float64) if total is None else total + picture
        count += 1
    if total is None:
        raise ValueError("the mean of no picture")
    return (total / count).astype(np.float32)


def _grey(picture: Plane) -> Plane:
    return np.ascontiguousarray(picture.mean(axis=2, dtype=np.float32))


def _pixels(layout: TileLayout, apron_px: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Rows and columns [P, T + 2a, T + 2a] of every place's pixels, in a picture widened by the apron."""
    side = np.arange(layout.grid.tile_px + 2 * apron_px)

    def along(starts: Sequence[int]) -> NDArray[np.int64]:
        return np.asarray(starts, np.int64)[:, None] + side

    rows, columns = along(layout.ys), along(layout.xs)
    high, wide, length = len(rows), len(columns), len(side)
    shape = (high, wide, length, length)
    return (
        np.broadcast_to(rows[:, None, :, None], shape).reshape(high * wide, length, length),
        np.broadcast_to(columns[None, :, None, :], shape).reshape(high * wide, length, length),
    )
