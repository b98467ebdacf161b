"""Restoring a picture from its high frequencies: fixed filters, a U-Net, and the map of what it restores badly.

Letters: N tiles; C channels; T tile side. Tiles are float32 [N, C, T, T], 0–1.
"""

from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from kizu_train.errors import UsageError
from kizu_train.nets.layers import MirrorConv
from kizu_train.nets.similarity import Filter, GradientDissimilarity, StructuralDissimilarity, Window, blur
from kizu_train.nets.unet import UNet, UNetSettings


@dataclass(frozen=True)
class HighPass:
    """What of a tile the network may see.

    `blur`: the tile less its Gaussian blur of `sigma_px`; 1.6 px passes what a Butterworth filter of cut-off 30 at
    256 px does. `laplacian`, `sobel`: those derivatives, the latter in both directions. `colour`: of each channel
    rather than of their mean.
    """

    kind: Literal["blur", "laplacian", "sobel"] = "blur"
    sigma_px: float = 1.6
    colour: bool = False

    def __post_init__(self) -> None:
        if not 0.3 <= self.sigma_px <= 20:
            raise ValueError("sigma_px must lie between 0.3 and 20")


class HighFrequencies(nn.Module):
    """The fixed filters, as products with constant matrices."""

    def __init__(self, settings: HighPass, tile_px: int, channels: int) -> None:
        super().__init__()
        self.colour = settings.colour
        self.kind = settings.kind
        self.filters = nn.ModuleList(Filter(tile_px, *pair) for pair in _weights(settings))
        self.channels = (channels if settings.colour else 1) * (2 if settings.kind == "sobel" else 1)

    def forward(self, tiles: Tensor) -> Tensor:
        """Tiles [N, C, T, T] → [N, `self.channels`, T, T], about 0 on average."""
        seen = tiles if self.colour else tiles.mean(1, keepdim=True)
        found: list[Tensor] = [fixed(seen) for fixed in self.filters]
        if self.kind == "sobel":
            return torch.cat(found, 1)
        return seen - found[0] if self.kind == "blur" else found[0] + found[1]


def _weights(settings: HighPass) -> list[tuple[Tensor, Tensor]]:
    """Pairs of weights, down and across, one for each filter."""
    if settings.kind == "blur":
        at = torch.arange(-round(3 * settings.sigma_px), round(3 * settings.sigma_px) + 1)
        weights = torch.exp(-0.5 * (at / settings.sigma_px) ** 2)
        return [(weights / weights.sum(), weights / weights.sum())]
    one, smooth = torch.tensor([0.0, 1, 0]), torch.tensor([1.0, 2, 1]) / 4
    along = torch.tensor([1.0, -2, 1]) if settings.kind == "laplacian" else torch.tensor([1.0, 0, -1])
    across = one if settings.kind == "laplacian" else smooth
    return [(along, across), (across, along)]


@dataclass(frozen=True)
class RestorationNetwork:
    """The high-pass filter and the U-Net's `widths`, at strides 2, 4, 8 and so on."""

    high_pass: HighPass = field(default_factory=HighPass)
    widths: tuple[int, ...] = (24, 32, 48, 64)

    def __post_init__(self) -> None:
        UNetSettings(self.widths, 2)


class Restorer(nn.Module):
    """High frequencies in, the whole picture out."""

    def __init__(self, network: RestorationNetwork, tile_px: int, channels: int) -> None:
        super().__init__()
        settings = UNetSettings(network.widths, 2)
        settings.check(tile_px)
        self.high_pass = HighFrequencies(network.high_pass, tile_px, channels)
        # Where nothing is filtered, nearly everything is near 0: batch norm brings it to the scale that layers expect.
        self.scale = nn.BatchNorm2d(self.high_pass.channels)
        self.unet = UNet(settings, self.high_pass.channels)
        # Four values for each place at half resolution, laid out as 2 × 2 pixels.
        self.head = nn.Sequential(MirrorConv(self.unet.out_width, 4 * channels, 3, plain=True), nn.PixelShuffle(2))

    def forward(self, tiles: Tensor) -> Tensor:
        """Tiles [N, C, T, T] → restored tiles of the same shape."""
        restored: Tensor = self.head(self.unet(self.scale(self.high_pass(tiles)))[1][-1])
        return restored


@dataclass(frozen=True)
class Comparison:
    """The loss and the map.

    Loss: `l2` times the squared error plus `ssim` times 1 − SSIM over `window`. Map: 1 − MS-GMS over `scales` scales
    plus `colour` times the absolute colour difference, both averaged over `mean_px` × `mean_px` pixels; colours before
    their difference is taken, so that grain cancels out.
    """

    l2: float = 1.0
    ssim: float = 1.0
    window: Window = field(default_factory=Window)
    scales: int = 4
    colour: float = 0.2
    mean_px: int = 21

    def __post_init__(self) -> None:
        if min(self.l2, self.ssim, self.colour) < 0 or self.l2 + self.ssim == 0:
            raise ValueError("l2, ssim and colour must be at least 0, and l2 or ssim more")
        if self.scales < 1 or self.mean_px < 1 or self.mean_px % 2 == 0:
            raise ValueError("scales >= 1 and an odd mean_px >= 1 are needed")

    def check(self, tile_px: int) -> None:
        """Raise UsageError unless tiles of `tile_px` are large enough for every window."""
        needed = max(self.mean_px, self.window.size) // 2 + 1
        if tile_px < needed or tile_px % 2**self.scales:
            raise UsageError(
                f"grid.tile_px is {tile_px}; {self.scales} scales need a multiple of {2**self.scales}, and means over "
                f"{self.mean_px} px at least {needed}"
            )


class RestorationLoss(nn.Module):
    """L2 + SSIM of tiles and restored tiles, a scalar; and each part."""

    def __init__(self, comparison: Comparison, tile_px: int) -> None:
        super().__init__()
        self.weights = comparison.l2, comparison.ssim
        self.ssim = StructuralDissimilarity(tile_px, comparison.window)

    def forward(self, tiles: Tensor, restored: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Two times [N, C, T, T] → the loss, and its parts without gradients."""
        l2, ssim = functional.mse_loss(restored, tiles), self.ssim(tiles, restored).mean()
        loss = self.weights[0] * l2 + self.weights[1] * ssim
        return loss, {"loss": loss.detach(), "l2": l2.detach(), "ssim": ssim.detach()}


class RestorationMap(nn.Module):
    """Where tiles and restored tiles differ, as maps [N, T, T], ≥ 0, of every kind."""

    def __init__(self, comparison: Comparison, tile_px: int) -> None:
        super().__init__()
        self.colour = comparison.colour
        self.gradients = GradientDissimilarity(tile_px, comparison.scales)
        self.mean = blur(tile_px, "box", comparison.mean_px)

    def forward(self, tiles: Tensor, restored: Tensor) -> dict[str, Tensor]:
        """`gms` gradients, `colour` colours, `both` their weighted sum."""
        gradients = self.mean(self.gradients(tiles, restored)[:, None]).squeeze(1)
        colours = self.mean(tiles - restored).abs().mean(1)
        return {"both": gradients + self.colour * colours, "gms": gradients, "colour": colours}
