"""What adversarial training descends, and what tells a tile from the generator's picture of it.

Letters: N tiles; C channels; T tile side; Z noise size. Pixels are float32 between 0 and 1. Sources: Goodfellow et al.
2014 (losses); Mescheder et al. 2018 (R1); Schlegl et al. 2017 (AnoGAN), 2019 (f-AnoGAN) (residuals).
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from kizu_train.nets.gan import Gan, draw_noise


class Residuals(NamedTuple):
    """How far a tile is from its picture: in pixels [N, C, T, T], and in the discriminator's features [N, F, f, f]."""

    pixels: Tensor
    features: Tensor


def residuals(gan: Gan, pixels: Tensor, noise: Tensor) -> Residuals:
    """Compare `pixels` [N, C, T, T] with what the generator draws from `noise` [N, Z]."""
    drawn = gan.generator(noise)
    features = gan.discriminator.features
    return Residuals(pixels - drawn, features(pixels) - features(drawn))


def squared_residuals(found: Residuals) -> tuple[Tensor, Tensor]:
    """Mean square of each part, [N] and [N]: the terms of f-AnoGAN's score."""
    return (found.pixels**2).flatten(1).mean(1), (found.features**2).flatten(1).mean(1)


def discriminator_loss(
    gan: Gan, pixels: Tensor, generator: torch.Generator, gradient_penalty: float
) -> tuple[Tensor, dict[str, Tensor]]:
    """Cross entropy of real and drawn tiles, plus R1: `gradient_penalty` times half the squared slope at real tiles.

    Without R1 the discriminator soon knows every drawn tile, and the generator cannot tell what would be better.
    """
    with torch.no_grad():
        drawn = _draw(gan, len(pixels), generator)
    pixels.requires_grad_()
    real, fake = gan.discriminator(pixels), gan.discriminator(drawn)
    loss = functional.softplus(-real).mean() + functional.softplus(fake).mean()
    (slope,) = torch.autograd.grad(real.sum(), pixels, create_graph=True)
    penalty = 0.5 * gradient_penalty * (slope**2).flatten(1).sum(1).mean()
    return loss + penalty, {"discriminator": loss.detach(), "slope": penalty.detach()}


def generator_loss(gan: Gan, count: int, generator: torch.Generator) -> tuple[Tensor, dict[str, Tensor]]:
    """Cross entropy of `count` drawn tiles that want to be taken for real: the form that does not saturate."""
    loss = functional.softplus(-gan.discriminator(_draw(gan, count, generator))).mean()
    return loss, {"generator": loss.detach()}


def _draw(gan: Gan, count: int, generator: torch.Generator) -> Tensor:
    drawn: Tensor = gan.generator(draw_noise(count, gan.network.noise, generator))
    return drawn
