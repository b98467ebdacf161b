"""The search of AnoGAN, for studies: seconds a picture where the encoder takes one pass, and not exportable.

Source: Schlegl et al., AnoGAN, 2017; as in the published 28 × 28 experiment, a small layer before the fixed generator
is fitted anew for each picture. Letters: N tiles; T tile side; C channels; Z noise size.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from kizu_train.nets.gan import Gan, draw_noise
from kizu_train.nets.gan_losses import Residuals, residuals
from kizu_train.nets.layers import to_pixels


@dataclass(frozen=True)
class Search:
    """`steps` of Adam for each picture; the residual of features weighs `feature_share`, that of pixels the rest."""

    steps: int = 300
    learning_rate: float = 1e-3
    feature_share: float = 0.1
    batch: int = 100

    def __post_init__(self) -> None:
        if not (self.steps >= 1 and self.learning_rate > 0 and 0 <= self.feature_share <= 1 and self.batch >= 1):
            raise ValueError("steps, batch >= 1, learning_rate > 0 and feature_share between 0 and 1 are needed")


def search_scores(gan: Gan, tiles: Tensor, search: Search, seed: int) -> Tensor:
    """AnoGAN's score float32 [N] of tiles uint8 [N, T, T, C]: sums of absolute residuals after the search.

    Tiles are searched for independently, `search.batch` at a time; `gan` is in eval mode and stays as it is.
    """
    parts = [_search(gan, to_pixels(part), search, seed) for part in torch.split(tiles, search.batch)]
    return torch.cat(parts)


def _search(gan: Gan, pixels: Tensor, search: Search, seed: int) -> Tensor:
    generator = torch.Generator(pixels.device).manual_seed(seed)
    size = gan.network.noise
    # One start for all: a tile's score must not depend on where it stands in the batch.
    start = draw_noise(1, size, generator)
    weights = torch.eye(size, device=pixels.device).repeat(len(pixels), 1, 1).requires_grad_()
    shift = torch.zeros((len(pixels), size), device=pixels.device, requires_grad=True)
    optimizer = torch.optim.Adam((weights, shift), lr=search.learning_rate)

    def scores() -> Tensor:
        noise = torch.tanh((start @ weights)[:, 0] + shift)
        return _scores(residuals(gan, pixels, noise), search)

    for _ in range(search.steps):
        optimizer.zero_grad(set_to_none=True)
        scores().sum().backward(inputs=[weights, shift])  # type: ignore[no-untyped-call]  # torch leaves it untyped
        optimizer.step()
    with torch.no_grad():
        return scores()


def _scores(found: Residuals, search: Search) -> Tensor:
    image, features = found.pixels.abs().flatten(1).sum(1), found.features.abs().flatten(1).sum(1)
    return (1 - search.feature_share) * image + search.feature_share * features
