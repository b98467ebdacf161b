"""Filter responses over several octaves and a mixture of Gaussians: a serious method for textures without a network.

Source: Böttger & Ulrich, "Real-time texture error detection on textured surfaces with compressed sensing", Pattern
Recognition and Image Analysis 26, 2016: a Gaussian mixture of texture features on a pyramid. What differs: features are
logarithms of local filter energy instead of randomly projected patches, all octaves are judged together instead of one
by one, and covariances are full.

Two kinds of score: `nearest`, the squared Mahalanobis distance to the nearest component, per feature; `likelihood`, the
negative log-likelihood above its lowest possible value, per feature. As with the patch VAE's M and L, the first leaves
out how frequent and how varied a kind of region is, so that one threshold serves all regions.

Where filters reach beyond the tile they know less, and good cells score higher for it. So every cell is divided by what
good tiles score there on average.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn import functional

from kizu_train.detectors.base import DETECTORS, DetectorKind, Scores, Session, TileShape, TileSource
from kizu_train.errors import UsageError
from kizu_train.nets.filters import LEAST_SIDE_PX, FilterBank
from kizu_train.nets.gathering import batches_of
from kizu_train.nets.gaussian import Moments, whitening
from kizu_train.nets.layers import to_pixels
from kizu_train.nets.mixture import Mixture, fit_mixture

KINDS = ("nearest", "likelihood")
_KEPT_PIXELS = 2**22
"""Of the tiles that settle what each cell typically scores."""


@dataclass(frozen=True)
class Filters:
    """The bank: `octaves` of `orientations`; `relative_contrast` leaves out local brightness and contrast."""

    octaves: int = 3
    orientations: int = 6
    relative_contrast: bool = False

    def __post_init__(self) -> None:
        if not (1 <= self.octaves <= 5 and 1 <= self.orientations <= 16):
            raise ValueError("1 <= octaves <= 5 and 1 <= orientations <= 16 are needed")


@dataclass(frozen=True)
class Components:
    """The mixture: `count` components, `steps` of expectation maximisation on a `sample` of places of `tiles` tiles."""

    count: int = 8
    steps: int = 30
    shrinkage: float = 0.01
    sample: int = 40_000
    tiles: int = 1024

    def __post_init__(self) -> None:
        if not (1 <= self.count <= 64 and self.steps >= 1 and self.sample >= 100 * self.count and self.tiles >= 1):
            raise ValueError("1 <= count <= 64, steps >= 1, sample >= 100 · count and tiles >= 1 are needed")
        if not 0 < self.shrinkage < 1:
            raise ValueError("0 < shrinkage < 1 is needed")


@dataclass(frozen=True)
class TextureGmmSettings:
    """Everything a recipe may set about the texture mixture."""

    filters: Filters = field(default_factory=Filters)
    mixture: Components = field(default_factory=Components)


class TextureGmm(nn.Module):
    """Tiles uint8 [N, T, T, C] → what the components make of each cell; F features, K components.

    Features are centred by `mean` and divided by `deviation` [1, F, 1, 1], then whitened for every component at once:
    `whiten` [K·F, F, 1, 1], `offset` [K·F]. `peak` [K, 1, 1]: log of each component's density at its mean, so counted
    that their sum is 1 and the likelihood never above it. `typical`: what good tiles score at each cell, by kind of
    score, against the mean of all cells [2, T/m, T/m].
    """

    mean: Tensor
    deviation: Tensor
    whiten: Tensor
    offset: Tensor
    peak: Tensor
    typical: Tensor

    def __init__(self, settings: TextureGmmSettings, shape: TileShape) -> None:
        super().__init__()
        bank = settings.filters
        self.bank = FilterBank(
            shape.channels,
            shape.map_cell_px,
            octaves=bank.octaves,
            orientations=bank.orientations,
            relative_contrast=bank.relative_contrast,
        )
        features, count = self.bank.count, settings.mixture.count
        self.register_buffer("mean", torch.zeros(1, features, 1, 1))
        self.register_buffer("deviation", torch.ones(1, features, 1, 1))
        self.register_buffer("whiten", torch.eye(features).repeat(count, 1)[:, :, None, None])
        self.register_buffer("offset", torch.zeros(count * features))
        self.register_buffer("peak", torch.zeros(count, 1, 1))
        side = shape.tile_px // shape.map_cell_px
        self.register_buffer("typical", torch.ones(len(KINDS), side, side))

    def features(self, tiles: Tensor) -> Tensor:
        """What the bank sees [N, F, T/m, T/m]."""
        found: Tensor = self.bank(to_pixels(tiles))
        return found

    def distances(self, tiles: Tensor) -> Tensor:
        """Squared Mahalanobis distance of each cell to each component [N, K, T/m, T/m]."""
        features = (self.features(tiles) - self.mean) / self.deviation
        whitened = functional.conv2d(features, self.whiten, self.offset).square()
        side = whitened.shape[-1]
        return whitened.reshape(-1, len(self.peak), self.bank.count, side, side).sum(2)

    def cells(self, distances: Tensor, kind: str) -> Tensor:
        """The map [N, T/m, T/m] of one kind of score."""
        return self._raw(distances, kind) / self.typical[KINDS.index(kind)]

    def settle(self, tiles: Tensor) -> None:
        """Learn what good `tiles` score at each cell on average; borders of all four sides are taken to act alike."""
        distances = self.distances(tiles)
        mean = torch.stack([self._raw(distances, kind).mean(0) for kind in KINDS])
        mean = torch.stack([torch.rot90(side, turn, (1, 2)) for side in (mean, mean.mT) for turn in range(4)]).mean(0)
        overall = mean.mean((1, 2), keepdim=True).clamp_min(1e-6)
        self.typical = (mean / overall).clamp_min(0.1)

    def _raw(self, distances: Tensor, kind: str) -> Tensor:
        if kind == "nearest":
            return distances.amin(1) / self.bank.count
        joint = self.peak - 0.5 * distances
        most = joint.amax(1, keepdim=True)
        likelihood = (joint - most).exp().sum(1).log() + most[:, 0]
        return functional.relu(-likelihood) / self.bank.count

    def learn(self, mean: Tensor, deviation: Tensor, mixture: Mixture) -> None:
        """Take up a mixture of standardised features."""
        whiten = whitening(mixture.covariances)
        offset = -(whiten @ mixture.means[:, :, None]).flatten()
        peaks = mixture.log_peaks()
        self.mean, self.deviation = (part.float().reshape(1, -1, 1, 1) for part in (mean, deviation))
        self.whiten, self.offset = whiten.flatten(0, 1)[:, :, None, None].float(), offset.float()
        self.peak = (peaks - torch.logsumexp(peaks, 0)).float()[:, None, None]


class TextureGmmScorer(nn.Module):
    """Tiles uint8 [N, T, T, C] → the highest cell [N] and the map [N, T/m, T/m] of one `kind`."""

    def __init__(self, model: TextureGmm, kind: str) -> None:
        super().__init__()
        self.model, self.kind = model, kind

    def forward(self, tiles: Tensor) -> Scores:
        """Score `tiles`."""
        return _scores(self.model.cells(self.model.distances(tiles), self.kind))


class TextureGmmDetector:
    """The texture mixture as a detector: one pass over a sample of tiles, then expectation maximisation."""

    score_kinds: tuple[str, ...] = KINDS

    def __init__(self, settings: TextureGmmSettings, shape: TileShape, _seed: int) -> None:
        coarsest = 2 ** (settings.filters.octaves - 1)
        if shape.map_cell_px % coarsest or shape.tile_px < LEAST_SIDE_PX * coarsest:
            raise UsageError(
                f"filters.octaves is {settings.filters.octaves}: map_cell_px must be a multiple of {coarsest}, not "
                f"{shape.map_cell_px}, and grid.tile_px at least {LEAST_SIDE_PX * coarsest}, not {shape.tile_px}"
            )
        self.settings = settings
        self.model = TextureGmm(settings, shape).eval()

    def fit(self, tiles: TileSource, session: Session) -> None:
        """Gather features, then fit the mixture. A resumed fit starts anew: it takes seconds."""
        settings, model = self.settings.mixture, self.model.to(session.device)
        generator = torch.Generator().manual_seed(session.seed)
        vectors, moments = [], Moments()
        kept: list[Tensor] = []
        each = -(-settings.sample // max(1, min(tiles.count, settings.tiles)))
        for batch in batches_of(tiles, settings.tiles, session):
            found = model.features(batch).flatten(2).transpose(1, 2)  # [B, cells, F]
            moments.add(found.flatten(0, 1))
            chosen = torch.randint(found.shape[1], (len(batch), min(each, found.shape[1])), generator=generator)
            vectors.append(found.gather(1, chosen.to(found.device)[:, :, None].expand(-1, -1, found.shape[2])))
            if sum(len(part) for part in kept) * batch.shape[1] ** 2 < _KEPT_PIXELS:
                kept.append(batch)
        deviation = moments.covariance().diagonal().sqrt().clamp_min(1e-3)
        sample = torch.cat([part.flatten(0, 1) for part in vectors]).double()

        def after_step(step: int, likelihood: float) -> bool:
            session.report(step, settings.steps, {"loss": -likelihood})
            return session.should_stop

        mixture = fit_mixture(
            (sample - moments.mean) / deviation,
            min(settings.count, len(sample)),
            steps=settings.steps,
            shrinkage=settings.shrinkage,
            generator=generator,
            after_step=after_step,
        )
        model.learn(moments.mean, deviation, mixture)
        model.settle(torch.cat(kept))
        model.cpu()

    def tensors(self) -> dict[str, Tensor]:
        """Mean and deviation of the features, and the mixture."""
        return self.model.state_dict()

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Take up what was learned."""
        self.model.load_state_dict(dict(tensors))

    def score_all(self, tiles: Tensor) -> dict[str, Scores]:
        """Score by both kinds in one pass."""
        distances = self.model.distances(tiles)
        return {kind: _scores(self.model.cells(distances, kind)) for kind in self.score_kinds}

    def scorer(self, kind: str) -> nn.Module:
        """The exportable module of `kind`."""
        return TextureGmmScorer(self.model, kind).eval()


def _scores(cells: Tensor) -> Scores:
    return cells.amax((1, 2)), cells


DETECTORS["texture_gmm"] = DetectorKind(TextureGmmSettings, TextureGmmDetector)
