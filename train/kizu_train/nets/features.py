"""From tiles to one vector per map cell: features of several layers, averaged, laid on one lattice and joined.

Source: Roth et al., "Towards Total Recall in Industrial Anomaly Detection" (PatchCore), 2022: mid-level layers, a local
3 × 3 average, deeper layers enlarged to the shallower ones' lattice. What differs: the lattice is the map's own, so
that shallow layers shrink where cells are larger than their stride; averages see mirrored borders.

Letters: N tiles; C channels; T tile side; m map cell side; D joined channels; K projected ones; V vectors.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional

from kizu_train.nets.backbones import Borders
from kizu_train.nets.layers import Enlarge, Mirror


@dataclass(frozen=True)
class BackboneChoice:
    """Where features come from: `auto` takes the file the user gave, or trains a small network where none was given.

    `layers` in the architecture's names, by default its usual ones; of the small network always both depths. `scales`
    are the sizes at which a tile is looked at, 2 for half: a coarse look sees what is wrong with a product's outline at
    any camera resolution, for a quarter of a fine look's cost (the papers shrink each picture to 224 px). `average`
    is the side of the local average, in a layer's own cells. `borders` `zero` is what pretrained networks were
    trained with, but tells apart border and middle by a pattern that is in no product.
    """

    source: Literal["auto", "file", "scratch"] = "auto"
    layers: tuple[str, ...] = ()
    scales: tuple[int, ...] = (1, 2, 4)
    average: int = 3
    borders: Borders = "mirror"

    def __post_init__(self) -> None:
        if self.average < 1 or self.average % 2 == 0:
            raise ValueError("average must be odd: 1 for none, 3, 5 …")
        if not self.scales or any(scale < 1 or scale & (scale - 1) for scale in self.scales):
            raise ValueError("scales must be powers of two, at least one of them: 1 is full size, 2 half of it")


class FeatureNet(Protocol):
    """Pixels float32 [N, C, T, T], 0–1 → one map [N, ·, T/s, T/s] for each of `strides`."""

    @property
    def strides(self) -> tuple[int, ...]:
        """Pixels between cells of each map, a power of two."""

    def __call__(self, pixels: Tensor) -> list[Tensor]:
        """The feature maps."""


class Lattice(nn.Module):
    """Pixels float32 [N, C, T, T], 0–1 → joined features [N, D, T/m, T/m]."""

    def __init__(self, net: nn.Module, strides: tuple[int, ...], average: int, map_cell_px: int) -> None:
        super().__init__()
        self.net = net
        self.smooth = nn.Sequential(Mirror(average // 2), nn.AvgPool2d(average, 1)) if average > 1 else nn.Identity()
        self.resize = nn.ModuleList(_resize(stride, map_cell_px) for stride in strides)

    def forward(self, pixels: Tensor) -> Tensor:
        """Features of `pixels`."""
        maps = self.net(pixels)
        return torch.cat([resize(self.smooth(each)) for resize, each in zip(self.resize, maps, strict=True)], 1)


def to_scale(pixels: Tensor, scale: int) -> Tensor:
    """Shrink [N, C, H, W] to [N, C, H / scale, W / scale] by averaging."""
    return pixels if scale == 1 else functional.avg_pool2d(pixels, scale)


class Projection(nn.Module):
    """Features [N, D, h, w] → weight · (features - centre) [N, K, h, w], a 1 × 1 convolution.

    Standardisation, principal components and whitening are folded into the one matrix. The centre is taken off first:
    folded into a bias it would cancel large numbers.
    """

    centre: Tensor
    weight: Tensor

    def __init__(self, centre: Tensor, weight: Tensor) -> None:
        super().__init__()
        self.register_buffer("centre", centre.float().reshape(1, -1, 1, 1))
        self.register_buffer("weight", weight.float().reshape(*weight.shape[:2], 1, 1))

    def forward(self, features: Tensor) -> Tensor:
        """Project `features`."""
        return functional.conv2d(features - self.centre, self.weight)

    def of_vectors(self, vectors: Tensor) -> Tensor:
        """Project vectors [V, D] → [V, K]."""
        return (vectors - self.centre.flatten()) @ self.weight.flatten(1).T


@dataclass(frozen=True)
class Spectrum:
    """Centre [D] of vectors, a basis [D, K] in which they are uncorrelated, and their variances there [K], rising.

    All float64; channels were standardised before. `count` vectors were seen; `fourth` is the mean of their ‖·‖⁴.
    """

    centre: Tensor
    basis: Tensor
    values: Tensor
    count: int
    fourth: float


_QUIET = 0.05
"""A channel that hardly moves is scaled by at least this share of the channels' mean deviation: one that was silent on
all good pictures must not decide alone."""
_CHUNK = 8192


def spectrum(vectors: Tensor, embed: Tensor | None = None) -> Spectrum:
    """Standardise `vectors` [V, D], project by `embed` [D, K] where it is given, and split their covariance.

    Products are float32, in chunks; sums are float64.
    """
    chunks = torch.split(vectors, _CHUNK)
    centre = torch.stack([chunk.double().sum(0) for chunk in chunks]).sum(0) / len(vectors)
    squares = torch.stack([(chunk - centre).square().sum(0) for chunk in chunks]).sum(0)
    scale = (squares / max(1, len(vectors) - 1)).sqrt()
    scale = scale.clamp(min=max(1e-12, _QUIET * float(scale.mean())))
    standardise = torch.diag(1 / scale) if embed is None else embed.double() / scale[:, None]
    products, fourth = torch.zeros(2 * standardise.shape[1:], dtype=torch.float64, device=vectors.device), 0.0
    for chunk in chunks:
        standard = (chunk - centre.float()) / scale.float()
        standard = standard if embed is None else standard @ embed
        products += standard.T @ standard
        fourth += float(standard.square().sum(1).square().sum(dtype=torch.float64))
    values, basis = torch.linalg.eigh(products / max(1, len(vectors) - 1))
    return Spectrum(centre, standardise @ basis, values.clamp(min=0), len(vectors), fourth / len(vectors))


def semi_orthogonal(size: int, dimension: int, generator: torch.Generator) -> Tensor | None:
    """A random matrix [size, dimension] with orthogonal columns; None where nothing would be left out.

    Source: Kim et al., "Semi-orthogonal Embedding for Efficient Unsupervised Anomaly Segmentation", 2021.
    """
    if dimension >= size:
        return None
    basis: Tensor = torch.linalg.qr(torch.randn((size, dimension), generator=generator, device=generator.device))[0]
    return basis


def principal(found: Spectrum, dimension: int, explained: float = 1.0) -> Projection:
    """Project onto at most `dimension` principal components, fewer where they explain that share of the variance."""
    falling = found.values.flip(0)
    enough = int((falling.cumsum(0) < explained * falling.sum()).sum()) + 1
    return Projection(found.centre, found.basis.flip(1)[:, : min(dimension, enough)].T)


def whitening(found: Spectrum, ridge: float) -> tuple[Projection, float]:
    """Project so that the squared length is the Mahalanobis distance; and the shrinkage that Ledoit and Wolf ask for.

    The correlation is drawn towards its mean variance by that shrinkage (Ledoit & Wolf 2004, for independent vectors;
    neighbouring cells are not), then `ridge` of the mean variance is added.
    """
    mean = found.values.mean()
    spread = float((found.values - mean).square().sum())
    noise = (found.fourth - float(found.values.square().sum())) / max(1, found.count)
    shrinkage = min(1.0, max(0.0, noise / spread)) if spread > 0 else 1.0
    shrunk = (1 - shrinkage) * found.values + (shrinkage + ridge) * mean
    return Projection(found.centre, (found.basis / shrunk.clamp(min=1e-12).sqrt()).T), shrinkage


def projection_from(tensors: Mapping[str, Tensor]) -> Projection:
    """The projection whose `state_dict` was `tensors`. Raises KeyError."""
    return Projection(tensors["centre"].flatten(), tensors["weight"].flatten(1))


def _resize(stride: int, cell: int) -> nn.Module:
    if stride == cell:
        return nn.Identity()
    return nn.AvgPool2d(cell // stride) if stride < cell else Enlarge(stride // cell, linear=True)
