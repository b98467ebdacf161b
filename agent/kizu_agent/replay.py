"""What is late, and how fast it may go: a backlog must neither hold up live results nor flood the plant."""

import time
from collections import deque

from kizu_agent.outbox import Backlog

LATE_S = 5.0
"""A row that waited so long for a broker that is there is as late as one from before the connection."""
PACE_S = 0.02
"""How long to wait for more to be allowed."""
_MARK_S = 0.5
_BURST_S = 0.1
"""What may be sent at once after a pause, in seconds of the allowed rate; never less than one message."""


class Replay:
    """Tells late rows from live ones, and lets `per_s` late ones a second go; used by one thread."""

    def __init__(self, per_s: float) -> None:
        self._per_s = per_s
        self._burst = max(1.0, per_s * _BURST_S)
        self._allowance, self._counted_mono_s = self._burst, time.monotonic()
        self._late_until = self._limit = 0
        self.is_held_back = False
        """The rate, and not the broker, decides when the next late row goes."""
        self._marks: deque[tuple[float, int]] = deque()

    def all_is_late(self, last_id: int) -> None:
        """A connection has come up: rows up to `last_id` were committed before."""
        self._late_until = max(self._late_until, last_id)

    def is_late(self, row_id: int) -> bool:
        """Tell whether this row is sent late."""
        return row_id <= self._late_until

    def backlog(self, last_id: int) -> Backlog:
        """Give what is late now, and how many late rows may go; `last_id` is the outbox's newest row."""
        now = time.monotonic()
        self._mark(now, last_id)
        self._allowance = min(self._burst, self._allowance + (now - self._counted_mono_s) * self._per_s)
        self._counted_mono_s = now
        self._limit = int(self._allowance)
        return Backlog(self._late_until, self._limit)

    def sent(self, late_rows: int) -> None:
        """So many late rows go now."""
        self._allowance -= late_rows
        self.is_held_back = late_rows >= self._limit

    def _mark(self, now: float, last_id: int) -> None:
        """Remember which row was the newest when: ids rise with time, whatever the wall clock does."""
        if not self._marks or now - self._marks[-1][0] >= _MARK_S:
            self._marks.append((now, last_id))
        while self._marks and now - self._marks[0][0] >= LATE_S:
            self._late_until = max(self._late_until, self._marks.popleft()[1])
