"""Where to look: a small U-Net that gives a map to any scorer that has none of its own.

Source of the idea: Ano-Unet V2 (shinmura0, 2019), an add-on for any method that scores whole pictures: a mask wanders
over the picture, another network repaints what it hides from good surroundings, the picture is scored again, and a
place counts by what became of the score. That takes a minute a picture.

What differs: the wandering is done in training, so that the map costs one pass and the exported graph has no loop. Good
tiles are spoilt in one place; what lay there is known, so nothing needs repainting. The scorer, frozen, scores the tile
with and without the flaw; the difference, relative to how good tiles differ among themselves, is how much that place
ought to show, and a U-Net learns to tell it from pixels. Flaws that the scorer does not see are not learned either: the
map explains the score, it does not replace it. The first Ano-Unet, trained anew for each picture, is not followed.

Letters: N tiles; C channels; T tile side; m map cell side.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn import functional

from kizu_train.detectors.base import Scores, Session, TileShape, TileSource
from kizu_train.nets.descent import Descent, descend
from kizu_train.nets.layers import Enlarge, seeded, to_cells, to_pixels
from kizu_train.nets.planting import plant
from kizu_train.nets.unet import UNet, UNetSettings

TileScore = Callable[[Tensor], Tensor]
"""Pixels float32 [N, C, T, T], 0–1 → score [N]."""

_CLEAN_SHARE = 4
"""One tile in so many stays good."""


@dataclass(frozen=True)
class LocaliserSettings:
    """Whether a localiser is trained after the scorer, its network and training.

    `even_share` of the score is spread evenly, whatever the localiser says: what it never saw must not vanish.
    """

    enabled: bool = False
    even_share: float = 0.1
    unet: UNetSettings = field(default_factory=lambda: UNetSettings((16, 32, 48), out_stride=2))
    train: Descent = field(default_factory=lambda: Descent(steps=1000, batch=32, learning_rate=2e-3))

    def __post_init__(self) -> None:
        if not 0 <= self.even_share <= 1:
            raise ValueError("even_share must lie between 0 and 1")


class Localiser(nn.Module):
    """Pixels [N, C, T, T] → how much each cell counts, 0–1 [N, T/m, T/m]."""

    def __init__(self, settings: LocaliserSettings, shape: TileShape) -> None:
        super().__init__()
        self.map_cell_px = shape.map_cell_px
        self.unet = UNet(settings.unet, shape.channels)
        self.head = nn.Conv2d(self.unet.out_width, 1, 1)
        nn.init.constant_(self.head.bias, -3.0)  # type: ignore[arg-type]  # nearly all is good at first
        self.enlarge = Enlarge(settings.unet.out_stride, linear=True)

    def forward(self, pixels: Tensor) -> Tensor:
        """Look at `pixels`."""
        return to_cells(torch.sigmoid(self.logits(pixels)), self.map_cell_px)

    def logits(self, pixels: Tensor) -> Tensor:
        """Logits of each pixel [N, T, T]."""
        found: Tensor = self.enlarge(self.head(self.unet(pixels)[1][-1]))
        return found[:, 0]


def make_localiser(settings: LocaliserSettings, shape: TileShape, seed: int) -> Localiser | None:
    """The localiser, its weights drawn by `seed`; None where it is not enabled. Raises UsageError for unfit tiles."""
    if not settings.enabled:
        return None
    settings.unet.check(shape.tile_px)
    with seeded(seed):
        return Localiser(settings, shape).eval()


def spread(score: Tensor, counts: Tensor | None, even_share: float, cells: int) -> Scores:
    """A tile's score [N] and its map [N, cells, cells]: the score, as far as a cell counts; None: wherever it is."""
    if counts is None:
        return score, score[:, None, None] * torch.ones(1, cells, cells, device=score.device)
    return score, score[:, None, None] * (even_share + (1 - even_share) * counts)


def train_localiser(
    localiser: Localiser, score: TileScore, settings: LocaliserSettings, tiles: TileSource, session: Session
) -> None:
    """Let `localiser` learn what moves `score`, which computes on the session's device."""

    def loss(batch: Tensor, generator: torch.Generator) -> tuple[Tensor, dict[str, Tensor]]:
        good = to_pixels(batch)
        spoilt, cover = plant(good, generator)
        cover[::_CLEAN_SHARE] = 0
        spoilt = torch.where(cover > 0, spoilt, good)
        target = cover[:, 0] * _weight_of_change(score, good, spoilt)[:, None, None]
        total = functional.binary_cross_entropy_with_logits(localiser.logits(spoilt), target)
        return total, {"localiser": total.detach()}

    descend(localiser, loss, settings.train, tiles, session)


@torch.no_grad()
def _weight_of_change(score: TileScore, good: Tensor, spoilt: Tensor) -> Tensor:
    """How much each flaw moved the score, 0–1 [N]: a half where as much as good tiles differ among themselves."""
    before, after = score(good), score(spoilt)
    change = (after - before).clamp(min=0)
    return change / (change + before.std() + 1e-6)
