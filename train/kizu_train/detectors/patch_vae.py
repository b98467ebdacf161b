"""Patch VAE with the unregularised anomaly score.

Source: Matsubara et al., "Anomaly Machine Component Detection by Deep Generative Model with Unregularized Score", 2018.
Trained on L = β·D + A + M, scored by M alone: without the terms that say how frequent and how complex a region is,
one threshold serves all regions. Scoring decodes the posterior mean, so it is deterministic. With a calibrated σ
(`network.variance = "calibrated"`, σ-VAE) one σ serves all pixels and M ranks as the squared error does.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from kizu_train.arithmetic import exact
from kizu_train.detectors.base import DETECTORS, DetectorKind, Scores, Session, TileShape, TileSource
from kizu_train.nets.descent import Descent, descend
from kizu_train.nets.layers import seeded, to_cells, to_pixels
from kizu_train.nets.patch_vae import Network, PatchVae
from kizu_train.nets.patch_vae_terms import Augment, kl_term, lowest_variance_term, residual_term, variance_term


@dataclass(frozen=True)
class Objective:
    """The weight β of the KL term: 1 as in the paper; per tile, not per pixel and not per batch."""

    beta: float = 1.0

    def __post_init__(self) -> None:
        if self.beta < 0:
            raise ValueError("beta must be at least 0")


@dataclass(frozen=True)
class PatchVaeSettings:
    """Everything a recipe may set about the patch VAE."""

    network: Network = field(default_factory=Network)
    loss: Objective = field(default_factory=Objective)
    augment: Augment = field(default_factory=Augment)
    train: Descent = field(default_factory=Descent)


class PatchVaeScorer(nn.Module):
    """Tiles uint8 [N, T, T, C] → score [N] and map [N, T/m, T/m] of one `kind`.

    `m`: residual term. `l`: β·D + A + M, each pixel carrying β·D / T². `d`, `a`: the single terms. A is counted from
    the lowest value that the floor of σ allows: a constant shift, which keeps the ranking and makes scores positive.
    """

    def __init__(self, vae: PatchVae, shape: TileShape, beta: float, kind: str) -> None:
        super().__init__()
        self.vae, self.shape, self.beta, self.kind = vae, shape, beta, kind
        self.lowest = lowest_variance_term(shape.channels, vae.network.lowest_sigma)

    def forward(self, tiles: Tensor) -> Scores:
        """Score `tiles`; all normalisation is inside."""
        return self._finish(self._pixels(*self.terms(tiles))[self.kind])

    def all_kinds(self, tiles: Tensor) -> dict[str, Scores]:
        """Score `tiles` by every kind in one pass."""
        return {kind: self._finish(pixels) for kind, pixels in self._pixels(*self.terms(tiles)).items()}

    def terms(self, tiles: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """D [N], A [N, T, T] (above its lowest value) and M [N, T, T] of `tiles`."""
        pixels = to_pixels(tiles)
        return self._terms(pixels, *self.vae.encode(pixels))

    def can_share(self, stride_px: int) -> bool:
        """Whether overlapping tiles have features of the encoder in common."""
        return self.vae.can_share(stride_px)

    def share(self, block: Tensor, stride_px: int) -> tuple[Tensor, ...]:
        """Latents of the tiles in `block` [h, w, C], encoded all at once."""
        return self.vae.encode_block(to_pixels(block[None]), stride_px)

    def score_shared(self, tiles: Tensor, *shared: Tensor) -> Scores:
        """Score `tiles` with their latents."""
        latent_mean, latent_log_variance = shared
        terms = self._terms(to_pixels(tiles), latent_mean, latent_log_variance)
        return self._finish(self._pixels(*terms)[self.kind])

    def _terms(self, pixels: Tensor, latent_mean: Tensor, latent_log_variance: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        mean, variance = self.vae.decode(latent_mean)
        kl = kl_term(latent_mean, latent_log_variance)
        return kl, variance_term(variance) - self.lowest, residual_term(pixels, mean, variance)

    def _pixels(self, kl: Tensor, variance: Tensor, residual: Tensor) -> dict[str, Tensor]:
        spread = (kl / self.shape.tile_px**2)[:, None, None]
        regularised = self.beta * spread + variance + residual
        return {"m": residual, "l": regularised, "d": spread.expand_as(residual), "a": variance}

    def _finish(self, pixels: Tensor) -> Scores:
        return pixels.sum((1, 2)), to_cells(pixels, self.shape.map_cell_px)


class PatchVaeDetector:
    """The patch VAE as a detector."""

    score_kinds: tuple[str, ...] = ("m", "l", "d", "a")

    def __init__(self, settings: PatchVaeSettings, shape: TileShape, seed: int) -> None:
        self.settings, self.shape = settings, shape
        with seeded(seed):
            self.vae = PatchVae(settings.network, shape.tile_px, shape.channels)
        self.vae.eval()

    def fit(self, tiles: TileSource, session: Session) -> None:
        """Train on random tiles."""
        descend(self.vae, self._loss, self.settings.train, tiles, session, can_mix=True)

    def tensors(self) -> dict[str, Tensor]:
        """The network's weights and batch norm statistics."""
        return self.vae.state_dict()

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Take up weights."""
        self.vae.load_state_dict(dict(tensors))

    def score_all(self, tiles: Tensor) -> dict[str, Scores]:
        """Score by every kind in one pass."""
        return PatchVaeScorer(self.vae, self.shape, self.settings.loss.beta, "m").all_kinds(tiles)

    def scorer(self, kind: str) -> nn.Module:
        """The exportable module of `kind`."""
        return PatchVaeScorer(self.vae, self.shape, self.settings.loss.beta, kind).eval()

    def _loss(self, tiles: Tensor, generator: torch.Generator) -> tuple[Tensor, dict[str, Tensor]]:
        """L = β·D + A + M per tile, averaged over the batch; the terms shown are per tile too."""
        spoilt, target = self.settings.augment(to_pixels(tiles), generator)
        latent_mean, latent_log_variance = (exact(part) for part in self.vae.encode(spoilt))
        noise = torch.randn(latent_mean.shape, generator=generator, device=latent_mean.device)
        mean, decoded = self.vae.decode(latent_mean + noise * (0.5 * latent_log_variance).exp())
        variance = self.vae.variance_for(target, mean, decoded)
        terms = {
            "D": kl_term(latent_mean, latent_log_variance).mean(),
            "A": variance_term(variance).sum((1, 2)).mean(),
            "M": residual_term(target, mean, variance).sum((1, 2)).mean(),
        }
        loss = self.settings.loss.beta * terms["D"] + terms["A"] + terms["M"]
        return loss, {"loss": loss.detach()} | {name: term.detach() for name, term in terms.items()}


DETECTORS["patch_vae"] = DetectorKind(PatchVaeSettings, PatchVaeDetector)
