"""One Gaussian of a network's features for all places of good tiles, and scales that let two maps be added.

Letters: N tiles; G cells along a tile's side; D features of all levels together.
"""

from collections.abc import Iterable, Sequence

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

_SHRINKAGE = 0.02
"""Of the mean variance, added to every variance: directions in which good tiles never differ must not decide."""


class CellGaussian(nn.Module):
    """Features of several levels [N, width, S, S] → mean square of the whitened ones, [N, G, G]; 1 on average."""

    mean: Tensor
    whiten: Tensor

    def __init__(self, widths: Sequence[int], cells: int) -> None:
        super().__init__()
        self.widths, self.cells = tuple(widths), cells
        size = sum(widths)
        self.register_buffer("mean", torch.zeros(size))
        self.register_buffer("whiten", torch.eye(size))

    def forward(self, levels: Sequence[Tensor]) -> Tensor:
        """Whitening is linear: each level is whitened at its own size before it is enlarged, a fraction of the work."""
        first, total = 0, torch.zeros(())
        for level, width in zip(levels, self.widths, strict=True):
            at = slice(first, first + width)
            kernel = self.whiten[:, at, None, None]
            centred = self._pooled(level) - self.mean[None, at, None, None]
            total = total + self._enlarged(functional.conv2d(centred, kernel))
            first += width
        return (total * total).mean(1)

    def fit(self, batches: Iterable[Sequence[Tensor]]) -> None:
        """Mean and covariance of the features of all cells of good tiles."""
        seen = torch.cat([self._cells(levels)[:: 1 + self.cells // 16] for levels in batches]).double()
        self.mean.copy_(seen.mean(0))
        covariance = torch.cov(seen.T)
        covariance += torch.eye(len(covariance)) * (_SHRINKAGE * covariance.diagonal().mean() + 1e-8)
        # Any root of the inverse gives the same distance; the symmetric one is the tamest.
        values, vectors = torch.linalg.eigh(covariance)
        self.whiten.copy_((vectors / values.sqrt()) @ vectors.T)

    def _cells(self, levels: Sequence[Tensor]) -> Tensor:
        """Features of every cell, [N · G², D]."""
        whole = torch.cat([self._enlarged(self._pooled(level)) for level in levels], 1)
        return whole.permute(0, 2, 3, 1).flatten(0, 2)

    def _pooled(self, level: Tensor) -> Tensor:
        size = level.shape[-1]
        return functional.avg_pool2d(level, size // self.cells) if size > self.cells else level

    def _enlarged(self, level: Tensor) -> Tensor:
        times = self.cells // level.shape[-1]
        return functional.interpolate(level, scale_factor=float(times), mode="nearest") if times > 1 else level


class Standard(nn.Module):
    """Values → about 0 at the median, 1 at the 99.9 % quantile of good tiles, at least 0 and rising everywhere."""

    low: Tensor
    high: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("low", torch.tensor(0.0))
        self.register_buffer("high", torch.tensor(1.0))

    def forward(self, values: Tensor) -> Tensor:
        """Same shape."""
        return functional.softplus((values - self.low) * (4 / (self.high - self.low))) * 0.25

    def fit(self, values: Tensor) -> None:
        """Take the quantiles of `values` [K]."""
        low, high = np.quantile(values.numpy(), (0.5, 0.999))
        self.low.fill_(float(low))
        self.high.fill_(max(float(high), float(low) + 1e-3))
