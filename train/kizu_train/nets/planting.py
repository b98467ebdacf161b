"""Flaws planted in good tiles on the device: patches from elsewhere, smears, shades; small specks to long scratches.

Letters: N tiles; C channels; T tile side. The idea of moved patches: Li et al., "CutPaste", 2021.
"""

import math

import torch
from torch import Tensor

_SOURCES = 4


def plant(pixels: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Spoil each tile [N, C, T, T], 0–1, in one place: spoilt tiles, and how much of each pixel is covered.

    The cover is [N, 1, T, T], 0–1. The same generator state gives the same flaws. Content: another tile's, the tile's
    own from elsewhere, one shade, or its own made brighter or darker.
    """
    cover = _shapes(len(pixels), pixels.shape[-1], generator)
    kind = torch.randint(_SOURCES, (len(pixels), 1, 1, 1), generator=generator, device=pixels.device)
    contents = torch.stack(_contents(pixels, generator))
    content = torch.gather(contents, 0, kind[None].expand(1, *pixels.shape))[0]
    return pixels + cover * (content - pixels), cover


def _contents(pixels: Tensor, generator: torch.Generator) -> list[Tensor]:
    side, shape = pixels.shape[-1], (len(pixels), pixels.shape[1], 1, 1)

    def uniform(low: float, high: float, *size: int) -> Tensor:
        return low + (high - low) * torch.rand(size, generator=generator, device=pixels.device)

    moves = torch.randint(side // 4 or 1, side, (2,), generator=generator, device=pixels.device).tolist()
    shift = (int(moves[0]), int(moves[1]))
    other = pixels.roll(1, 0).flip(2).roll(shift, (2, 3))
    grey = uniform(0, 1, len(pixels), 1, 1, 1) + uniform(-0.1, 0.1, *shape)
    sign = torch.where(uniform(0, 1, len(pixels), 1, 1, 1) < 0.5, -1.0, 1.0)
    lit = pixels + sign * uniform(0.1, 0.5, *shape)
    return [other, pixels.roll(shift, (2, 3)), grey.clamp(0, 1).expand_as(pixels), lit.clamp(0, 1)]


def _shapes(count: int, side: int, generator: torch.Generator) -> Tensor:
    """Ellipses and boxes at any angle, half axes from 1 px to a quarter of the tile, with soft edges: [N, 1, T, T]."""

    def uniform(low: float, high: float) -> Tensor:
        return low + (high - low) * torch.rand((count, 1, 1), generator=generator, device=generator.device)

    long = torch.exp(uniform(0, math.log(max(side / 4, 1.5))))
    wide = (long * torch.exp(uniform(math.log(0.1), 0))).clamp(min=0.8)
    angle, is_box = uniform(0, math.pi), uniform(0, 1) < 0.5
    place = torch.arange(side, device=generator.device) + 0.5
    y, x = place[None, :, None] - uniform(0, side), place[None, None, :] - uniform(0, side)
    along = (x * angle.cos() + y * angle.sin()).abs() / long
    across = (y * angle.cos() - x * angle.sin()).abs() / wide
    far = torch.where(is_box, torch.maximum(along, across), (along**2 + across**2).sqrt())
    return ((1 - far) * wide + 0.5).clamp(0, 1)[:, None]
