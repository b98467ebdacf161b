"""Brings the outbox's write-ahead log onto the disk, when asked, without holding up whoever commits meanwhile.

SQLite's `synchronous=NORMAL` writes commits into the log and syncs it at checkpoints only. The log is a plain file of
checksummed frames: once it is synced, every commit in it is found again after a power cut. A checkpoint that runs
meanwhile syncs the log before it copies from it, so none is missed (https://sqlite.org/wal.html).
"""

import os
import threading
from pathlib import Path


class LogSync:
    """Syncs the log of the database at `path`; any thread may call it."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._lock = threading.Lock()
        self._handle: int | None = None
        self._commits = self._synced = 0

    def note_commit(self) -> None:
        """There is something new in the log."""
        self._commits += 1

    def sync(self) -> None:
        """Return when what was committed before the call is on the disk. Raises OSError."""
        with self._lock:
            commits = self._commits
            if commits == self._synced:
                return
            if self._handle is None:
                # The name of a new log must be on the disk too. Closing it again takes none of SQLite's locks: they
                # are on the database's own file.
                self._handle = os.open(self._path.with_name(self._path.name + "-wal"), os.O_RDWR | os.O_CLOEXEC)
                _sync_folder(self._path.parent)
            os.fdatasync(self._handle)
            self._synced = commits

    def close(self) -> None:
        """Let go of the log: the database is closed, or replaced. Idempotent."""
        with self._lock:
            self._synced = self._commits
            if self._handle is not None:
                os.close(self._handle)
                self._handle = None


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
