"""Mean and deviation of each place, for parts that a fixture holds in front of a fixed camera.

Source: the variation model of machine vision libraries (Steger, Ulrich & Wiedemann, Machine Vision Algorithms and
Applications, "print inspection"): mean picture and variation picture of registered good pictures; a pixel is judged by
its difference from the mean over the variation. What differs: the variation is smoothed a little (few pictures are
enough then) and enlarged by the mean's gradient, which pays for what registration leaves; registration at the line is
inside the graph: each tile is moved by whole pixels to where it fits its place best.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from kizu_contract.tiles import FrameSize, TileLayout
from kizu_train.detectors.base import DETECTORS, DetectorKind, Scores, Session, TileShape, TileSource
from kizu_train.errors import UsageError
from kizu_train.nets.layers import to_cells
from kizu_train.nets.registration import (
    Plane,
    blurred,
    cut_places,
    gradient,
    joined,
    mean_of,
    moved_back,
    shift_between,
)

_PASSES = 3


@dataclass(frozen=True)
class Registration:
    """How pictures are brought to cover each other.

    At training pictures are moved by at most `most_px` onto their mean. At the line each tile is tried at every shift
    of up to `search_px`; 0 where the fixture is exact.
    """

    most_px: int = 24
    search_px: int = 4

    def __post_init__(self) -> None:
        if not (self.most_px >= 0 and 0 <= self.search_px <= 16):
            raise ValueError("most_px >= 0 and 0 <= search_px <= 16 are needed")


@dataclass(frozen=True)
class Variation:
    """What a pixel may deviate by, in grey levels.

    At least `floor`, and besides what it did vary by, `tolerance_px` times the gradient of the mean; variances are
    smoothed over `smooth_sigma_px`. `local_brightness` takes a tile's mean difference from its place off first.
    """

    floor: float = 4.0
    tolerance_px: float = 0.5
    smooth_sigma_px: float = 1.0
    local_brightness: bool = False

    def __post_init__(self) -> None:
        if not (self.floor > 0 and self.tolerance_px >= 0 and 0 <= self.smooth_sigma_px <= 50):
            raise ValueError("floor > 0, tolerance_px >= 0 and 0 <= smooth_sigma_px <= 50 are needed")


@dataclass(frozen=True)
class VariationModelSettings:
    """Everything a recipe may set about the variation model."""

    registration: Registration = field(default_factory=Registration)
    variation: Variation = field(default_factory=Variation)


class VariationScorer(nn.Module):
    """Tiles uint8 [N, T, T, C] and position int64 [N] → the highest cell [N], and |x - mean| / deviation by cell.

    `mean` and `inverse` (1 / deviation) [P, C, T + 2k, T + 2k] are what each of P places looks like, with an apron of
    the k pixels that a tile may be moved by. The deviations of the channels are joined by their root mean square.
    """

    inputs = ("tiles", "position")
    mean: Tensor
    inverse: Tensor
    pick: Tensor
    rows: Tensor
    distance: Tensor

    def __init__(self, settings: VariationModelSettings, shape: TileShape, mean: Tensor, inverse: Tensor) -> None:
        super().__init__()
        self.settings, self.shape = settings, shape
        self.frame: FrameSize | None = None
        self.register_buffer("mean", mean)
        self.register_buffer("inverse", inverse)
        reach = settings.registration.search_px
        wide = 2 * reach + 1
        # A convolution whose kernels hold a single 1 gives the place as seen at each shift.
        self.register_buffer("pick", torch.eye(wide**2).reshape(wide**2, 1, wide, wide))
        shifts = torch.stack(torch.meshgrid(torch.arange(wide), torch.arange(wide), indexing="ij")).reshape(2, -1)
        self.register_buffer("rows", shifts[:, :, None] + torch.arange(shape.tile_px))
        # Of two shifts that fit alike the smaller one is taken, on every machine.
        self.register_buffer("distance", 1e-2 * (shifts - reach).float().square().sum(0).sqrt())

    def forward(self, tiles: Tensor, position: Tensor) -> Scores:
        """Score `tiles` at their places."""
        pixels = tiles.to(torch.float32).permute(0, 3, 1, 2)
        mean, inverse = self.mean[position], self.inverse[position]
        if self.settings.registration.search_px:
            best = self.best_shift(pixels, mean)
            mean, inverse = self._moved(mean, best), self._moved(inverse, best)
        difference = pixels - mean
        if self.settings.variation.local_brightness:
            difference = difference - difference.mean((2, 3), keepdim=True)
        deviation = (difference * inverse).square().mean(1).sqrt()
        cells = to_cells(deviation, self.shape.map_cell_px)
        return cells.amax((1, 2)), cells

    def best_shift(self, pixels: Tensor, mean: Tensor) -> Tensor:
        """Which shift [N], counted along rows, brings the place `mean` [N, C, T + 2k, T + 2k] closest to the tile.

        Closest in the mean absolute difference of grey levels, on every other pixel of both directions.
        """
        grey, place = pixels.mean(1, keepdim=True), mean.mean(1, keepdim=True)
        seen = functional.conv2d(place, self.pick, stride=2)  # [N, (2k + 1)², T/2, T/2]
        difference = grey[:, :, ::2, ::2] - seen
        if self.settings.variation.local_brightness:
            difference = difference - difference.mean((2, 3), keepdim=True)
        return (difference.abs().mean((2, 3)) + self.distance).argmin(1)

    def _moved(self, place: Tensor, best: Tensor) -> Tensor:
        """The part [N, C, T, T] of `place` [N, C, T + 2k, T + 2k] that the shift `best` [N] shows."""
        channels, side = self.shape.channels, self.shape.tile_px
        wide = side + 2 * self.settings.registration.search_px
        rows = self.rows[0][best][:, None, :, None].expand(-1, channels, side, wide)
        columns = self.rows[1][best][:, None, None, :].expand(-1, channels, side, side)
        return place.gather(2, rows).gather(3, columns)


class VariationModelDetector:
    """The variation model as a detector: three passes over the pictures."""

    score_kinds: tuple[str, ...] = ("deviation",)
    inputs = ("tiles", "position")

    def __init__(self, settings: VariationModelSettings, shape: TileShape, _seed: int) -> None:
        if shape.tile_px % 2:
            raise UsageError(f"grid.tile_px is {shape.tile_px}; the variation model needs an even number")
        self.settings, self.shape = settings, shape
        self.frame: FrameSize | None = None
        side = shape.tile_px + 2 * settings.registration.search_px
        self.mean = torch.zeros(1, shape.channels, side, side)
        self.inverse = torch.full_like(self.mean, 1 / settings.variation.floor)

    def fit(self, tiles: TileSource, session: Session) -> None:
        """Register the pictures, then learn the mean and the deviation of each place. Raises DataError.

        Pictures of different sizes are refused. It takes seconds: a resumed fit starts anew. When it should stop,
        a pass goes on with the pictures it has seen.
        """
        session.restore()
        layout = tiles.frame_layout()
        self.frame = FrameSize(layout.height, layout.width)
        reference = next(_pictures(layout, tiles))
        for turn in range(_PASSES - 1):
            reference = mean_of(picture for picture, _ in self._registered(layout, tiles, session, reference, turn))
        total, count = np.zeros_like(reference, np.float64), 0
        for registered, _ in self._registered(layout, tiles, session, reference, _PASSES - 1):
            total += self._difference(layout, registered, reference).astype(np.float64) ** 2
            count += 1
        self._learn(layout, reference, (total / count).astype(np.float32))

    def tensors(self) -> dict[str, Tensor]:
        """Mean and inverse deviation of each place, and the size of the frame."""
        frame = self.frame or FrameSize(1, 1)
        size = torch.tensor([frame.height, frame.width])
        return {"mean": self.mean, "inverse": self.inverse, "frame": size}

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Take up what was learned."""
        mean, inverse = tensors["mean"], tensors["inverse"]
        if mean.shape[1:] != self.mean.shape[1:] or inverse.shape != mean.shape:
            raise RuntimeError(f"places are {list(mean.shape)}, not {list(self.mean.shape[1:])} each")
        self.mean, self.inverse = mean, inverse
        self.frame = FrameSize(*(int(length) for length in tensors["frame"]))

    def score_all(self, tiles: Tensor, position: Tensor | None = None) -> dict[str, Scores]:
        """The one kind there is; None stands for the first place."""
        places = torch.zeros(len(tiles), dtype=torch.int64) if position is None else position
        return {"deviation": self.scorer("deviation")(tiles, places)}

    def scorer(self, kind: str) -> nn.Module:
        """The exportable module; the one `kind` is deviation."""
        del kind
        module = VariationScorer(self.settings, self.shape, self.mean, self.inverse)
        module.frame = self.frame
        return module.eval()

    def _registered(
        self, layout: TileLayout, tiles: TileSource, session: Session, reference: Plane, turn: int
    ) -> Iterator[tuple[Plane, tuple[float, float]]]:
        """Each picture moved onto `reference`, and by how much."""
        count = tiles.count // layout.count
        for index, picture in enumerate(_pictures(layout, tiles)):
            if index and session.should_stop:
                session.save(index, lambda: {"begun": torch.ones(1)})
                return
            shift = shift_between(reference, picture, self.settings.registration.most_px)
            yield moved_back(picture, shift), shift
            session.report(turn * count + index + 1, _PASSES * count, {"moved_px": float(np.hypot(*shift))})

    def _difference(self, layout: TileLayout, picture: Plane, mean: Plane) -> Plane:
        difference = picture - mean
        if not self.settings.variation.local_brightness:
            return difference
        # As at the line, where a tile is all there is to see: tile by tile.
        places = cut_places(layout, difference, 0)
        return joined(layout, places - places.mean((1, 2), keepdims=True))

    def _learn(self, layout: TileLayout, mean: Plane, variance: Plane) -> None:
        allowed, reach = self.settings.variation, self.settings.registration.search_px
        variance = blurred(variance, allowed.smooth_sigma_px) + (allowed.tolerance_px * gradient(mean)) ** 2
        deviation = np.sqrt(variance + np.float32(allowed.floor) ** 2)
        self.mean, self.inverse = (
            torch.from_numpy(np.ascontiguousarray(cut_places(layout, plane, reach).transpose(0, 3, 1, 2)))
            for plane in (mean, 1 / deviation)
        )


def _pictures(layout: TileLayout, tiles: TileSource) -> Iterator[Plane]:
    """The padded pictures one after another."""
    return (joined(layout, part) for part in tiles.sweep())


DETECTORS["variation_model"] = DetectorKind(VariationModelSettings, VariationModelDetector)
