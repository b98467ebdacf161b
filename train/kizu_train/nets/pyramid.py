"""Raw patches at several scales: a pyramid of ever smaller pictures, and what is remembered of each.

Letters: N tiles; C channels; T tile side; p patch side in a level's pixels; D dimensions kept; M remembered patches;
h lattice places along a tile's side; G map cells along it; V vectors.
"""

import math

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from kizu_train.nets.layers import Mirror

_BLUR_SIGMA = 1.1
"""In pixels of the finer level: enough against aliasing when every second pixel is dropped."""
_COMPARED = 3 * 2**17
"""Products of a tile's places and words at a time: 1.5 MiB, which stay in a CPU's caches until all are compared."""
_LEAST = 1e-3
"""Under this share of the memory's typical distance, squared distances are the pictures' own rounding."""


class Pyramid(nn.Module):
    """Pixels [N, C, T, T] → one picture for each of `levels`, blurred and halved so often: [N, C, T/2^l, T/2^l].

    Columns are blurred before rows: engines compute convolutions of single channels slowly, and two lines are 10
    products where their square is 25.
    """

    column: Tensor
    row: Tensor

    def __init__(self, levels: tuple[int, ...], channels: int) -> None:
        super().__init__()
        self.levels, self.channels = levels, channels
        line = torch.from_numpy(cv2.getGaussianKernel(5, _BLUR_SIGMA).astype(np.float32)).reshape(1, 1, 5, 1)
        column = line.expand(channels, 1, 5, 1).contiguous()
        self.register_buffer("column", column, persistent=False)
        self.register_buffer("row", column.transpose(2, 3).contiguous(), persistent=False)
        self.mirror = Mirror(2)

    def forward(self, pixels: Tensor) -> list[Tensor]:
        """Shrink `pixels`."""
        found, level = [], pixels
        for depth in range(max(self.levels) + 1):
            if depth:
                columns = functional.conv2d(self.mirror(level), self.column, stride=(2, 1), groups=self.channels)
                level = functional.conv2d(columns, self.row, stride=(1, 2), groups=self.channels)
            if depth in self.levels:
                found.append(level)
        return found


class PatchMemory(nn.Module):
    """One level's pixels [N, C, S, S], S `side_px` → distance of each patch to the nearest remembered one [N, h, h].

    A patch is p × p pixels of the level, one every `step`, wholly inside the tile: nothing is mirrored, so nothing at
    a border is stranger than elsewhere. Patches are centred and reduced to principal components by one convolution.
    The nearest is found by a matrix product; its distance is then computed from the difference itself, for
    |z|² - 2 z·m + |m|² would leave only rounding of a good match.
    """

    centre: Tensor
    basis: Tensor
    words: Tensor
    floor: Tensor

    def __init__(self, side_px: int, patch_px: int, step_px: int, channels: int, dimension: int, size: int) -> None:
        super().__init__()
        self.patch_px, self.step_px, self.channels = patch_px, step_px, channels
        self.places = (side_px - patch_px) // step_px + 1
        self.register_buffer("centre", torch.zeros(channels * patch_px**2))
        self.register_buffer("basis", torch.zeros(dimension, channels * patch_px**2))
        self.register_buffer("words", torch.zeros(size, dimension))
        self.register_buffer("floor", torch.ones(1))

    def forward(self, level: Tensor) -> Tensor:
        """Distances of the patches of `level`."""
        count, dimension = self.places**2, len(self.basis)
        cells = self.reduced(level).reshape(-1, dimension, count).permute(0, 2, 1)  # [N, h², D]
        squares = (cells - self.words[self._nearest(cells)]).square().sum(2)
        distances = (squares + self.floor).sqrt() - self.floor.sqrt()
        return distances.reshape(-1, self.places, self.places)

    def _nearest(self, cells: Tensor) -> Tensor:
        """Index [N, P] of the word nearest to each of `cells` [N, P, D]: the one with the largest z·m - |m|²/2.

        First the group of neighbouring words that holds it, then which one it is: engines take a maximum over rows many
        numbers at a time, but look for where it lies one by one.
        """
        count, group = self.places**2, _group(len(self.words))
        step = max(1, _COMPARED // len(self.words))
        parts = [self._groups(cells[:, at : at + step], min(step, count - at), group) for at in range(0, count, step)]
        best, members = (torch.cat(column, 1) for column in zip(*parts, strict=True))
        return best * group + members.argmax(2)

    def _groups(self, cells: Tensor, count: int, group: int) -> tuple[Tensor, Tensor]:
        """The best group [N, P] for each of `count` = P `cells` [N, P, D], and how like them its words are."""
        vectors = cells.reshape(-1, len(self.basis))
        likeness = torch.addmm(-self.words.square().sum(1) / 2, vectors, self.words.T)
        grouped = likeness.reshape(-1, len(self.words) // group, group)
        best = grouped.amax(2).argmax(1, keepdim=True)  # [N · P, 1]
        members = grouped.gather(1, best[:, :, None].expand(-1, 1, group))
        return best.reshape(-1, count), members.reshape(-1, count, group)

    def reduced(self, level: Tensor) -> Tensor:
        """Principal components of all patches of `level`, [N, D, h, h]."""
        kernel = self.basis.reshape(-1, self.channels, self.patch_px, self.patch_px)
        shift = self.basis @ self.centre
        return functional.conv2d(level, kernel, -shift, stride=self.step_px)

    def patches(self, level: Tensor) -> Tensor:
        """All patches of `level` as they are, [N, C·p², h²]."""
        return functional.unfold(level, self.patch_px, stride=self.step_px)

    def learn_basis(self, vectors: Tensor) -> None:
        """Take centre and principal components of patches [V, C·p²]."""
        mean = vectors.mean(0)
        _, basis = torch.linalg.eigh(torch.cov((vectors - mean).double().T))
        self.centre.copy_(mean)
        self.basis.copy_(basis.flip(1)[:, : len(self.basis)].T)

    def of_vectors(self, vectors: Tensor) -> Tensor:
        """Patches [V, C·p²] → their principal components [V, D]."""
        return (vectors - self.centre) @ self.basis.T

    def remember(self, words: Tensor) -> None:
        """Keep `words` [M, D]; fewer are repeated, which changes no distance."""
        times = -(-len(self.words) // len(words))
        self.words.copy_(words.repeat(times, 1)[: len(self.words)])
        self.floor.fill_(max(1e-12, (_LEAST * float(words.norm(dim=1).mean())) ** 2))


def spread_matrix(tile_px: int, level: int, patch_px: int, step_px: int, cell_px: int) -> NDArray[np.float32]:
    """[G, h]: what each map cell takes of the lattice places along a side, linearly between their centres.

    Cells beyond the outermost centres take the outermost place's value.
    """
    size = level_px(tile_px, level)
    starts = np.arange(0, size - patch_px + 1, step_px)
    centres = (starts + (patch_px - 1) / 2) * 2**level
    cells = np.arange(tile_px // cell_px) * cell_px + (cell_px - 1) / 2
    matrix = np.stack([np.interp(cells, centres, one) for one in np.eye(len(starts))], 1)
    return matrix.astype(np.float32)


def level_px(tile_px: int, level: int) -> int:
    """Side of a tile at `level`."""
    for _ in range(level):
        tile_px = -(-tile_px // 2)
    return tile_px


def _group(count: int) -> int:
    """Words in a group: what divides `count`, the least from its root on."""
    return next(size for size in range(math.isqrt(count - 1) + 1, count + 1) if count % size == 0)
