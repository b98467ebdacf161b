"""Building blocks that every network shares: pixels in, mirrored convolutions, maps out.

Letters: N tiles; C channels; T tile side; H, W feature map sides; m map cell side.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn import functional


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Build a network inside: its first weights depend on `seed` alone, and nobody else's random numbers on it."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield


def to_pixels(tiles: Tensor) -> Tensor:
    """Tiles uint8 [N, T, T, C] → float32 [N, C, T, T], 0–1."""
    # The cast comes first: TensorRT takes uint8 for an input and nothing else.
    return tiles.to(torch.float32).permute(0, 3, 1, 2) * (1 / 255)


def to_cells(pixels: Tensor, map_cell_px: int) -> Tensor:
    """Anomaly of each pixel [N, T, T] → its mean over cells of m × m pixels [N, T/m, T/m]."""
    if map_cell_px == 1:
        return pixels
    return functional.avg_pool2d(pixels[:, None], map_cell_px).squeeze(1)


def cut_squares(plane: Tensor, side: int, step: int) -> Tensor:
    """One plane [1, C, h, w] → its squares, one every `step`, [n, C, side, side], row by row."""
    channels = int(plane.shape[1])
    rows, columns = ((int(length) - side) // step + 1 for length in plane.shape[2:])
    for axis, count in ((2, rows), (3, columns)):
        places = torch.arange(count)[:, None] * step + torch.arange(side)
        plane = plane.index_select(axis, places.reshape(-1).to(plane.device))
    apart = plane.reshape(channels, rows, side, columns, side).permute(1, 3, 0, 2, 4)
    return apart.reshape(rows * columns, channels, side, side)


class Mirror(nn.Module):
    """Mirror `before` pixels outwards at the upper and left, `after` at the lower and right edge.

    A network's own zero padding makes borders look anomalous: it decided over whole data sets (see docs/methods.md).
    """

    def __init__(self, before: int, after: int | None = None) -> None:
        super().__init__()
        after = before if after is None else after
        self.pads = (before, after, before, after)

    def forward(self, features: Tensor) -> Tensor:
        """[N, C, H, W] → [N, C, H + before + after, W + before + after]."""
        return functional.pad(features, self.pads, mode="reflect") if any(self.pads) else features


class MirrorConv(nn.Sequential):
    """A convolution over mirrored borders, then batch norm and ReLU unless `plain`; keeps the size for stride 1.

    Stride s halves (divides) an input of H rows to ceil(H / s) where the kernel is odd.
    """

    def __init__(
        self, low: int, high: int, kernel: int = 3, stride: int = 1, *, dilation: int = 1, plain: bool = False
    ) -> None:
        reach = dilation * (kernel - 1)
        convolution = nn.Conv2d(low, high, kernel, stride, dilation=dilation, bias=plain)
        finish = () if plain else (nn.BatchNorm2d(high), nn.ReLU(inplace=True))
        super().__init__(Mirror(reach // 2, reach - reach // 2), convolution, *finish)


class Enlarge(nn.Module):
    """Enlarge feature maps by a whole factor, to the nearest neighbour or linearly between them."""

    def __init__(self, times: int = 2, *, linear: bool = False) -> None:
        super().__init__()
        self.times, self.mode = times, "bilinear" if linear else "nearest"

    def forward(self, features: Tensor) -> Tensor:
        """[N, C, H, W] → [N, C, times · H, times · W]."""
        if self.mode == "nearest":
            return functional.interpolate(features, scale_factor=float(self.times), mode="nearest")
        return functional.interpolate(features, scale_factor=float(self.times), mode="bilinear", align_corners=False)
