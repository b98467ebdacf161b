"""One training, from a folder of pictures to a run directory: learn, calibrate, write."""

import hashlib
import json
import logging
import signal
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path
from types import FrameType
from typing import Any, Literal

import torch
from torch import Tensor

from kizu_contract.pictures import read_picture
from kizu_train import distributed
from kizu_train.calibrate import calibrate
from kizu_train.checkpoint import CHECKPOINT, Checkpoint, drop_checkpoint, load_checkpoint, save_checkpoint
from kizu_train.data import PictureSet, Split, hold_out, open_data
from kizu_train.detectors.base import Detector, Extras, Settles, find_detector, inputs_of
from kizu_train.errors import UsageError
from kizu_train.feeding import current, fed
from kizu_train.folds import score_folds
from kizu_train.golden import golden_tiles, preview
from kizu_train.held_out import Scored, score_held_out, tell_odd
from kizu_train.naming import slug
from kizu_train.progress import FitProgress
from kizu_train.recipes import Recipe
from kizu_train.runs import LOG, RUN, RUN_SCHEMA, RunRecord, build_detector, read_record, save_run
from kizu_train.scoring import frame_scorer, with_border
from kizu_train.tile_pool import TilePool
from kizu_train.tile_size import fit_tiles

DeviceChoice = Literal["auto", "cpu", "cuda"]
CHECKPOINT_EVERY_S = 15.0
_LOG = logging.getLogger(__name__)


@dataclass(frozen=True)
class FitRequest:
    """What to train: `resume` goes on with the run in `out` where there is one.

    Learning ends after `stop_after_s` seconds as after SIGINT. With `folds` so many further detectors are trained, so
    that thresholds come from all good pictures rather than from those held out. `metrics` are further figures for the
    run's record.
    """

    recipe: Recipe
    data: Path
    out: Path
    device: DeviceChoice = "auto"
    seed: int = 0
    resume: bool = False
    checkpoint_every_s: float = CHECKPOINT_EVERY_S
    extras: Extras = field(default_factory=Extras)
    stop_after_s: float | None = None
    folds: int = 0
    metrics: Mapping[str, float] = field(default_factory=dict)


def fit(request: FitRequest) -> RunRecord:
    """Train, calibrate and write the run; the record of the run that stands there, where it was through already.

    SIGINT ends the training after the current step and still leaves a whole run. Raises UsageError for a folder in
    the way, TrainError and DataError for what cannot be trained on.
    """
    device = choose_device(request.device)
    through = distributed.from_first(lambda: _begin(request))
    if through is not None:
        return through
    pictures = open_data(request.data, request.recipe.data.colour, with_tests=False)
    request = replace(request, recipe=fit_tiles(request.recipe, pictures))
    settings = request.recipe.data
    split = hold_out(pictures, request.seed, settings.held_out_share, settings.held_out_at_least)
    detector = build_detector(request.recipe, pictures.colour, request.seed)
    tiles = TilePool(split.learn, request.recipe.grid, pictures.colour, request.seed, settings.cache_mb)
    request.out.mkdir(parents=True, exist_ok=True)
    session = _learn(request, device, pictures, detector, tiles)
    record = distributed.from_first(lambda: finish(request, pictures, split, detector, session))
    if distributed.is_first() and not record.stopped_early:
        drop_checkpoint(request.out)
    return record


def _begin(request: FitRequest) -> RunRecord | None:
    """Look whether the request can be met; the record of the run that stands there, where it is through already."""
    if request.folds and distributed.world() > 1:
        raise UsageError("--folds: trains its detectors one after the other in one process; leave torchrun out")
    _claim(request)
    _check_extras(request)
    return read_record(request.out) if request.resume and _is_through(request.out) else None


def _learn(request: FitRequest, device: str, pictures: PictureSet, detector: Detector, tiles: TilePool) -> "FitSession":
    progress = FitProgress()
    with _stop_on_sigint() as stop, fed(request.recipe.data.ahead):
        session = FitSession(request, device, _fingerprints(request.extras, pictures), progress, stop)
        if distributed.is_first():
            progress.start()
        try:
            detector.fit(tiles, session)
        finally:
            progress.stop()
    return session


def choose_device(choice: DeviceChoice) -> str:
    """`cuda` where it is asked for and there, or `auto` finds it. Raises UsageError."""
    if choice == "cuda" and not torch.cuda.is_available():
        raise UsageError("--device cuda: torch finds no CUDA device here; use --device cpu")
    return "cuda" if choice != "cpu" and torch.cuda.is_available() else "cpu"


class FitSession:
    """The `Session` of one fit: checkpoints, log and progress in the run directory.

    In a team (see `distributed`) the first process alone writes and shows; the wish to stop is shared by all.
    """

    def __init__(
        self,
        request: FitRequest,
        device: str,
        fingerprints: Mapping[str, str],
        progress: FitProgress,
        stop: Callable[[], bool],
    ) -> None:
        self._request, self.fingerprints, self._progress, self._stop = request, fingerprints, progress, stop
        self._device = device
        self._began = time.monotonic()
        self._saved = self._began
        self._seconds_before = 0.0
        self._last: dict[str, float] = {}
        self._step = self._steps = 0
        self.was_stopped = False
        self.waiting_share: float | None = None
        """Share of the steps' time that they waited for their batches, as last reported; None without steps."""

    @property
    def device(self) -> str:
        """`cpu` or `cuda`."""
        return self._device

    @property
    def seed(self) -> int:
        """The run's seed."""
        return self._request.seed

    @property
    def extras(self) -> Extras:
        """What the user gave beside good pictures."""
        return self._request.extras

    @property
    def should_stop(self) -> bool:
        """True once SIGINT came, or the time was up, in any process."""
        limit = self._request.stop_after_s
        is_late = limit is not None and time.monotonic() - self._began >= limit
        self.was_stopped = distributed.agree(flag=self.was_stopped or self._stop() or is_late)
        return self.was_stopped

    @property
    def seconds(self) -> float:
        """Seconds of training so far, those before a resume included."""
        return self._seconds_before + time.monotonic() - self._began

    @property
    def losses(self) -> dict[str, float]:
        """The losses last reported."""
        return dict(self._last)

    def restore(self) -> tuple[int, dict[str, Tensor]] | None:
        """The checkpoint of the run, checked to belong to this very fit. Raises UsageError where it does not."""
        found = load_checkpoint(self._request.out) if self._request.resume else None
        distributed.wait_for_all()  # until each has read it: the first process writes the next one soon
        if found is None:
            self._trim_log(0)
            return None
        checkpoint, tensors = found
        _check_same(checkpoint, self._request, self.fingerprints)
        # Sums on a CPU depend on how many threads share them: the same number gives the same bits.
        torch.set_num_threads(checkpoint.threads)
        self._seconds_before = checkpoint.seconds
        self._trim_log(checkpoint.step)
        _LOG.info("%s: going on after step %d", self._request.out, checkpoint.step)
        return checkpoint.step, tensors

    def save(self, step: int, tensors: Callable[[], dict[str, Tensor]]) -> None:
        """Write a checkpoint where one is due: every few seconds, and when stopping."""
        now = time.monotonic()
        # A wish that comes now is heard by all at their next look at `should_stop`, and saved after it.
        if not distributed.is_first() or (
            now - self._saved < self._request.checkpoint_every_s and not self.was_stopped
        ):
            return
        request = self._request
        checkpoint = Checkpoint(
            step=step,
            seconds=self.seconds,
            seed=request.seed,
            threads=torch.get_num_threads(),
            recipe=request.recipe.to_dict(),
            fingerprints=dict(self.fingerprints),
            tensors="",
            sha256="",
        )
        save_checkpoint(request.out, checkpoint, tensors())
        self._saved = time.monotonic()

    def report(self, step: int, steps: int, losses: Mapping[str, float]) -> None:
        """Show and log a step's losses."""
        self._last = dict(losses)
        if not distributed.is_first():
            return
        self._progress.show(step, steps, losses)
        self.waiting_share = current().waiting.share
        waiting = None if self.waiting_share is None else round(self.waiting_share, 4)
        line = {"step": step, "steps": steps, "seconds": round(self.seconds, 3), "waiting_share": waiting, **losses}
        with (self._request.out / LOG).open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")

    def _trim_log(self, step: int) -> None:
        """Drop the lines after `step`, which are written again, and a half line that a kill left."""
        if not distributed.is_first():
            return
        path = self._request.out / LOG
        lines = path.read_text(encoding="utf-8").splitlines(keepends=True) if step and path.exists() else []
        whole = (line for line in lines if line.endswith("\n"))
        path.write_text("".join(line for line in whole if json.loads(line)["step"] <= step), encoding="utf-8")


@contextmanager
def _stop_on_sigint() -> Iterator[Callable[[], bool]]:
    """A flag that the first SIGINT sets; the second one interrupts as usual."""
    was_asked = False

    def ask(_number: int, _frame: FrameType | None) -> None:
        nonlocal was_asked
        was_asked = True
        signal.signal(signal.SIGINT, signal.default_int_handler)
        _LOG.warning("stopping after this step; the run will be usable (again Ctrl-C to give up)")

    try:
        before = signal.signal(signal.SIGINT, ask)
    except ValueError:  # not the main thread: whoever started it handles signals
        yield lambda: False
        return
    try:
        yield lambda: was_asked
    finally:
        signal.signal(signal.SIGINT, before)


def _claim(request: FitRequest) -> None:
    out = request.out
    if out.exists() and not out.is_dir():
        raise UsageError(f"{out}: is a file; --out names a folder for the run")
    if not request.resume and out.is_dir() and any(out.iterdir()):
        raise UsageError(f"{out}: is not empty; go on with --resume or choose another --out")


def _is_through(out: Path) -> bool:
    return (out / RUN).is_file() and not (out / CHECKPOINT).is_file()


def _check_extras(request: FitRequest) -> None:
    uses = find_detector(request.recipe.detector).uses
    for name, path in request.extras.given().items():
        if name not in uses:
            raise UsageError(f"--{name}: {request.recipe.detector} has no use for it; leave it out")
        if not path.exists():
            raise UsageError(f"--{name} {path}: is not there")


def _fingerprints(extras: Extras, pictures: PictureSet) -> dict[str, str]:
    """SHA-256 of everything that is learned from, by name."""
    return {"pictures": pictures.fingerprint} | {name: _sha256(path) for name, path in extras.given().items()}


def _sha256(path: Path) -> str:
    """SHA-256 of a file, or of the names and contents of all files below a folder."""
    if path.is_file():
        return hashlib.sha256(path.read_bytes()).hexdigest()
    digest = hashlib.sha256()
    for file in sorted(item for item in path.rglob("*") if item.is_file()):
        digest.update(f"{file.relative_to(path).as_posix()}\n{_sha256(file)}\n".encode())
    return digest.hexdigest()


def _check_same(checkpoint: Checkpoint, request: FitRequest, fingerprints: Mapping[str, str]) -> None:
    wanted = {"recipe": _learned_from(request.recipe.to_dict()), "seed": request.seed, **fingerprints}
    found = {"recipe": _learned_from(checkpoint.recipe), "seed": checkpoint.seed, **checkpoint.fingerprints}
    other = [name for name in dict.fromkeys([*wanted, *found]) if wanted.get(name) != found.get(name)]
    if other:
        raise UsageError(f"{request.out}: was begun with other {' and '.join(other)}; resume with the same ones")


def _learned_from(recipe: Mapping[str, Any]) -> dict[str, Any]:
    """A recipe without what changes no number: who makes batches, how far ahead."""
    data = {name: value for name, value in recipe["data"].items() if name not in ("prefetch", "workers")}
    return {**recipe, "data": data}


def finish(
    request: FitRequest, pictures: PictureSet, split: Split, detector: Detector, session: FitSession
) -> RunRecord:
    """Calibrate a `detector` that has learned from `split`, on its held-out pictures, and write the run."""
    recipe, colour = request.recipe, pictures.colour
    training_s = session.seconds
    began = time.monotonic()
    if isinstance(detector, Settles):
        detector.settle(TilePool(split.held_out, recipe.grid, colour, request.seed, recipe.data.cache_mb))
    borders, own = score_held_out(split.held_out, recipe, colour, detector)
    scored = _folds(request, pictures, session) or own
    calibrations = {kind: calibrate(values) for kind, values in scored.scores.items()}
    tell_odd(scored.paths, scored.scores[recipe.score])
    metrics = {name if name == "loss" else f"loss_{name}": value for name, value in session.losses.items()}
    metrics |= {"training_s": round(training_s, 1), "calibration_s": round(time.monotonic() - began, 1)}
    metrics |= {} if session.waiting_share is None else {"waiting_share": round(session.waiting_share, 4)}
    metrics |= {"folds": float(request.folds)} if scored is not own else {}
    metrics |= request.metrics
    golden = golden_tiles(split.held_out, recipe.grid, colour, request.seed)
    record = RunRecord(
        schema=RUN_SCHEMA,
        name=slug(request.data),
        recipe=recipe.to_dict(),
        colour=colour,
        seed=request.seed,
        data_fingerprint=pictures.fingerprint,
        train_pictures=len(split.learn),
        extras={name: value for name, value in session.fingerprints.items() if name != "pictures"},
        held_out=tuple(path.relative_to(pictures.root).as_posix() for path in split.held_out),
        calibrations=calibrations,
        borders=borders,
        metrics=metrics,
        stopped_early=session.was_stopped,
        kizu_version=version("kizu"),
        finished=datetime.now(timezone.utc).isoformat(timespec="milliseconds").replace("+00:00", "Z"),
        sums={},
        golden_position=tuple(golden.position.tolist()) if "position" in inputs_of(detector) else None,
        picture_size=pictures.size,
    )
    picture = read_picture(split.held_out[0], colour)
    reduction = with_border(recipe.reduction, borders, recipe.score)
    found = frame_scorer(detector.scorer(recipe.score), recipe.grid, reduction)(picture)
    rates = recipe.calibration
    thresholds = calibrations[recipe.score].thresholds(rates.warn_rate, rates.reject_rate)
    save_run(request.out, record, detector.tensors(), golden.tiles, preview(picture, found, thresholds))
    return record


def _folds(request: FitRequest, pictures: PictureSet, session: FitSession) -> Scored | None:
    """Scores of all good pictures by detectors that never saw them, where that is asked for."""
    if not request.folds:
        return None
    if session.was_stopped:
        _LOG.warning("the training was stopped: thresholds come from the held-out pictures alone, not from folds")
        return None
    with fed(request.recipe.data.ahead):
        return score_folds(pictures, request.recipe, request.extras, request.seed, session.device, request.folds)
