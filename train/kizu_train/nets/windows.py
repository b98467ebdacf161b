"""Smaller windows inside a tile: cut, and their maps put back, by constant matrices, so that any engine runs them.

Letters: N tiles; C channels; T tile side; t window side; W windows along a side; k map cells along a window's side;
m side of the tile's map cells.
"""

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from kizu_contract.tiles import TileGrid


class CutWindows(nn.Module):
    """Tiles [N, T, T, C] → windows [N · W², t, t, C], row by row within a tile."""

    def __init__(self, tile_px: int, grid: TileGrid) -> None:
        super().__init__()
        starts = window_starts(tile_px, grid)
        self.side, self.count = grid.tile_px, len(starts)
        index = torch.tensor([start + i for start in starts for i in range(self.side)])
        self.is_partition = index.tolist() == list(range(tile_px))
        """Windows that do not overlap are cut without a copy of each pixel."""
        self.register_buffer("index", index, persistent=False)

    def forward(self, tiles: Tensor) -> Tensor:
        """Cut `tiles`."""
        if self.count == 1:
            return tiles
        index, count, side, channels = self.get_buffer("index"), self.count, self.side, tiles.shape[3]
        rows = tiles if self.is_partition else tiles.index_select(1, index).index_select(2, index)  # [N, W·t, W·t, C]
        blocks = rows.reshape(-1, count, side, count, side, channels).permute(0, 1, 3, 2, 4, 5)
        return blocks.reshape(-1, side, side, channels)


class JoinWindows(nn.Module):
    """Windows' maps [N · W², k, k] → the tile's map [N, T/m, T/m]: A X Aᵀ.

    A holds all three linear steps along one side: windows averaged where they overlap, a Gaussian of `smooth_sigma_px`
    with mirrored borders, the mean over the tile's cells. Every one of them is separable, so one A serves both sides.
    """

    def __init__(self, tile_px: int, grid: TileGrid, cell_px: int, map_cell_px: int, smooth_sigma_px: float) -> None:
        super().__init__()
        starts = window_starts(tile_px, grid)
        self.count, self.cells = len(starts), grid.tile_px // cell_px
        whole = _mean_matrix(tile_px, map_cell_px) @ _gaussian_matrix(tile_px, smooth_sigma_px)
        whole = whole @ _overlap_matrix(tile_px, starts, cell_px, self.cells)
        self.is_plain = whole.shape[0] == whole.shape[1] and bool(np.allclose(whole, np.eye(len(whole))))
        self.register_buffer("matrix", torch.from_numpy(whole.astype(np.float32)), persistent=False)

    def forward(self, maps: Tensor) -> Tensor:
        """Join `maps`."""
        if self.is_plain:
            return maps
        matrix, count, cells = self.get_buffer("matrix"), self.count, self.cells
        side = count * cells
        whole = maps.reshape(-1, count, count, cells, cells).permute(0, 1, 3, 2, 4).reshape(-1, side, side)
        return torch.matmul(torch.matmul(matrix, whole), matrix.T.contiguous())


def window_starts(tile_px: int, grid: TileGrid) -> tuple[int, ...]:
    """Where windows begin along a tile's side; the last one is shifted inwards, nothing is mirrored."""
    return TileGrid(grid.tile_px, grid.stride_px).layout(tile_px, tile_px).ys


def _overlap_matrix(tile_px: int, starts: tuple[int, ...], cell_px: int, cells: int) -> NDArray[np.float64]:
    """[T, W · k]: each pixel is the mean of the cells that cover it."""
    cover = np.zeros((tile_px, len(starts), cells))
    for window, start in enumerate(starts):
        for cell in range(cells):
            cover[start + cell * cell_px : start + (cell + 1) * cell_px, window, cell] = 1
    flat = cover.reshape(tile_px, -1)
    mean: NDArray[np.float64] = flat / flat.sum(1, keepdims=True)
    return mean


def _gaussian_matrix(tile_px: int, sigma_px: float) -> NDArray[np.float64]:
    """[T, T]: the Gaussian of the frame's reduction, along one side."""
    one = np.eye(tile_px)
    if sigma_px <= 0:
        return one
    # A tile may be smaller than the Gaussian is wide: borders are mirrored once, so its reach ends there.
    reach = min(int(np.ceil(3 * sigma_px)), tile_px - 1)
    kernel = cv2.getGaussianKernel(2 * reach + 1, sigma_px)
    return np.asarray(cv2.sepFilter2D(one, -1, np.ones(1), kernel, borderType=cv2.BORDER_REFLECT_101), np.float64)


def _mean_matrix(tile_px: int, cell_px: int) -> NDArray[np.float64]:
    """[T/m, T]: the mean over each cell."""
    return np.kron(np.eye(tile_px // cell_px), np.full((1, cell_px), 1 / cell_px))
