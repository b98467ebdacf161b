"""Transformed good tiles as classes of other things, for methods that want some and were given none.

Source: Golan & El-Yaniv, "Deep Anomaly Detection Using Geometric Transformations", 2018: flips, quarter turns and
shifts of whole pictures. What differs: the classes are not all products of these (7 turns and flips, 4 shifts, rather
than 72), and one more class holds tiles with a part exchanged (see `planting`), since flaws are local.

Letters: N tiles; C channels; T tile side.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from kizu_train.nets.planting import plant

Transform = Callable[[Tensor], Tensor]
"""Tiles [N, C, T, T] → as many, changed alike."""


@dataclass(frozen=True)
class Transforms:
    """Which classes are made: quarter turns with and without a flip, shifts by a quarter tile, exchanged parts.

    `light`: all tiles are made brighter or darker by up to this share, in every class alike, so that light tells
    nothing.
    """

    turns: bool = True
    shifts: bool = True
    parts: bool = True
    light: float = 0.1

    def __post_init__(self) -> None:
        if not (self.turns or self.shifts or self.parts):
            raise ValueError("at least one of turns, shifts and parts is needed")
        if not 0 <= self.light < 1:
            raise ValueError("light must lie between 0 and 1")

    @property
    def classes(self) -> int:
        """How many classes beside the tiles as they are."""
        return 7 * self.turns + 4 * self.shifts + self.parts

    def rigid(self, tile_px: int) -> list[Transform]:
        """The transforms that draw nothing at random, in the order of their classes, without the tile as it is."""
        turns = [_turn(quarters, flip) for flip in (False, True) for quarters in range(4)][1:]
        shifts = [_shift(*by, tile_px) for by in ((1, 0), (-1, 0), (0, 1), (0, -1))]
        return turns * self.turns + shifts * self.shifts

    def apply(self, pixels: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Change each of the tiles [N, C, T, T]: them, and their classes int64 [N] from 0.

        Every other tile gets a part exchanged, where that is asked for; the rigid transforms share the rest.
        """
        rigid, place = self.classes - self.parts, torch.arange(len(pixels), device=pixels.device)
        first = torch.randint(max(1, rigid), (1,), generator=generator, device=pixels.device)
        labels = (place // (1 + self.parts) + first) % max(1, rigid)
        if self.parts:
            labels = torch.where(place % 2 == 0, rigid, labels) if rigid else torch.zeros_like(labels)
        changed = plant(pixels, generator)[0] if self.parts else pixels.clone()
        for index, transform in enumerate(self.rigid(pixels.shape[-1])):
            changed[labels == index] = transform(pixels[labels == index])
        return changed, labels

    def relight(self, pixels: Tensor, generator: torch.Generator) -> Tensor:
        """Make each tile brighter or darker by its own share."""
        if not self.light:
            return pixels
        draw = torch.rand((len(pixels), 1, 1, 1), generator=generator, device=pixels.device)
        return (pixels * (1 + self.light * (2 * draw - 1))).clamp(0, 1)


def _turn(quarters: int, flip: bool) -> Transform:
    def turn(pixels: Tensor) -> Tensor:
        straight = pixels.flip(3) if flip else pixels
        if quarters == 2:
            return straight.flip(2, 3)
        return straight.transpose(2, 3).flip(2 if quarters == 1 else 3) if quarters else straight

    return turn


def _shift(down: int, right: int, side: int) -> Transform:
    """Shift by a quarter tile; what comes in is mirrored."""
    step = max(1, side // 4)
    y, x = step - down * step, step - right * step

    def shift(pixels: Tensor) -> Tensor:
        padded = functional.pad(pixels, (step, step, step, step), mode="reflect")
        return padded[:, :, y : y + side, x : x + side]

    return shift
