"""The durable queue under the publisher: what was committed here is delivered, or its loss is counted.

One SQLite file, one connection, one lock. A second connection would let the publisher read while delivery commits, yet
both write (one inserts, the other deletes) and SQLite has one writer: measured on two cores with 10,000 messages of
1 kB, one connection behind a lock took 15,500 messages/s through and two connections 14,700, with the longer waits.
"""

import contextlib
import sqlite3
import threading
import time
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import structlog

from kizu_agent.errors import OutboxError
from kizu_agent.outbox_file import boot_mark, cause_of, move_aside, open_database, salvage, seed
from kizu_agent.outbox_room import make_room, overdue
from kizu_agent.outbox_sync import LogSync
from kizu_agent.outbox_transaction import Loss, Losses, Transaction, kind_of, size_of
from kizu_agent.records import Message, Priority
from kizu_agent.settings import OutboxConfig

log = structlog.get_logger(__name__)

MAX_REFUSED = 1000
MAX_REFUSED_BYTES = 16 * 2**20
"""How much of what the broker refused is kept for an operator to look at; the oldest goes first."""
_AGE_CHECK_S = 10.0
_COLUMNS = "id, topic, payload, qos, retain, content_type, expiry_s, priority, boot, created_mono_ns, created_ns"

_Row = tuple[int, str, bytes, Literal[0, 1], int, str, int | None, int, int, int, int]


@dataclass(frozen=True)
class Stored:
    """A committed message on its way out; `age_s` since its commit, which a step of the wall clock does not change."""

    id: int
    message: Message
    age_s: float


@dataclass(frozen=True)
class Backlog:
    """Rows up to `until_id` are late: they come after all others, at most `limit` of them."""

    until_id: int
    limit: int


class Outbox:
    """A queue on disk that any thread may use.

    Order: priority, then commit; what is late comes after what is not (see `take`). What goes when it is full or old is
    decided in outbox_room.py; each row that goes is counted by cause and kind, over restarts too. Rows given out by
    `take` are lent: nobody else gets them and no cap touches them until `delete`, `refuse` or `release`.

    A transaction with an event or a reject is on the disk when it returns; others are after `sync`, which the owner
    calls about once a second (docs/decisions/0015).

    A database that cannot be used is moved aside beside `path` and a fresh one started; numbers of cameras go on.
    """

    def __init__(self, path: Path, config: OutboxConfig, is_by_priority: bool = True) -> None:
        """Open or create the file; without `is_by_priority` rows come in the order of their commits alone.

        Raises OutboxError where even a fresh one cannot be made.
        """
        self._path = path
        self._config = config
        self._order = "priority, id" if is_by_priority else "id"
        self._boot = boot_mark()
        self._lock = threading.Lock()
        self._database: sqlite3.Connection | None = None
        self._is_closed = False
        self._sequences: dict[str, int] = {}
        self._losses: Losses = Counter()
        self._unsaved_losses: Losses = Counter()
        self._depth = self._bytes = self._last_id = 0
        self._lent: set[int] = set()
        self._next_age_check_mono_s = 0.0
        self._sync = LogSync(path)
        self.sync_problem: str | None = None
        self.moved_aside: Path | None = None
        """The last database that could not be used, where it is now; None: there was none."""
        with self._lock:
            self._open()

    @contextlib.contextmanager
    def transaction(self) -> Iterator[Transaction]:
        """Commit at the end of the block what was done in it, or nothing of it when it raises.

        Prepare payloads' heavy parts (pictures) before: other threads wait. Raises OutboxError. A disk that takes the
        commit and does not sync it shows in `sync_problem`.
        """
        with self._lock, self._translated(), self._transaction() as transaction:
            yield transaction
            self._make_room(transaction)
        if transaction.is_urgent or not self._config.sync_s:
            self.sync()

    def put(self, messages: Sequence[Message]) -> None:
        """Commit `messages` in one transaction. Raises OutboxError."""
        with self.transaction() as transaction:
            transaction.put(messages)

    def sync(self) -> None:
        """Bring what was committed onto the disk; other threads may go on meanwhile. Never raises: `sync_problem`."""
        try:
            self._sync.sync()
        except OSError as exc:
            if self.sync_problem is None:
                log.warning("outbox cannot be synced", path=str(self._path), error=exc.strerror)
            self.sync_problem = f"a power cut would take results: {exc.strerror}"
        else:
            self.sync_problem = None

    def take(self, limit: int, backlog: Backlog | None = None, topics: Collection[str] | None = None) -> list[Stored]:
        """Lend the next rows, at most `limit`, none that is lent already; of `topics` only, None: of all.

        Raises OutboxError.
        """
        marks = ",".join("?" * len(topics or ()))
        among = () if topics is None else ((f"topic IN ({marks})", *topics),)
        with self._lock, self._translated():
            self._drop_overdue()
            if backlog is None:
                return self._lend(self._select("SELECT id FROM messages", among, limit))
            # By their ids, and not along the index of priorities: live rows are few, a backlog is long.
            live = self._select("SELECT id FROM messages NOT INDEXED", (("id > ?", backlog.until_id), *among), limit)
            room = min(limit - len(live), backlog.limit)
            due = (("id <= ?", backlog.until_id), *among)
            late = self._select("SELECT id FROM messages", due, room) if room > 0 else []
            return self._lend(live) + self._lend(late)

    def take_these(self, ids: Collection[int], limit: int) -> list[Stored]:
        """Lend the first `limit` rows of `ids` that are there and not lent, in the order of `take`."""
        with self._lock, self._translated():
            wanted = tuple(row_id for row_id in ids if row_id not in self._lent)
            marks = ",".join("?" * len(wanted))
            return self._lend(self._select("SELECT id FROM messages", ((f"id IN ({marks})", *wanted),), limit))

    def delete(self, ids: Sequence[int]) -> None:
        """Delivered: take these rows out. Raises OutboxError; they stay lent then."""
        with self._lock, self._translated():
            with self._transaction() as transaction:
                transaction.remove(ids)
            self._lent.difference_update(ids)

    def refuse(self, row: Stored, reason: str) -> None:
        """Set `row` aside with the reason why it can never be delivered. Raises OutboxError; it stays lent then."""
        with self._lock, self._translated():
            with self._transaction() as transaction:
                transaction.remove([row.id], "refused")
                self._set_aside(row, reason)
            self._lent.discard(row.id)

    def release(self, ids: Sequence[int] | None = None) -> None:
        """Take back what was lent, None: all of it; it will be given out again, in order."""
        with self._lock:
            self._lent.difference_update(self._lent.copy() if ids is None else ids)

    @property
    def last_id(self) -> int:
        """Id of the row committed last; ids only rise, over restarts too."""
        return self._last_id

    def depth(self) -> int:
        """How many messages wait, those in flight included."""
        return self._depth

    def bytes(self) -> int:
        """What they take, about, in bytes on disk."""
        return self._bytes

    def losses(self) -> Losses:
        """Messages that were not delivered, by cause and kind, since the file was first made."""
        with self._lock:
            return self._losses + self._unsaved_losses

    def note_loss(self, loss: Loss, priority: Priority) -> None:
        """Count a message that never came so far as to be committed; kept with the next transaction."""
        with self._lock:
            self._unsaved_losses[loss, kind_of(priority)] += 1

    def oldest_age_s(self) -> float | None:
        """Age of the oldest message that waits; None: none waits. Raises OutboxError."""
        with self._lock, self._translated():
            row = self._db.execute(
                "SELECT boot, created_mono_ns, created_ns FROM messages ORDER BY id LIMIT 1"
            ).fetchone()
            return None if row is None else self._age_s(*row)

    def refused(self) -> list[tuple[str, str]]:
        """Topic and reason of what was set aside, oldest first, at most 1,000. Raises OutboxError."""
        with self._lock, self._translated():
            return self._db.execute("SELECT topic, reason FROM refused ORDER BY id").fetchall()

    def close(self) -> None:
        """Close the file; idempotent. Everything after raises OutboxError `closed`."""
        with self._lock:
            self._is_closed = True
            self._sync.close()
            if self._database is not None:
                self._database.close()
                self._database = None

    @property
    def _db(self) -> sqlite3.Connection:
        if self._is_closed:
            raise OutboxError("closed", f"{self._path}: the outbox is closed")
        if self._database is None:  # a damaged one was moved aside and the disk refused a fresh one: perhaps now
            self._make_fresh()
        return self._database  # type: ignore[return-value]  # made above, or that raised

    @contextlib.contextmanager
    def _transaction(self) -> Iterator[Transaction]:
        database = self._db
        database.execute("BEGIN IMMEDIATE")
        transaction = Transaction(database, self._sequences, self._boot)
        try:
            yield transaction
            transaction.lose(self._unsaved_losses)
            database.execute("COMMIT")
        except BaseException:
            if database.in_transaction:  # SQLite has rolled back by itself after some failures
                database.execute("ROLLBACK")
            raise
        self._depth += transaction.depth_change
        self._bytes += transaction.bytes_change
        self._sequences.update(transaction.sequences)
        self._losses.update(transaction.losses)
        self._unsaved_losses.clear()
        self._last_id = max(self._last_id, transaction.last_id)
        if transaction.last_id or transaction.sequences:  # a row that comes twice after a power cut is no loss
            self._sync.note_commit()

    @contextlib.contextmanager
    def _translated(self) -> Iterator[None]:
        try:
            yield
        except sqlite3.Error as exc:
            cause = cause_of(exc)
            if cause == "corrupt":
                self._start_afresh(str(exc))
            raise OutboxError(cause, f"{self._path}: {exc}") from exc

    def _open(self) -> None:
        try:
            self._load(open_database(self._path))
        except sqlite3.Error as exc:
            if cause_of(exc) != "corrupt":
                raise OutboxError(cause_of(exc), f"{self._path}: cannot be opened: {exc}") from exc
            self._start_afresh(str(exc))

    def _load(self, database: sqlite3.Connection) -> None:
        self._database = database
        self._depth, self._bytes = database.execute("SELECT COUNT(*), COALESCE(SUM(size), 0) FROM messages").fetchone()
        self._sequences = dict(database.execute("SELECT camera, last FROM sequences"))
        rows = database.execute("SELECT cause, kind, count FROM losses")
        self._losses = Counter({(cause, kind): count for cause, kind, count in rows})
        (self._last_id,) = database.execute(
            "SELECT COALESCE(MAX(seq), 0) FROM sqlite_sequence WHERE name = 'messages'"
        ).fetchone()

    def _start_afresh(self, reason: str) -> None:
        self._sync.close()
        if self._database is not None:
            self._database.close()
            self._database = None
        self.moved_aside = move_aside(self._path)
        kept = salvage(self.moved_aside)
        self._sequences = {**kept.sequences, **self._sequences}
        self._losses = self._losses or Counter(kept.losses)
        kinds = Counter({kind_of(priority): count for priority, count in kept.depths.items()})
        kinds["unknown"] += max(1, self._depth) - kinds.total() if kinds.total() < max(1, self._depth) else 0
        self._losses.update({("corrupt", kind): count for kind, count in kinds.items()})
        self._last_id = max(self._last_id, kept.last_id)
        log.error("outbox was damaged and moved aside", reason=reason, moved_to=str(self.moved_aside))
        self._make_fresh()

    def _make_fresh(self) -> None:
        self._lent.clear()
        try:
            database = open_database(self._path)
            # Ids go on too: one that is still in flight must not come to mean another row.
            seed(database, self._sequences, self._losses, self._last_id)
            self._load(database)
        except sqlite3.Error as exc:
            raise OutboxError(cause_of(exc), f"{self._path}: a fresh outbox cannot be made: {exc}") from exc

    def _select(self, source: str, conditions: Sequence[tuple[str | int, ...]], limit: int) -> list[_Row]:
        """Rows that are not lent and meet the conditions (text with question marks, then values), in order."""
        marks = ",".join("?" * len(self._lent))
        where = " AND ".join([f"id NOT IN ({marks})", *(str(text) for text, *_ in conditions)])
        values = [value for _, *values in conditions for value in values]
        return self._db.execute(
            f"SELECT {_COLUMNS} FROM messages WHERE id IN ({source} WHERE {where} ORDER BY {self._order} LIMIT ?)"  # noqa: S608 - constants and question marks
            f" ORDER BY {self._order}",
            (*self._lent, *values, limit),
        ).fetchall()

    def _lend(self, rows: list[_Row]) -> list[Stored]:
        """Lend `rows` but those that are past their own expiry: they are lost."""
        found = [self._stored(row) for row in rows]
        expired = {row.id for row in found if row.message.expiry_s is not None and row.age_s >= row.message.expiry_s}
        if expired:
            with self._transaction() as transaction:
                transaction.remove(sorted(expired), "expired")
        fresh = [row for row in found if row.id not in expired]
        self._lent.update(row.id for row in fresh)
        return fresh

    def _make_room(self, transaction: Transaction) -> None:
        self._drop_overdue(transaction)
        make_room(self._db, transaction, self._bytes, self._lent, self._config)

    def _drop_overdue(self, transaction: Transaction | None = None) -> None:
        if time.monotonic() < self._next_age_check_mono_s:
            return
        self._next_age_check_mono_s = time.monotonic() + _AGE_CHECK_S
        ids = overdue(self._db, self._lent, self._config.max_age_s, self._age_s)
        if ids:
            with contextlib.nullcontext(transaction) if transaction else self._transaction() as inner:
                inner.remove(ids, "age")

    def _age_s(self, boot: int, created_mono_ns: int, created_ns: int) -> float:
        # The monotonic clock is the machine's, not the process's: it goes on over restarts until the next boot.
        if boot == self._boot:
            return (time.monotonic_ns() - created_mono_ns) / 1e9
        return max(0.0, (time.time_ns() - created_ns) / 1e9)

    def _stored(self, row: _Row) -> Stored:
        row_id, topic, payload, qos, retain, content_type, expiry_s, priority, *times = row
        message = Message(topic, payload, qos, bool(retain), content_type, expiry_s, priority)
        return Stored(row_id, message, self._age_s(*times))

    def _set_aside(self, row: Stored, reason: str) -> None:
        self._db.execute(
            "INSERT OR REPLACE INTO refused VALUES (?, ?, ?, ?, ?, ?)",
            (row.id, row.message.topic, reason, time.time_ns(), size_of(row.message), row.message.payload),
        )
        self._db.execute(
            "DELETE FROM refused WHERE id IN (SELECT id FROM (SELECT id, ROW_NUMBER() OVER newest AS number,"
            " SUM(size) OVER newest AS total FROM refused WINDOW newest AS (ORDER BY id DESC))"
            " WHERE number > ? OR total > ?)",
            (MAX_REFUSED, MAX_REFUSED_BYTES),
        )
