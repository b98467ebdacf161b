"""How alike two pictures are, as losses and as maps: SSIM and multi-scale gradient magnitude similarity.

Both are written as dissimilarities computed from differences, never as 1 minus something close to 1: what good
pictures score then keeps its digits on every provider.

Letters: N pictures; C channels; S their side. Pictures are float32 [N, C, S, S], 0–1.
"""

from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from numpy.lib.stride_tricks import sliding_window_view
from torch import Tensor, nn
from torch.nn import functional

from kizu_train.nets.layers import Enlarge

WindowShape = Literal["gaussian", "box"]
_LUMINANCE_FLOOR, _CONTRAST_FLOOR = 0.01**2, 0.03**2
_GRADIENT_FLOOR = 0.0026
_TINY = 1e-8
"""Keeps the slope of a square root finite at 0."""


def window_weights(shape: WindowShape, size: int) -> Tensor:
    """Weights [size] of one direction of a window, summing to 1; a Gaussian reaches to 3.67 σ (σ 1.5 for 11 pixels)."""
    if shape == "box":
        return torch.full((size,), 1 / size)
    at = torch.arange(size, dtype=torch.float64) - (size - 1) / 2
    weights = torch.exp(-0.5 * (at / (size * 1.5 / 11)) ** 2)
    return (weights / weights.sum()).float()


def band_matrix(side: int, weights: Tensor) -> Tensor:
    """The matrix [side, side] that correlates a line of `side` pixels with odd-sized `weights`, mirrored at its ends.

    Raises ValueError when half the weights do not fit into the line.
    """
    if len(weights) // 2 >= side:
        raise ValueError(f"a line of {side} pixels cannot be mirrored for a window of {len(weights)}")
    reach = len(weights) // 2
    mirrored = np.pad(np.eye(side, dtype=np.float32), ((reach, reach), (0, 0)), mode="reflect")
    shifted = sliding_window_view(mirrored, len(weights), axis=0)  # [side, side, taps]
    return torch.from_numpy(shifted @ weights.numpy())


class Filter(nn.Module):
    """A separable filter of pictures of one side, `down` × `across`: odd-sized weights, mirrored at the borders.

    Two products with a constant matrix, at these sides many times faster on a CPU than convolving each channel.
    """

    before: Tensor
    after: Tensor

    def __init__(self, side: int, down: Tensor, across: Tensor) -> None:
        super().__init__()
        self.register_buffer("before", band_matrix(side, down), persistent=False)
        self.register_buffer("after", band_matrix(side, across).T.contiguous(), persistent=False)

    def forward(self, pictures: Tensor) -> Tensor:
        """[N, C, S, S] → [N, C, S, S]."""
        return self.before @ pictures @ self.after


def blur(side: int, shape: WindowShape, size: int) -> Filter:
    """The mean over a window of `size` × `size` pixels, for pictures of that side."""
    weights = window_weights(shape, size)
    return Filter(side, weights, weights)


@dataclass(frozen=True)
class Window:
    """The window that SSIM is computed over: 11 × 11 pixels as published, an even Gaussian or a box."""

    shape: WindowShape = "gaussian"
    size: int = 11

    def __post_init__(self) -> None:
        if self.size < 3 or self.size % 2 == 0:
            raise ValueError("an SSIM window has an odd size of at least 3 pixels")


class StructuralDissimilarity(nn.Module):
    """1 − SSIM of each pixel, 0 (alike) to 2, mean over channels.

    Source: Wang et al. 2004, constants for pixels of 0–1. Computed as a + (1 − a) · b of the dissimilarities of
    luminance a = (μx − μy)² / (μx² + μy² + c₁) and contrast b = var(x − y) / (var x + var y + c₂), which is the same.
    """

    def __init__(self, side: int, window: Window) -> None:
        super().__init__()
        self.blur = blur(side, window.shape, window.size)

    def forward(self, pictures: Tensor, others: Tensor) -> Tensor:
        """Two times [N, C, S, S] → [N, S, S]."""
        # Variances do not change when both pictures are shifted alike, and keep more digits around 0.
        middle = pictures.mean((1, 2, 3), keepdim=True)
        x, y = pictures - middle, others - middle
        mean_x, mean_y = self.blur(x), self.blur(y)
        spread = self._variance(x, mean_x) + self._variance(y, mean_y)
        contrast = self._variance(x - y, mean_x - mean_y) / (spread + _CONTRAST_FLOOR)
        whole_x, whole_y = mean_x + middle, mean_y + middle
        luminance = (mean_x - mean_y) ** 2 / (whole_x**2 + whole_y**2 + _LUMINANCE_FLOOR)
        unlike: Tensor = luminance + (1 - luminance) * contrast
        return unlike.mean(1)

    def _variance(self, values: Tensor, mean: Tensor) -> Tensor:
        variance: Tensor = self.blur(values**2) - mean**2
        return variance.clamp(min=0)


class GradientDissimilarity(nn.Module):
    """1 − multi-scale gradient magnitude similarity of each pixel, 0 (alike) to 1, mean over channels and scales.

    Source: Xue et al. 2014 (GMS, Prewitt gradients); the multi-scale mean of Zavrtanik, Kristan & Skočaj 2021 (RIAD).
    Each scale halves the one before; the side must be a multiple of 2^scales. Computed as
    (g − h)² / (g² + h² + c), which is the same as 1 − (2gh + c) / (g² + h² + c).
    """

    def __init__(self, side: int, scales: int = 4) -> None:
        super().__init__()
        mean, slope = torch.full((3,), 1 / 3), torch.tensor([1.0, 0, -1])
        sides = [side // 2**scale for scale in range(scales)]
        self.across = nn.ModuleList(Filter(scaled, mean, slope) for scaled in sides)
        self.down = nn.ModuleList(Filter(scaled, slope, mean) for scaled in sides)
        self.enlarge = nn.ModuleList(Enlarge(2**scale, linear=True) for scale in range(scales))

    def forward(self, pictures: Tensor, others: Tensor) -> Tensor:
        """Two times [N, C, S, S] → [N, S, S]."""
        maps = []
        for scale, enlarge in enumerate(self.enlarge):
            if scale:
                pictures, others = functional.avg_pool2d(pictures, 2), functional.avg_pool2d(others, 2)
            first, second = self._magnitude(pictures, scale), self._magnitude(others, scale)
            unlike = (first - second) ** 2 / (first**2 + second**2 + _GRADIENT_FLOOR)
            maps.append(enlarge(unlike.mean(1, keepdim=True)))
        return torch.cat(maps, 1).mean(1)

    def _magnitude(self, pictures: Tensor, scale: int) -> Tensor:
        """Length of the gradient of each channel [N, C, S, S] → [N, C, S, S]."""
        return torch.sqrt(self.across[scale](pictures) ** 2 + self.down[scale](pictures) ** 2 + _TINY)
