"""Tiles to compare with: a bounded sample of a sweep, classes of other things from a folder, kinds of places.

Letters: N tiles; T tile side; C channels.
"""

from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kizu_contract.pictures import Colour, list_pictures
from kizu_contract.tiles import TileGrid
from kizu_train.detectors.base import TileShape, TileSource
from kizu_train.errors import DataError
from kizu_train.tile_pool import TilePool

_MOST_BYTES = 128 * 2**20
"""Of tiles in memory, all classes together."""
_THUMB = 4


@dataclass(frozen=True, eq=False)
class TileSample:
    """Tiles uint8 [N, T, T, C], the place of each in its picture's grid [N], and whether all grids are alike."""

    tiles: NDArray[np.uint8]
    places: NDArray[np.int64]
    has_one_grid: bool


def sample_tiles(source: TileSource, most: int, seed: int) -> TileSample:
    """At most `most` tiles of a sweep, chosen by `seed`, none twice, in the sweep's order."""
    draw = np.random.default_rng([seed, 0x5A3])
    chosen = np.sort(draw.choice(source.count, min(most, source.count), replace=False))
    tiles, places, lengths, start = [], [], set(), 0
    for part in source.sweep():
        low, high = np.searchsorted(chosen, (start, start + len(part)))
        places.append(chosen[low:high] - start)
        tiles.append(part[places[-1]])
        lengths.add(len(part))
        start += len(part)
    return TileSample(np.concatenate(tiles), np.concatenate(places), len(lengths) == 1)


def read_references(folder: Path, shape: TileShape, seed: int) -> list[Tensor]:
    """Tiles uint8 [n, T, T, C] of each class, in the order of the sub-folders' names.

    Pictures smaller than a tile are mirrored up to one. Raises DataError where there are not at least two classes with
    pictures.
    """
    classes = [list_pictures(item) for item in sorted(folder.iterdir()) if item.is_dir()] if folder.is_dir() else []
    classes = [paths for paths in classes if paths]
    if len(classes) < 2:
        raise DataError(f"{folder}: references are at least two sub-folders of pictures, one for each class of things")
    most = max(1, _MOST_BYTES // (len(classes) * shape.tile_px**2 * shape.channels))
    grid = TileGrid(shape.tile_px, max(1, shape.tile_px // 2))
    colour: Colour = "grey" if shape.channels == 1 else "rgb"
    pools = (TilePool(paths, grid, colour, seed, cache_mb=1) for paths in classes)
    return [torch.from_numpy(sample_tiles(pool, most, seed).tiles) for pool in pools]


@dataclass(frozen=True)
class Places:
    """Kinds of places in the picture as classes, where pictures show the same at the same place.

    Places are sorted into `kinds` (0: none) by what they look like on average. They are used only if the place explains
    at least `least_explained` of the variance of tiles (adjusted R² of 4 × 4 px thumbnails).
    """

    kinds: int = 8
    least_explained: float = 0.25

    def __post_init__(self) -> None:
        if not (self.kinds == 0 or 2 <= self.kinds <= 64) or not 0 <= self.least_explained <= 1:
            raise ValueError("kinds must be 0 or between 2 and 64, least_explained between 0 and 1")


def place_kinds(sample: TileSample, places: Places, seed: int) -> NDArray[np.int64] | None:
    """The kind of each tile's place [N], from 0; None where places are not asked for, or say too little."""
    if not places.kinds or not sample.has_one_grid:
        return None
    thumbs = _thumbnails(sample.tiles)
    _, index, counts = np.unique(sample.places, return_inverse=True, return_counts=True)
    freedom = len(thumbs) - len(counts)
    if len(counts) < places.kinds or freedom < 1:
        return None
    sums = np.zeros((len(counts), thumbs.shape[1]))
    np.add.at(sums, index, thumbs)
    means = sums / counts[:, None]
    within = ((thumbs - means[index]) ** 2).sum() / freedom
    total = max(((thumbs - thumbs.mean(0)) ** 2).sum() / (len(thumbs) - 1), 1e-12)
    if 1 - within / total < places.least_explained:
        return None
    return _clusters(means.astype(np.float32), places.kinds, seed)[index]


def _thumbnails(tiles: NDArray[np.uint8]) -> NDArray[np.float32]:
    # Rows and columns beyond a multiple of 4 change nothing in what a place looks like.
    cell = max(1, tiles.shape[1] // _THUMB)
    cells = tiles.shape[1] // cell
    cut = tiles[:, : cells * cell, : cells * cell]
    blocks = cut.reshape(len(tiles), cells, cell, cells, cell, -1)
    return np.asarray(blocks.mean((2, 4), dtype=np.float32)).reshape(len(tiles), -1)


def _clusters(points: NDArray[np.float32], kinds: int, seed: int) -> NDArray[np.int64]:
    cv2.setRNGSeed(seed % 2**31)
    until = (cv2.TERM_CRITERIA_MAX_ITER | cv2.TERM_CRITERIA_EPS, 50, 1e-3)
    labels = cv2.kmeans(points, kinds, np.zeros((len(points), 1), np.int32), until, 3, cv2.KMEANS_PP_CENTERS)[1]
    return np.asarray(labels, np.int64)[:, 0]
