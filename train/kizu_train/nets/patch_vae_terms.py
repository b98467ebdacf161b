"""The loss of the patch VAE as separate terms, and the options that spoil its input.

Letters: N tiles; C channels; T tile side; Z latent size. Tiles x, means μ and variances σ² are float32 [N, C, T, T]
with pixels between 0 and 1. Source: Kingma & Welling 2014; Matsubara et al. 2018 (unregularised score M).
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor


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


@dataclass(frozen=True)
class Augment:
    """What is done to a tile before it is encoded.

    `salt_and_pepper`: share of pixels turned black or white, 1 : 1, in the input only; the target stays clean.
    `brightness`: input and target are multiplied alike by 1 ± up to this share. `flips`: mirrored in both directions
    at random; only where products look the same mirrored.
    """

    salt_and_pepper: float = 0.004
    brightness: float = 0.0
    flips: bool = False

    def __post_init__(self) -> None:
        if not (0 <= self.salt_and_pepper < 1 and 0 <= self.brightness < 1):
            raise ValueError("salt_and_pepper and brightness must lie between 0 and 1")

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
        if not self.salt_and_pepper:
            return target, target
        draw = uniform(len(tiles), 1, *tiles.shape[2:])
        half = self.salt_and_pepper / 2
        spoilt = target.masked_fill(draw < half, 0.0).masked_fill(draw > 1 - half, 1.0)
        return spoilt, target
