"""Pictures that tell what a lower precision loses: good ones to round by, others to judge by."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from kizu_contract.errors import PictureError
from kizu_contract.manifest import Manifest
from kizu_contract.pictures import Colour, read_picture
from kizu_export.errors import ExportError, UsageError
from kizu_train.data import TestPicture, open_data
from kizu_train.evaluation.masks import read_mask
from kizu_train.planted import plant
from kizu_train.runs import Run, read_record

_ROUNDED_PIXELS = 2**22
"""Pixels of tiles that ranges are measured on: 64 tiles of 256 px, 256 of 128 px."""
_MOST_TILES, _BATCH_PIXELS = 256, 2**18
_PLANTED = 64
_PIECE_TILES = 2
"""Side of a piece that flaws are planted in, in tiles."""
_FLAW_SHARES = (0.04, 0.15)
_LEAST_FLAW_PX = 6.0
_TILES_SEED, _FLAWS_SEED = 0x1278, 0x1279


@dataclass(frozen=True, eq=False)
class Sample:
    """A picture uint8 [H, W, C]; `mask` bool [H, W] marks its defect, None where it has none or nobody marked it."""

    picture: NDArray[np.uint8]
    is_good: bool
    kind: str
    mask: NDArray[np.bool_] | None


@dataclass(frozen=True)
class Evidence:
    """Good pictures that were `learned` from, good ones that were `held_out`, and `tests`, which may be none.

    `is_calibrated` tells whether the run's thresholds come from the held-out pictures: with folds they do not.
    """

    learned: tuple[Path, ...]
    held_out: tuple[Path, ...]
    tests: tuple[TestPicture, ...]
    colour: Colour
    seed: int
    is_calibrated: bool = True

    @property
    def measured_on(self) -> Literal["tests", "planted"]:
        """What is judged: real defects where there are some beside good pictures, else planted ones."""
        return "tests" if len({test.is_good for test in self.tests}) == 2 else "planted"

    def batches(self, manifest: Manifest) -> Iterator[dict[str, Any]]:
        """Inputs of the graph: tiles of good pictures, every second with a flaw drawn into it, and their positions.

        Flaws are no part of what is learned here but of what the graph must be able to tell: ranges of good tiles alone
        would cut off what defects excite.
        """
        tiles, position = self._tiles(manifest)
        size = max(1, _BATCH_PIXELS // tiles.shape[1] ** 2)
        for at in range(0, len(tiles), size):
            batch: dict[str, Any] = {"tiles": tiles[at : at + size]}
            yield batch | ({"position": position[at : at + size]} if manifest.takes_position else {})

    def samples(self, manifest: Manifest) -> Iterator[Sample]:
        """What is judged, picture by picture; the same ones every time."""
        return self._test_samples() if self.measured_on == "tests" else self._planted_samples(manifest)

    def good(self, manifest: Manifest) -> Iterator[NDArray[np.uint8]]:
        """The held-out pictures. Raises ExportError where one cannot be judged."""
        for path in self.held_out:
            picture = _read(path, self.colour)
            why = manifest.misfit(*picture.shape[:2])
            if why is not None:
                raise ExportError(f"{path}: {why}")
            yield picture

    def _tiles(self, manifest: Manifest) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
        random = np.random.default_rng([self.seed, _TILES_SEED])
        grid = manifest.grid
        count = int(np.clip(_ROUNDED_PIXELS // grid.tile_px**2, 8, _MOST_TILES))
        tiles, places = [], []
        order = random.permutation(len(self.learned))
        for number in range(count):
            picture = _read(self.learned[order[number % len(order)]], self.colour)
            layout = grid.layout(*picture.shape[:2])
            places.append(int(random.integers(layout.count)))
            tile = layout.cut(picture)[places[-1]]
            size_px = max(_LEAST_FLAW_PX, grid.tile_px * random.uniform(*_FLAW_SHARES))
            tiles.append(plant(tile, size_px, random)[0] if number % 2 else tile)
        return np.stack(tiles), np.array(places, np.int64)

    def _test_samples(self) -> Iterator[Sample]:
        for test in self.tests:
            picture = _read(test.path, self.colour)
            yield Sample(picture, test.is_good, test.kind, _mask(test, picture))

    def _planted_samples(self, manifest: Manifest) -> Iterator[Sample]:
        """Pieces of the held-out pictures, each as it is and with a flaw; whole ones for models of one frame size."""
        random = np.random.default_rng([self.seed, _FLAWS_SEED])
        for number in range(_PLANTED):
            picture = _read(self.held_out[number % len(self.held_out)], self.colour)
            size_px = max(_LEAST_FLAW_PX, min(picture.shape[:2]) * random.uniform(*_FLAW_SHARES))
            piece = picture if manifest.frame else _piece(picture, _PIECE_TILES * manifest.grid.tile_px, random)
            flawed, mask, kind = plant(piece, min(size_px, max(min(piece.shape[:2]) / 3, _LEAST_FLAW_PX)), random)
            yield Sample(piece, is_good=True, kind="good", mask=None)
            yield Sample(flawed, is_good=False, kind=kind, mask=mask)


def gather_evidence(run: Run, folder: Path) -> Evidence:
    """The pictures below `folder` that `run` was trained on, as it divided them, and the test pictures beside them.

    Raises UsageError where these are other pictures, DataError where there are none.
    """
    record = read_record(run.path)
    pictures = open_data(folder, record.colour)
    if pictures.fingerprint != record.data_fingerprint:
        raise UsageError(
            f"--data {folder}: holds other good pictures than those that {run.path} was trained on; name that folder, "
            "as it was then: what was held out tells what a lower precision shifts"
        )
    held_out = set(record.held_out)
    names = {path: path.relative_to(pictures.root).as_posix() for path in pictures.train}
    return Evidence(
        learned=tuple(path for path, name in names.items() if name not in held_out),
        held_out=tuple(path for path, name in names.items() if name in held_out),
        tests=pictures.tests,
        colour=record.colour,
        seed=record.seed,
        is_calibrated=not record.metrics.get("folds"),
    )


def _read(path: Path, colour: Colour) -> NDArray[np.uint8]:
    try:
        return read_picture(path, colour)
    except PictureError as exc:
        raise ExportError(f"{path}: {exc}") from exc


def _mask(test: TestPicture, picture: NDArray[np.uint8]) -> NDArray[np.bool_] | None:
    if test.is_good or test.mask is None:
        return None
    try:
        mask = read_mask(test.mask, *picture.shape[:2])
    except PictureError as exc:
        raise ExportError(f"{test.mask}: {exc}") from exc
    return mask if mask.any() else None


def _piece(picture: NDArray[np.uint8], side: int, random: np.random.Generator) -> NDArray[np.uint8]:
    y, x = (int(random.integers(0, max(0, length - side) + 1)) for length in picture.shape[:2])
    return np.ascontiguousarray(picture[y : y + side, x : x + side])
