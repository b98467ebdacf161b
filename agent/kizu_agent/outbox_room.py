"""Who has to go when the outbox is full or its rows are old: heatmaps, then ok results, then those that warn.

Events and rejects stay until the reserve beyond `max_bytes`, which only they may take, is used up as well; then the
oldest rejects go, and events last. Rows that are lent to the publisher are on their way and never touched.
"""

import sqlite3
from collections.abc import Callable, Collection, Iterator

from kizu_agent.outbox_transaction import Transaction
from kizu_agent.records import Priority
from kizu_agent.settings import OutboxConfig

_AT_ONCE = 100

AgeOf = Callable[[int, int, int], float]
"""Boot mark, monotonic and UTC time of a commit → seconds since then."""


def make_room(
    database: sqlite3.Connection, transaction: Transaction, held_bytes: int, lent: Collection[int], caps: OutboxConfig
) -> None:
    """Take rows out until `held_bytes` and what the transaction adds are within the caps, as far as rows may go."""
    steps = ((caps.max_bytes, Priority.WARN), (caps.max_bytes + caps.reserve_bytes, Priority.EVENT))
    for limit, most_important in steps:
        while (over := held_bytes + transaction.bytes_change - limit) > 0:
            victims = list(_victims(database, over, lent, most_important))
            if not victims:
                break  # only rows that may not go, or are lent, are left
            transaction.remove(victims, "bytes")


def overdue(database: sqlite3.Connection, lent: Collection[int], max_age_s: float, age_of: AgeOf) -> list[int]:
    """Ids of rows that are older than `max_age_s`; events and rejects have no age."""
    found: list[int] = []
    rows = database.execute(
        "SELECT id, boot, created_mono_ns, created_ns FROM messages WHERE priority >= ? ORDER BY id", (Priority.WARN,)
    )
    for row_id, *times in rows:
        if age_of(*times) <= max_age_s:
            break  # ids rise with time
        if row_id not in lent:
            found.append(row_id)
    return found


def _victims(
    database: sqlite3.Connection, over_bytes: int, lent: Collection[int], most_important: Priority
) -> Iterator[int]:
    """Rows of the least important priority that has some, oldest first, enough for `over_bytes` or a hundred."""
    marks = ",".join("?" * len(lent))
    # Two steps, for one index cannot serve falling priorities with rising ids.
    rows = database.execute(
        f"SELECT id, size FROM messages WHERE id NOT IN ({marks}) AND priority ="  # noqa: S608 - question marks only
        f" (SELECT priority FROM messages WHERE id NOT IN ({marks}) AND priority >= ? ORDER BY priority DESC LIMIT 1)"
        " ORDER BY id LIMIT ?",
        (*lent, *lent, most_important, _AT_ONCE),
    )
    for row_id, size in rows:
        if over_bytes <= 0:
            return
        yield row_id
        over_bytes -= size
