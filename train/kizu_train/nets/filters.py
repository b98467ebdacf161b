"""A fixed bank of filters over several octaves: local energies of Gabor pairs and blobs, colours, cell by cell.

Sources: Gabor's energy (Jain & Farrokhnia, 1991) and the blobs of Leung & Malik's bank (2001).

No filter sees a mirrored pixel: a mirror makes a kink in every texture, and the maxima of good pictures gather there.
Energies are mirrored instead, where a filter would reach beyond the tile.

Letters: N tiles; C channels; H, W pixels of an octave; m map cell side; F features.
"""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional

from kizu_train.nets.layers import Mirror

_SIDE = 9
LEAST_SIDE_PX = _SIDE + _SIDE // 2
"""Of the coarsest octave of a tile: filters must fit, and their energies be enough to mirror."""
_ROUNDING = (2 / 255) ** 2
"""Energy of an edge of about two grey levels: what lies below says little."""
_OPPONENT = ((1 / 3, 1 / 3, 1 / 3), (0.5, -0.5, 0.0), (0.25, 0.25, -0.5))
"""Brightness, red against green, yellow against blue."""
_BINOMIAL = (1 / 8, 3 / 8, 3 / 8, 1 / 8)


class FilterBank(nn.Module):
    """Pixels [N, C, T, T], 0–1 → features [N, F, T/m, T/m].

    For each octave the logarithms of local energy of `orientations` quadrature pairs of Gabor filters (wavelength 4 px
    of the octave) and of a blob; for colour pictures of a blob in each of the two colour differences. Besides the
    brightness of the cell, and its two colour differences. With `relative_contrast` energies are relative to the
    energy within 9 cells, and brightness to its mean there: light and print contrast do not matter then.
    """

    gabor: Tensor
    blob: Tensor
    opponent: Tensor
    halve: Tensor

    def __init__(
        self, channels: int, cell_px: int, *, octaves: int, orientations: int, relative_contrast: bool
    ) -> None:
        super().__init__()
        self.channels, self.cell_px, self.octaves = channels, cell_px, octaves
        self.orientations, self.relative = orientations, relative_contrast
        opponent = torch.tensor(_OPPONENT if channels == 3 else ((1.0,),))
        self.register_buffer("opponent", opponent[:, :, None, None], persistent=False)
        self.register_buffer("gabor", gabor_pairs(orientations)[:, None], persistent=False)
        self.register_buffer("blob", blob_filter()[None, None], persistent=False)
        halve = torch.tensor(_BINOMIAL)
        self.register_buffer("halve", torch.outer(halve, halve).repeat(channels, 1, 1, 1), persistent=False)
        self.mirror, self.mirror_halving = Mirror(_SIDE // 2), Mirror(1)
        self.mirror_cell, self.mirror_wide = Mirror(1), Mirror(4)

    @property
    def count(self) -> int:
        """F: how many features there are."""
        return self.octaves * (self.orientations + self.channels) + self.channels

    def forward(self, pixels: Tensor) -> Tensor:
        """Filter `pixels`."""
        planes = functional.conv2d(pixels, self.opponent) if self.channels == 3 else pixels
        means = functional.avg_pool2d(planes, self.cell_px)
        found = [self._around(means)] if self.relative else [means]
        for octave in range(self.octaves):
            found.append(self._energies(planes, self.cell_px >> octave))
            if octave + 1 < self.octaves:
                planes = functional.conv2d(self.mirror_halving(planes), self.halve, stride=2, groups=self.channels)
        return torch.cat(found, 1)

    def _energies(self, planes: Tensor, cell: int) -> Tensor:
        """Logarithms of energies of one octave, whose cells have `cell` pixels; [N, orientations + C, T/m, T/m]."""
        pairs = functional.conv2d(planes[:, :1], self.gabor).square()
        lines = pairs[:, : self.orientations] + pairs[:, self.orientations :]
        blobs = functional.conv2d(planes, self.blob.expand(self.channels, -1, -1, -1), groups=self.channels).square()
        energies = self.mirror(torch.cat([lines, blobs], 1))
        energies = functional.avg_pool2d(energies, cell) if cell > 1 else energies
        smooth = functional.avg_pool2d(self.mirror_cell(energies), 3, stride=1)
        logarithms = (smooth + _ROUNDING).log()
        if not self.relative:
            return logarithms
        total = smooth[:, : self.orientations].mean(1, keepdim=True)
        around = functional.avg_pool2d(self.mirror_wide(total), 9, stride=1)
        return logarithms - (around + _ROUNDING).log()

    def _around(self, means: Tensor) -> Tensor:
        """Brightness less its mean within 9 cells; colour differences as they are."""
        brightness = means[:, :1]
        brightness = brightness - functional.avg_pool2d(self.mirror_wide(brightness), 9, stride=1)
        return torch.cat([brightness, means[:, 1:]], 1) if self.channels == 3 else brightness


def gabor_pairs(orientations: int) -> Tensor:
    """Even, then odd Gabor filters [2 · orientations, 9, 9]: mean 0, response of length 1 to a wave of 4 px."""
    steps = torch.arange(_SIDE) - _SIDE // 2
    y, x = torch.meshgrid(steps.double(), steps.double(), indexing="ij")
    angles = torch.arange(orientations).double() * (math.pi / orientations)
    along = x * angles.cos()[:, None, None] + y * angles.sin()[:, None, None]
    window = torch.exp(-(x**2 + y**2) / (2 * 1.8**2))
    even, odd = window * torch.cos(along * math.pi / 2), window * torch.sin(along * math.pi / 2)
    even = even - window * (even.sum((1, 2)) / window.sum())[:, None, None]
    pairs = torch.cat([even, odd])
    return (pairs / (window.sum() / 2)).float()


def blob_filter() -> Tensor:
    """Difference of two Gaussians of 0.7 and 1.4 px [9, 9], mean 0."""
    steps = (torch.arange(_SIDE) - _SIDE // 2).double()
    squares = steps[:, None] ** 2 + steps**2

    def gaussian(sigma: float) -> Tensor:
        found = torch.exp(-squares / (2 * sigma**2))
        return found / found.sum()

    return (gaussian(0.7) - gaussian(1.4)).float()
