"""Metric learning: good tiles are one class on the unit sphere, every kind of other things another.

Sources: Ranjan et al., "L2-constrained Softmax Loss for Discriminative Face Verification", 2017; Deng et al.,
"ArcFace", 2019; used for anomaly detection with a local outlier factor on the embeddings.

What differs: the network is a small one from scratch unless a backbone is given, whose layers then stay frozen;
ArcFace's scale is 16 rather than 64, as there are few classes; half of each batch is good; and where there are no
reference classes, transformed good tiles stand in.
"""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from kizu_train.detectors.base import DETECTORS, DetectorKind, Session, TileShape, TileSource
from kizu_train.nets.embedding import ClassHead, Embedding, MetricLoss
from kizu_train.nets.scored_by_lof import EmbeddingDetector, EmbeddingSettings, OtherThings, Task


@dataclass(frozen=True)
class MetricSettings(EmbeddingSettings):
    """Everything a recipe may set about metric learning."""

    loss: MetricLoss = field(default_factory=MetricLoss)


class MetricTask(Task):
    """Good against each class of others."""

    def __init__(self, embedding: Embedding, size: int, others: OtherThings, loss: MetricLoss, seed: int) -> None:
        super().__init__(embedding)
        self.others = others
        self.head = ClassHead(size, 1 + others.classes, loss, seed)

    def loss(self, good: Tensor, generator: torch.Generator) -> tuple[Tensor, dict[str, Tensor]]:
        """One pass over good tiles, of class 0, and as many others."""
        others, labels = self.others.draw(good, generator)
        labels = torch.cat([torch.zeros_like(labels), labels + 1])
        return self.head.loss(self.embedding(torch.cat([good, others])), labels), {}


class MetricDetector(EmbeddingDetector):
    """Metric learning as a detector."""

    def __init__(self, settings: MetricSettings, shape: TileShape, seed: int) -> None:
        super().__init__(settings, shape, seed)
        self.settings = settings

    def task(self, _tiles: TileSource, session: Session) -> Task:
        """References from the user's folder, or transformed good tiles."""
        others = OtherThings.of(session, self.settings.transforms, self.shape)
        return MetricTask(self.embedding, self.settings.network.size, others, self.settings.loss, self.seed + 2)


DETECTORS["metric"] = DetectorKind(MetricSettings, MetricDetector, uses=frozenset({"references", "backbone"}))
