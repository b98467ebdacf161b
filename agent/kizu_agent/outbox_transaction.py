"""What is done to the outbox in one transaction: rows in, rows out, cameras' numbers, counted losses."""

import sqlite3
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Literal

from kizu_agent.records import KINDS, Message, Priority

ROW_BYTES = 256
"""What a row takes on disk beside its topic and payload: columns, index entry, page slack."""

Loss = Literal["bytes", "age", "expired", "refused", "corrupt", "disk"]
"""Why a message was not delivered: over `max_bytes`, older than `max_age_s`, older than its own expiry, refused by
the broker (set aside), in a database that was moved aside (at least 1, as many as could be counted), or never
committed because the disk refused it for too long."""

Losses = Counter[tuple[str, str]]
"""(cause, kind) → messages that were not delivered; `kind` is one of KINDS, or `unknown` where it could not be read."""


class Transaction:
    """What is done here is committed together or not at all; made by `Outbox.transaction`."""

    def __init__(self, database: sqlite3.Connection, sequences: dict[str, int], boot: int) -> None:
        self._database = database
        self._committed_sequences = sequences
        self._boot = boot
        self.sequences: dict[str, int] = {}
        self.losses: Losses = Counter()
        self.depth_change = 0
        self.bytes_change = 0
        self.last_id = 0
        self.is_urgent = False
        """An event or a reject is in it: it is synced at once."""

    def next_seq(self, camera: str) -> int:
        """The camera's next number, from 1, rising by one for ever: never given twice once committed."""
        seq = self.sequences.get(camera, self._committed_sequences.get(camera, 0)) + 1
        self.sequences[camera] = seq
        self._database.execute("INSERT OR REPLACE INTO sequences VALUES (?, ?)", (camera, seq))
        return seq

    def put(self, messages: Iterable[Message]) -> None:
        """Add `messages`, in their order."""
        now_ns, now_mono_ns = time.time_ns(), time.monotonic_ns()
        for message in messages:
            size = size_of(message)
            cursor = self._database.execute(
                "INSERT INTO messages (size, topic, payload, qos, retain, content_type, expiry_s, priority, boot,"
                " created_mono_ns, created_ns) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
                (
                    size,
                    message.topic,
                    message.payload,
                    message.qos,
                    message.retain,
                    message.content_type,
                    message.expiry_s,
                    message.priority,
                    self._boot,
                    now_mono_ns,
                    now_ns,
                ),
            )
            self.last_id = cursor.lastrowid or 0
            self.depth_change += 1
            self.bytes_change += size
            self.is_urgent = self.is_urgent or message.priority <= Priority.REJECT

    def remove(self, ids: Sequence[int], loss: Loss | None = None) -> None:
        """Take rows out, counting them under `loss` where they were not delivered; absent ids are no error."""
        for start in range(0, len(ids), 500):
            some = ids[start : start + 500]
            marks = ",".join("?" * len(some))
            query = f"DELETE FROM messages WHERE id IN ({marks}) RETURNING size, priority"  # noqa: S608 - question marks only
            gone = self._database.execute(query, some).fetchall()
            self.depth_change -= len(gone)
            self.bytes_change -= sum(size for size, _ in gone)
            if loss is not None:
                self.lose(Counter((loss, kind_of(priority)) for _, priority in gone))

    def lose(self, losses: Losses) -> None:
        """Count messages that will not be delivered."""
        self.losses.update(losses)
        self._database.executemany(
            "INSERT INTO losses VALUES (?, ?, ?)"
            " ON CONFLICT (cause, kind) DO UPDATE SET count = count + excluded.count",
            [(cause, kind, count) for (cause, kind), count in losses.items()],
        )


def kind_of(priority: int) -> str:
    """The kind that losses of this priority are counted by."""
    return KINDS[priority] if 0 <= priority < len(KINDS) else "unknown"


def size_of(message: Message) -> int:
    """What `message` takes in the outbox, about, in bytes."""
    return len(message.topic) + len(message.payload) + ROW_BYTES
