"""Models on disk: those that proved themselves, which one each slot uses, and the quarantine of the others."""

import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import IO

from kizu_agent.drop import DroppedFile
from kizu_agent.errors import ModelError
from kizu_agent.records import ModelId
from kizu_contract.bundle import MAX_BUNDLE_BYTES, write_atomically

MAX_QUARANTINED = 20
MAX_QUARANTINE_BYTES = 2 * 2**30
"""Files in quarantine, and their bytes together; the oldest go first."""
KEPT_MODELS = 2
"""The newest models stay, whether or not a slot uses them."""
_CHUNK = 2**20
_ANY_SLOT = "*"
_FILE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.+-]*\.kizu")
_FOREIGN = re.compile(r"[^A-Za-z0-9_.+-]")
_MAX_NAME = 120

Beat = Callable[[], object]


class StillChanging(Exception):  # noqa: N818 - a copy is under way; nothing is wrong
    """The dropped file changed while it was read."""


@dataclass(frozen=True)
class Entry:
    """What a slot uses: the file's name in the store, and the one before it."""

    file: str
    previous: str | None


class ModelStore:
    """Owns `models/` and `quarantine/` below the state directory; used by one thread.

    After `open`, `entries` is what each slot uses, and `is_damaged` tells that its record could not be read.
    """

    def __init__(self, state_dir: Path) -> None:
        self._models = state_dir / "models"
        self._quarantine = state_dir / "quarantine"
        self._index = self._models / "current.json"
        self.entries: dict[str | None, Entry] = {}
        self.is_damaged = False

    def open(self) -> None:
        """Make the directories, clear what an interrupted write left, read the record. Raises OSError."""
        for folder in (self._models, self._quarantine):
            folder.mkdir(parents=True, exist_ok=True)
        for stale in self._models.glob(".*.tmp"):
            stale.unlink(missing_ok=True)
        entries = self.current()
        self.entries, self.is_damaged = entries or {}, entries is None

    def current(self) -> dict[str | None, Entry] | None:
        """Read what each slot uses: empty on a new box, None when the record is damaged. Needs no `open`."""
        try:
            return _entries(self._index.read_bytes())
        except FileNotFoundError:
            return {}
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
            return None

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

    def keep(self, incoming: Path, model: ModelId) -> str:
        """Give a proven copy its name in the store, durably; returns that name."""
        file = f"{model.name}-{model.version}-{model.sha256[:8]}.kizu"
        incoming.replace(self._models / file)
        _sync_folder(self._models)
        return file

    def commit(self, slot: str | None, entry: Entry) -> None:
        """Record durably what `slot` uses. Raises OSError, and then nothing has changed."""
        entries = {**self.entries, slot: entry}
        raw = {_ANY_SLOT if slot is None else slot: asdict(entry) for slot, entry in entries.items()}
        write_atomically(self._index, json.dumps({"schema": 1, "slots": raw}, indent=2, sort_keys=True).encode())
        self.entries = entries

    def newest(self) -> list[str]:
        """All models of the store, the newest first."""
        files = [path for path in self._models.glob("*.kizu") if not path.name.startswith(".")]
        return [path.name for path in sorted(files, key=_age_key, reverse=True)]

    def discard(self, file: str) -> None:
        """Delete a model that did not get into service, unless a slot uses it."""
        if file not in self._used():
            self.path_of(file).unlink(missing_ok=True)

    def prune(self) -> None:
        """Delete models that no slot uses or could go back to, but never the newest two."""
        used = self._used()
        for file in self.newest()[KEPT_MODELS:]:
            if file not in used:
                self.path_of(file).unlink(missing_ok=True)

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
        return {file for entry in self.entries.values() for file in (entry.file, entry.previous)}

    def _bound_quarantine(self) -> None:
        names = sorted({path.name.removesuffix(".reason.json") for path in self._quarantine.iterdir()})
        files = [self._quarantine / name for name in names]
        sizes = [path.stat().st_size if path.exists() else 0 for path in files]
        while files and (len(files) > MAX_QUARANTINED or sum(sizes) > MAX_QUARANTINE_BYTES):
            oldest = files.pop(0)
            sizes.pop(0)
            oldest.unlink(missing_ok=True)
            oldest.with_name(f"{oldest.name}.reason.json").unlink(missing_ok=True)


def _entries(data: bytes) -> dict[str | None, Entry]:
    slots = json.loads(data)["slots"]
    return {None if slot == _ANY_SLOT else slot: _entry(raw) for slot, raw in slots.items()}


def _entry(raw: Mapping[str, str | None]) -> Entry:
    file, previous = raw["file"], raw["previous"]
    if file is None or any(name is not None and not _FILE_NAME.fullmatch(name) for name in (file, previous)):
        raise ValueError("not a name in the store")
    return Entry(file, previous)


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
