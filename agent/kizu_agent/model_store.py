"""Models on disk: those that proved themselves, which one each slot uses, and the quarantine of the others."""

import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Mapping
from dataclasses import replace
from datetime import datetime, timezone
from pathlib import Path
from typing import IO, TypeVar

from kizu_agent.drop import DroppedFile
from kizu_agent.encoding import utc_now
from kizu_agent.errors import ModelError
from kizu_agent.model_index import Entry, Failure, Index, Stored, Trial
from kizu_agent.records import ModelId
from kizu_contract.bundle import MAX_BUNDLE_BYTES, write_atomically

MAX_QUARANTINED = 20
MAX_QUARANTINE_BYTES = 2 * 2**30
"""Files in quarantine, and their bytes together; the oldest go first."""
KEPT_MODELS = 2
"""The newest models stay, whether or not a slot uses them."""
_CHUNK = 2**20
_FOREIGN = re.compile(r"[^A-Za-z0-9_.+-]")
_MAX_NAME = 120

Beat = Callable[[], object]
Key = TypeVar("Key")
Item = TypeVar("Item")


class StillChanging(Exception):  # noqa: N818 - a copy is under way; nothing is wrong
    """The dropped file changed while it was read."""


class ModelStore:
    """Owns `models/` and `quarantine/` below the state directory; used by one thread.

    After `open`, `index` is its record, `entries` what each slot uses; `is_damaged` tells that it could not be read.
    Whatever changes the record writes it durably first, and raises OSError when the disk refuses: nothing has changed
    then.
    """

    def __init__(self, state_dir: Path) -> None:
        self._models = state_dir / "models"
        self._quarantine = state_dir / "quarantine"
        self._record = self._models / "current.json"
        self.index = Index()
        self.is_damaged = False

    @property
    def entries(self) -> Mapping[str | None, Entry]:
        """What each slot uses."""
        return self.index.slots

    def open(self) -> None:
        """Make the directories, clear what an interrupted write left, read the record. Raises OSError."""
        for folder in (self._models, self._quarantine):
            folder.mkdir(parents=True, exist_ok=True)
        for stale in self._models.glob(".*.tmp"):
            stale.unlink(missing_ok=True)
        index = self._read()
        found = set(self.newest())
        models = {file: stored for file, stored in (index or Index()).models.items() if file in found}
        signers = {file: key for file, key in (index or Index()).signers.items() if file in found}
        self.index, self.is_damaged = replace(index or Index(), models=models, signers=signers), index is None

    def current(self) -> Mapping[str | None, Entry] | None:
        """Read what each slot uses: empty on a new box, None when the record is damaged. Needs no `open`."""
        index = self._read()
        return None if index is None else index.slots

    def path_of(self, file: str) -> Path:
        """Where the store's `file` lies."""
        return self._models / file

    def take_in(self, dropped: DroppedFile, beat: Beat) -> Path:
        """Copy a dropped file into the store under a temporary name, synced; `beat` is called as it goes on.

        A copy, never a rename: the drop directory may lie on another file system, and whoever wrote the file may
        still hold it open. Raises ModelError when it is larger than any bundle, StillChanging when it changed
        meanwhile, OSError.
        """
        if dropped.fingerprint.size > MAX_BUNDLE_BYTES:
            raise ModelError(
                f"has {dropped.fingerprint.size} bytes; a bundle has at most {MAX_BUNDLE_BYTES}: this is none"
            )
        incoming = self._models / f".incoming.{os.getpid()}.tmp"
        try:
            source = os.open(dropped.path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
            with os.fdopen(source, "rb") as reader, incoming.open("wb") as writer:
                _copy(reader, writer, dropped.fingerprint.size, beat)
            if not dropped.is_unchanged():
                raise StillChanging
        except BaseException:
            incoming.unlink(missing_ok=True)
            raise
        return incoming

    def keep(self, incoming: Path, model: ModelId, created: str, signed_by: str | None = None) -> str:
        """Give a proven copy its name in the store, durably; returns that name. Raises OSError."""
        file = f"{model.name}-{model.version}-{model.sha256[:8]}.kizu"
        incoming.replace(self._models / file)
        _sync_folder(self._models)
        # The same content may come with another signature.
        models, signers = _without(self.index.models, file), _without(self.index.signers, file)
        self.index = replace(self.index, models=models, signers=signers)
        self.note(file, model, created, signed_by)
        return file

    def note(self, file: str, model: ModelId, created: str, signed_by: str | None) -> None:
        """Remember what `file` holds and who signed it, unless it is known; it is written with the next change."""
        if signed_by is not None:
            self.index = replace(self.index, signers={**self.index.signers, file: signed_by})
        if file in self.index.models:
            return
        stored = Stored(model.name, model.version, model.sha256, created, utc_now())
        self.index = replace(self.index, models={**self.index.models, file: stored})

    def commit(self, slot: str | None, entry: Entry) -> None:
        """Record that `slot` uses `entry`; its trial is over. Raises OSError."""
        slots = {**self.index.slots, slot: entry}
        self._write(replace(self.index, slots=slots, trials=self._trials_without(slot, entry.file)))

    def begin_trial(self, slot: str | None, trial: Trial) -> None:
        """Record what `slot` is about to load. Raises OSError."""
        self._write(replace(self.index, trials={**self.index.trials, slot: trial}))

    def end_trial(self, slot: str | None, file: str, earlier: Trial | None = None) -> None:
        """Record that `file` is not on trial in `slot`, but `earlier`, as before. Raises OSError."""
        trials = self._trials_without(slot, file)
        if earlier is not None and earlier.file != file:
            trials = {**trials, slot: earlier}
        if trials != self.index.trials:
            self._write(replace(self.index, trials=trials))

    def pause_trials(self) -> None:
        """Record that the service stops in order: the next start goes on with what is on trial. Raises OSError."""
        trials = {slot: replace(trial, starts=0) for slot, trial in self.index.trials.items()}
        if trials != self.index.trials:
            self._write(replace(self.index, trials=trials))

    def fail(self, slot: str | None, file: str, reason: str) -> None:
        """Record that the model in `file` is not to be used again; its trial is over. Raises OSError."""
        failures, stored = dict(self.index.failures), self.index.models.get(file)
        if stored is not None:
            failures[stored.sha256] = Failure(reason, utc_now())
        self._write(replace(self.index, failures=failures, trials=self._trials_without(slot, file)))

    def forgive(self, sha256: str) -> None:
        """Forget that this model failed. Raises OSError."""
        if sha256 in self.index.failures:
            self._write(replace(self.index, failures=_without(self.index.failures, sha256)))

    def signer_of(self, model: ModelId) -> str | None:
        """Fingerprint of the trusted key that signed `model`, None where none is known to have."""
        files = (file for file, stored in self.index.models.items() if stored.sha256 == model.sha256)
        return next((self.index.signers[file] for file in files if file in self.index.signers), None)

    def save(self) -> None:
        """Write what was noted since the last change. Raises OSError."""
        self._write(self.index)

    def failure_of(self, file: str) -> Failure | None:
        """Why the model in `file` is not to be used; None where nothing speaks against it."""
        stored = self.index.models.get(file)
        return None if stored is None else self.index.failures.get(stored.sha256)

    def newest(self) -> list[str]:
        """All models of the store, the newest first."""
        files = [path for path in self._models.glob("*.kizu") if not path.name.startswith(".")]
        return [path.name for path in sorted(files, key=_age_key, reverse=True)]

    def discard(self, file: str) -> None:
        """Delete a model that did not get into service, unless a slot uses it."""
        if file not in self._used():
            self._forget(file)

    def prune(self) -> None:
        """Delete models that no slot uses or could go back to, but never the newest two."""
        used = self._used()
        for file in self.newest()[KEPT_MODELS:]:
            if file not in used:
                self._forget(file)

    def quarantine(self, path: Path, reason: str) -> None:
        """Move a refused file away, with its reason beside it; a file larger than the quarantine is deleted.

        Raises OSError.
        """
        now = datetime.now(timezone.utc)
        name = f"{now:%Y%m%dT%H%M%S.%fZ}-{_FOREIGN.sub('_', path.name)[-_MAX_NAME:]}"
        size, kept = path.stat().st_size, self._quarantine / name
        record = {"file": path.name, "time": f"{now:%Y-%m-%dT%H:%M:%S}.{now.microsecond // 1000:03d}Z"}
        is_kept = size <= MAX_QUARANTINE_BYTES
        if is_kept:
            shutil.move(path, kept)
        else:
            path.unlink()
        record_all = {**record, "reason": reason, "size": size, "sha256": _sha256(kept) if is_kept else None}
        write_atomically(self._quarantine / f"{name}.reason.json", json.dumps(record_all, indent=2).encode())
        self._bound_quarantine()

    def _used(self) -> set[str | None]:
        used = {file for entry in self.entries.values() for file in (entry.file, entry.previous)}
        return used | {trial.file for trial in self.index.trials.values()}

    def _trials_without(self, slot: str | None, file: str) -> Mapping[str | None, Trial]:
        trial = self.index.trials.get(slot)
        return _without(self.index.trials, slot) if trial is not None and trial.file == file else self.index.trials

    def _forget(self, file: str) -> None:
        self.path_of(file).unlink(missing_ok=True)
        models, signers = _without(self.index.models, file), _without(self.index.signers, file)
        self.index = replace(self.index, models=models, signers=signers)

    def _read(self) -> Index | None:
        try:
            return Index.from_json(self._record.read_bytes())
        except FileNotFoundError:
            return Index()
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
            return None

    def _write(self, index: Index) -> None:
        write_atomically(self._record, index.to_json())
        self.index = index

    def _bound_quarantine(self) -> None:
        names = sorted({path.name.removesuffix(".reason.json") for path in self._quarantine.iterdir()})
        files = [self._quarantine / name for name in names]
        sizes = [path.stat().st_size if path.exists() else 0 for path in files]
        while files and (len(files) > MAX_QUARANTINED or sum(sizes) > MAX_QUARANTINE_BYTES):
            oldest = files.pop(0)
            sizes.pop(0)
            oldest.unlink(missing_ok=True)
            oldest.with_name(f"{oldest.name}.reason.json").unlink(missing_ok=True)


def _without(table: Mapping[Key, Item], key: Key) -> dict[Key, Item]:
    return {name: item for name, item in table.items() if name != key}


def _copy(reader: IO[bytes], writer: IO[bytes], size: int, beat: Beat) -> None:
    left = size
    while left and (chunk := reader.read(min(left, _CHUNK))):
        writer.write(chunk)
        left -= len(chunk)
        beat()
    writer.flush()
    os.fsync(writer.fileno())


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _age_key(path: Path) -> tuple[int, str]:
    return path.stat().st_mtime_ns, path.name


def _sha256(path: Path) -> str | None:
    digest = hashlib.sha256()
    try:
        with path.open("rb") as file:
            while chunk := file.read(_CHUNK):
                digest.update(chunk)
    except OSError:
        return None
    return digest.hexdigest()
