"""What a detector is, whatever its mathematics, and the registry that knows each by name."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from pkgutil import iter_modules
from typing import Any, Literal, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, nn

from kizu_contract.tiles import FrameSize, TileLayout
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
        """Every tile of the grid once, uint8 [N, T, T, C], picture by picture; within one, in order of position."""

    def frame_layout(self) -> TileLayout:
        """The grid over the pictures' one common size. Raises DataError, naming a picture, where sizes differ."""


ExtraName = Literal["backbone", "defects", "references"]


@dataclass(frozen=True)
class Extras:
    """What a user may give beside good pictures; None where it was not given.

    `backbone`: a state dict under torchvision's parameter names, .safetensors or .pth. `defects`: a folder of pictures
    with known defects. `references`: a folder with one sub-folder of pictures for each class of other things.
    """

    backbone: Path | None = None
    defects: Path | None = None
    references: Path | None = None

    def given(self) -> dict[ExtraName, Path]:
        """The extras that were given, by name."""
        found: dict[ExtraName, Path | None] = {
            "backbone": self.backbone,
            "defects": self.defects,
            "references": self.references,
        }
        return {name: path for name, path in found.items() if path is not None}


class Session(Protocol):
    """What a fit may ask of its surroundings: where to compute, what to resume from, whether to stop."""

    @property
    def extras(self) -> Extras:
        """What the user gave beside good pictures."""

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
    """A method that learns from good tiles. Gradients are its own affair: `fit` may as well be one sweep.

    One that learns each place of the frame says `inputs = ("tiles", "position")`, on itself and on its scorer, and
    gives both a `frame`, the one size of frames that it knows. Its `score_all` and its scorer's `forward` then take the
    positions too, int64 [N]. Without a word of it, a detector takes tiles alone and frames of any size.
    """

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


def inputs_of(part: object) -> tuple[str, ...]:
    """What the graph of a detector or scorer takes: its `inputs`, ("tiles",) by default."""
    return tuple(getattr(part, "inputs", ("tiles",)))


def frame_of(part: object) -> FrameSize | None:
    """The one size of frames that a detector or scorer knows: its `frame`, None (any size) by default."""
    found: FrameSize | None = getattr(part, "frame", None)
    return found


@runtime_checkable
class Settles(Protocol):
    """A detector that, once it has learned, sets a few numbers by good tiles it has not learned from."""

    def settle(self, held_out: TileSource) -> None:
        """Set them; called once after `fit`, before calibration, also when the fit was stopped early."""


@runtime_checkable
class SharesOverlap(Protocol):
    """A scorer that computes once what overlapping tiles have in common, and gives what it gives tile by tile.

    Only what does not depend on where a tile ends may be shared: a tile mirrors or fills its own borders, so whatever
    has seen them belongs to that tile alone (see docs/decisions/0024).
    """

    def can_share(self, stride_px: int) -> bool:
        """Whether tiles that begin every `stride_px` have anything exactly in common."""

    def share(self, block: Tensor, stride_px: int) -> tuple[Tensor, ...]:
        """What `score_shared` needs of each tile of `block` float32 [h, w, C], 0-255: tensors [n, …], row by row.

        The tiles begin every `stride_px` from the upper left corner on and fill the block.
        """

    def score_shared(self, tiles: Tensor, *shared: Tensor) -> Scores:
        """As `forward` of `tiles` [n, T, T, C], given what `share` computed of them."""


@dataclass(frozen=True)
class DetectorKind:
    """A registered detector: its settings (a frozen dataclass of frozen dataclasses, all with defaults) and builder.

    `build(settings, shape, seed)` raises UsageError where the settings do not fit the tile shape. `uses` names the
    extras that its fit makes use of; others are refused rather than ignored.
    """

    settings: type[Any]
    build: Callable[[Any, TileShape, int], Detector]
    uses: frozenset[ExtraName] = frozenset()


DETECTORS: dict[str, DetectorKind] = {}
"""Detectors by the name recipes give; a detector's module adds its own entry when imported."""

_PACKAGE = "kizu_train.detectors"


def find_detector(name: str) -> DetectorKind:
    """The detector called `name`, from the module of that name. Raises UsageError that lists the known ones."""
    module = f"{_PACKAGE}.{name}"
    if name.isidentifier() and find_spec(module) is not None:
        import_module(module)
    if name not in DETECTORS:
        raise UsageError(f"detector {name!r} is not known; known are {', '.join(known_detectors())}")
    return DETECTORS[name]


def known_detectors() -> tuple[str, ...]:
    """The names of all detectors, sorted."""
    for module in iter_modules(import_module(_PACKAGE).__path__):
        import_module(f"{_PACKAGE}.{module.name}")
    return tuple(sorted(DETECTORS))
