"""Planted patches for self-supervised features: ragged discs and bars filled from elsewhere, a batch at a time."""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

_VISIBLE = 0.03
"""Grey levels (0–1) below which a change is none."""


@dataclass(frozen=True)
class Planting:
    """`spots` in each crop, half axes between `smallest_px` and `largest_px` (log-uniform, each axis by itself).

    `borrowed` is the share filled with another crop; the others are shaded darker or brighter.
    """

    spots: int = 2
    smallest_px: float = 1.5
    largest_px: float = 16.0
    borrowed: float = 0.6

    def __post_init__(self) -> None:
        if self.spots < 1 or not 0 < self.smallest_px <= self.largest_px or not 0 <= self.borrowed <= 1:
            raise ValueError("spots >= 1, 0 < smallest_px <= largest_px and 0 <= borrowed <= 1 are needed")


def plant(crops: Tensor, settings: Planting, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Spoil `crops` [B, C, P, P], 0–1; and how far each pixel was changed, [B, 1, P, P], 0 unseen to 1 plain."""
    mask = spots(len(crops), crops.shape[-1], settings, generator)
    filling = _filling(crops, settings.borrowed, generator)
    spoilt = (crops + mask * (filling - crops)).clamp(0, 1)
    difference = (spoilt - crops).abs().amax(1, keepdim=True)
    return spoilt, ((difference - _VISIBLE) / _VISIBLE).clamp(0, 1)


def spots(count: int, side: int, settings: Planting, generator: torch.Generator) -> Tensor:
    """Soft masks [count, 1, side, side], 0–1: the union of turned ellipses and bars whose outlines are ragged."""
    device = generator.device
    draw = torch.rand((6, count, settings.spots, 1, 1), generator=generator, device=device)
    line = torch.arange(side, device=device, dtype=torch.float32)
    y, x = line[:, None] - draw[0] * side, line[None, :] - draw[1] * side  # [count, spots, side, side]
    angle = draw[2] * torch.pi
    along, across = x * angle.cos() + y * angle.sin(), y * angle.cos() - x * angle.sin()
    range_ = settings.largest_px / settings.smallest_px
    a, b = settings.smallest_px * range_ ** draw[3], settings.smallest_px * range_ ** draw[4]
    u, v = (along / a).abs(), (across / b).abs()
    reach = torch.where(draw[5] < 0.5, (u.square() + v.square()).sqrt(), torch.maximum(u, v))
    ragged = torch.randn((count, settings.spots, 8, 8), generator=generator, device=device)
    reach = reach + 0.2 * functional.interpolate(ragged, size=(side, side), mode="bilinear", align_corners=False)
    # Edges about a pixel wide, whatever the size.
    soft = ((1 - reach) * torch.minimum(a, b) + 0.5).clamp(0, 1)
    return soft.amax(1, keepdim=True)


def _filling(crops: Tensor, borrowed: float, generator: torch.Generator) -> Tensor:
    """What goes into the spots: the next crop, moved and relit, or the crop itself in another shade or colour."""
    draw = torch.rand((3, len(crops), 1, 1, 1), generator=generator, device=crops.device)
    shift = torch.randint(crops.shape[-1], (2,), generator=generator, device=crops.device).tolist()
    tint = torch.rand((len(crops), crops.shape[1], 1, 1), generator=generator, device=crops.device)
    light = 0.2 * (draw[1] - 0.5)
    other = crops.roll(1, 0).roll(shift, (2, 3)) + light * (draw[2] < 0.5)
    sign = torch.where(draw[1] < 0.5, -1.0, 1.0)
    shade = crops + sign * (0.08 + 0.4 * draw[2]) * (0.6 + 0.4 * tint)
    flat = tint.expand_as(crops)
    own = torch.where(draw[2] < 0.7, shade, flat + 0.2 * (crops - crops.mean((2, 3), keepdim=True)))
    return torch.where(draw[0] < borrowed, other, own)
