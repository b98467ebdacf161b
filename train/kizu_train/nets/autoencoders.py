"""Plain autoencoders, wholly described by their settings: the published forms and smaller ones.

Letters: N tiles; C channels; T tile side; Z latent size. Tiles are float32 [N, C, T, T], 0–1.
"""

from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

from torch import Tensor, nn

from kizu_train.errors import UsageError
from kizu_train.nets.layers import Enlarge, MirrorConv


@dataclass(frozen=True)
class DenseNetwork:
    """Sizes of the hidden layers down to the narrowest; the way up mirrors them. Published: 784–256–100–256–784."""

    widths: tuple[int, ...] = (256, 100)

    def __post_init__(self) -> None:
        if not self.widths or min(self.widths) < 1:
            raise ValueError("widths needs at least one layer, each of at least 1")


class DenseAutoencoder(nn.Module):
    """Fully connected layers with ReLU, a sigmoid at the end."""

    def __init__(self, network: DenseNetwork, tile_px: int, channels: int) -> None:
        super().__init__()
        self.shape = (channels, tile_px, tile_px)
        sizes = (channels * tile_px**2, *network.widths, *network.widths[-2::-1])
        hidden = [layer for low, high in pairwise(sizes) for layer in (nn.Linear(low, high), nn.ReLU(inplace=True))]
        self.layers = nn.Sequential(nn.Flatten(), *hidden, nn.Linear(sizes[-1], sizes[0]), nn.Sigmoid())

    def forward(self, tiles: Tensor) -> Tensor:
        """Tiles [N, C, T, T] → what the network makes of them, of the same shape, 0–1."""
        rebuilt: Tensor = self.layers(tiles)
        return rebuilt.reshape(-1, *self.shape)


@dataclass(frozen=True)
class ConvNetwork:
    """Convolutions that shrink, perhaps a latent vector, convolutions that enlarge.

    Each of `widths` is a convolution of `kernel` that halves the sides: followed by a maximum over 2 × 2 (`pool`), or
    of stride 2 (`stride`). `refine` 3 × 3 convolutions of the same width follow each. `latent` > 0 puts a vector of
    that size in the middle, reached through 3 × 3 convolutions of `squeeze`. The way up mirrors the way down, enlarging
    to the nearest neighbour before each convolution. `slope` is that of the leaky ReLU below 0.
    """

    widths: tuple[int, ...] = (16, 8)
    kernel: int = 3
    shrink: Literal["pool", "stride"] = "pool"
    refine: int = 0
    squeeze: tuple[int, ...] = ()
    latent: int = 0
    batch_norm: bool = False
    slope: float = 0.0
    mean: Literal["sigmoid", "linear"] = "sigmoid"

    def __post_init__(self) -> None:
        if not self.widths or min(*self.widths, *self.squeeze, self.kernel) < 1:
            raise ValueError("widths needs at least one layer; widths, squeeze and kernel must be at least 1")
        if min(self.refine, self.latent) < 0 or not 0 <= self.slope < 1:
            raise ValueError("refine >= 0, latent >= 0 and 0 <= slope < 1 are needed")
        if self.shrink == "pool" and self.kernel % 2 == 0:
            raise ValueError('shrink = "pool" needs an odd kernel')

    def smallest_px(self, tile_px: int) -> int:
        """Side of the smallest feature map. Raises UsageError when the tile does not halve evenly or is too small."""
        shrink = int(2 ** len(self.widths))
        side = tile_px // shrink
        # What is mirrored must be larger than what it is mirrored by; the last convolution sees twice the last side.
        needed = max(2, self.kernel // 4 + 1)
        if tile_px % shrink or side < needed:
            raise UsageError(
                f"tiles of {tile_px} px must be a multiple of {shrink} px, and at least {shrink * needed} px, for "
                f"{len(self.widths)} halvings"
            )
        return side


class ConvAutoencoder(nn.Module):
    """The network for tiles of `tile_px` and `channels`.

    With the published settings (widths 16 and 8, maxima, no latent) on three channels it has the published 3,795
    parameters.
    """

    def __init__(self, network: ConvNetwork, tile_px: int, channels: int) -> None:
        super().__init__()
        side = network.smallest_px(tile_px)
        inner = (network.widths[-1], *network.squeeze)
        size = inner[-1] * side**2
        self.encoder = nn.Sequential(*_shrinking(network, channels))
        self.middle = _middle(network, inner, size, side) if network.latent else nn.Identity()
        self.decoder = nn.Sequential(*_enlarging(network), *_head(network, channels))

    def forward(self, tiles: Tensor) -> Tensor:
        """Tiles [N, C, T, T] → what the network makes of them, of the same shape."""
        rebuilt: Tensor = self.decoder(self.middle(self.encoder(tiles)))
        return rebuilt


class _Unflatten(nn.Module):
    """[N, C · H · W] → [N, C, H, W]; torch's own traces a shape that TensorRT need not see."""

    def __init__(self, channels: int, side: int) -> None:
        super().__init__()
        self.shape = (channels, side, side)

    def forward(self, features: Tensor) -> Tensor:
        return features.reshape(-1, *self.shape)


def convolution(network: ConvNetwork, low: int, high: int, kernel: int = 3, stride: int = 1) -> nn.Sequential:
    """A mirrored convolution from `low` to `high` channels, then batch norm where asked for, and (leaky) ReLU."""
    norm = [nn.BatchNorm2d(high)] if network.batch_norm else []
    return nn.Sequential(MirrorConv(low, high, kernel, stride, plain=True), *norm, _bend(network))


def _bend(network: ConvNetwork) -> nn.Module:
    return nn.LeakyReLU(network.slope, inplace=True) if network.slope else nn.ReLU(inplace=True)


def _shrinking(network: ConvNetwork, channels: int) -> list[nn.Module]:
    layers: list[nn.Module] = []
    for low, high in pairwise((channels, *network.widths)):
        is_strided = network.shrink == "stride"
        layers.append(convolution(network, low, high, network.kernel, 2 if is_strided else 1))
        layers += [] if is_strided else [nn.MaxPool2d(2)]
        layers += [convolution(network, high, high) for _ in range(network.refine)]
    return layers


def _middle(network: ConvNetwork, inner: tuple[int, ...], size: int, side: int) -> nn.Sequential:
    down = [convolution(network, low, high) for low, high in pairwise(inner)]
    up = [convolution(network, low, high) for low, high in pairwise(inner[::-1])]
    bottleneck = (nn.Flatten(), nn.Linear(size, network.latent), nn.Linear(network.latent, size))
    return nn.Sequential(*down, *bottleneck, _Unflatten(inner[-1], side), _bend(network), *up)


def _enlarging(network: ConvNetwork) -> list[nn.Module]:
    """The way up, as wide as the way down; the convolution before each enlargement belongs to its smaller side."""
    layers: list[nn.Module] = []
    rising = network.widths[::-1]
    for low, high in zip((rising[0], *rising), rising, strict=False):
        layers += [convolution(network, low, high), Enlarge(2)]
        layers += [convolution(network, high, high) for _ in range(network.refine)]
    return layers


def _head(network: ConvNetwork, channels: int) -> tuple[nn.Module, ...]:
    last = MirrorConv(network.widths[0], channels, 3, plain=True)
    return (last, nn.Sigmoid()) if network.mean == "sigmoid" else (last,)
