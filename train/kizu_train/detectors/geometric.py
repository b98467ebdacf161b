"""Geometric learning: an embedding that tells good tiles from turned, shifted and patched ones, and places apart.

Sources: Golan & El-Yaniv, "Deep Anomaly Detection Using Geometric Transformations", 2018 (which transform was it?); Li
et al., "CutPaste", 2021 (a class of tiles with a part exchanged). Kinds of score:

`distance`, `lof`: how odd the embedding is among good ones, see `scored_by_lof`; one pass.
`transforms`: the source's simple score: the mean over all rigid transforms of -log p(the transform | the tile so
transformed); as many passes as there are transforms.

What differs: an embedding trained with a metric loss instead of a softmax classifier, small transforms of tiles rather
than of pictures, 13 classes rather than 72, no Dirichlet fit of the softmax; and where all pictures show the same
at the same place, the kinds of places are a second set of classes (after Yi & Yoon, "Patch SVDD", 2020, which learns
where patches lie to one another).
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor, nn

from kizu_train.detectors.base import DETECTORS, DetectorKind, Scores, Session, TileShape, TileSource
from kizu_train.nets.embedding import ClassHead, Embedding, MetricLoss
from kizu_train.nets.layers import to_pixels
from kizu_train.nets.reference_classes import Places, place_kinds, sample_tiles
from kizu_train.nets.scored_by_lof import EmbeddingDetector, EmbeddingScorer, EmbeddingSettings, Task
from kizu_train.nets.transforms import Transform, Transforms

_MOST_PLACED_BYTES = 128 * 2**20


@dataclass(frozen=True)
class GeometricSettings(EmbeddingSettings):
    """Everything a recipe may set about geometric learning.

    `score_transforms`: offer the kind `transforms` too, which makes calibration take about ten times as long.
    """

    loss: MetricLoss = field(default_factory=lambda: MetricLoss(margin=0.2))
    places: Places = field(default_factory=Places)
    score_transforms: bool = False


@dataclass(frozen=True, eq=False)
class PlacedTiles:
    """Good tiles uint8 [n, T, T, C] and the kind of place of each int64 [n]."""

    tiles: Tensor
    kinds: Tensor


class GeometricTask(Task):
    """Which transform, and which kind of place."""

    def __init__(
        self, embedding: Embedding, head: ClassHead, transforms: Transforms, placed: PlacedTiles | None,
        places: ClassHead | None,
    ) -> None:  # fmt: skip
        super().__init__(embedding)
        self.head, self.places, self.transforms, self.placed = head, places, transforms, placed

    def loss(self, good: Tensor, generator: torch.Generator) -> tuple[Tensor, dict[str, Tensor]]:
        """Good tiles as they are, as many changed ones, and as many of known places."""
        changed, labels = self.transforms.apply(good, generator)
        labels = torch.cat([torch.zeros_like(labels), labels + 1])
        if self.placed is None or self.places is None:
            return self.head.loss(self.embedding(torch.cat([good, changed])), labels), {}
        rows = torch.randint(len(self.placed.kinds), (len(good),), generator=generator, device=good.device)
        placed = self.transforms.relight(to_pixels(self.placed.tiles[rows]), generator)
        embeddings = self.embedding(torch.cat([good, changed, placed]))
        which = self.head.loss(embeddings[: len(labels)], labels)
        where = self.places.loss(embeddings[len(labels) :], self.placed.kinds[rows])
        return which + where, {"transform": which.detach(), "place": where.detach()}


class TransformScorer(nn.Module):
    """Tiles uint8 [N, T, T, C] → mean of -log p(transform | transformed tile) [N], and map [N, T/m, T/m]."""

    def __init__(self, scorer: EmbeddingScorer, head: ClassHead, transforms: list[Transform]) -> None:
        super().__init__()
        self.scorer, self.head, self.transforms = scorer, head, transforms

    def forward(self, tiles: Tensor) -> Scores:
        """Score `tiles`; all normalisation is inside."""
        pixels = to_pixels(tiles)
        views = [pixels, *(transform(pixels) for transform in self.transforms)]
        surprise = [self._surprise(view, index) for index, view in enumerate(views)]
        score = torch.stack(surprise, 1).mean(1)
        return self.scorer.with_map(score, pixels)

    def _surprise(self, view: Tensor, index: int) -> Tensor:
        logits = self.head(self.scorer.embedding(view))[:, : len(self.transforms) + 1]
        return -torch.log_softmax(logits, 1)[:, index]


class GeometricDetector(EmbeddingDetector):
    """Geometric learning as a detector."""

    score_kinds: tuple[str, ...] = ("distance", "lof")

    def __init__(self, settings: GeometricSettings, shape: TileShape, seed: int) -> None:
        super().__init__(settings, shape, seed)
        self.settings = settings
        if settings.score_transforms:
            self.score_kinds = (*self.score_kinds, "transforms")
        self.head = ClassHead(settings.network.size, 1 + settings.transforms.classes, settings.loss, seed + 2)

    def task(self, tiles: TileSource, session: Session) -> Task:
        """Transforms, and places where they say something."""
        placed = self._placed(tiles, session)
        size, kinds = self.settings.network.size, self.settings.places.kinds
        places = ClassHead(size, kinds, self.settings.loss, self.seed + 3) if placed else None
        return GeometricTask(self.embedding, self.head, self.settings.transforms, placed, places)

    def tensors(self) -> dict[str, Tensor]:
        """The embedding's tensors and the head's."""
        return super().tensors() | {f"head.{name}": tensor for name, tensor in self.head.state_dict().items()}

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Take up what `tensors` gave."""
        super().load(tensors)
        self.head.load_state_dict({name: tensors[f"head.{name}"] for name in self.head.state_dict()})

    def score_all(self, tiles: Tensor) -> dict[str, Scores]:
        """Score by every kind on offer."""
        found = super().score_all(tiles)
        return {kind: found[kind] if kind in found else self.scorer(kind)(tiles) for kind in self.score_kinds}

    def scorer(self, kind: str) -> nn.Module:
        """The exportable module of `kind`."""
        scorer = self._scorer(kind)
        if kind != "transforms":
            return scorer
        return TransformScorer(scorer, self.head, self.settings.transforms.rigid(self.shape.tile_px)).eval()

    def _placed(self, tiles: TileSource, session: Session) -> PlacedTiles | None:
        if not self.settings.places.kinds:
            return None
        most = max(1, _MOST_PLACED_BYTES // (self.shape.tile_px**2 * self.shape.channels))
        sample = sample_tiles(tiles, most, self.seed + 4)
        kinds = place_kinds(sample, self.settings.places, self.seed)
        if kinds is None:
            return None
        kinds = np.ascontiguousarray(kinds)
        return PlacedTiles(
            torch.from_numpy(sample.tiles).to(session.device), torch.from_numpy(kinds).to(session.device)
        )


DETECTORS["geometric"] = DetectorKind(GeometricSettings, GeometricDetector, uses=frozenset({"backbone"}))
