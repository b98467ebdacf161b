"""The loss of the patch VAE as separate terms, and the options that spoil its input.

Letters: N tiles; C channels; T tile side; Z latent size. Tiles x, means μ and variances σ² are float32 [N, C, T, T]
with pixels between 0 and 1. Source: Kingma & Welling 2014; Matsubara et al. 2018 (unregularised score M).
"""

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from kizu_train import distributed


def kl_term(latent_mean: Tensor, latent_log_variance: Tensor) -> Tensor:
    """D = KL(q(z|x) ‖ N(0, 1)) of latents [N, Z], in nats, ≥ 0: [N]."""
    return 0.5 * (latent_mean**2 + latent_log_variance.exp() - 1 - latent_log_variance).sum(1)


def variance_term(variance: Tensor) -> Tensor:
    """A = ½ Σ log 2πσ² over channels, for each pixel: [N, T, T]; negative where σ² < 1/2π."""
    return 0.5 * torch.log(2 * math.pi * variance).sum(1)


def residual_term(tiles: Tensor, mean: Tensor, variance: Tensor) -> Tensor:
    """M = ½ Σ (x − μ)² / σ² over channels, for each pixel, ≥ 0: [N, T, T]."""
    return 0.5 * ((tiles - mean) ** 2 / variance).sum(1)


def lowest_variance_term(channels: int, sigma_floor: float) -> float:
    """What A of a pixel cannot fall below while σ ≥ `sigma_floor`: ½ C log 2πσ²."""
    return 0.5 * channels * math.log(2 * math.pi * sigma_floor**2)


class CalibratedSigma(nn.Module):
    """One σ for all pixels and channels, not learned by gradients but computed: the optimum for the residuals.

    Source: Rybkin, Daniilidis & Levine 2021 (optimal σ-VAE): A + M is least at σ² = mean (x − μ)², over the batch, and
    log σ is clipped softly so that σ stays above e⁻⁶. What differs: scoring needs a σ that does not depend on other
    tiles, so the mean over the batches is kept, an average that forgets with a memory of 100 batches.
    """

    LOG_LOWEST: ClassVar[float] = -6.0
    LOWEST: ClassVar[float] = math.exp(LOG_LOWEST)
    MEMORY: ClassVar[int] = 100

    running: Tensor
    batches: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("running", torch.tensor(0.25))
        self.register_buffer("batches", torch.tensor(0.0))

    def observe(self, target: Tensor, mean: Tensor) -> Tensor:
        """Variance [1] that is best for this batch [N, C, T, T]; gradients flow through it. Updates the average."""
        squared = torch.square(target - mean).mean()
        seen = squared.detach().reshape(1).clone()
        distributed.average([seen], 1 / distributed.world())
        self.batches.add_(1).clamp_(max=self.MEMORY)
        self.running.lerp_(seen[0], 1 / self.batches)
        return self._clipped(squared)

    def forward(self) -> Tensor:
        """Variance [1] to score with."""
        return self._clipped(self.running)

    def _clipped(self, squared: Tensor) -> Tensor:
        # The offset lies far below e⁻¹²: it only keeps the logarithm of a perfect reconstruction finite.
        log_sigma = 0.5 * torch.log(squared + 1e-12)
        clipped = self.LOG_LOWEST + functional.softplus(log_sigma - self.LOG_LOWEST)
        return torch.exp(2 * clipped).reshape(1)


@dataclass(frozen=True)
class Augment:
    """What is done to a tile before it is encoded.

    `salt_and_pepper`: share of pixels turned black or white, 1 : 1, in the input only; the target stays clean.
    `brightness`: input and target are multiplied alike by 1 ± up to this share. `flips`: mirrored in both directions
    at random; only where products look the same mirrored. `darken`: grey levels; input and target are darkened alike by
    none or one of these, each as likely: five of them stand for data copied six times.
    """

    salt_and_pepper: float = 0.004
    brightness: float = 0.0
    flips: bool = False
    darken: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if not (0 <= self.salt_and_pepper < 1 and 0 <= self.brightness < 1):
            raise ValueError("salt_and_pepper and brightness must lie between 0 and 1")
        if not all(0 < levels < 256 for levels in self.darken):
            raise ValueError("darken takes grey levels between 1 and 255")

    def __call__(self, tiles: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Tiles [N, C, T, T] → spoilt input and clean target, of the same shape."""
        target = tiles

        def uniform(*shape: int) -> Tensor:
            return torch.rand(shape, generator=generator, device=tiles.device)

        if self.flips:
            toss = uniform(2, len(tiles), 1, 1, 1) < 0.5
            target = torch.where(toss[0], target.flip(2), target)
            target = torch.where(toss[1], target.flip(3), target)
        if self.brightness:
            target = (target * (1 + self.brightness * (2 * uniform(len(tiles), 1, 1, 1) - 1))).clamp(0, 1)
        if self.darken:
            levels = torch.tensor((0, *self.darken), dtype=target.dtype, device=tiles.device) / 255
            drawn = (uniform(len(tiles), 1, 1, 1) * len(levels)).long().clamp(max=len(levels) - 1)
            target = (target - levels[drawn]).clamp(0, 1)
        if not self.salt_and_pepper:
            return target, target
        draw = uniform(len(tiles), 1, *tiles.shape[2:])
        half = self.salt_and_pepper / 2
        spoilt = target.masked_fill(draw < half, 0.0).masked_fill(draw > 1 - half, 1.0)
        return spoilt, target
