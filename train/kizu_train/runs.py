"""The run directory: what a finished fit leaves behind, and how export and evaluation open it.

RUN/run.json              the record below
RUN/weights.safetensors   everything learned
RUN/golden.npy            golden tiles uint8 [K, T, T, C]
RUN/preview.png           one held-out good picture with its heatmap
RUN/log.jsonl             losses, one JSON object a line
RUN/checkpoint*           only while a fit is running or was stopped early
"""

import hashlib
import io
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray
from torch import Tensor, nn

from kizu_contract.bundle import write_atomically
from kizu_contract.calibration import Calibration
from kizu_contract.errors import ManifestError, PictureError
from kizu_contract.judging import BorderGain, Reduction, Thresholds
from kizu_contract.manifest import Provenance
from kizu_contract.pictures import Colour, channels_of, decode_picture
from kizu_contract.strict_json import parse_json, parse_record, to_plain
from kizu_contract.tiles import FrameSize, TileGrid
from kizu_train.checkpoint import CHECKPOINT, pack, unpack
from kizu_train.detectors.base import Detector, TileShape, find_detector
from kizu_train.errors import TrainError, UsageError
from kizu_train.recipes import Recipe, parse_recipe
from kizu_train.scoring import with_border

RUN_SCHEMA = 1
RUN, WEIGHTS, GOLDEN, PREVIEW, LOG = "run.json", "weights.safetensors", "golden.npy", "preview.png", "log.jsonl"


@dataclass(frozen=True)
class RunRecord:
    """The content of run.json.

    `calibrations` has one entry for each kind of score, `borders` for each whose maps rise at borders; `extras` the
    SHA-256 of each that was learned from, `sums` that of each file of the run.
    """

    schema: int
    name: str
    recipe: dict[str, Any]
    colour: Colour
    seed: int
    data_fingerprint: str
    train_pictures: int
    extras: dict[str, str]
    held_out: tuple[str, ...]
    calibrations: dict[str, Calibration]
    borders: dict[str, BorderGain]
    metrics: dict[str, float]
    stopped_early: bool
    kizu_version: str
    finished: str
    sums: dict[str, str]
    golden_position: tuple[int, ...] | None = None
    """Where in its frame's grid each golden tile lies; for detectors that are told."""
    picture_size: FrameSize | None = None
    """The one size of all good pictures; absent where they differ."""


@dataclass(frozen=True, eq=False)
class Run:
    """A finished run, opened for one kind of score.

    `scorer` is in eval mode on the CPU: forward(tiles uint8 [N, T, T, C]) → (score [N], map [N, T/m, T/m]), float32;
    one that takes positions too says so (see `detectors.base.Detector`), and has `golden_position` int64 [K].
    `golden_tiles` uint8 [K, T, T, C]: real tiles of held-out good pictures and a few corrupted ones. `preview` uint8
    [H, W, 3], at most 320 wide. `score_kinds` are the kinds it can be opened for.
    """

    path: Path
    name: str
    recipe: Mapping[str, Any]
    grid: TileGrid
    colour: Colour
    reduction: Reduction
    map_cell_px: int
    score: str
    score_kinds: tuple[str, ...]
    calibration: Calibration
    warn_rate: float
    reject_rate: float
    scorer: nn.Module
    golden_tiles: NDArray[np.uint8]
    preview: NDArray[np.uint8]
    provenance: Provenance
    finished: str
    stopped_early: bool
    golden_position: NDArray[np.int64] | None = None
    picture_size: FrameSize | None = None

    @property
    def thresholds(self) -> Thresholds:
        """The default thresholds, for the recipe's false alarm rates."""
        return self.calibration.thresholds(self.warn_rate, self.reject_rate)


def save_run(
    path: Path,
    record: RunRecord,
    tensors: dict[str, Tensor],
    golden: NDArray[np.uint8],
    preview: NDArray[np.uint8],
) -> None:
    """Write a run; run.json comes last, so that a run which has one is whole. `sums` of `record` is filled in here."""
    parts = {WEIGHTS: pack(tensors), GOLDEN: _pack_array(golden), PREVIEW: _pack_picture(preview)}
    for name, data in parts.items():
        write_atomically(path / name, data)
    sums = {name: hashlib.sha256(data).hexdigest() for name, data in parts.items()}
    text = json.dumps(to_plain(record) | {"sums": sums}, indent=2, sort_keys=True, allow_nan=False, ensure_ascii=False)
    write_atomically(path / RUN, text.encode() + b"\n")


def read_record(path: Path) -> RunRecord:
    """The record of the run at `path`. Raises TrainError where it is missing, unfinished or damaged."""
    file = path / RUN
    if not file.is_file():
        if (path / CHECKPOINT).is_file():
            raise TrainError(f"{path}: this run is not finished; go on with kizu-train fit … --out {path} --resume")
        raise TrainError(f"{path}: is not a run: it has no {RUN}; make one with kizu-train fit … --out {path}")
    try:
        record = parse_record(RunRecord, parse_json(file.read_bytes(), RUN), "run")
    except (OSError, ManifestError) as exc:
        raise TrainError(f"{file}: cannot be read: {exc}") from exc
    if record.schema != RUN_SCHEMA:
        raise TrainError(f"{file}: has schema {record.schema}; this kizu reads schema {RUN_SCHEMA}")
    return record


def open_run(path: Path, score: str | None = None) -> Run:
    """Open the run at `path` for the kind of score `score`, by default the recipe's.

    Raises UsageError for a kind the run does not offer, TrainError where the run is missing, unfinished or damaged.
    """
    record = read_record(path)
    recipe = parse_recipe(record.recipe)
    kind = score or recipe.score
    parts = {name: _read_part(path / name, record.sums) for name in (WEIGHTS, GOLDEN, PREVIEW)}
    detector = build_detector(recipe, record.colour, record.seed)
    offered = tuple(name for name in detector.score_kinds if name in record.calibrations)
    if kind not in offered:
        raise UsageError(f"{path}: score {kind!r} is not offered; this run has {', '.join(offered)}")
    try:
        detector.load(unpack(parts[WEIGHTS], path / WEIGHTS))
    except (KeyError, RuntimeError) as exc:
        raise TrainError(f"{path / WEIGHTS}: does not fit the recipe in {RUN}: {exc}") from exc
    return Run(
        path=path,
        name=record.name,
        recipe=recipe.to_dict(),
        grid=recipe.grid,
        colour=record.colour,
        reduction=with_border(recipe.reduction, record.borders, kind),
        map_cell_px=recipe.map_cell_px,
        score=kind,
        score_kinds=offered,
        calibration=record.calibrations[kind],
        warn_rate=recipe.calibration.warn_rate,
        reject_rate=recipe.calibration.reject_rate,
        scorer=detector.scorer(kind),
        golden_tiles=_read_tiles(parts[GOLDEN], path / GOLDEN, recipe, record.colour),
        preview=_read_preview(parts[PREVIEW], path / PREVIEW),
        provenance=_provenance(record, recipe, kind),
        finished=record.finished,
        stopped_early=record.stopped_early,
        golden_position=_position(record),
        picture_size=record.picture_size,
    )


def build_detector(recipe: Recipe, colour: Colour, seed: int) -> Detector:
    """The recipe's detector for pictures of `colour`, nothing learned yet. Raises UsageError where it does not fit."""
    shape = TileShape(recipe.grid.tile_px, channels_of(colour), recipe.map_cell_px)
    detector = find_detector(recipe.detector).build(recipe.settings, shape, seed)
    if recipe.score not in detector.score_kinds:
        raise UsageError(f"recipe.score is {recipe.score!r}; {recipe.detector} has {', '.join(detector.score_kinds)}")
    return detector


def _position(record: RunRecord) -> NDArray[np.int64] | None:
    return None if record.golden_position is None else np.array(record.golden_position, np.int64)


def _provenance(record: RunRecord, recipe: Recipe, kind: str) -> Provenance:
    return Provenance(
        detector=recipe.detector,
        recipe=recipe.to_dict() | {"score": kind, "extras": record.extras},
        seed=record.seed,
        data_fingerprint=record.data_fingerprint,
        train_pictures=record.train_pictures,
        kizu_version=record.kizu_version,
        metrics=record.metrics,
    )


def _read_part(path: Path, sums: Mapping[str, str]) -> bytes:
    try:
        data = path.read_bytes()
    except OSError as exc:
        raise TrainError(f"{path}: cannot be read: {exc.strerror}; copy the whole run or train again") from exc
    if hashlib.sha256(data).hexdigest() != sums.get(path.name):
        raise TrainError(f"{path}: does not match {RUN}: damaged or exchanged; copy the whole run or train again")
    return data


def _pack_array(array: NDArray[np.uint8]) -> bytes:
    buffer = io.BytesIO()
    np.lib.format.write_array(buffer, np.ascontiguousarray(array), allow_pickle=False)
    return buffer.getvalue()


def _pack_picture(picture: NDArray[np.uint8]) -> bytes:
    return bytes(cv2.imencode(".png", picture[:, :, ::-1])[1])


def _read_tiles(data: bytes, path: Path, recipe: Recipe, colour: Colour) -> NDArray[np.uint8]:
    try:
        tiles: NDArray[np.uint8] = np.lib.format.read_array(io.BytesIO(data), allow_pickle=False)
    except ValueError as exc:
        raise TrainError(f"{path}: is not a whole .npy file: {exc}") from exc
    wanted = (recipe.grid.tile_px, recipe.grid.tile_px, channels_of(colour))
    if tiles.dtype != np.uint8 or tiles.shape[1:] != wanted:
        raise TrainError(f"{path}: holds {tiles.dtype} {list(tiles.shape)}; wanted uint8 [K, {wanted}]")
    return tiles


def _read_preview(data: bytes, path: Path) -> NDArray[np.uint8]:
    try:
        return decode_picture(data)
    except PictureError as exc:
        raise TrainError(f"{path}: {exc}") from exc
