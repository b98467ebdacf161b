"""Restoration from high frequencies: a U-Net sees only edges and grain, and must know good products to paint the rest.

Source: Liu et al., "FAIR: Frequency-aware Image Restoration for Industrial Visual Anomaly Detection", 2023; the map is
that of Zavrtanik, Kristan & Skočaj, "Reconstruction by inpainting for visual anomaly detection", 2021 (RIAD): 1 −
multi-scale gradient magnitude similarity, averaged over 21 × 21 pixels, plus a small colour term. What differs: the
high-pass is a Gaussian's complement of the same cut-off as FAIR's Butterworth filter, so that it is a constant in the
graph; it works on tiles, not on whole pictures of 256 px; the U-Net is narrow and works at half resolution; borders are
mirrored. Optionally, tiles are spoilt with synthetic defects before filtering and restored to the clean tile.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from kizu_train.detectors.base import DETECTORS, DetectorKind, Scores, Session, TileShape, TileSource
from kizu_train.feeding import Batch
from kizu_train.nets.descent import Descent, descend
from kizu_train.nets.layers import seeded, to_cells, to_pixels
from kizu_train.nets.restoration import Comparison, RestorationLoss, RestorationMap, RestorationNetwork, Restorer
from kizu_train.nets.synthetic import Spoiling, spoil
from kizu_train.nets.synthetic_nuisance import Nuisance

_NOTHING_ELSE = Nuisance(light=0, focus=0, noise=0, movement=0)
"""The clean tile is the target: only defects may differ."""


@dataclass(frozen=True)
class Defects:
    """Synthetic defects in the input: this `share` of the tiles carries one to `most`."""

    share: float = 0.5
    most: int = 3

    def __post_init__(self) -> None:
        if not (0 <= self.share <= 1 and self.most >= 1):
            raise ValueError("share must lie between 0 and 1, most must be at least 1")


@dataclass(frozen=True)
class RestoreSettings:
    """Everything a recipe may set about the restoration."""

    network: RestorationNetwork = field(default_factory=RestorationNetwork)
    compare: Comparison = field(default_factory=Comparison)
    defects: Defects = field(default_factory=Defects)
    train: Descent = field(default_factory=lambda: Descent(steps=1000, batch=8, learning_rate=2e-3))


class RestoreScorer(nn.Module):
    """Tiles uint8 [N, T, T, C] → score [N], the map's maximum, and map [N, T/m, T/m] of one `kind`."""

    def __init__(self, restorer: Restorer, difference: RestorationMap, map_cell_px: int, kind: str) -> None:
        super().__init__()
        self.restorer, self.difference, self.map_cell_px, self.kind = restorer, difference, map_cell_px, kind

    def forward(self, tiles: Tensor) -> Scores:
        """Score `tiles`; all normalisation is inside."""
        pixels = to_pixels(tiles)
        return _finish(self.difference(pixels, self.restorer(pixels))[self.kind], self.map_cell_px)


@dataclass(frozen=True)
class Planting:
    """Good tiles uint8 [B, T, T, C] → them and what is spoilt of them, which are the same where none is to be."""

    spoiling: Spoiling

    def __call__(self, tiles: NDArray[np.uint8], generator: torch.Generator) -> Batch:
        """Plant defects."""
        if self.spoiling.clean_share == 1:
            return tiles, tiles
        seed = torch.randint(2**31, (1,), generator=generator)
        return tiles, spoil(tiles, self.spoiling, np.random.default_rng(int(seed)))[0]


class RestoreDetector:
    """The restoration as a detector."""

    score_kinds: tuple[str, ...] = ("both", "gms", "colour")

    def __init__(self, settings: RestoreSettings, shape: TileShape, seed: int) -> None:
        settings.compare.check(shape.tile_px)
        self.settings, self.shape = settings, shape
        self.spoiling = Spoiling(
            clean_share=1 - settings.defects.share, most=settings.defects.most, nuisance=_NOTHING_ELSE
        )
        with seeded(seed):
            self.restorer = Restorer(settings.network, shape.tile_px, shape.channels)
        self.restorer.eval()
        self.loss = RestorationLoss(settings.compare, shape.tile_px)
        self.difference = RestorationMap(settings.compare, shape.tile_px)

    def fit(self, tiles: TileSource, session: Session) -> None:
        """Train on random tiles."""
        self.loss.to(session.device)
        descend(self.restorer, self._loss, self.settings.train, tiles, session, prepare=Planting(self.spoiling))
        self.loss.cpu()

    def tensors(self) -> dict[str, Tensor]:
        """The network's weights and batch norm statistics."""
        return self.restorer.state_dict()

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Take up weights."""
        self.restorer.load_state_dict(dict(tensors))

    def score_all(self, tiles: Tensor) -> dict[str, Scores]:
        """Score by every kind in one pass."""
        pixels = to_pixels(tiles)
        maps = self.difference(pixels, self.restorer(pixels))
        return {kind: _finish(found, self.shape.map_cell_px) for kind, found in maps.items()}

    def scorer(self, kind: str) -> nn.Module:
        """The exportable module of `kind`."""
        return RestoreScorer(self.restorer, self.difference, self.shape.map_cell_px, kind).eval()

    def _loss(self, tiles: Tensor, spoilt: Tensor, _generator: torch.Generator) -> tuple[Tensor, dict[str, Tensor]]:
        """L2 + SSIM of the clean tiles and what is restored of the spoilt ones."""
        loss, shown = self.loss(to_pixels(tiles), self.restorer(to_pixels(spoilt)))
        return loss, shown


def _finish(pixels: Tensor, map_cell_px: int) -> Scores:
    cells = to_cells(pixels, map_cell_px)
    return cells.amax((1, 2)), cells


DETECTORS["restore"] = DetectorKind(RestoreSettings, RestoreDetector)
