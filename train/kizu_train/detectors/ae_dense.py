"""Dense autoencoder: fully connected layers squeeze a tile through a narrow layer; what comes out wrong is anomalous.

Source: the autoencoder of 784–256–100–256–784 (ReLU, sigmoid, squared error, Adam, batch 128, 16 epochs) that tutorials
apply to whole 28 × 28 pictures. What differs: it sees tiles of any size and number of channels, the learning rate
falls along a cosine, and SSIM is offered as a loss and as a score beside the squared error.
"""

from dataclasses import dataclass, field

from kizu_train.detectors.base import DETECTORS, DetectorKind, TileShape
from kizu_train.nets.autoencoders import DenseAutoencoder, DenseNetwork
from kizu_train.nets.descent import Descent
from kizu_train.nets.patch_vae_terms import Augment
from kizu_train.nets.reconstruction import Objective, ReconstructionDetector


@dataclass(frozen=True)
class DenseSettings:
    """Everything a recipe may set about the dense autoencoder."""

    network: DenseNetwork = field(default_factory=DenseNetwork)
    loss: Objective = field(default_factory=Objective)
    augment: Augment = field(default_factory=lambda: Augment(salt_and_pepper=0.0))
    train: Descent = field(default_factory=lambda: Descent(steps=3000, batch=128, learning_rate=1e-3))


def build(settings: DenseSettings, shape: TileShape, seed: int) -> ReconstructionDetector:
    """The detector for tiles of `shape`. Raises UsageError where tiles are too small for the SSIM window."""
    return ReconstructionDetector(
        lambda: DenseAutoencoder(settings.network, shape.tile_px, shape.channels),
        settings.loss,
        settings.train,
        settings.augment,
        shape,
        seed,
    )


DETECTORS["ae_dense"] = DetectorKind(DenseSettings, build)
