"""A small U-Net that keeps to the edge: half resolution at once, one or two convolutions a level, mirrored borders.

Letters: N tiles; C channels; T tile side.
"""

from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

import torch
from torch import Tensor, nn

from kizu_train.errors import UsageError
from kizu_train.nets.layers import Enlarge, Mirror, MirrorConv


@dataclass(frozen=True)
class UNetSettings:
    """`widths`: channels at strides 2, 4, 8 …; the decoder climbs back to `out_stride` (a power of two).

    `join`: on each way up the coarser features are laid beside the encoder's (`concat`), or reduced to their width
    while they are still coarse and added (`add`), which takes half of the arithmetic or less. `refine`: a second
    convolution at stride 2, a quarter of a narrow network's time. Engines compute sixteen channels at a time: 12 cost
    as much as 16.
    """

    widths: tuple[int, ...] = (16, 32, 48, 64, 64)
    out_stride: int = 4
    join: Literal["concat", "add"] = "concat"
    refine: bool = True

    def __post_init__(self) -> None:
        if len(self.widths) < 2 or min(self.widths) < 1:
            raise ValueError("widths needs at least two entries, each at least 1")
        if self.out_stride not in [2 ** (level + 1) for level in range(len(self.widths))]:
            raise ValueError(f"out_stride must be a power of two from 2 to {2 ** len(self.widths)}")

    def check(self, tile_px: int) -> None:
        """Raise UsageError unless tiles of `tile_px` can be halved as often as there are widths."""
        shrink = 2 ** len(self.widths)
        if tile_px % shrink or tile_px // shrink < 2:
            raise UsageError(
                f"grid.tile_px is {tile_px}; {len(self.widths)} widths need a multiple of {shrink}, "
                f"at least {2 * shrink}"
            )


class UNet(nn.Module):
    """Pixels [N, C, T, T] → features at every level of encoder and decoder, the decoder's last being the finest."""

    def __init__(self, settings: UNetSettings, channels: int) -> None:
        super().__init__()
        widths = settings.widths
        self.stem = MirrorConv(channels, widths[0], 5, 2)
        self.refine: nn.Module = MirrorConv(widths[0], widths[0]) if settings.refine else nn.Identity()
        self.down = nn.ModuleList(
            nn.Sequential(MirrorConv(low, high, 3, 2), MirrorConv(high, high)) for low, high in pairwise(widths)
        )
        climbs = len(widths) - settings.out_stride.bit_length() + 1
        pairs = list(pairwise(reversed(widths)))[:climbs]
        self.adds = settings.join == "add"
        self.reduce = nn.ModuleList(nn.Conv2d(high, low, 1) for high, low in pairs if self.adds)
        self.up = nn.ModuleList(MirrorConv(low if self.adds else high + low, low) for high, low in pairs)
        self.enlarge = Enlarge(2)
        self.out_width = pairs[-1][1] if pairs else widths[-1]

    def forward(self, pixels: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        """Encoder features from fine to coarse, decoder features from coarse to fine."""
        ways = [self.refine(self.stem(pixels))]
        for down in self.down:
            ways.append(down(ways[-1]))
        climbed = [ways[-1]]
        for level, up in enumerate(self.up, start=2):
            climbed.append(up(self._joined(climbed[-1], ways[-level], level - 2)))
        return ways, climbed

    def _joined(self, coarse: Tensor, way: Tensor, climb: int) -> Tensor:
        if self.adds:
            added: Tensor = way + self.enlarge(self.reduce[climb](coarse))
            return added
        return torch.cat([self.enlarge(coarse), way], 1)


class LocalContrast(nn.Module):
    """Pixels [N, C, T, T] → each against mean and deviation of about 40 px around it: light matters less, stains too.

    Mean and deviation are taken on a grid of 8 px and enlarged linearly, which costs next to nothing.
    """

    def __init__(self, cell_px: int = 8, floor: float = 0.04) -> None:
        super().__init__()
        self.floor = floor
        self.pool = nn.AvgPool2d(cell_px)
        self.spread = nn.Sequential(Mirror(2), nn.AvgPool2d(5, 1), Enlarge(cell_px, linear=True))

    def forward(self, pixels: Tensor) -> Tensor:
        """Same shape, about 0 on average."""
        centred = pixels - self.spread(self.pool(pixels))
        variance = self.spread(self.pool((centred * centred).mean(1, keepdim=True)))
        contrast: Tensor = centred / (variance.sqrt() + self.floor)
        return contrast
