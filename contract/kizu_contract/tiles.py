"""Where tiles lie in a frame, how they are cut, and how their maps become one map.

Dimension letters: H, W picture height and width; T tile side; S stride; N tiles; C channels; m cell side.
"""

from dataclasses import dataclass
from functools import lru_cache
from math import gcd
from typing import TypeVar

import cv2
import numpy as np
from numpy.typing import NDArray

MAX_FRAME_PX = 65_535

_Number = TypeVar("_Number", bound=np.generic)


@dataclass(frozen=True)
class FrameSize:
    """Height and width of a frame in pixels, both from 1 to MAX_FRAME_PX. Raises ValueError."""

    height: int
    width: int

    def __post_init__(self) -> None:
        if not (1 <= self.height <= MAX_FRAME_PX and 1 <= self.width <= MAX_FRAME_PX):
            raise ValueError(f"a frame of {self} pixels; each side must lie between 1 and {MAX_FRAME_PX}")

    def __str__(self) -> str:
        return f"{self.height} × {self.width}"


@dataclass(frozen=True)
class TileGrid:
    """Square tiles of `tile_px`, one every `stride_px`, over a picture of any size.

    The last row and column are shifted inwards so that every pixel is covered. A picture smaller than a tile is
    mirrored up to one. `margin_px` mirrors the picture outwards on every side first, so that pixels at the border
    are covered by as many tiles as those inside (see docs/decisions/0003).

    Raises ValueError unless tile_px >= 1, 1 <= stride_px <= tile_px and 0 <= margin_px < tile_px.
    """

    tile_px: int
    stride_px: int
    margin_px: int = 0

    def __post_init__(self) -> None:
        if self.tile_px < 1:
            raise ValueError(f"tile_px is {self.tile_px}; it must be at least 1")
        if not 1 <= self.stride_px <= self.tile_px:
            raise ValueError(f"stride_px is {self.stride_px}; it must lie between 1 and tile_px = {self.tile_px}")
        if not 0 <= self.margin_px < self.tile_px:
            raise ValueError(f"margin_px is {self.margin_px}; it must lie between 0 and tile_px - 1")

    def layout(self, height: int, width: int) -> "TileLayout":
        """Lay the grid over a picture of `height` × `width` pixels (both >= 1)."""
        return _layout(self, height, width)


@dataclass(frozen=True, eq=False)
class TileLayout:
    """A grid laid over pictures of one size: N = rows × columns tiles, row by row.

    `ys` and `xs` are tile origins in the padded picture, whose size is `padded_height` × `padded_width` and whose
    pixel (margin_px, margin_px) is the picture's first pixel.
    """

    grid: TileGrid
    height: int
    width: int
    padded_height: int
    padded_width: int
    ys: tuple[int, ...]
    xs: tuple[int, ...]

    @property
    def count(self) -> int:
        """How many tiles one picture gives (N)."""
        return len(self.ys) * len(self.xs)

    def pad(self, picture: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """Mirror `picture` uint8 [H, W, C] outwards to the padded size; the picture itself where nothing is added."""
        if picture.shape[:2] != (self.height, self.width):
            raise ValueError(f"the layout is for {self.height} × {self.width} pixels, the picture has {picture.shape}")
        margin = self.grid.margin_px
        bottom = self.padded_height - self.height - margin
        right = self.padded_width - self.width - margin
        if margin == bottom == right == 0:
            return picture
        padded = cv2.copyMakeBorder(picture, margin, bottom, margin, right, cv2.BORDER_REFLECT_101)
        # OpenCV drops the channel axis of grey pictures.
        return np.asarray(padded, dtype=np.uint8).reshape(self.padded_height, self.padded_width, picture.shape[2])

    def cut(self, picture: NDArray[np.uint8], out: NDArray[np.uint8] | None = None) -> NDArray[np.uint8]:
        """Cut `picture` uint8 [H, W, C] into tiles uint8 [N, T, T, C], into `out` where it is given.

        Raises ValueError when the picture or `out` has another size than the layout.
        """
        padded = self.pad(picture)
        side, channels = self.grid.tile_px, picture.shape[2]
        shape = (self.count, side, side, channels)
        tiles = np.empty(shape, np.uint8) if out is None else out
        if tiles.shape != shape or tiles.dtype != np.uint8:
            raise ValueError(f"tiles are uint8 {shape}; they do not go into {tiles.dtype} {tiles.shape}")
        windows = _windows(padded, side)
        grid = tiles.reshape(len(self.ys), len(self.xs), side, side, channels)  # a view: only the first axis is split
        for rows, down in _runs(self.ys):
            for columns, across in _runs(self.xs):
                grid[rows, columns] = windows[down, across]  # views on both sides: each pixel is copied once a tile
        return tiles

    def stitch(self, maps: NDArray[np.float32]) -> NDArray[np.float32]:
        """Join tile maps float32 [N, T/m, T/m] into one float32 [H, W], averaging where tiles overlap.

        Raises ValueError when the maps have another number or form.
        """
        return self.spread(self.join(maps))

    def unit_px(self, cell_px: int) -> int:
        """Pixels a side that share a value of the joined map: `cell_px` where all tiles lie on its lattice, else 1."""
        unit = gcd(cell_px, self.padded_height, self.padded_width, *self.ys, *self.xs)
        return unit if unit == cell_px else 1

    def join(self, maps: NDArray[np.float32]) -> NDArray[np.float32]:
        """Average tile maps float32 [N, T/m, T/m] over the padded picture, one value for u × u pixels: [H'/u, W'/u].

        u is `unit_px`, H' × W' the padded size. Raises ValueError when the maps have another number or form.
        """
        cells = maps.shape[-1] if maps.ndim else 0
        side = self.grid.tile_px
        if cells < 1 or maps.shape != (self.count, cells, cells) or side % cells:
            raise ValueError(f"maps of shape {maps.shape} do not fit {self.count} tiles of {side} px")
        cell_px = side // cells
        # Where every origin falls on the cell lattice, the work is done on cells and enlarged once at the end.
        unit = self.unit_px(cell_px)
        spread, high, wide = cell_px // unit, self.padded_height // unit, self.padded_width // unit
        grid = maps.reshape(len(self.ys), len(self.xs), cells, cells)

        strips = np.zeros((len(self.ys), cells, wide), np.float32)
        line = strips.itemsize * wide
        for columns, x, step in _apart(self.xs, side):
            tiles = _enlarge(grid[:, columns].transpose(0, 2, 1, 3), spread, axis=3)
            strides = (cells * line, line, step // unit * strips.itemsize, strips.itemsize)
            _view(strips, tiles.shape, strides, x // unit * strips.itemsize)[...] += tiles
        total = np.zeros((high, wide), np.float32)
        for rows, y, step in _apart(self.ys, side):
            bands = strips[rows][:, :, None]
            shape = (len(bands), cells, spread, wide)
            strides = (step // unit * line, spread * line, line, total.itemsize)
            _view(total, shape, strides, y // unit * line)[...] += bands
        across, down = _covered(self.xs, side, unit, wide), _covered(self.ys, side, unit, high)
        if max(across.max(), down.max()) > 1:  # where no tiles overlap there is nothing to average
            total /= down[:, None] * across[None, :]
        return total

    def spread(self, joined: NDArray[np.float32]) -> NDArray[np.float32]:
        """Enlarge what `join` gave to pixels and cut the padding off: float32 [H, W].

        Raises ValueError when it is no joined map of this layout.
        """
        rows, columns = joined.shape
        unit = self.padded_height // max(1, rows)
        if (rows * unit, columns * unit) != (self.padded_height, self.padded_width):
            raise ValueError(
                f"a joined map of {rows} × {columns} does not fit {self.padded_height} × {self.padded_width}"
            )
        whole = _enlarge(_enlarge(joined, unit, axis=1), unit, axis=0)  # in this order rows are copied whole
        margin = self.grid.margin_px
        return np.ascontiguousarray(whole[margin : margin + self.height, margin : margin + self.width])


def _windows(picture: NDArray[np.uint8], side: int) -> NDArray[np.uint8]:
    """Every window of `picture` uint8 [H, W, C] as a view [H - T + 1, W - T + 1, T, T, C]; no pixel is copied."""
    whole = np.ascontiguousarray(picture)
    height, width, channels = whole.shape
    down, across, deep = whole.strides
    shape = (height - side + 1, width - side + 1, side, side, channels)
    return _view(whole, shape, (down, across, down, across, deep))


def _runs(starts: tuple[int, ...]) -> list[tuple[slice, slice]]:
    """Even runs of `starts` as slices, each with the places of its members: all, but for a last one shifted inwards."""
    step = starts[1] - starts[0] if len(starts) > 1 else 1
    even = len(starts) if starts[-1] == starts[0] + step * (len(starts) - 1) else len(starts) - 1
    runs = [(slice(0, even), slice(starts[0], starts[even - 1] + 1, step))]
    return runs if even == len(starts) else [*runs, (slice(even, None), slice(starts[-1], starts[-1] + 1))]


@lru_cache(maxsize=512)
def _apart(starts: tuple[int, ...], side: int) -> tuple[tuple[slice, int, int], ...]:
    """Sets of tiles that do not overlap: which of `starts`, the first of them, and pixels from one to the next."""
    runs = [(members, places.step or side) for members, places in _runs(starts)]
    return tuple(
        (slice(first, members.stop, -(-side // step)), starts[first], -(-side // step) * step)
        for members, step in runs
        for first in range(*members.indices(len(starts)))[: -(-side // step)]
    )


@lru_cache(maxsize=512)
def _covered(starts: tuple[int, ...], side: int, unit: int, length: int) -> NDArray[np.float32]:
    """How many tiles lie over each of `length` units of `unit` pixels; read-only."""
    tiles = np.zeros(length, np.float32)
    for start in starts:
        tiles[start // unit : (start + side) // unit] += 1
    tiles.setflags(write=False)  # it is kept for all frames
    return tiles


def _view(
    whole: NDArray[_Number], shape: tuple[int, ...], strides: tuple[int, ...], offset: int = 0
) -> NDArray[_Number]:
    """Of `whole`, contiguous, what lies at `strides` from byte `offset` on.

    numpy's `stride_tricks` go by `__array_interface__`, which enters names into CPython's table of interned strings
    for each frame and drops them again: the table is laid out anew every few thousand frames, and leaves holes.
    """
    view: NDArray[_Number] = np.ndarray(shape, whole.dtype, whole.data, offset, strides)
    return view


def _enlarge(values: NDArray[np.float32], times: int, axis: int) -> NDArray[np.float32]:
    return values if times == 1 else values.repeat(times, axis=axis)


@lru_cache(maxsize=256)
def _layout(grid: TileGrid, height: int, width: int) -> TileLayout:
    if height < 1 or width < 1:
        raise ValueError(f"a picture of {height} × {width} pixels has nothing to inspect")
    padded_height, ys = _axis(grid, height)
    padded_width, xs = _axis(grid, width)
    return TileLayout(grid, height, width, padded_height, padded_width, ys, xs)


def _axis(grid: TileGrid, length: int) -> tuple[int, tuple[int, ...]]:
    padded = max(length + 2 * grid.margin_px, grid.tile_px)
    last = padded - grid.tile_px
    starts = list(range(0, last + 1, grid.stride_px))
    if starts[-1] != last:
        starts.append(last)
    return padded, tuple(starts)
