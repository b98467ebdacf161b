"""A memory of good features; the score is the distance to the nearest one (PatchCore).

Source: Roth et al., "Towards Total Recall in Industrial Anomaly Detection", 2022. What differs: features are
standardised and reduced to their principal components, which keep distances and make the search some ten times faster;
the coreset is chosen from a bounded sample, not from every patch; the score of a picture is not re-weighted by the
neighbours of its worst patch (`neighbours` averages over the nearest few instead); the search is a matrix product
inside the graph.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from kizu_train.detectors.base import DETECTORS, DetectorKind, Session, TileShape
from kizu_train.nets.coreset import greedy_coreset
from kizu_train.nets.features import principal, spectrum
from kizu_train.nets.features_detector import FeatureDetector, FeatureSettings
from kizu_train.nets.features_words import Words, words_from


@dataclass(frozen=True)
class Memory:
    """How many vectors are remembered for each scale, with a backbone and without, in how many dimensions.

    The score is the mean distance to the `neighbours` nearest.
    """

    size: int = 5_000
    size_from_scratch: int = 2_000
    dimension: int = 128
    neighbours: int = 1

    def __post_init__(self) -> None:
        smallest = min(self.size, self.size_from_scratch)
        if not (self.dimension >= 1 and 1 <= self.neighbours <= smallest and self.neighbours < 100):
            raise ValueError("dimension >= 1 and 1 <= neighbours <= both sizes, below 100, are needed")


@dataclass(frozen=True)
class PatchMemorySettings(FeatureSettings):
    """Everything a recipe may set about the memory of features."""

    memory: Memory = field(default_factory=Memory)


class PatchMemoryDetector(FeatureDetector):
    """The memory of features as a detector."""

    def __init__(self, settings: PatchMemorySettings, shape: TileShape, seed: int) -> None:
        super().__init__(settings, shape, seed)
        self.memory = settings.memory

    def learn(self, vectors: Tensor, generator: torch.Generator, session: Session) -> nn.Module:
        """Reduce `vectors` and remember the coreset."""
        project = principal(spectrum(vectors), self.memory.dimension)
        reduced = project.of_vectors(vectors)
        size = self.memory.size if self.has_backbone else self.memory.size_from_scratch
        chosen = greedy_coreset(reduced, size, generator, stop=lambda: session.should_stop)
        return Words(project, reduced[chosen], self.memory.neighbours)

    def head_from(self, tensors: Mapping[str, Tensor]) -> nn.Module:
        """Take up the memory."""
        return words_from(tensors, self.memory.neighbours)


DETECTORS["patch_memory"] = DetectorKind(PatchMemorySettings, PatchMemoryDetector, uses=frozenset({"backbone"}))
