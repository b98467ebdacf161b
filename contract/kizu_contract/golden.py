"""Golden tiles: what a graph must answer, kept as plain .npy arrays and read without numpy's header parser."""

import io
import math
import re
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kizu_contract.archive import pack_archive, unpack_archive
from kizu_contract.errors import BundleError

MAX_GOLDEN_TILES = 256
MAX_GOLDEN_BYTES = 64 * 2**20
_POSITION = "position.npy"

# numpy's reader evaluates the header as Python; ours takes only the one spelling that numpy writes.
_NPY_HEADER = re.compile(
    rb"\{'descr': '(?P<dtype>\|u1|<f4|<i8)', 'fortran_order': False, "
    rb"'shape': \((?P<shape>\d{1,9},|\d{1,9}(?:, \d{1,9})+)\), \} *\n"
)
_NPY_START = b"\x93NUMPY\x01\x00"


@dataclass(frozen=True, eq=False)
class Golden:
    """Tiles uint8 [K, T, T, C] with the score [K] and map [K, T/m, T/m], float32, that the graph must give.

    `position` int64 [K] says where in its frame's grid each tile lies, for graphs that take it; None stands for 0s.
    """

    tiles: NDArray[np.uint8]
    score: NDArray[np.float32]
    map: NDArray[np.float32]
    position: NDArray[np.int64] | None = None

    def check(self, tile_px: int, channels: int, map_cell_px: int) -> None:
        """Raise BundleError unless the shapes fit such a graph, K is 1 to 256 and every number is finite."""
        count, side = len(self.tiles), tile_px // map_cell_px
        found = (self.tiles.shape, self.score.shape, self.map.shape)
        wanted = ((count, tile_px, tile_px, channels), (count,), (count, side, side))
        if not 1 <= count <= MAX_GOLDEN_TILES or found != wanted:
            raise BundleError(f"golden.npz holds shapes {found}; wanted {wanted}, at most {MAX_GOLDEN_TILES} tiles")
        if not (np.isfinite(self.score).all() and np.isfinite(self.map).all()):
            raise BundleError("golden.npz holds scores that are not finite numbers")

    def check_position(self, takes_position: bool, places: int | None) -> None:
        """Raise BundleError unless positions fit such a graph: int64 [K] from 0 to `places` - 1 (None: unbounded)."""
        if self.position is None:
            return
        if not takes_position:
            raise BundleError("golden.npz holds positions, and the graph takes none")
        if self.position.shape != (len(self.tiles),):
            raise BundleError(f"golden.npz holds positions {self.position.shape} for {len(self.tiles)} tiles")
        if self.position.min() < 0 or (places is not None and self.position.max() >= places):
            raise BundleError(f"golden.npz holds positions outside the frame's grid of {places} tiles")

    def positions(self) -> NDArray[np.int64]:
        """The position of each tile, int64 [K]; 0 where none were kept."""
        return np.zeros(len(self.tiles), np.int64) if self.position is None else self.position


def golden_frame(tiles: NDArray[np.uint8], height: int, width: int) -> NDArray[np.uint8]:
    """A frame uint8 [H, W, C] of golden `tiles` side by side: what both graphs of a bundle must score alike."""
    side = tiles.shape[1]
    rows, columns = -(-height // side), -(-width // side)
    chosen = tiles[np.arange(rows * columns) % len(tiles)].reshape(rows, columns, *tiles.shape[1:])
    whole = chosen.transpose(0, 2, 1, 3, 4).reshape(rows * side, columns * side, tiles.shape[3])
    return np.ascontiguousarray(whole[:height, :width])


def pack_golden(golden: Golden) -> bytes:
    """Write golden.npz; the same arrays give the same bytes."""
    arrays = {
        "tiles.npy": golden.tiles.astype("|u1", casting="equiv"),
        "score.npy": golden.score.astype("<f4", casting="equiv"),
        "map.npy": golden.map.astype("<f4", casting="equiv"),
    }
    if golden.position is not None:
        arrays[_POSITION] = golden.position.astype("<i8", casting="equiv")
    return pack_archive({name: _npy(array) for name, array in arrays.items()})


def unpack_golden(data: bytes) -> Golden:
    """Read golden.npz, at most MAX_GOLDEN_BYTES. Raises BundleError; shapes are left to `Golden.check`."""
    names = ("tiles.npy", "score.npy", "map.npy")
    parts = unpack_archive(io.BytesIO(data), dict.fromkeys((*names, _POSITION), MAX_GOLDEN_BYTES))
    if not parts.keys() >= set(names):
        raise BundleError(f"golden.npz must hold {', '.join(names)}")
    tiles, score, cells = (_array(parts[name], name) for name in names)
    position = _array(parts[_POSITION], _POSITION) if _POSITION in parts else None
    if not (tiles.dtype == np.uint8 and score.dtype == cells.dtype == np.float32):
        raise BundleError(f"golden.npz holds {tiles.dtype}, {score.dtype}, {cells.dtype}; wanted uint8, float32 twice")
    if position is not None and position.dtype != np.int64:
        raise BundleError(f"golden.npz holds positions of type {position.dtype}; wanted int64")
    return Golden(tiles, score, cells, position)


def _npy(array: NDArray[Any]) -> bytes:
    buffer = io.BytesIO()
    np.lib.format.write_array(buffer, np.ascontiguousarray(array), version=(1, 0), allow_pickle=False)
    return buffer.getvalue()


def _array(data: bytes, name: str) -> NDArray[Any]:
    """Read one .npy whose header must describe exactly the bytes that follow: nothing is allocated on its word."""
    body = 10 + int.from_bytes(data[8:10], "little")
    header = _NPY_HEADER.fullmatch(data[10:body])
    if data[:8] != _NPY_START or header is None:
        raise BundleError(f"golden.npz: {name} is no plain array of uint8, float32 or int64, in C order")
    dtype = np.dtype(header["dtype"].decode())
    shape = tuple(int(length) for length in header["shape"].rstrip(b",").split(b", "))
    wanted = dtype.itemsize * math.prod(shape)
    if wanted != len(data) - body:
        raise BundleError(f"golden.npz: {name} holds {len(data) - body} bytes, its header says {wanted}")
    return np.frombuffer(data, dtype, offset=body).reshape(shape)
