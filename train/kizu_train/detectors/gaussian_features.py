"""One Gaussian of good features; the score is the Mahalanobis distance.

Sources: Defard et al., "PaDiM", 2020; Rippel et al., "Modeling the Distribution of Normal Data in Pre-Trained Deep
Features", 2020. What differs from PaDiM: one Gaussian for all places, since tiles have no place of their own (for
fixtured parts there are methods that learn each place); a random semi-orthogonal projection (Kim et al. 2021) instead
of a random choice of channels, and not principal components: directions of little variance tell defects apart best;
Ledoit-Wolf shrinkage beside the ridge. Projection and whitening are one 1 × 1 convolution inside the graph.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from kizu_train.detectors.base import DETECTORS, DetectorKind, Session, TileShape
from kizu_train.nets.features import Projection, projection_from, semi_orthogonal, spectrum, whitening
from kizu_train.nets.features_detector import FeatureDetector, FeatureSettings


@dataclass(frozen=True)
class Gaussian:
    """Features are projected to `dimension`; `ridge` is added to the correlation's diagonal, as a share of its mean."""

    dimension: int = 512
    ridge: float = 0.01

    def __post_init__(self) -> None:
        if self.ridge <= 0 or self.dimension < 1:
            raise ValueError("ridge must be above 0 and dimension at least 1")


@dataclass(frozen=True)
class GaussianFeaturesSettings(FeatureSettings):
    """Everything a recipe may set about the Gaussian of features."""

    gaussian: Gaussian = field(default_factory=Gaussian)


class Mahalanobis(nn.Module):
    """Features [N, D, h, w] → Mahalanobis distance over √K, [N, h, w]: about 1 for good cells, whatever K is."""

    def __init__(self, whiten: Projection) -> None:
        super().__init__()
        self.whiten = whiten

    def forward(self, features: Tensor) -> Tensor:
        """Distances of `features`."""
        distances: Tensor = self.whiten(features).square().mean(1).sqrt()
        return distances


class GaussianFeaturesDetector(FeatureDetector):
    """The Gaussian of features as a detector."""

    def __init__(self, settings: GaussianFeaturesSettings, shape: TileShape, seed: int) -> None:
        super().__init__(settings, shape, seed)
        self.settings = settings

    def learn(self, vectors: Tensor, generator: torch.Generator, _session: Session) -> nn.Module:
        """Mean and whitening of `vectors`."""
        embed = semi_orthogonal(vectors.shape[1], self.settings.gaussian.dimension, generator)
        return Mahalanobis(whitening(spectrum(vectors, embed), self.settings.gaussian.ridge)[0])

    def head_from(self, tensors: Mapping[str, Tensor]) -> nn.Module:
        """Take up mean and whitening."""
        return Mahalanobis(projection_from({name: tensors[f"whiten.{name}"] for name in ("centre", "weight")}))


DETECTORS["gaussian_features"] = DetectorKind(
    GaussianFeaturesSettings, GaussianFeaturesDetector, uses=frozenset({"backbone"})
)
