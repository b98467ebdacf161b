"""Cells of the detection bench: one row, one set, one seed; each run in a child process, each kept as one JSON file."""

import hashlib
import json
import os
import random
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from harness import commit

ROOT = Path(__file__).parents[1]
CHILD = Path(__file__).with_name("detection_child.py")
_SHOWN_ERROR = 300


@dataclass(frozen=True)
class Figures:
    """What one cell measured; a figure is None where the set has nothing to measure it on.

    Rates are shares of pictures, 0 to 1; `overkill_asked` is the false alarm rate that `reject` was set for.
    """

    image_auroc: float | None
    pixel_auroc: float | None
    au_pro_30: float | None
    au_pro_05: float | None
    reject_escape: float | None
    reject_overkill: float | None
    warn_escape: float | None
    warn_overkill: float | None
    good: int
    reject_false_alarms: int
    overkill_asked: float
    training_s: float
    ms_256: float
    bundle_bytes: int
    parity: float
    train_pictures: int
    calibrated_on: int
    is_fixtured: bool
    cpu_ms_256: float | None = None
    """CPU milliseconds of the whole process for a picture of 256 × 256 on one thread."""


@dataclass(frozen=True)
class Method:
    """A row of the tables: a recipe (name or file), a kind of score, with the backbone or without."""

    recipe: str
    score: str | None = None
    backbone: Path | None = None
    overrides: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """How tables call it."""
        stem = Path(self.recipe).stem if self.recipe.endswith(".toml") else self.recipe
        score = f"@{self.score}" if self.score else ""
        return f"{stem}{score}{'+backbone' if self.backbone else ''}"

    @property
    def training(self) -> str:
        """The name of the training it needs, which kinds of score share."""
        return replace(self, score=None).name


@dataclass(frozen=True)
class Key:
    """What must agree for a kept cell to be used again; `code` is a hash over the sources of train and export."""

    method: str
    recipe: str
    overrides: tuple[str, ...]
    seed: int
    data: str
    backbone: str | None
    code: str


@dataclass(frozen=True)
class Cell:
    """One method on one set with one seed: what was measured, at which commit, or why nothing was."""

    method: str
    set: str
    seed: int
    figures: Figures | None
    failed: str | None
    commit: str


@dataclass(frozen=True)
class Bench:
    """Where cells are kept and how they are run.

    `keep` uses cells of other code, `retry` runs failed ones again, `only_kept` measures nothing. `retime` times the
    bundles of kept cells again: in one run on a quiet machine, so that they compare.
    """

    work: Path
    threads: int
    limit_s: float
    keep: bool
    retry: bool
    only_kept: bool = False
    child: Path = CHILD
    retime: bool = False

    def cell(self, method: Method, data: Path, data_hash: str, seed: int) -> Cell | None:
        """The cell, from its file where one agrees, else measured now; None where nothing is to be measured."""
        file = self.work / "cells" / data.name / f"{method.name}-seed{seed}.json"
        key = _key(method, data_hash, seed)
        kept = _read(file, key, keep=self.keep)
        if kept is not None and not (self.retry and kept.failed):
            if self.retime and kept.figures:
                kept = self._timed_again(kept, method, data, seed, key)
                _write(file, _read_key(file), kept)
            return kept
        if self.only_kept:
            return None
        cell = self._measure(method, data, seed, key)
        _write(file, key, cell)
        return cell

    def _measure(self, method: Method, data: Path, seed: int, key: Key) -> Cell:
        """Train, export and evaluate in a child: what crashes or hangs there costs this cell alone."""
        at = commit()
        failed, found = self._ask_child(method, data, seed, key)
        return Cell(method.name, data.name, seed, None if failed else Figures(**found), failed, at)

    def _timed_again(self, cell: Cell, method: Method, data: Path, seed: int, key: Key) -> Cell:
        """The cell with new times of its bundle; with the old ones, and a line why, where that is gone."""
        assert cell.figures is not None
        failed, found = self._ask_child(method, data, seed, key, only_time_of=cell.figures.bundle_bytes)
        if failed is not None:
            print(f"{cell.set}  {cell.method}  seed {seed}  not timed again: {failed}", flush=True)
            return cell
        return replace(cell, figures=replace(cell.figures, **found))

    def _ask_child(
        self, method: Method, data: Path, seed: int, key: Key, *, only_time_of: int | None = None
    ) -> tuple[str | None, dict[str, Any]]:
        """Why the child failed, None where it did not, and what it found.

        `only_time_of`: train nothing, time the bundle that is there, if it has so many bytes.
        """
        folder = self.work / "runs" / data.name / f"{method.training}-seed{seed}"
        folder.mkdir(parents=True, exist_ok=True)
        out = folder / f"{method.name}.json"
        out.unlink(missing_ok=True)
        training = asdict(replace(key, method=method.training))
        order = {
            "recipe": method.recipe,
            "overrides": method.overrides,
            "score": method.score,
            "backbone": str(method.backbone) if method.backbone else None,
            "data": str(data),
            "seed": seed,
            "threads": self.threads,
            "folder": str(folder),
            "out": str(out),
            "training": training,
            "only_time_of": only_time_of,
        }
        failed = self._run_child(json.dumps(order), folder / f"{method.name}{'.time' if only_time_of else ''}.log")
        return failed, {} if failed is not None else json.loads(out.read_text(encoding="utf-8"))

    def _run_child(self, order: str, log: Path) -> str | None:
        """Why the child failed; None where it did not."""
        environment = {**os.environ, "OMP_NUM_THREADS": str(self.threads), "OMP_WAIT_POLICY": "PASSIVE"}
        with log.open("wb") as file:
            try:
                done = subprocess.run(
                    [sys.executable, str(self.child), order],
                    stdout=file,
                    stderr=subprocess.STDOUT,
                    timeout=self.limit_s,
                    env=environment,
                    check=False,
                )
            except subprocess.TimeoutExpired:
                return f"took longer than {self.limit_s:.0f} s"
        if done.returncode == 0:
            return None
        if done.returncode < 0:
            return f"was ended by signal {-done.returncode}"
        lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
        return (lines[-1] if lines else f"exit code {done.returncode}")[:_SHOWN_ERROR]


def thinned(data: Path, most: int, work: Path) -> Path:
    """A folder of links to `data` with at most `most` good and `most` defective test pictures, the same ones each time.

    Defective ones are drawn over all kinds alike, so that each keeps its share. A folder that is right already stays:
    another bench may be reading it.
    """
    view = work / str(most) / data.name
    wanted = _links(data, most)
    found = {path.relative_to(view): path.readlink() for path in view.rglob("*") if path.is_symlink()}
    if found != wanted:
        shutil.rmtree(view, ignore_errors=True)
        for name, target in wanted.items():
            (view / name).parent.mkdir(parents=True, exist_ok=True)
            (view / name).symlink_to(target)
    return view


def _links(data: Path, most: int) -> dict[Path, Path]:
    """What each link of the thinned folder leads to, by its path there."""
    links = {Path(name): data / name for name in ("train", "manifest.csv") if (data / name).exists()}
    tests = sorted(path for path in (data / "test").rglob("*") if path.is_file())
    good = [path for path in tests if path.parent.name == "good"]
    for group in (good, [path for path in tests if path not in set(good)]):
        for path in random.Random(most).sample(group, min(most, len(group))):
            links[path.relative_to(data)] = path
            mask = data / "ground_truth" / path.parent.name / f"{path.stem}_mask.png"
            if mask.is_file():
                links[mask.relative_to(data)] = mask
    return links


def fingerprint(paths: Sequence[Path], base: Path) -> str:
    """SHA-256 over the names and contents of `paths`."""
    digest = hashlib.sha256()
    for path in sorted(paths):
        digest.update(path.relative_to(base).as_posix().encode() + b"\n")
        digest.update(hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()


def folder_fingerprint(folder: Path) -> str:
    """SHA-256 over every file below `folder`, links followed."""
    found = (Path(parent) / name for parent, _, names in os.walk(folder, followlinks=True) for name in names)
    return fingerprint(list(found), folder)


def code_fingerprint() -> str:
    """SHA-256 over the sources of train and export."""
    return fingerprint(list(_sources()), ROOT)


def learning_fingerprint() -> str:
    """SHA-256 over the modules that learning depends on; a recipe counts by what it says, not by its file."""
    return fingerprint([path for part in ("contract", "train") for path in (ROOT / part).rglob("*.py")], ROOT)


def _sources() -> Iterator[Path]:
    for part in ("train", "export"):
        for path in (ROOT / part).rglob("*"):
            if path.suffix in (".py", ".toml") and path.is_file():
                yield path


def _key(method: Method, data_hash: str, seed: int) -> Key:
    recipe = Path(method.recipe)
    text = recipe.read_text(encoding="utf-8") if method.recipe.endswith(".toml") else method.recipe
    backbone = hashlib.sha256(method.backbone.read_bytes()).hexdigest() if method.backbone else None
    return Key(method.name, text, method.overrides, seed, data_hash, backbone, code_fingerprint())


def _write(file: Path, key: Key, cell: Cell) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps({"key": asdict(key), "cell": asdict(cell)}, indent=2)
    partial = file.with_suffix(".partial")
    partial.write_text(text + "\n", encoding="utf-8")
    partial.replace(file)


def _read_key(file: Path) -> Key:
    key = json.loads(file.read_text(encoding="utf-8"))["key"]
    return Key(**{**key, "overrides": tuple(key["overrides"])})


def _read(file: Path, key: Key, *, keep: bool) -> Cell | None:
    if not file.is_file():
        return None
    found = _read_key(file)
    if found != (replace(key, code=found.code) if keep else key):
        return None
    cell = json.loads(file.read_text(encoding="utf-8"))["cell"]
    return Cell(**{**cell, "figures": Figures(**cell["figures"]) if cell["figures"] else None})
