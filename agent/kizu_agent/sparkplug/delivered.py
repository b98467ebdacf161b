"""What is on its way at QoS 0, and when it may be taken for delivered (docs/decisions/0019)."""

import time
from collections import deque
from collections.abc import Callable

from kizu_agent.outbox import Stored

MOST = 200
"""Rows that may be under way without a sign from the broker: they lie in the socket, or in memory when it is full."""
FENCE_S = 0.2
"""A sign is asked for this long after the first of them, or when there is no room for more."""
STRIKES = 3
"""A row that was under way alone when the connection broke, so often in a row, is what breaks it."""


class UnderWay:
    """Rows sent and not yet proven read; used by one thread. `ask` puts a fence behind them and gives its number.

    After a connection broke under rows they go one at a time, doubling with each fence passed: one that the broker
    closes the connection for (MQTT 3.1.1 cannot say why) is then met alone.
    """

    def __init__(self, ask: Callable[[], int | None]) -> None:
        self._ask = ask
        self._fenced: deque[tuple[int, list[Stored]]] = deque()
        self._unfenced: list[Stored] = []
        self._since_mono_s = 0.0
        self._asked_mono_s = 0.0
        self._window = MOST
        self._strikes = (0, 0)
        self._births: int | None = None

    def __len__(self) -> int:
        return len(self._unfenced) + sum(len(rows) for _, rows in self._fenced)

    @property
    def room(self) -> int:
        """How many rows more may go."""
        return 0 if self._births is not None else max(0, self._window - len(self))

    @property
    def silent_s(self) -> float:
        """For how long the broker has owed a sign; 0 where it owes none."""
        return time.monotonic() - self._asked_mono_s if self._fenced else 0.0

    def begin(self) -> None:
        """Births were sent: where rows are suspected, none goes before the broker has read those.

        Else births that break the connection would have every row after them blamed for it.
        """
        number = self._ask() if self._window < MOST else None
        if number is not None:
            self._asked_mono_s = time.monotonic()
            self._fenced.append((number, []))
        self._births = number

    def add(self, row: Stored) -> None:
        """It was sent."""
        if not self._unfenced:
            self._since_mono_s = time.monotonic()
        self._unfenced.append(row)

    def fence(self, is_now: bool = False) -> None:
        """Ask for a sign where that is due."""
        is_due = is_now or not self.room or time.monotonic() - self._since_mono_s >= FENCE_S
        if not (self._unfenced and is_due):
            return
        number = self._ask()
        if number is not None:
            self._asked_mono_s = time.monotonic()
            self._fenced.append((number, self._unfenced))
            self._unfenced = []

    def passed(self, number: int) -> list[int]:
        """A fence was passed: ids of the rows before it, which the broker has read."""
        read: list[int] = []
        while self._fenced and any(fence == number for fence, _ in self._fenced):
            fence, rows = self._fenced.popleft()
            read += [row.id for row in rows]
            self._asked_mono_s = time.monotonic()
            self._window = min(MOST, self._window * 2) if rows else self._window
            self._births = None
            if fence == number:
                break
        return read

    def broken(self) -> Stored | None:
        """The connection is gone: forget all; a row that has broken it alone once too often."""
        rows = [row for _, rows in self._fenced for row in rows] + self._unfenced
        self.left()
        if rows:
            self._window = 1
        if len(rows) != 1:
            return None
        last, strikes = self._strikes
        self._strikes = (rows[0].id, strikes + 1 if last == rows[0].id else 1)
        return rows[0] if self._strikes[1] >= STRIKES else None

    def left(self) -> None:
        """The connection was ended by us: nothing is anybody's fault."""
        self._fenced.clear()
        self._unfenced = []
        self._births = None
