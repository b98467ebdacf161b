"""The outbox's file: its schema, how it is opened, and what is done when it cannot be used."""

import contextlib
import sqlite3
import time
from collections import Counter
from pathlib import Path
from typing import NamedTuple

from kizu_agent.outbox_transaction import Losses

SCHEMA_VERSION = 2
MAX_MOVED_ASIDE = 3
"""So many unusable databases are kept: a dying flash card must not fill itself with them."""

_LOSSES = """CREATE TABLE losses (
    cause TEXT NOT NULL,
    kind TEXT NOT NULL,
    count INTEGER NOT NULL,
    PRIMARY KEY (cause, kind)
) WITHOUT ROWID"""

_SCHEMA = f"""
CREATE TABLE schema (version INTEGER NOT NULL);
CREATE TABLE messages (
    id INTEGER PRIMARY KEY AUTOINCREMENT,
    priority INTEGER NOT NULL,
    size INTEGER NOT NULL,
    topic TEXT NOT NULL,
    qos INTEGER NOT NULL,
    retain INTEGER NOT NULL,
    content_type TEXT NOT NULL,
    expiry_s INTEGER,
    boot INTEGER NOT NULL,
    created_mono_ns INTEGER NOT NULL,
    created_ns INTEGER NOT NULL,
    payload BLOB NOT NULL
);
CREATE INDEX messages_in_order ON messages (priority, id, size);
CREATE TABLE refused (
    id INTEGER PRIMARY KEY,
    topic TEXT NOT NULL,
    reason TEXT NOT NULL,
    refused_ns INTEGER NOT NULL,
    size INTEGER NOT NULL,
    payload BLOB NOT NULL
);
CREATE TABLE sequences (camera TEXT PRIMARY KEY, last INTEGER NOT NULL) WITHOUT ROWID;
{_LOSSES};
"""

_FROM_1 = f"""
UPDATE messages SET priority = CASE priority WHEN 0 THEN 0 WHEN 1 THEN 3 ELSE 4 END;
ALTER TABLE losses RENAME TO losses_1;
{_LOSSES};
INSERT INTO losses SELECT cause, 'unknown', count FROM losses_1;
DROP TABLE losses_1;
UPDATE schema SET version = 2
"""  # noqa: S608 - constants
"""Priorities were 0 events, 1 results, 2 heatmaps; losses were counted by cause alone."""

_CORRUPT = ("malformed", "not a database", "another kizu", "no such table", "no such column")


class Salvaged(NamedTuple):
    """What could still be read from a damaged database; `depths` are messages by priority."""

    sequences: dict[str, int]
    losses: Losses
    depths: dict[int, int]
    last_id: int


def open_database(path: Path) -> sqlite3.Connection:
    """Open the outbox at `path`, making folder and schema where there are none. Raises sqlite3.Error."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as exc:
        raise sqlite3.OperationalError(f"unable to make the folder: {exc.strerror}") from exc
    database = sqlite3.connect(path, timeout=5, isolation_level=None, check_same_thread=False)
    try:
        _configure(database)
        _ensure_schema(database)
    except BaseException:
        database.close()
        raise
    return database


def cause_of(exc: sqlite3.Error) -> str:
    """`corrupt`, `disk_full` or `io`. By the text: Python 3.10 does not give SQLite's error codes."""
    text = str(exc)
    if any(sign in text for sign in _CORRUPT):
        return "corrupt"
    return "disk_full" if "is full" in text else "io"


def salvage(path: Path) -> Salvaged:
    """Read what can be read of a damaged database at `path`: the cameras' numbers above all."""
    with contextlib.closing(sqlite3.connect(path, timeout=5, isolation_level=None)) as database:
        return Salvaged(
            dict(_try(database, "SELECT camera, last FROM sequences")),
            Counter({(cause, kind): n for cause, kind, n in _try(database, "SELECT cause, kind, count FROM losses")}),
            dict(_try(database, "SELECT priority, COUNT(*) FROM messages GROUP BY priority")),
            sum(last for (last,) in _try(database, "SELECT seq FROM sqlite_sequence WHERE name = 'messages'")),
        )


def seed(database: sqlite3.Connection, sequences: dict[str, int], losses: Losses, last_id: int) -> None:
    """Give a fresh database what must go on: the cameras' numbers, the losses counted so far, the ids."""
    with database:
        database.execute("BEGIN IMMEDIATE")
        database.executemany("INSERT OR REPLACE INTO sequences VALUES (?, ?)", sequences.items())
        counts = [(cause, kind, count) for (cause, kind), count in losses.items()]
        database.executemany("INSERT OR REPLACE INTO losses VALUES (?, ?, ?)", counts)
        database.execute("DELETE FROM sqlite_sequence")
        database.execute("INSERT INTO sqlite_sequence VALUES ('messages', ?)", (last_id,))


def move_aside(path: Path) -> Path:
    """Rename the database and its log to a name with the time; delete all but the newest of earlier ones."""
    stamp = time.strftime("%Y%m%dT%H%M%SZ", time.gmtime())
    number = 0
    while (aside := path.with_name(f"{path.name}.{stamp}-{number:03}.damaged")).exists():
        number += 1
    for suffix in ("", "-wal", "-shm"):
        with contextlib.suppress(FileNotFoundError):
            path.with_name(path.name + suffix).rename(aside.with_name(aside.name + suffix))
    for old in sorted(path.parent.glob(f"{path.name}.*.damaged"))[:-MAX_MOVED_ASIDE]:
        for suffix in ("", "-wal", "-shm"):
            old.with_name(old.name + suffix).unlink(missing_ok=True)
    return aside


def boot_mark() -> int:
    """A number that stays the same from boot to boot: only within it can monotonic times be compared."""
    try:
        boot_id = Path("/proc/sys/kernel/random/boot_id").read_text("ascii")
    except OSError:
        return time.time_ns() >> 1  # none: the mark of this process alone
    return int(boot_id.replace("-", "")[:15], 16)


def _configure(database: sqlite3.Connection) -> None:
    # One process owns the file; a second agent on the same folder fails here instead of delivering everything twice.
    # It also keeps the log's index in memory, so no -shm file can be left stale.
    database.execute("PRAGMA locking_mode = EXCLUSIVE")
    database.execute("PRAGMA journal_mode = WAL")
    # NORMAL syncs at checkpoints, not at commits, which FULL does at the cost of one sync a frame; LogSync does so for
    # events and rejects at once, and for the rest about once a second (docs/decisions/0015).
    database.execute("PRAGMA synchronous = NORMAL")
    # Debian's SQLite zeroes what is deleted: every delivered payload would be written once more.
    database.execute("PRAGMA secure_delete = OFF")
    database.execute(f"PRAGMA journal_size_limit = {16 * 2**20}")


def _ensure_schema(database: sqlite3.Connection) -> None:
    database.execute("BEGIN IMMEDIATE")
    try:
        if database.execute("SELECT COUNT(*) FROM sqlite_master").fetchone() == (0,):
            for statement in _SCHEMA.split(";\n"):
                database.execute(statement)
            database.execute("INSERT INTO schema VALUES (?)", (SCHEMA_VERSION,))
        _migrate(database)
        versions = database.execute("SELECT version FROM schema").fetchall()
        database.execute("COMMIT")
    except BaseException:
        if database.in_transaction:
            database.execute("ROLLBACK")
        raise
    if versions != [(SCHEMA_VERSION,)]:
        raise sqlite3.DatabaseError(f"the outbox is of another kizu: schema {versions}, this one has {SCHEMA_VERSION}")


def _migrate(database: sqlite3.Connection) -> None:
    """Bring a database of schema 1 to the present one: what an older agent committed is delivered by this one."""
    if database.execute("SELECT version FROM schema").fetchall() != [(1,)]:
        return
    for statement in _FROM_1.split(";\n"):
        database.execute(statement)


def _try(database: sqlite3.Connection, query: str) -> list[tuple]:  # type: ignore[type-arg]  # columns as the query says
    try:
        return database.execute(query).fetchall()
    except sqlite3.Error:
        return []
