"""Two autoencoders against each other: one rebuilds tiles, the other judges what was rebuilt by rebuilding it again.

Source: Vu et al., "Anomaly Detection with Adversarial Dual Autoencoders", 2019 (ADAE), the first of the line to which
Tang et al., "Anomaly Detection Neural Network with Dual Auto-Encoders GAN and Its Industrial Inspection Applications",
2020 (DAGAN) belongs. With G the generator and D the judge, both autoencoders:

    D learns  |x − D(x)| − k · |G(x) − D(G(x))|        G learns  |x − G(x)| + |G(x) − D(G(x))|

so D rebuilds good tiles well and G's products badly, until G's products cannot be told from good tiles. A tile is
scored by (x − D(G(x)))²: what neither could rebuild. What differs: both learn in one descent, each from its own loss
alone; D's second term is weighed by a balance k in 0…1 as in BEGAN (Berthelot et al. 2017), where ADAE slows D down by
hand, since without a bound that term grows for ever; the networks are small, without batch norm in the judge, and
borders are mirrored.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.func import functional_call

from kizu_train import distributed
from kizu_train.detectors.base import DETECTORS, DetectorKind, Scores, Session, TileShape, TileSource
from kizu_train.nets.autoencoders import ConvAutoencoder, ConvNetwork
from kizu_train.nets.descent import Descent, descend
from kizu_train.nets.layers import seeded, to_pixels
from kizu_train.nets.reconstruction import finish


@dataclass(frozen=True)
class Contest:
    """How hard the judge works against the generator.

    k rises while |G − D(G)| stays under `ratio` times |x − D(x)|, and falls while it is above, by `pace` a step;
    `adversarial` weighs the judge's opinion in the generator's loss.
    """

    ratio: float = 0.5
    pace: float = 0.005
    adversarial: float = 1.0

    def __post_init__(self) -> None:
        if not (0 <= self.ratio <= 1 and 0 <= self.pace <= 1 and self.adversarial >= 0):
            raise ValueError("ratio and pace must lie between 0 and 1, adversarial must be at least 0")


def _network(*, batch_norm: bool) -> ConvNetwork:
    return ConvNetwork((16, 32, 64), kernel=4, shrink="stride", latent=64, batch_norm=batch_norm, slope=0.2)


@dataclass(frozen=True)
class DualSettings:
    """Everything a recipe may set about the two autoencoders."""

    generator: ConvNetwork = field(default_factory=lambda: _network(batch_norm=True))
    judge: ConvNetwork = field(default_factory=lambda: _network(batch_norm=False))
    contest: Contest = field(default_factory=Contest)
    train: Descent = field(default_factory=lambda: Descent(steps=1500, batch=8, learning_rate=1e-3))


class DualAutoencoder(nn.Module):
    """Generator, judge and the balance k between them."""

    balance: Tensor

    def __init__(self, settings: DualSettings, shape: TileShape) -> None:
        super().__init__()
        self.generator = ConvAutoencoder(settings.generator, shape.tile_px, shape.channels)
        self.judge = ConvAutoencoder(settings.judge, shape.tile_px, shape.channels)
        self.register_buffer("balance", torch.tensor(0.0))

    def forward(self, tiles: Tensor) -> tuple[Tensor, Tensor]:
        """Tiles [N, C, T, T] → what the generator makes of them, and what the judge makes of that."""
        made = self.generator(tiles)
        return made, self.judge(made)

    def judge_frozen(self, made: Tensor) -> Tensor:
        """What the judge makes of `made`, with gradients to `made` but none to the judge's weights."""
        weights = {name: weight.detach() for name, weight in self.judge.named_parameters()}
        judged: Tensor = functional_call(self.judge, weights, (made,))
        return judged


class DualScorer(nn.Module):
    """Tiles uint8 [N, T, T, C] → score [N] and map [N, T/m, T/m] of one `kind`.

    `dual`: (x − D(G(x)))². `generator`: (x − G(x))². Means over channels, the score over pixels too.
    """

    def __init__(self, network: DualAutoencoder, map_cell_px: int, kind: str) -> None:
        super().__init__()
        self.network, self.map_cell_px, self.kind = network, map_cell_px, kind

    def forward(self, tiles: Tensor) -> Scores:
        """Score `tiles`; all normalisation is inside."""
        pixels = to_pixels(tiles)
        made = self.network.generator(pixels)
        rebuilt = self.network.judge(made) if self.kind == "dual" else made
        return finish(((pixels - rebuilt) ** 2).mean(1), self.map_cell_px)


class DualDetector:
    """The two autoencoders as a detector."""

    score_kinds: tuple[str, ...] = ("dual", "generator")

    def __init__(self, settings: DualSettings, shape: TileShape, seed: int) -> None:
        self.settings, self.shape = settings, shape
        with seeded(seed):
            self.network = DualAutoencoder(settings, shape)
        self.network.eval()

    def fit(self, tiles: TileSource, session: Session) -> None:
        """Train both on random tiles."""
        descend(self.network, self._loss, self.settings.train, tiles, session)

    def tensors(self) -> dict[str, Tensor]:
        """Both networks' weights and the balance."""
        return self.network.state_dict()

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Take up weights."""
        self.network.load_state_dict(dict(tensors))

    def score_all(self, tiles: Tensor) -> dict[str, Scores]:
        """Score by every kind in one pass."""
        pixels = to_pixels(tiles)
        made, judged = self.network(pixels)
        rebuilt = {"dual": judged, "generator": made}
        return {
            kind: finish(((pixels - of_kind) ** 2).mean(1), self.shape.map_cell_px) for kind, of_kind in rebuilt.items()
        }

    def scorer(self, kind: str) -> nn.Module:
        """The exportable module of `kind`."""
        return DualScorer(self.network, self.shape.map_cell_px, kind).eval()

    def _loss(self, tiles: Tensor, _generator: torch.Generator) -> tuple[Tensor, dict[str, Tensor]]:
        """The sum of both losses; each reaches the weights of its own network only."""
        pixels, contest = to_pixels(tiles), self.settings.contest
        made = self.network.generator(pixels)
        fixed = made.detach()
        of_good = _distance(pixels, self.network.judge(pixels))
        of_made = _distance(fixed, self.network.judge(fixed))
        rebuilding = _distance(pixels, made)
        opinion = _distance(made, self.network.judge_frozen(made))
        balance = self.network.balance.clone()
        self._shift_balance(of_good.detach(), of_made.detach())
        loss = of_good - balance * of_made + rebuilding + contest.adversarial * opinion
        shown = {"loss": rebuilding, "G": opinion, "D": of_good, "k": balance}
        return loss, {name: term.detach() for name, term in shown.items()}

    def _shift_balance(self, of_good: Tensor, of_made: Tensor) -> None:
        # BEGAN's rule in relative terms, so that its pace does not depend on how small errors become.
        contest, both = self.settings.contest, torch.stack([of_good, of_made])
        distributed.average([both], 1 / distributed.world())
        surplus = (contest.ratio - both[1] / both[0].clamp(min=1e-8)).clamp(-1, 1)
        self.network.balance.add_(contest.pace * surplus).clamp_(0, 1)


def _distance(tiles: Tensor, rebuilt: Tensor) -> Tensor:
    return (tiles - rebuilt).abs().mean()


DETECTORS["dual_ae"] = DetectorKind(DualSettings, DualDetector)
