"""What plain autoencoders share: the loss, the map of what they rebuild badly, and the detector around a network.

Letters: N tiles; C channels; T tile side; m map cell side. Tiles are float32 [N, C, T, T], 0–1.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor, nn

from kizu_train.detectors.base import Scores, Session, TileShape, TileSource
from kizu_train.errors import UsageError
from kizu_train.nets.descent import Descent, descend
from kizu_train.nets.layers import seeded, to_cells, to_pixels
from kizu_train.nets.patch_vae_terms import Augment
from kizu_train.nets.similarity import StructuralDissimilarity, Window

LossKind = Literal["l2", "ssim"]


@dataclass(frozen=True)
class Objective:
    """How unlike a tile and its reconstruction are: in training, and in the map of the kind of the same name.

    `l2`: squared error. `ssim`: 1 − SSIM over `window`, plus `l1_weight` times the absolute error.
    """

    kind: LossKind = "l2"
    window: Window = field(default_factory=Window)
    l1_weight: float = 0.0

    def __post_init__(self) -> None:
        if self.l1_weight < 0:
            raise ValueError("l1_weight must be at least 0")


class Unlikeness(nn.Module):
    """The objective as a map: tiles and reconstructions [N, C, T, T] → [N, T, T], mean over channels, ≥ 0."""

    def __init__(self, objective: Objective, kind: str, tile_px: int) -> None:
        super().__init__()
        self.l1_weight, self.kind = objective.l1_weight, kind
        self.ssim = StructuralDissimilarity(tile_px, objective.window)

    def forward(self, tiles: Tensor, rebuilt: Tensor) -> Tensor:
        """Compare `tiles` with what was `rebuilt` of them."""
        if self.kind == "l2":
            return ((tiles - rebuilt) ** 2).mean(1)
        unlike: Tensor = self.ssim(tiles, rebuilt)
        return unlike + self.l1_weight * (tiles - rebuilt).abs().mean(1) if self.l1_weight else unlike


class ReconstructionScorer(nn.Module):
    """Tiles uint8 [N, T, T, C] → score [N], the mean of the map, and map [N, T/m, T/m] of one `kind`."""

    def __init__(self, network: nn.Module, unlike: nn.Module, map_cell_px: int) -> None:
        super().__init__()
        self.network, self.unlike, self.map_cell_px = network, unlike, map_cell_px

    def forward(self, tiles: Tensor) -> Scores:
        """Score `tiles`; all normalisation is inside."""
        pixels = to_pixels(tiles)
        return finish(self.unlike(pixels, self.network(pixels)), self.map_cell_px)


def finish(unlike: Tensor, map_cell_px: int) -> Scores:
    """Unlikeness of pixels [N, T, T] → its mean [N] and cells [N, T/m, T/m]."""
    return unlike.mean((1, 2)), to_cells(unlike, map_cell_px)


class ReconstructionDetector:
    """A network that rebuilds good tiles, trained on an objective and scored by `l2` or `ssim`, the trained one first.

    `make` builds the network; `seed` decides its first weights.
    """

    score_kinds: tuple[str, ...]

    def __init__(
        self,
        make: Callable[[], nn.Module],
        loss: Objective,
        train: Descent,
        augment: Augment,
        shape: TileShape,
        seed: int,
    ) -> None:
        if shape.tile_px <= loss.window.size // 2:
            raise UsageError(f"tiles of {shape.tile_px} px are too small for an SSIM window of {loss.window.size} px")
        self.objective, self.train, self.augment, self.shape = loss, train, augment, shape
        self.score_kinds = ("l2", "ssim") if loss.kind == "l2" else ("ssim", "l2")
        self.unlike = {kind: Unlikeness(loss, kind, shape.tile_px) for kind in self.score_kinds}
        with seeded(seed):
            self.network = make()
        self.network.eval()

    def fit(self, tiles: TileSource, session: Session) -> None:
        """Train on random tiles."""
        self.unlike[self.objective.kind].to(session.device)
        descend(self.network, self._loss, self.train, tiles, session)
        self.unlike[self.objective.kind].cpu()

    def tensors(self) -> dict[str, Tensor]:
        """The network's weights."""
        return self.network.state_dict()

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Take up weights."""
        self.network.load_state_dict(dict(tensors))

    def score_all(self, tiles: Tensor) -> dict[str, Scores]:
        """Score by every kind in one pass."""
        pixels = to_pixels(tiles)
        rebuilt = self.network(pixels)
        return {kind: finish(unlike(pixels, rebuilt), self.shape.map_cell_px) for kind, unlike in self.unlike.items()}

    def scorer(self, kind: str) -> nn.Module:
        """The exportable module of `kind`."""
        return ReconstructionScorer(self.network, self.unlike[kind], self.shape.map_cell_px).eval()

    def _loss(self, tiles: Tensor, generator: torch.Generator) -> tuple[Tensor, dict[str, Tensor]]:
        """Mean unlikeness of the clean tiles and what is rebuilt of the spoilt ones."""
        spoilt, target = self.augment(to_pixels(tiles), generator)
        loss = self.unlike[self.objective.kind](target, self.network(spoilt)).mean()
        return loss, {"loss": loss.detach()}
