"""Golden tiles and the preview: what every later stage recomputes to prove that it still scores alike."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np
from numpy.typing import NDArray

from kizu_contract.heatmap import overlay
from kizu_contract.judging import FrameScore, Thresholds
from kizu_contract.pictures import Colour, read_picture
from kizu_contract.tiles import TileGrid

GOLDEN_GOOD, GOLDEN_CORRUPTED = 12, 4
PREVIEW_PX = 320


class GoldenTiles(NamedTuple):
    """Tiles uint8 [K, T, T, C], and the index of each in its frame's grid, int64 [K]."""

    tiles: NDArray[np.uint8]
    position: NDArray[np.int64]


def golden_tiles(paths: Sequence[Path], grid: TileGrid, colour: Colour, seed: int) -> GoldenTiles:
    """16 tiles of the pictures at `paths`: 12 as they are, 4 with a drawn flaw."""
    draw = np.random.default_rng([seed, 0x601D])
    chosen, position = [], []
    for index in range(GOLDEN_GOOD + GOLDEN_CORRUPTED):
        tiles = _tiles(paths[index % len(paths)], grid, colour)
        position.append(int(draw.integers(len(tiles))))
        tile = tiles[position[-1]]
        chosen.append(tile if index < GOLDEN_GOOD else _corrupt(tile, draw))
    return GoldenTiles(np.stack(chosen), np.array(position, np.int64))


def preview(picture: NDArray[np.uint8], found: FrameScore, thresholds: Thresholds) -> NDArray[np.uint8]:
    """The picture with its heatmap, uint8 RGB [H, W, 3], at most 320 wide."""
    return overlay(picture, found.map, thresholds, PREVIEW_PX)


def _tiles(path: Path, grid: TileGrid, colour: Colour) -> NDArray[np.uint8]:
    picture = read_picture(path, colour)
    return grid.layout(*picture.shape[:2]).cut(picture)


def _corrupt(tile: NDArray[np.uint8], draw: np.random.Generator) -> NDArray[np.uint8]:
    """A scratch of the opposite brightness across the tile."""
    side, shade = tile.shape[0], 255 if tile.mean() < 128 else 0
    ends = [(int(x), int(y)) for x, y in draw.integers(0, side, (2, 2))]
    mask = np.asarray(cv2.line(np.zeros((side, side), np.uint8), ends[0], ends[1], 1, max(1, side // 16)), np.bool_)
    flawed: NDArray[np.uint8] = tile.copy()
    flawed[mask] = shade
    return flawed
