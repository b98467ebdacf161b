"""The drop directory: which files in it are whole and worth looking at.

It is listed, not watched through inotify: a listing sees what other machines write over NFS or SMB, survives a
directory that is replaced or mounted over, and follows names, never the inode of a file that was there before.
"""

import stat
import time
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import structlog

STABLE_S = 1.0
"""A file is looked at once it has not changed for this long."""
TRUNCATED_S = 10.0
"""A file without a ZIP's end is taken for a copy that stalled until it has not changed for this long."""
SUFFIX = ".kizu"

log = structlog.get_logger(__name__)


class Fingerprint(NamedTuple):
    """What changes when a file is written to or replaced."""

    size: int
    mtime_ns: int
    inode: int


@dataclass(frozen=True)
class DroppedFile:
    """A file that has come to rest, as it was then."""

    path: Path
    fingerprint: Fingerprint

    def is_unchanged(self) -> bool:
        """Tell whether the file is still there and as it was."""
        return fingerprint_of(self.path) == self.fingerprint


class DropDirectory:
    """Lists one directory; used by one thread. `*.kizu` regular files count, hidden and temporary ones do not."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._seen: dict[Path, tuple[Fingerprint, int]] = {}
        self._not_before_mono_ns: dict[Path, tuple[Fingerprint, float]] = {}
        self._is_lost = False

    def ready(self) -> list[DroppedFile]:
        """Files at rest that are whole, or that have stayed incomplete for `TRUNCATED_S`; the oldest first."""
        now = time.monotonic_ns()
        found = self._list()
        self._seen = {
            path: self._seen[path] if path in self._seen and self._seen[path][0] == print_ else (print_, now)
            for path, print_ in found.items()
        }
        self._not_before_mono_ns = {
            path: kept for path, kept in self._not_before_mono_ns.items() if found.get(path) == kept[0]
        }
        files = [
            DroppedFile(path, print_)
            for path, (print_, since) in self._seen.items()
            if now >= self._not_before_mono_ns.get(path, (print_, 0.0))[1] and _is_ready(path, (now - since) / 1e9)
        ]
        return sorted(files, key=lambda file: (file.fingerprint.mtime_ns, file.path.name))

    def leave(self, file: DroppedFile, for_s: float = float("inf")) -> None:
        """Do not name `file` again for `for_s`, unless it changes: it is dealt with but cannot be moved away."""
        self._not_before_mono_ns[file.path] = (file.fingerprint, time.monotonic_ns() + for_s * 1e9)

    def _list(self) -> dict[Path, Fingerprint]:
        try:
            names = [path for path in self._folder.iterdir() if _is_candidate(path)]
        except OSError as exc:
            if not self._is_lost:
                log.warning("drop directory lost", folder=str(self._folder), error=str(exc))
            self._is_lost = True
            return {}
        if self._is_lost:
            log.info("drop directory back", folder=str(self._folder))
        self._is_lost = False
        prints = {path: fingerprint_of(path) for path in names}
        return {path: print_ for path, print_ in prints.items() if print_ is not None}


def fingerprint_of(path: Path) -> Fingerprint | None:
    """Size, time and inode of the regular file at `path`; None for anything else, links included."""
    try:
        info = path.lstat()
    except OSError:
        return None
    return Fingerprint(info.st_size, info.st_mtime_ns, info.st_ino) if stat.S_ISREG(info.st_mode) else None


def _is_candidate(path: Path) -> bool:
    return path.suffix.lower() == SUFFIX and not path.name.startswith((".", "~"))


def _is_ready(path: Path, at_rest_s: float) -> bool:
    if at_rest_s < STABLE_S:
        return False
    if at_rest_s >= TRUNCATED_S:
        return True
    try:
        return zipfile.is_zipfile(path)
    except OSError:
        return False
