"""A DCGAN of tiles and the encoder of f-AnoGAN: three networks that mirror one another.

Letters: N tiles; C channels; T tile side; Z noise size; F width of the last feature maps, f their side.
"""

from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor, nn

from kizu_train.errors import UsageError
from kizu_train.nets.layers import Mirror, MirrorConv

_SLOPE = 0.2


@dataclass(frozen=True)
class GanNetwork:
    """`widths` are the feature maps from the tile inwards, each half as large as the one before.

    28 px and widths of 64, 128 give the published generator: `noise` 30 → dense 7 × 7 × 128 → 14 × 14 × 64 → 28 × 28.
    """

    noise: int = 30
    widths: tuple[int, ...] = (64, 128)

    def __post_init__(self) -> None:
        if self.noise < 1 or not self.widths or min(self.widths) < 1:
            raise ValueError("noise and at least one of widths are needed, all at least 1")

    def smallest_px(self, tile_px: int) -> int:
        """Side of the innermost feature maps. Raises UsageError where the tile does not divide or is too small."""
        shrink = int(2 ** len(self.widths))
        if tile_px % shrink or tile_px < 2 * shrink:
            raise UsageError(
                f"tiles of {tile_px} px must be a multiple of {shrink} px, and at least {2 * shrink} px, for "
                f"{len(self.widths)} halvings; change grid.tile_px or network.widths"
            )
        return tile_px // shrink


class Generator(nn.Module):
    """Noise [N, Z] between −1 and 1 → tiles float32 [N, C, T, T], 0–1."""

    def __init__(self, network: GanNetwork, tile_px: int, channels: int) -> None:
        super().__init__()
        widths = (*reversed(network.widths), channels)
        self.start = (widths[0], network.smallest_px(tile_px), network.smallest_px(tile_px))
        size = widths[0] * self.start[1] ** 2
        self.dense = nn.Sequential(nn.Linear(network.noise, size, bias=False), nn.BatchNorm1d(size), nn.ReLU())
        pairs = list(pairwise(widths))
        self.layers = nn.Sequential(*(_Double(low, high, plain=(low, high) == pairs[-1]) for low, high in pairs))

    def forward(self, noise: Tensor) -> Tensor:
        """Draw tiles."""
        return torch.sigmoid(self.layers(self.dense(noise).reshape(-1, *self.start)))


class _Double(nn.Sequential):
    """A transposed convolution that doubles the size, over mirrored borders; batch norm and ReLU unless `plain`."""

    def __init__(self, low: int, high: int, *, plain: bool) -> None:
        # What the mirrored pixels add is cut off again: the outermost pixels get the overlap that others have.
        up = nn.ConvTranspose2d(low, high, 4, 2, padding=3, bias=plain)
        super().__init__(Mirror(1), up, *(() if plain else (nn.BatchNorm2d(high), nn.ReLU())))


class Contraction(nn.Sequential):
    """Tiles [N, C, T, T] → feature maps [N, F, f, f]: strided 4 × 4 convolutions, leaky ReLU."""

    def __init__(self, network: GanNetwork, tile_px: int, channels: int, *, batch_norm: bool) -> None:
        network.smallest_px(tile_px)
        layers: list[nn.Module] = []
        for low, high in pairwise((channels, *network.widths)):
            norm = nn.BatchNorm2d(high) if batch_norm else nn.Identity()
            layers += [MirrorConv(low, high, 4, 2, plain=True), norm, nn.LeakyReLU(_SLOPE)]
        super().__init__(*layers)

    def forward(self, tiles: Tensor) -> Tensor:
        """Describe `tiles`, which are spread about 0 first, as DCGAN's are."""
        maps: Tensor = super().forward(2 * tiles - 1)  # type: ignore[no-untyped-call]  # torch leaves it untyped
        return maps


class Discriminator(nn.Module):
    """Tiles [N, C, T, T] → how real they look, a logit [N]; its `features` are what feature residuals compare.

    Without batch norm: it would take off what all drawn tiles of a batch have in common, such as being too bright, and
    the generator would never learn of it (on MNIST it went on drawing grey).
    """

    def __init__(self, network: GanNetwork, tile_px: int, channels: int) -> None:
        super().__init__()
        self.features = Contraction(network, tile_px, channels, batch_norm=False)
        self.judge = nn.Linear(network.widths[-1] * network.smallest_px(tile_px) ** 2, 1)

    def forward(self, tiles: Tensor) -> Tensor:
        """Judge `tiles`."""
        logit: Tensor = self.judge(self.features(tiles).flatten(1))
        return logit[:, 0]


class NoiseEncoder(nn.Module):
    """Tiles [N, C, T, T] → the noise [N, Z], between −1 and 1, from which the generator should draw them."""

    def __init__(self, network: GanNetwork, tile_px: int, channels: int) -> None:
        super().__init__()
        self.features = Contraction(network, tile_px, channels, batch_norm=True)
        self.dense = nn.Linear(network.widths[-1] * network.smallest_px(tile_px) ** 2, network.noise)

    def forward(self, tiles: Tensor) -> Tensor:
        """Encode `tiles`."""
        return torch.tanh(self.dense(self.features(tiles).flatten(1)))


class Gan(nn.Module):
    """Generator and discriminator, the two players."""

    def __init__(self, network: GanNetwork, tile_px: int, channels: int) -> None:
        super().__init__()
        self.network = network
        self.generator = Generator(network, tile_px, channels)
        self.discriminator = Discriminator(network, tile_px, channels)


def draw_noise(count: int, size: int, generator: torch.Generator) -> Tensor:
    """Noise [count, size], uniform between −1 and 1."""
    return 2 * torch.rand((count, size), generator=generator, device=generator.device) - 1
