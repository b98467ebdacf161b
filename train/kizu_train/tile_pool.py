"""Tiles of the good pictures, drawn by the grid's own geometry from pictures kept in memory up to a bound."""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import NDArray

from kizu_contract.pictures import Colour, channels_of, read_picture
from kizu_contract.tiles import FrameSize, TileGrid, TileLayout
from kizu_train.errors import DataError

_TURN = 200
"""Steps that one shard serves where the pictures do not fit into memory together."""
_ORDER_SEED = 0x0DE5


@dataclass(frozen=True, eq=False)
class _Shard:
    """Padded pictures laid end to end in `rows` uint8; the arrays run along them."""

    rows: NDArray[np.uint8]
    """Every run of T · C bytes that starts somewhere in the pictures, [bytes - T·C + 1, T·C]: a view."""
    starts: NDArray[np.int64]
    widths: NDArray[np.int64]
    last_y: NDArray[np.int64]
    last_x: NDArray[np.int64]
    columns: NDArray[np.int64]
    tiles: NDArray[np.int64]
    """Running total of the grid's tiles, so that a picture is drawn in proportion to its size."""


class TilePool:
    """A `TileSource` over picture files; `batch(step, size)` depends on the seed and the step alone.

    A random tile is a tile of the grid, moved by up to half a stride each way: every pixel can be covered, and the
    tiles shifted inwards at the last row and column keep their share. At most about `cache_mb` MiB of pictures are
    held at once (one picture at least); larger sets are dealt into shards that take turns of 200 steps.
    """

    def __init__(self, paths: Sequence[Path], grid: TileGrid, colour: Colour, seed: int, cache_mb: int) -> None:
        self._paths, self._grid, self._colour, self._seed = tuple(paths), grid, colour, seed
        self._channels = channels_of(colour)
        self._limit = cache_mb * 2**20
        self._count = 0
        self._sizes: dict[Path, FrameSize] = {}
        self._shards = self._deal()
        self._held: tuple[int, _Shard] | None = None

    def __getstate__(self) -> dict[str, Any]:
        """Another process reads its pictures itself: a view of every run of bytes would travel as all of them."""
        return self.__dict__ | {"_held": None}

    @property
    def count(self) -> int:
        """How many tiles one sweep gives."""
        return self._count

    def batch(self, step: int, size: int) -> NDArray[np.uint8]:
        """`size` random tiles uint8 [size, T, T, C] of step `step`."""
        shard = self._shard((step // _TURN) % len(self._shards))
        side, stride = self._grid.tile_px, self._grid.stride_px
        draw = np.random.default_rng([self._seed, step])
        tile = draw.integers(0, shard.tiles[-1], size)
        picture = np.searchsorted(shard.tiles, tile, side="right")
        row, column = np.divmod(tile - np.append(0, shard.tiles)[picture], shard.columns[picture])
        moved = draw.integers(-(stride // 2), stride - stride // 2, (2, size))
        y = np.clip(np.minimum(row * stride, shard.last_y[picture]) + moved[0], 0, shard.last_y[picture])
        x = np.clip(np.minimum(column * stride, shard.last_x[picture]) + moved[1], 0, shard.last_x[picture])
        down = np.arange(side)
        pixel = shard.starts[picture, None] + (y[:, None] + down) * shard.widths[picture, None] + x[:, None]
        tiles: NDArray[np.uint8] = shard.rows[pixel * self._channels]  # [size, T, T·C]
        return tiles.reshape(size, side, side, self._channels)

    def sweep(self) -> Iterator[NDArray[np.uint8]]:
        """Every tile of the grid once, uint8 [N, T, T, C], picture by picture; within one, in order of position."""
        for path in self._paths:
            picture = read_picture(path, self._colour)
            yield self._layout(picture).cut(picture)

    def frame_layout(self) -> TileLayout:
        """The grid over the pictures' one common size. Raises DataError, naming a picture, where sizes differ."""
        common, count = Counter(self._sizes.values()).most_common(1)[0]
        odd = [path for path in self._paths if self._sizes[path] != common]
        if odd:
            raise DataError(
                f"{odd[0]}: has {self._sizes[odd[0]]} pixels, {count} of {len(self._paths)} pictures have {common}: "
                "this detector learns each place of the frame and needs pictures of one size; "
                f"crop, scale or leave out the {len(odd)} others"
            )
        return self._grid.layout(common.height, common.width)

    def _layout(self, picture: NDArray[np.uint8]) -> TileLayout:
        return self._grid.layout(*picture.shape[:2])

    def _deal(self) -> list[list[Path]]:
        """Paths in seeded order, cut into shards by the size of their padded pictures."""
        order = np.random.default_rng([self._seed, _ORDER_SEED]).permutation(len(self._paths))
        shards: list[list[Path]] = [[]]
        filled = 0
        for index in order:
            picture = read_picture(self._paths[index], self._colour)
            layout = self._layout(picture)
            self._sizes[self._paths[index]] = FrameSize(*picture.shape[:2])
            self._count += layout.count
            size = layout.padded_height * layout.padded_width * self._channels
            if shards[-1] and filled + size > self._limit:
                shards.append([])
                filled = 0
            shards[-1].append(self._paths[index])
            filled += size
        return shards

    def _shard(self, index: int) -> _Shard:
        if self._held is None or self._held[0] != index:
            self._held = None  # let go of the old pictures before the new ones come
            self._held = (index, self._load(self._shards[index]))
        return self._held[1]

    def _load(self, paths: Sequence[Path]) -> _Shard:
        layouts, padded = [], []
        for path in paths:
            picture = read_picture(path, self._colour)
            layouts.append(self._layout(picture))
            padded.append(layouts[-1].pad(picture).ravel())
        pixels = np.array([data.size // self._channels for data in padded])
        side = self._grid.tile_px
        return _Shard(
            sliding_window_view(np.concatenate(padded), side * self._channels),
            np.cumsum(pixels) - pixels,
            np.array([layout.padded_width for layout in layouts]),
            np.array([layout.ys[-1] for layout in layouts]),
            np.array([layout.xs[-1] for layout in layouts]),
            np.array([len(layout.xs) for layout in layouts]),
            np.cumsum([layout.count for layout in layouts]),
        )
