"""One Gaussian of raw patches: the baseline without a network that every network must beat to earn its cost.

Source: the multivariate Gaussian of the hyperspectral RX detector (Reed & Yu, 1990), on patches of pixels instead of
spectra. What differs: several scales, whose distances are averaged; the covariance is that of all places of all good
pictures and is shrunk; distances are averaged over the patches that cover a cell. No pixel is padded: at borders, where
fewer patches cover a cell, distances are mirrored, so that every cell averages as many. Averages of fewer would scatter
more, and the maxima of good pictures gather at borders. Whitening is one convolution for each scale.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn import functional

from kizu_train.detectors.base import DETECTORS, DetectorKind, Scores, Session, TileShape, TileSource
from kizu_train.errors import UsageError
from kizu_train.nets.gathering import batches_of
from kizu_train.nets.gaussian import Moments, shrink, whitening
from kizu_train.nets.layers import Mirror, cut_squares, to_pixels

_MOST_NUMBERS = 2048
_ROUNDING = 1 / 12 / 255**2
"""Variance of rounding to whole grey levels: no direction can vary less."""


@dataclass(frozen=True)
class Patches:
    """Patches of `side_px` pixels of the picture shrunk by each of `scales`: 8 at scale 2 sees 16 × 16 pixels."""

    side_px: int = 8
    scales: tuple[int, ...] = (1, 2, 4)

    def __post_init__(self) -> None:
        if not (2 <= self.side_px <= 64 and self.scales and all(scale >= 1 for scale in self.scales)):
            raise ValueError("2 <= side_px <= 64 and at least one scale, each >= 1, are needed")


@dataclass(frozen=True)
class Covariance:
    """`shrinkage` towards the mean variance; `keep_brightness` false removes each patch's mean; `tiles` learnt from."""

    shrinkage: float = 1e-4
    keep_brightness: bool = True
    tiles: int = 1024

    def __post_init__(self) -> None:
        if not (0 < self.shrinkage < 1 and self.tiles >= 1):
            raise ValueError("0 < shrinkage < 1 and tiles >= 1 are needed")


@dataclass(frozen=True)
class RawGaussianSettings:
    """Everything a recipe may set about the Gaussian of raw patches."""

    patches: Patches = field(default_factory=Patches)
    covariance: Covariance = field(default_factory=Covariance)


class Distance(nn.Module):
    """Squared Mahalanobis distance, per number of the patch, of every patch of one scale.

    `whiten` [D, C, p, p] and `offset` [D], D = C·p²; `centre` [1, C, 1, 1] is taken off the pixels first, so that
    little is left to cancel.
    """

    whiten: Tensor
    offset: Tensor
    centre: Tensor

    def __init__(self, channels: int, side_px: int, scale: int, cell_px: int) -> None:
        super().__init__()
        self.side, self.scale, self.step = side_px, scale, cell_px // scale
        size = channels * side_px**2
        self.register_buffer("whiten", torch.eye(size).reshape(size, channels, side_px, side_px))
        self.register_buffer("offset", torch.zeros(size))
        self.register_buffer("centre", torch.zeros(1, channels, 1, 1))
        self.span = side_px * scale // cell_px
        self.mirror = Mirror(self.span - 1)

    def forward(self, pixels: Tensor) -> Tensor:
        """Pixels [N, C, T, T], 0–1 → mean over the patches that cover each cell [N, T/m, T/m]; 1 on average."""
        return self.averaged(self.of_patches(pixels))

    def of_patches(self, pixels: Tensor) -> Tensor:
        """Pixels [N, C, h, w] → distance of every patch, one each map cell: [N, 1, …]; none sees beyond itself."""
        whitened = functional.conv2d(self._shrunk(pixels) - self.centre, self.whiten, stride=self.step)
        return (whitened + self.offset[:, None, None]).square().mean(1, keepdim=True)

    def averaged(self, distance: Tensor) -> Tensor:
        """Distances of a tile's patches → its cells [N, T/m, T/m]."""
        return functional.avg_pool2d(self.mirror(distance), self.span, stride=1)[:, 0]

    def patches(self, pixels: Tensor) -> Tensor:
        """Every patch as a vector [n, D] of pixels [N, C, T, T]."""
        return functional.unfold(self._shrunk(pixels), self.side, stride=self.step).transpose(1, 2).flatten(0, 1)

    def learn(self, moments: Moments, settings: Covariance) -> None:
        """Set the Gaussian from the `moments` of patches."""
        size, shape = len(moments.mean), self.whiten.shape
        keep = torch.eye(size).to(moments.mean)
        if not settings.keep_brightness:
            keep -= 1 / size
        spread = shrink(keep @ moments.covariance() @ keep, settings.shrinkage, _ROUNDING)
        whiten = whitening(spread) @ keep
        centre = moments.mean.reshape(shape[1], -1).mean(1)
        offset = -whiten @ (moments.mean - centre.repeat_interleave(size // shape[1]))
        self.whiten, self.offset = whiten.reshape(shape).float(), offset.float()
        self.centre = centre.reshape(1, -1, 1, 1).float()

    def _shrunk(self, pixels: Tensor) -> Tensor:
        return pixels if self.scale == 1 else functional.avg_pool2d(pixels, self.scale)


class RawGaussianScorer(nn.Module):
    """Tiles uint8 [N, T, T, C] → the highest cell [N], and the mean of the scales' distances [N, T/m, T/m]."""

    def __init__(self, settings: Patches, shape: TileShape) -> None:
        super().__init__()
        self.shape = shape
        self.scales = nn.ModuleList(
            Distance(shape.channels, settings.side_px, scale, shape.map_cell_px) for scale in settings.scales
        )

    def forward(self, tiles: Tensor) -> Scores:
        """Score `tiles`."""
        pixels = to_pixels(tiles)
        return self.score_shared(tiles, *(scale.of_patches(pixels) for scale in self.distances()))

    def can_share(self, stride_px: int) -> bool:
        """Whether overlapping tiles have patches in common."""
        return stride_px % self.shape.map_cell_px == 0 and stride_px < self.shape.tile_px

    def share(self, block: Tensor, stride_px: int) -> tuple[Tensor, ...]:
        """Distances of the patches of each tile in `block` [h, w, C], each computed once: [n, 1, …] of every scale."""
        pixels, cell = to_pixels(block[None]), self.shape.map_cell_px
        lattices = ((scale, scale.of_patches(pixels)) for scale in self.distances())
        return tuple(
            cut_squares(lattice, self.shape.tile_px // cell - scale.span + 1, stride_px // cell)
            for scale, lattice in lattices
        )

    def score_shared(self, _tiles: Tensor, *shared: Tensor) -> Scores:
        """Score tiles by the distances of their patches."""
        parts = zip(self.distances(), shared, strict=True)
        cells = torch.stack([scale.averaged(distance) for scale, distance in parts]).mean(0)
        return cells.amax((1, 2)), cells

    def distances(self) -> list[Distance]:
        """The modules of the scales."""
        return [scale for scale in self.scales if isinstance(scale, Distance)]


class RawGaussianDetector:
    """The Gaussian of raw patches as a detector: one pass over a sample of tiles."""

    score_kinds: tuple[str, ...] = ("mahalanobis",)

    def __init__(self, settings: RawGaussianSettings, shape: TileShape, _seed: int) -> None:
        _check(settings.patches, shape)
        self.settings = settings
        self.module = RawGaussianScorer(settings.patches, shape).eval()

    def fit(self, tiles: TileSource, session: Session) -> None:
        """Gather mean and covariance. A resumed fit starts anew: it takes seconds."""
        module = self.module.to(session.device)
        moments = [Moments() for _ in module.scales]
        for batch in batches_of(tiles, self.settings.covariance.tiles, session):
            pixels = to_pixels(batch)
            for found, distance in zip(moments, module.distances(), strict=True):
                found.add(distance.patches(pixels))
        for found, distance in zip(moments, module.distances(), strict=True):
            distance.learn(found, self.settings.covariance)
        module.cpu()

    def tensors(self) -> dict[str, Tensor]:
        """Whitening, offset and centre of each scale."""
        return self.module.state_dict()

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Take up what was learned."""
        self.module.load_state_dict(dict(tensors))

    def score_all(self, tiles: Tensor) -> dict[str, Scores]:
        """The one kind there is."""
        return {"mahalanobis": self.module(tiles)}

    def scorer(self, kind: str) -> nn.Module:
        """The exportable module; the one `kind` is mahalanobis."""
        del kind
        return self.module


def _check(patches: Patches, shape: TileShape) -> None:
    cell, numbers = shape.map_cell_px, shape.channels * patches.side_px**2
    for scale in patches.scales:
        side = patches.side_px * scale
        if cell % scale or side % cell or 2 * side - cell > shape.tile_px or shape.tile_px % scale:
            raise UsageError(
                f"patches.side_px {patches.side_px} at scale {scale} does not fit: the scale must divide map_cell_px "
                f"{cell}, and the {side} pixels seen must be a multiple of that, at most half a tile of {shape.tile_px}"
            )
    if numbers > _MOST_NUMBERS:
        raise UsageError(f"a patch of {numbers} numbers is too large a vector; choose a smaller patches.side_px")


DETECTORS["raw_gaussian"] = DetectorKind(RawGaussianSettings, RawGaussianDetector)
