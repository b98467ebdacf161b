"""Golden tiles: what a graph must answer, kept as three plain .npy arrays and read without numpy's header parser."""

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

# numpy's reader evaluates the header as Python; ours takes only the one spelling that numpy writes.
_NPY_HEADER = re.compile(
    rb"\{'descr': '(?P<dtype>\|u1|<f4)', 'fortran_order': False, "
    rb"'shape': \((?P<shape>\d{1,9},|\d{1,9}(?:, \d{1,9})+)\), \} *\n"
)
_NPY_START = b"\x93NUMPY\x01\x00"


@dataclass(frozen=True, eq=False)
class Golden:
    """Tiles uint8 [K, T, T, C] with the score [K] and map [K, T/m, T/m], float32, that the graph must give."""

    tiles: NDArray[np.uint8]
    score: NDArray[np.float32]
    map: NDArray[np.float32]

    def check(self, tile_px: int, channels: int, map_cell_px: int) -> None:
        """Raise BundleError unless the shapes fit such a graph, K is 1 to 256 and every number is finite."""
        count, side = len(self.tiles), tile_px // map_cell_px
        found = (self.tiles.shape, self.score.shape, self.map.shape)
        wanted = ((count, tile_px, tile_px, channels), (count,), (count, side, side))
        if not 1 <= count <= MAX_GOLDEN_TILES or found != wanted:
            raise BundleError(f"golden.npz holds shapes {found}; wanted {wanted}, at most {MAX_GOLDEN_TILES} tiles")
        if not (np.isfinite(self.score).all() and np.isfinite(self.map).all()):
            raise BundleError("golden.npz holds scores that are not finite numbers")


def pack_golden(golden: Golden) -> bytes:
    """Write golden.npz; the same arrays give the same bytes."""
    arrays = {
        "tiles.npy": golden.tiles.astype("|u1", casting="equiv"),
        "score.npy": golden.score.astype("<f4", casting="equiv"),
        "map.npy": golden.map.astype("<f4", casting="equiv"),
    }
    return pack_archive({name: _npy(array) for name, array in arrays.items()})


def unpack_golden(data: bytes) -> Golden:
    """Read golden.npz, at most MAX_GOLDEN_BYTES. Raises BundleError; shapes are left to `Golden.check`."""
    names = ("tiles.npy", "score.npy", "map.npy")
    parts = unpack_archive(io.BytesIO(data), dict.fromkeys(names, MAX_GOLDEN_BYTES))
    if len(parts) != len(names):
        raise BundleError(f"golden.npz must hold {', '.join(names)}")
    tiles, score, cells = (_array(parts[name], name) for name in names)
    if not (tiles.dtype == np.uint8 and score.dtype == cells.dtype == np.float32):
        raise BundleError(f"golden.npz holds {tiles.dtype}, {score.dtype}, {cells.dtype}; wanted uint8, float32 twice")
    return Golden(tiles, score, cells)


def _npy(array: NDArray[Any]) -> bytes:
    buffer = io.BytesIO()
    np.lib.format.write_array(buffer, np.ascontiguousarray(array), version=(1, 0), allow_pickle=False)
    return buffer.getvalue()


def _array(data: bytes, name: str) -> NDArray[Any]:
    """Read one .npy whose header must describe exactly the bytes that follow: nothing is allocated on its word."""
    body = 10 + int.from_bytes(data[8:10], "little")
    header = _NPY_HEADER.fullmatch(data[10:body])
    if data[:8] != _NPY_START or header is None:
        raise BundleError(f"golden.npz: {name} is no plain array of uint8 or float32, in C order")
    dtype = np.dtype(header["dtype"].decode())
    shape = tuple(int(length) for length in header["shape"].rstrip(b",").split(b", "))
    wanted = dtype.itemsize * math.prod(shape)
    if wanted != len(data) - body:
        raise BundleError(f"golden.npz: {name} holds {len(data) - body} bytes, its header says {wanted}")
    return np.frombuffer(data, dtype, offset=body).reshape(shape)
