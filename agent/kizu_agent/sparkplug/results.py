"""Results from the store to the session: live ones as they are, late ones as history, deleted when they were read."""

import contextlib
import time
from collections.abc import Callable, Iterable

from kizu_agent.errors import OutboxError
from kizu_agent.outage import OutageLog
from kizu_agent.outbox import Stored
from kizu_agent.replay import Replay
from kizu_agent.sparkplug.delivered import UnderWay
from kizu_agent.sparkplug.payload import PayloadError, decode
from kizu_agent.sparkplug.session import Session
from kizu_agent.sparkplug.settings import SparkplugConfig
from kizu_agent.sparkplug.store import Store

ROWS_AT_ONCE = 50


class Results:
    """Sends the store's rows; used by one thread. `ask_fence` puts a fence behind what was sent (see `UnderWay`)."""

    def __init__(self, config: SparkplugConfig, store: Store, ask_fence: Callable[[], int | None]) -> None:
        self._is_in_order = config.history == "in_order"
        self._store = store
        self._replay = Replay(config.history_per_s)
        self._under_way = UnderWay(ask_fence)
        self._log = OutageLog("sparkplug store")
        self._hold_until_mono_s = 0.0
        self._is_dry = True

    @property
    def is_pressed(self) -> bool:
        """Whether something is due sooner than the next wake-up."""
        return self._replay.is_held_back or len(self._under_way) > 0 or self._under_way.silent_s > 0

    @property
    def is_through(self) -> bool:
        """Whether all that living devices had was read by the broker, as of the last turn."""
        return self._is_dry and not self.is_pressed

    @property
    def silent_s(self) -> float:
        """For how long the broker has owed a sign."""
        return self._under_way.silent_s

    @property
    def waiting(self) -> int:
        """Rows that are not under way yet."""
        return max(0, self._store.depth() - len(self._under_way))

    def all_is_late(self, last_id: int) -> None:
        """Births go out: what was committed up to `last_id` is history."""
        self._replay.all_is_late(last_id)

    def begin(self) -> None:
        """Births were sent on a new connection."""
        self._under_way.begin()

    def send(self, session: Session) -> None:
        """Send what may go now, of the devices that live."""
        if time.monotonic() < self._hold_until_mono_s:
            return
        try:
            rows = self._next(session)
            self._is_dry = not rows
            for row in rows:
                self._send_one(session, row)
        except OutboxError as exc:
            self._trouble(exc)
        else:
            self._log.over()
        self._under_way.fence()

    def fence(self) -> None:
        """Ask for a sign at once: the session is about to end."""
        self._under_way.fence(is_now=True)

    def passed(self, fences: Iterable[int]) -> None:
        """The broker has read what came before these fences."""
        read = [row_id for fence in fences for row_id in self._under_way.passed(fence)]
        if not read:
            return
        try:
            self._store.delete(read)
        except OutboxError as exc:  # they stay lent, and go again after the next connection
            self._trouble(exc)

    def broken(self, reason: str) -> bool:
        """The connection broke; tell whether one row alone was to blame and was set aside."""
        culprit = self._under_way.broken()
        if culprit is not None:
            with contextlib.suppress(OutboxError):
                self._store.refuse(culprit, f"the broker closes the connection when it gets this: {reason}")
        self.left()
        return culprit is not None

    def left(self) -> None:
        """The connection is over: what was not proven read goes again, as history."""
        self._under_way.left()
        self._store.release()

    def _next(self, session: Session) -> list[Stored]:
        limit = min(ROWS_AT_ONCE, self._under_way.room)
        backlog = self._replay.backlog(self._store.last_id)
        if not limit or not session.devices:
            return []
        if self._is_in_order:
            limit = min(limit, backlog.limit)
        rows = self._store.take(limit, None if self._is_in_order else backlog, session.devices) if limit else []
        self._replay.sent(sum(row.id <= backlog.until_id for row in rows))
        return rows

    def _send_one(self, session: Session, row: Stored) -> None:
        device = row.message.topic
        try:
            found = decode(row.message.payload).metrics
        except PayloadError as exc:  # written by another version, or a damaged disk
            self._store.refuse(row, str(exc))
            return
        is_late = self._replay.is_late(row.id)
        is_sent = session.device_history(device, found) if is_late else session.device_data(device, found)
        if is_sent:
            self._under_way.add(row)
        else:
            self._store.refuse(row, "larger than the broker's maximum packet")

    def _trouble(self, exc: OutboxError) -> None:
        self._log.trouble(exc.cause, "sparkplug store cannot be used", str(exc))
        self._hold_until_mono_s = time.monotonic() + 1.0
