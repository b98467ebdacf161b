"""Self-supervised segmentation: a small U-Net that learns to find synthetic defects on good tiles.

Sources: CutPaste (Li et al., 2021), DRAEM (Zavrtanik et al., 2021), above all NSA (Schlüter et al., 2022), whose
patches of other good pictures and soft labels it keeps. What differs: many more kinds of defects, each a free pair of
shape and fill; Poisson blending is replaced by a cheap likeness of it; labels measure a change against the variation
around it; changes of light, focus and noise are shown as good; no reconstruction, no foreign textures; half the
resolution from the first convolution on, and mirrored borders. As in CutPaste a Gaussian of the learned features is
offered beside the segmentation, here for every cell of the map.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from kizu_train.arithmetic import exact
from kizu_train.detectors.base import DETECTORS, DetectorKind, Scores, Session, TileShape, TileSource
from kizu_train.errors import UsageError
from kizu_train.feeding import Batch
from kizu_train.known_defects import KnownDefects, read_known_defects
from kizu_train.nets.descent import Descent, descend
from kizu_train.nets.gathering import sample_tiles
from kizu_train.nets.layers import MirrorConv, seeded, to_pixels
from kizu_train.nets.synthetic import Spoiling, spoil
from kizu_train.nets.synthetic_gaussian import CellGaussian, Standard
from kizu_train.nets.unet import LocalContrast, UNet, UNetSettings

_PRIOR = -3.0
"""Logit of a defect before anything is learned."""


@dataclass(frozen=True)
class Objective:
    """Binary cross-entropy with soft labels y, weighted by |y - p|^`focal` (Li et al., quality focal loss, 2020)."""

    focal: float = 1.0

    def __post_init__(self) -> None:
        if not 0 <= self.focal <= 5:
            raise ValueError("focal must lie between 0 and 5")

    def of(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Mean loss of logits against labels 0–1 of the same shape."""
        loss = functional.binary_cross_entropy_with_logits(logits, labels, reduction="none")
        return (loss * (labels - logits.sigmoid()).abs() ** self.focal).mean() if self.focal else loss.mean()


@dataclass(frozen=True)
class SyntheticDefectsSettings:
    """Everything a recipe may set: `contrast` is how pixels are normalised, `plain` or against their surroundings."""

    network: UNetSettings = field(default_factory=UNetSettings)
    contrast: Literal["plain", "local"] = "plain"
    spoiling: Spoiling = field(default_factory=Spoiling)
    loss: Objective = field(default_factory=Objective)
    train: Descent = field(default_factory=lambda: Descent(steps=1500, batch=16, learning_rate=2e-3))


class Segmenter(nn.Module):
    """U-Net and head: pixels [N, C, T, T] → logits [N, 1, T/o, T/o] and features, o the network's `out_stride`."""

    def __init__(self, settings: SyntheticDefectsSettings, channels: int) -> None:
        super().__init__()
        self.contrast = LocalContrast() if settings.contrast == "local" else nn.Identity()
        self.net = UNet(settings.network, channels)
        self.head = MirrorConv(self.net.out_width, 1, 1, plain=True)
        bias = self.head[1].bias
        assert isinstance(bias, nn.Parameter)  # noqa: S101  # a plain convolution has one
        nn.init.constant_(bias, _PRIOR)

    def forward(self, pixels: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Logits, and the features that describe a place: encoder levels from stride 4 on, the decoder's last."""
        ways, climbed = self.net(self.contrast(pixels))
        logits: Tensor = self.head(climbed[-1])
        return logits, [*ways[1:4], climbed[-1]]


@dataclass(frozen=True, eq=False)
class Planting:
    """Good tiles uint8 [B, T, T, C] → spoilt ones, and labels float32 [B, 1, T/o, T/o] of the cells of `out_stride`."""

    spoiling: Spoiling
    out_stride: int
    known: KnownDefects | None

    def __call__(self, tiles: NDArray[np.uint8], generator: torch.Generator) -> Batch:
        """Plant defects."""
        seed = torch.randint(2**62, (1,), generator=generator).tolist()
        spoilt, labels = spoil(tiles, self.spoiling, np.random.default_rng(seed), self.known)
        # The largest label of a cell: a speck must not vanish where the network sees half the resolution.
        cells = labels.shape[1] // self.out_stride
        blocks = labels.reshape(-1, 1, cells, self.out_stride, cells, self.out_stride)
        return spoilt, blocks.max((3, 5))


class SyntheticDefectsScorer(nn.Module):
    """Tiles uint8 [N, T, T, C] → score [N] (the largest cell) and map [N, T/m, T/m] of one `kind`.

    `segmentation`: softplus of the logit, which keeps the order also where a probability would be 0 or 1.
    `features`: Mahalanobis distance of the network's features to those of good tiles, as a mean square.
    `joint`: both, each brought to about 1 at its 99.9 % quantile on good tiles, added.
    """

    def __init__(self, detector: "SyntheticDefectsDetector", kind: str) -> None:
        super().__init__()
        self.segmenter, self.gaussian = detector.segmenter, detector.gaussian
        self.standards = detector.standards
        self.cells, self.kind = detector.shape.tile_px // detector.shape.map_cell_px, kind

    def forward(self, tiles: Tensor) -> Scores:
        """Score `tiles`; all normalisation is inside."""
        logits, features = self.segmenter(to_pixels(tiles))
        if self.kind == "segmentation":
            return _finish(self.evidence(logits))
        if self.kind == "features":
            return _finish(self.gaussian(features))
        return _finish(self.join(self.evidence(logits), self.gaussian(features)))

    def all_kinds(self, tiles: Tensor) -> dict[str, Scores]:
        """Score `tiles` by every kind in one pass."""
        logits, features = self.segmenter(to_pixels(tiles))
        evidence, distance = self.evidence(logits), self.gaussian(features)
        maps = {"segmentation": evidence, "features": distance, "joint": self.join(evidence, distance)}
        return {kind: _finish(cells) for kind, cells in maps.items()}

    def evidence(self, logits: Tensor) -> Tensor:
        """Cells [N, T/m, T/m] of logits [N, 1, T/o, T/o]: at least 0."""
        # Shifting the logits up keeps the order too, but brings good and bad closer in units of how good ones spread:
        # thresholds from a dozen good pictures then let up to three times as many defects escape (measured).
        cells = functional.softplus(logits)
        return functional.avg_pool2d(cells, logits.shape[-1] // self.cells).squeeze(1)

    def join(self, evidence: Tensor, distance: Tensor) -> Tensor:
        """Both maps in units of what good tiles show."""
        joined: Tensor = self.standards["segmentation"](evidence) + self.standards["features"](distance)
        return joined


def _finish(cells: Tensor) -> Scores:
    return cells.amax((1, 2)), cells


class SyntheticDefectsDetector:
    """The segmentation as a detector."""

    score_kinds: tuple[str, ...] = ("segmentation", "features", "joint")

    def __init__(self, settings: SyntheticDefectsSettings, shape: TileShape, seed: int) -> None:
        settings.network.check(shape.tile_px)
        if shape.map_cell_px % settings.network.out_stride:
            raise UsageError(
                f"map_cell_px is {shape.map_cell_px}; it must be a multiple of network.out_stride = "
                f"{settings.network.out_stride}"
            )
        if settings.contrast == "local" and (shape.tile_px % 8 or shape.tile_px < 24):
            raise UsageError(f"grid.tile_px is {shape.tile_px}; contrast = local needs a multiple of 8, at least 24")
        self.settings, self.shape = settings, shape
        with seeded(seed):
            self.segmenter = Segmenter(settings, shape.channels)
        widths = (*settings.network.widths[1:4], self.segmenter.net.out_width)
        self.gaussian = CellGaussian(widths, shape.tile_px // shape.map_cell_px)
        self.standards = nn.ModuleDict({"segmentation": Standard(), "features": Standard()})
        self._all = nn.ModuleDict({"unet": self.segmenter, "gaussian": self.gaussian, "standard": self.standards})
        self._all.eval()

    def fit(self, tiles: TileSource, session: Session) -> None:
        """Train on spoilt tiles, then measure what features and logits good tiles give."""
        known = None
        if session.extras.defects is not None:
            known = read_known_defects(session.extras.defects, self.shape.channels, self.shape.tile_px)
        plant = Planting(self.settings.spoiling, self.settings.network.out_stride, known)
        descend(self.segmenter, self._loss, self.settings.train, tiles, session, prepare=plant, can_mix=True)
        self._measure(sample_tiles(tiles))

    def tensors(self) -> dict[str, Tensor]:
        """Weights, batch norm statistics, the Gaussian, and the scales of both maps."""
        return dict(self._all.state_dict())

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Take up what was learned."""
        self._all.load_state_dict(dict(tensors))

    def score_all(self, tiles: Tensor) -> dict[str, Scores]:
        """Score by every kind in one pass."""
        return SyntheticDefectsScorer(self, "joint").all_kinds(tiles)

    def scorer(self, kind: str) -> nn.Module:
        """The exportable module of `kind`."""
        return SyntheticDefectsScorer(self, kind).eval()

    def _loss(self, spoilt: Tensor, labels: Tensor, _generator: torch.Generator) -> tuple[Tensor, dict[str, Tensor]]:
        """Ask where the tiles are spoilt."""
        logits, _ = self.segmenter(to_pixels(spoilt))
        loss = self.settings.loss.of(exact(logits), labels)
        return loss, {"loss": loss.detach()}

    @torch.no_grad()
    def _measure(self, tiles: Tensor) -> None:
        """Fit the Gaussian and the scales on good tiles uint8 [K, T, T, C]."""
        parts = torch.split(tiles, 16)
        self.gaussian.fit(self.segmenter(to_pixels(part))[1] for part in parts)
        found = [self.score_all(part) for part in parts]
        for kind in ("segmentation", "features"):
            standard = self.standards[kind]
            assert isinstance(standard, Standard)  # noqa: S101  # a ModuleDict forgets what it holds
            standard.fit(torch.cat([part[kind][1].flatten() for part in found]))


DETECTORS["synthetic_defects"] = DetectorKind(
    SyntheticDefectsSettings, SyntheticDefectsDetector, uses=frozenset({"defects"})
)
