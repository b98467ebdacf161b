"""A dictionary of good features by k-means; the score is the mean distance to the nearest words.

Source: Napoletano, Piccoli and Schettini, "Anomaly Detection in Nanofibrous Materials by CNN-Based Self-Similarity",
2018. What differs: features of two or three mid-level layers for each cell of the map instead of one vector of the last
layer for each cut-out patch (ResNet-18 saw every patch by itself), so that one pass serves all patches; words are the
cluster centres themselves, not the patches nearest to them.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from kizu_train.detectors.base import DETECTORS, DetectorKind, Session, TileShape
from kizu_train.nets.coreset import k_means
from kizu_train.nets.features import principal, spectrum
from kizu_train.nets.features_detector import FeatureDetector, FeatureSettings
from kizu_train.nets.features_words import Words, words_from


@dataclass(frozen=True)
class Dictionary:
    """`words` cluster centres for each scale, in at most `dimension` principal components.

    Fewer components do where they explain `explained` of the variance. The score is the mean distance to the `nearest`
    words.
    """

    words: int = 500
    nearest: int = 3
    explained: float = 0.95
    dimension: int = 128

    def __post_init__(self) -> None:
        if not (1 <= self.nearest <= self.words and self.nearest < 100 and self.dimension >= 1):
            raise ValueError("1 <= nearest <= words, nearest below 100, and dimension >= 1 are needed")
        if not 0 < self.explained <= 1:
            raise ValueError("explained must lie above 0 and not above 1")


@dataclass(frozen=True)
class FeatureDictionarySettings(FeatureSettings):
    """Everything a recipe may set about the dictionary of features."""

    dictionary: Dictionary = field(default_factory=Dictionary)


class FeatureDictionaryDetector(FeatureDetector):
    """The dictionary of features as a detector."""

    def __init__(self, settings: FeatureDictionarySettings, shape: TileShape, seed: int) -> None:
        super().__init__(settings, shape, seed)
        self.dictionary = settings.dictionary

    def learn(self, vectors: Tensor, generator: torch.Generator, _session: Session) -> nn.Module:
        """Reduce `vectors` and cluster them."""
        project = principal(spectrum(vectors), self.dictionary.dimension, self.dictionary.explained)
        words = k_means(project.of_vectors(vectors), self.dictionary.words, generator)
        return Words(project, words, self.dictionary.nearest)

    def head_from(self, tensors: Mapping[str, Tensor]) -> nn.Module:
        """Take up the words."""
        return words_from(tensors, self.dictionary.nearest)


DETECTORS["feature_dictionary"] = DetectorKind(
    FeatureDictionarySettings, FeatureDictionaryDetector, uses=frozenset({"backbone"})
)
