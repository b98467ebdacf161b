"""What a detector is, whatever its mathematics, and the registry that knows each by name."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from importlib import import_module
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, nn

from kizu_train.errors import UsageError

Scores = tuple[Tensor, Tensor]
"""Tile score float32 [N] and map float32 [N, T/m, T/m]; every value finite and at least 0, higher is worse."""


@dataclass(frozen=True)
class TileShape:
    """Tiles are uint8 [N, T, T, C] with T `tile_px` and C `channels`; maps have cells of `map_cell_px`."""

    tile_px: int
    channels: int
    map_cell_px: int


class TileSource(Protocol):
    """Tiles of the good pictures to learn from."""

    @property
    def count(self) -> int:
        """How many tiles one sweep gives."""

    def batch(self, step: int, size: int) -> NDArray[np.uint8]:
        """`size` random tiles uint8 [size, T, T, C]; the same `step` gives the same tiles."""

    def sweep(self) -> Iterator[NDArray[np.uint8]]:
        """Every tile of the grid once, uint8 [N, T, T, C], picture by picture."""


class Session(Protocol):
    """What a fit may ask of its surroundings: where to compute, what to resume from, whether to stop."""

    @property
    def device(self) -> str:
        """`cpu` or `cuda`."""

    @property
    def seed(self) -> int:
        """Every random choice derives from it and the step, so that resuming needs no generator's state."""

    @property
    def should_stop(self) -> bool:
        """True once the user asked to stop: finish the step and return."""

    def restore(self) -> tuple[int, dict[str, Tensor]] | None:
        """Steps done and the tensors last saved; None at a fresh start."""

    def save(self, step: int, tensors: Callable[[], dict[str, Tensor]]) -> None:
        """Offer a checkpoint after `step` steps; `tensors` is called only when one is due."""

    def report(self, step: int, steps: int, losses: Mapping[str, float]) -> None:
        """Show and log where the fit stands."""


class Detector(Protocol):
    """A method that learns from good tiles. Gradients are its own affair: `fit` may as well be one sweep."""

    score_kinds: tuple[str, ...]
    """Kinds of score it offers, the default first."""

    def fit(self, tiles: TileSource, session: Session) -> None:
        """Learn. Returns early, in a usable state, when `session.should_stop`; goes on from `session.restore()`."""

    def tensors(self) -> dict[str, Tensor]:
        """Everything learned, by name."""

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Take up what `tensors()` gave. Raises KeyError or RuntimeError where it does not fit."""

    def score_all(self, tiles: Tensor) -> dict[str, Scores]:
        """Scores and maps of tiles uint8 [N, T, T, C] for every kind, at the cost of one pass."""

    def scorer(self, kind: str) -> nn.Module:
        """The exportable module of one kind: forward(tiles uint8 [N, T, T, C]) → (score, map), see `Scores`."""


@dataclass(frozen=True)
class DetectorKind:
    """A registered detector: its settings (a frozen dataclass of frozen dataclasses, all with defaults) and builder.

    `build(settings, shape, seed)` raises UsageError where the settings do not fit the tile shape.
    """

    settings: type[Any]
    build: Callable[[Any, TileShape, int], Detector]


DETECTORS: dict[str, DetectorKind] = {}
"""Detectors by the name recipes give; a detector's module adds its own entry when imported."""

_MODULES = ("kizu_train.detectors.patch_vae",)


def find_detector(name: str) -> DetectorKind:
    """The detector called `name`. Raises UsageError that lists the known ones."""
    for module in _MODULES:
        import_module(module)
    if name not in DETECTORS:
        raise UsageError(f"detector {name!r} is not known; known are {', '.join(sorted(DETECTORS))}")
    return DETECTORS[name]
