"""Convolutional autoencoder, with the squared error or with SSIM as loss and as score.

Sources: the small published network (3 × 3 convolutions of 16, 8, 8, 16, two maxima, two enlargements, sigmoid: 3,795
parameters in colour), squared error; Bergmann et al., "Improving Unsupervised Defect Segmentation by Applying
Structural Similarity to Autoencoders", 2019 (AE-SSIM: strided convolutions, latent of 100, SSIM over 11 × 11 as loss
and residual). What differs: borders are mirrored, not filled with zeros; AE-SSIM's transposed convolutions are an
enlargement to the nearest neighbour before a 3 × 3 convolution, which leaves no checkerboard, and its last 8 × 8
convolution is the linear layer that it amounts to; the learning rate falls along a cosine.
"""

from dataclasses import dataclass, field

from kizu_train.detectors.base import DETECTORS, DetectorKind, TileShape
from kizu_train.nets.autoencoders import ConvAutoencoder, ConvNetwork
from kizu_train.nets.descent import Descent
from kizu_train.nets.patch_vae_terms import Augment
from kizu_train.nets.reconstruction import Objective, ReconstructionDetector


@dataclass(frozen=True)
class ConvSettings:
    """Everything a recipe may set about the convolutional autoencoder."""

    network: ConvNetwork = field(default_factory=ConvNetwork)
    loss: Objective = field(default_factory=Objective)
    augment: Augment = field(default_factory=lambda: Augment(salt_and_pepper=0.0))
    train: Descent = field(default_factory=lambda: Descent(steps=1500, batch=16, learning_rate=2e-3))


def build(settings: ConvSettings, shape: TileShape, seed: int) -> ReconstructionDetector:
    """The detector for tiles of `shape`. Raises UsageError where the tiles do not halve evenly or are too small."""
    return ReconstructionDetector(
        lambda: ConvAutoencoder(settings.network, shape.tile_px, shape.channels),
        settings.loss,
        settings.train,
        settings.augment,
        shape,
        seed,
    )


DETECTORS["ae_conv"] = DetectorKind(ConvSettings, build)
