"""AnoGAN with an encoder (f-AnoGAN): what a generator of good tiles cannot draw is anomalous.

Sources: Schlegl et al., "Unsupervised Anomaly Detection with Generative Adversarial Networks", 2017 (AnoGAN); the same,
"f-AnoGAN", 2019; Radford et al., "DCGAN", 2016. A DCGAN learns to draw good tiles; then an encoder learns to find
the noise from which the fixed generator draws a given tile, by the residual in pixels plus κ times the residual in the
discriminator's features (izi_f). The encoder is what exports; `nets.gan_search` searches the noise instead.

What differs: DCGAN losses, as in AnoGAN, rather than f-AnoGAN's Wasserstein critic; the discriminator has no batch norm
and its slope is penalised (R1, Mescheder et al. 2018), without which it won on MNIST and nothing was learned; the
learning rate is higher and falls along a cosine; borders are mirrored; features are compared as maps, not pooled; tiles
of any side that halves evenly.

Where good tiles are of several sorts, a generator soon draws the most frequent one only, and rare good regions score
like flaws: the method suits one motif, such as whole 28 px digits, and hardly pictures cut into tiles.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from kizu_train.detectors.base import DETECTORS, DetectorKind, Scores, Session, TileShape, TileSource
from kizu_train.nets.descent import Descent, Turn, descend, descend_in_turns
from kizu_train.nets.gan import Gan, GanNetwork, NoiseEncoder
from kizu_train.nets.gan_losses import discriminator_loss, generator_loss, residuals, squared_residuals
from kizu_train.nets.layers import seeded, to_cells, to_pixels
from kizu_train.nets.phases import Phase, earlier

_BETAS = (0.5, 0.999)
"""Adam's momentum that DCGAN found to be stable."""


@dataclass(frozen=True)
class AnoganObjective:
    """`kappa` weighs the residual of features, `gradient_penalty` the slope of the discriminator at good tiles."""

    kappa: float = 1.0
    gradient_penalty: float = 1.0

    def __post_init__(self) -> None:
        if not (self.kappa >= 0 and self.gradient_penalty >= 0):
            raise ValueError("kappa >= 0 and gradient_penalty >= 0 are needed")


@dataclass(frozen=True)
class AnoganSettings:
    """Everything a recipe may set about AnoGAN: `train` is the adversarial phase, `encode` that of the encoder."""

    network: GanNetwork = field(default_factory=GanNetwork)
    loss: AnoganObjective = field(default_factory=AnoganObjective)
    train: Descent = field(default_factory=lambda: Descent(steps=1200, batch=32, learning_rate=1e-3))
    encode: Descent = field(default_factory=lambda: Descent(steps=1000, batch=32, learning_rate=1e-3))


class AnoganScorer(nn.Module):
    """Tiles uint8 [N, T, T, C] → score [N] and map [N, T/m, T/m] of one `kind`.

    The score is the mean squared residual in pixels (`izi`), plus κ times that in features (`izi_f`); the map is the
    absolute residual of pixels for both.
    """

    def __init__(self, gan: Gan, encoder: NoiseEncoder, shape: TileShape, kappa: float, kind: str) -> None:
        super().__init__()
        self.gan, self.encoder, self.shape, self.kappa, self.kind = gan, encoder, shape, kappa, kind

    def forward(self, tiles: Tensor) -> Scores:
        """Score `tiles`; all normalisation is inside."""
        return self.all_kinds(tiles)[self.kind]

    def all_kinds(self, tiles: Tensor) -> dict[str, Scores]:
        """Score `tiles` by every kind in one pass."""
        pixels = to_pixels(tiles)
        found = residuals(self.gan, pixels, self.encoder(pixels))
        image, features = squared_residuals(found)
        cells = to_cells(found.pixels.abs().mean(1), self.shape.map_cell_px)
        return {"izi_f": (image + self.kappa * features, cells), "izi": (image, cells)}


class AnoganDetector:
    """AnoGAN as a detector."""

    score_kinds: tuple[str, ...] = ("izi_f", "izi")

    def __init__(self, settings: AnoganSettings, shape: TileShape, seed: int) -> None:
        self.settings, self.shape = settings, shape
        with seeded(seed):
            self.gan = Gan(settings.network, shape.tile_px, shape.channels).eval()
            self.encoder = NoiseEncoder(settings.network, shape.tile_px, shape.channels).eval()

    def fit(self, tiles: TileSource, session: Session) -> None:
        """Let generator and discriminator learn from one another, then the encoder from both."""
        train, encode, saved = self.settings.train, self.settings.encode, session.restore()
        total = train.steps + encode.steps
        if saved is not None and (kept := earlier(saved[1])):
            self.gan.load_state_dict(kept)
        else:
            self._learn_to_draw(tiles, Phase(session, 0, total).resume(saved))
        if not session.should_stop:
            self._learn_to_encode(tiles, Phase(session, train.steps, total, self.gan.state_dict).resume(saved))

    def tensors(self) -> dict[str, Tensor]:
        """Weights and batch norm statistics of the three networks."""
        return self._whole().state_dict()

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Take up weights."""
        self._whole().load_state_dict(dict(tensors))

    def score_all(self, tiles: Tensor) -> dict[str, Scores]:
        """Score by every kind in one pass."""
        return self._scorer("izi_f").all_kinds(tiles)

    def scorer(self, kind: str) -> nn.Module:
        """The exportable module of `kind`."""
        return self._scorer(kind)

    def _whole(self) -> nn.ModuleDict:
        return nn.ModuleDict({"gan": self.gan, "encoder": self.encoder})

    def _scorer(self, kind: str) -> AnoganScorer:
        return AnoganScorer(self.gan, self.encoder, self.shape, self.settings.loss.kappa, kind).eval()

    def _learn_to_draw(self, tiles: TileSource, session: Session) -> None:
        gan, penalty = self.gan, self.settings.loss.gradient_penalty

        def judge(batch: Tensor, generator: torch.Generator) -> tuple[Tensor, dict[str, Tensor]]:
            return discriminator_loss(gan, to_pixels(batch), generator, penalty)

        def draw(batch: Tensor, generator: torch.Generator) -> tuple[Tensor, dict[str, Tensor]]:
            return generator_loss(gan, len(batch), generator)

        turns = (Turn(gan.discriminator, judge, _BETAS), Turn(gan.generator, draw, _BETAS))
        descend_in_turns(gan, turns, self.settings.train, tiles, session)

    def _learn_to_encode(self, tiles: TileSource, session: Session) -> None:
        gan = self.gan.to(session.device).eval()

        def loss(batch: Tensor, _generator: torch.Generator) -> tuple[Tensor, dict[str, Tensor]]:
            pixels = to_pixels(batch)
            image, features = squared_residuals(residuals(gan, pixels, self.encoder(pixels)))
            terms = {"residual": image.mean(), "features": features.mean()}
            total = terms["residual"] + self.settings.loss.kappa * terms["features"]
            return total, {"loss": total.detach()} | {name: term.detach() for name, term in terms.items()}

        descend(self.encoder, loss, self.settings.encode, tiles, session)
        gan.cpu()


DETECTORS["anogan"] = DetectorKind(AnoganSettings, AnoganDetector)
