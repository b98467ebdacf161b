"""Deep One-Class: features in which good tiles lie close together and other things are still told apart.

Source: Perera & Patel, "Learning Deep Features for One-Class Classification", 2019: compactness on a batch of good
pictures plus descriptiveness (cross-entropy) on a batch of reference classes, through one network.

What differs: features lie on the unit sphere, where compactness cannot be had by shrinking them all; both batches pass
the network together, so that batch norm sees one distribution; the network is a small one from scratch unless a
backbone is given, whose layers then stay frozen; tiles are scored by the local outlier factor among good ones rather
than by the distance to templates; and where there are no reference classes, transformed good tiles stand in.
"""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from kizu_train.detectors.base import DETECTORS, DetectorKind, Session, TileShape, TileSource
from kizu_train.nets.embedding import ClassHead, Embedding, MetricLoss
from kizu_train.nets.scored_by_lof import EmbeddingDetector, EmbeddingSettings, OtherThings, Task

_SOFTMAX = MetricLoss("l2_softmax")


@dataclass(frozen=True)
class DocLoss:
    """The weight of `compactness` beside descriptiveness: the source's λ, 0.1."""

    compactness: float = 0.1

    def __post_init__(self) -> None:
        if self.compactness < 0:
            raise ValueError("compactness must be at least 0")


@dataclass(frozen=True)
class DocSettings(EmbeddingSettings):
    """Everything a recipe may set about Deep One-Class."""

    loss: DocLoss = field(default_factory=DocLoss)


def compactness(embeddings: Tensor) -> Tensor:
    """Mean squared distance of each embedding [N, E] from the mean of the others: a scalar, the source's l_C · E."""
    count = len(embeddings)
    return ((embeddings - embeddings.mean(0)) ** 2).sum(1).mean() * (count / (count - 1)) ** 2


class DocTask(Task):
    """Descriptiveness + λ · compactness."""

    def __init__(self, embedding: Embedding, size: int, others: OtherThings, loss: DocLoss, seed: int) -> None:
        super().__init__(embedding)
        self.others, self.weight = others, loss.compactness
        self.head = ClassHead(size, others.classes, _SOFTMAX, seed)

    def loss(self, good: Tensor, generator: torch.Generator) -> tuple[Tensor, dict[str, Tensor]]:
        """One pass over good tiles and as many others."""
        others, labels = self.others.draw(good, generator)
        embeddings = self.embedding(torch.cat([good, others]))
        close = compactness(embeddings[: len(good)])
        told = self.head.loss(embeddings[len(good) :], labels)
        return told + self.weight * close, {"compactness": close.detach(), "descriptiveness": told.detach()}


class DocDetector(EmbeddingDetector):
    """Deep One-Class as a detector."""

    def __init__(self, settings: DocSettings, shape: TileShape, seed: int) -> None:
        super().__init__(settings, shape, seed)
        self.settings = settings

    def task(self, _tiles: TileSource, session: Session) -> Task:
        """References from the user's folder, or transformed good tiles."""
        others = OtherThings.of(session, self.settings.transforms, self.shape)
        return DocTask(self.embedding, self.settings.network.size, others, self.settings.loss, self.seed + 2)


DETECTORS["doc"] = DetectorKind(DocSettings, DocDetector, uses=frozenset({"references", "backbone"}))
