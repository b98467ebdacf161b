"""Outbox → broker, and commands the other way.

One thread owns the connection and the window: it publishes, reads acknowledgements and deletes rows.
"""

import contextlib
import select
import socket
import ssl
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

import structlog

from kizu_agent.command_lane import CommandLane
from kizu_agent.connection import REJECTED, WINDOW, Connection, drain
from kizu_agent.credentials import CredentialKeeper
from kizu_agent.errors import AgentError, OutboxError
from kizu_agent.outage import Backoff, OutageLog
from kizu_agent.outbox import Outbox, Stored
from kizu_agent.records import CommandAnswer, CommandRequest, Message, as_replayed
from kizu_agent.replay import PACE_S, Replay
from kizu_agent.settings import MqttConfig
from kizu_agent.stages import Stage

log = structlog.get_logger(__name__)

NO_ACK_S = 120.0
"""A broker that answers pings and acknowledges nothing for so long is left and connected to again."""
RENEW_S = 5.0
"""What is in flight when credentials are renewed may take so long to be acknowledged before the connection is left."""
STEADY_S = 10.0
"""A connection that held so long makes the next wait the shortest again."""
STRIKES = 3
"""A message that was lost so often together with its connection, each time alone and just after another one went
through, is what closes the connection: larger than an MQTT 3.1.1 broker takes, or refused by MQTT 5 with a code that
paho takes for a protocol error (Mosquitto 2.0 does so above `message_size_limit`)."""
Ignored = Literal["retained", "oversized", "dropped"]
"""Why a command never gets to its handler; the last: too many waited."""
_IDLE_S = 0.5
_KEEP_ALIVE_TIMEOUT, _PACKET_TOO_LARGE, _QUOTA_EXCEEDED = 0x8D, 0x95, 0x97
_SETUP_ERRORS = (AgentError, ssl.SSLError, FileNotFoundError, PermissionError, ValueError)
"""Trouble that the configuration causes: said even while the broker is known to be away."""


@dataclass(frozen=True)
class PublisherCounters:
    """What happened since the start, and how many messages are in flight now.

    `refused` ones were set aside; `reconnects` counts connections after the first; `commands_dropped` those that
    found too many others waiting.
    """

    published: int
    refused: int
    reconnects: int
    commands_dropped: int
    in_flight: int


@dataclass(frozen=True)
class _Sent:
    """A message in flight; `row` where it came from the outbox."""

    topic: str
    row: Stored | None


class Publisher:
    """Sends what is in the outbox, the latest of each retained topic, and answers to commands.

    On every connection the retained ones go first, then the outbox in its order: live rows at once, late ones (from
    before the connection, or older than LATE_S) after them and at most `replay_per_s` a second. A row leaves the
    outbox when the broker acknowledged it; one that the broker refuses is set aside with the reason (MQTT 3.1.1
    brokers acknowledge what they refuse, so there it is lost unseen; see docs/mqtt.md).

    `client_id` is the agent's alone at this broker; `base_topic` is `<prefix>/<agent>`; `will` the retained `offline`
    status, which `stop` publishes too. `on_command` runs in threads of its own; where it gives None the answer may come
    by `answer`. What it raises is logged. `on_ignored` hears of commands that never get there. `on_failure` is called
    when the publishing thread dies of a bug.

    `credentials` are looked after by somebody else: when they are renewed, what is in flight is awaited and the
    connection made anew. None: those that the configuration's files hold at the first connection.
    """

    def __init__(  # noqa: PLR0917 - as many as there are parties to it
        self,
        config: MqttConfig,
        client_id: str,
        base_topic: str,
        will: Message,
        outbox: Outbox,
        on_command: Callable[[CommandRequest], CommandAnswer | None],
        on_failure: Callable[[], None] = lambda: None,
        replay_per_s: float = 500.0,
        on_ignored: Callable[[str, Ignored], None] = lambda _name, _why: None,
        *,
        credentials: CredentialKeeper | None = None,
    ) -> None:
        self._config = config
        self._credentials = credentials or CredentialKeeper(config)
        self._client_id = client_id
        self._base_topic = base_topic
        self._will = will
        self._outbox = outbox
        self._connection: Connection | None = None
        self._is_connected = False
        self._stage = Stage("publisher", self._work, on_failure)
        self._on_ignored = on_ignored
        self._commands = CommandLane(
            base_topic, on_command, self.wake, on_failure, lambda name: on_ignored(name, "dropped")
        )
        self._retained_lock = threading.Lock()
        self._retained: dict[str, bytes] = {}
        self._unsent_retained: dict[str, None] = {}
        self._in_flight: dict[int, _Sent] = {}
        self._delivered: list[int] = []
        self._refused: list[tuple[Stored, str]] = []
        self._strikes: tuple[int, int] = (0, 0)
        self._is_stopping = False
        self._suspects: list[int] = []
        self._window = WINDOW
        self._replay = Replay(replay_per_s)
        self._hold_until_mono_s = 0.0
        self._next_attempt_mono_s = 0.0
        self._up_since_mono_s = 0.0
        self._last_ack_mono_s = 0.0
        self._backoff = Backoff(0.5, 30.0)
        self._broker_log = OutageLog("broker")
        self._outbox_log = OutageLog("outbox")
        self._published = self._refusals = self._connections = 0
        self._wake_in, self._wake_out = socket.socketpair()
        self._wake_in.settimeout(0)
        self._wake_out.settimeout(0)
        self._leave_by_mono_s: float | None = None
        self._credentials.attach(lambda: self._is_connected, self.wake)

    def start(self) -> None:
        """Start connecting and publishing, whether or not the broker is there; idempotent."""
        self._stage.start()
        self._commands.start()

    def stop(self, deadline_s: float, last_word: bytes | None = None) -> None:
        """Send what can be sent within `deadline_s`, say offline, disconnect; the rest stays in the outbox.

        `last_word` is the final retained payload on the will's topic; the will's own where it is None. Publish the
        cameras' last states before. Idempotent.
        """
        deadline_mono_s = time.monotonic() + deadline_s
        self._is_stopping = True
        self.wake()
        self._commands.stop(min(1.0, deadline_s / 4))
        if not self._stage.stop(deadline_mono_s - time.monotonic()):
            log.warning("publisher did not end in time; unsent messages stay in the outbox")
            return
        if self._connection is not None:
            # From here on this thread owns the connection.
            self._drain(deadline_mono_s - min(1.0, deadline_s / 4))
            self._say_offline(deadline_mono_s, last_word)
        self._wake_in.close()
        self._wake_out.close()

    def wake(self) -> None:
        """There is something new in the outbox; without it the publisher looks twice a second."""
        # A full buffer has woken it already; a closed one belongs to a publisher that was stopped.
        with contextlib.suppress(OSError):
            self._wake_in.send(b"\0")

    def publish_retained(self, topic: str, payload: bytes) -> None:
        """Publish `payload` (JSON) retained, QoS 1: the latest for a topic wins, and is sent again on each connect."""
        with self._retained_lock:
            self._retained[topic] = payload
            self._unsent_retained[topic] = None
        self.wake()

    def answer(self, request: CommandRequest, answer: CommandAnswer) -> None:
        """Answer a command for which `on_command` gave None; from any thread."""
        self._commands.answer(request, answer)

    @property
    def is_connected(self) -> bool:
        """Whether the broker is there and takes messages."""
        return self._is_connected

    @property
    def progress_mono_ns(self) -> int:
        """When the publishing thread last came round; a broker that is away is no standstill.

        Resolving the broker's name and connecting may take half a minute in one piece: allow 60 s.
        """
        return self._stage.progress_mono_ns

    @property
    def failure(self) -> BaseException | None:
        """The bug that ended one of the two threads, None while they live."""
        return self._stage.failure or self._commands.failure

    @property
    def counters(self) -> PublisherCounters:
        """What happened since the start."""
        reconnects = max(0, self._connections - 1)
        in_flight = len(self._in_flight)
        return PublisherCounters(self._published, self._refusals, reconnects, self._commands.dropped, in_flight)

    def _work(self) -> None:
        if self._is_stopping:
            time.sleep(0.01)  # `stop` is about to end this thread and take over
            return
        try:
            if self._connection is None:
                self._connect()
            else:
                self._exchange(self._connection, _IDLE_S)
            self._settle()
        except OutboxError as exc:
            self._outbox_log.trouble(exc.cause, "outbox cannot be used", str(exc))
            self._hold_until_mono_s = time.monotonic() + 1.0
            time.sleep(_IDLE_S)  # acknowledgements wait in the socket meanwhile

    def _connect(self) -> None:
        wait_s = self._next_attempt_mono_s - time.monotonic()
        if wait_s > 0:
            self._pause(min(wait_s, _IDLE_S))
            return
        try:
            connection = self._open()
        except (AgentError, OSError, ValueError) as exc:
            kind = "setup" if isinstance(exc, _SETUP_ERRORS) else "away"
            reason = f"{self._config.host}:{self._config.port}: {exc}; trying on"
            self._broker_log.trouble(kind, "broker cannot be reached", reason)
            self._next_attempt_mono_s = time.monotonic() + self._backoff.next_s()
            return
        self._connection = connection

    def _open(self) -> Connection:
        commands, credentials = f"{self._base_topic}/cmd/", self._credentials.take()
        connection = Connection(self._config, self._client_id, self._will, commands, credentials)
        connection.open()
        self._credentials.note_broker(connection.broker_certificate)
        return connection

    def _pause(self, seconds: float) -> None:
        """Wait, or until something wakes the publisher: a stop must not wait for the next attempt."""
        if select.select([self._wake_out], [], [], seconds)[0]:
            drain(self._wake_out)

    def _exchange(self, connection: Connection, timeout_s: float) -> None:
        """One turn: send what the window allows, wait for the network, take what came."""
        if connection.is_up:
            if not self._is_connected:
                self._come_up(connection)
            if not self._is_outdated(connection):
                self._fill(connection)
        connection.step(self._wake_out, min(timeout_s, PACE_S) if self._replay.is_held_back else timeout_s)
        self._take_acks(connection)
        for request in connection.commands:
            self._commands.submit(request)
        connection.commands.clear()
        for name, why in connection.ignored:
            self._on_ignored(name, why)
        connection.ignored.clear()
        silent_s = time.monotonic() - self._last_ack_mono_s
        if connection.is_up and self._in_flight and silent_s > NO_ACK_S:
            log.warning("broker acknowledges nothing", silent_s=round(silent_s))
            connection.drop()
        if connection.ended is not None:
            self._lose(connection, *connection.ended)
        elif self._is_outdated(connection):
            self._renew(connection)

    def _is_outdated(self, connection: Connection) -> bool:
        # A stop says its last word on the connection that there is.
        is_current = connection.credentials is None or self._credentials.is_current(connection.credentials)
        return not (is_current or self._is_stopping)

    def _renew(self, connection: Connection) -> None:
        """Leave in good order, so that no will is published, and sign on with the renewed credentials at once."""
        now = time.monotonic()
        self._leave_by_mono_s = self._leave_by_mono_s or now + RENEW_S
        if self._in_flight and now < self._leave_by_mono_s:
            return
        self._leave(connection)
        self._take_back([sent.row for sent in self._in_flight.values() if sent.row is not None])
        self._in_flight.clear()
        self._backoff.reset()
        self._next_attempt_mono_s = now

    def _come_up(self, connection: Connection) -> None:
        self._broker_log.over()
        self._connections += 1
        self._is_connected = True
        self._up_since_mono_s = self._last_ack_mono_s = time.monotonic()
        self._replay.all_is_late(self._outbox.last_id)
        # Late rows that were in flight at a loss go first, one at a time, doubling with each acknowledgement: a message
        # that closes the connection is then met alone and can be told from its neighbours. They are the first of the
        # backlog anyway; live ones that were in flight have their turn in it.
        self._window = 1 if self._suspects else connection.window
        with self._retained_lock:
            self._unsent_retained = dict.fromkeys(self._retained)

    def _lose(self, connection: Connection, event: str, reason: str) -> None:
        self._broker_log.trouble(reason if event == REJECTED else "away", event, reason)
        is_steady = self._is_connected and time.monotonic() - self._up_since_mono_s > STEADY_S
        self._leave(connection)
        rows = [sent.row for sent in self._in_flight.values() if sent.row is not None]
        suspect = rows[0] if len(rows) == len(self._in_flight) == 1 else None
        self._in_flight.clear()
        is_struck = suspect is not None and self._strike(suspect, connection)
        if suspect is not None and is_struck and self._is_poison(suspect, connection):
            self._refuse(suspect, f"the broker closes the connection when it gets this message: {reason}")
            rows.remove(suspect)
        self._take_back(rows)
        if is_steady or is_struck:  # one message is in the way, not the broker: the others must not wait for long
            self._backoff.reset()
        self._next_attempt_mono_s = time.monotonic() + self._backoff.next_s()

    def _take_back(self, rows: list[Stored]) -> None:
        self._suspects = [row.id for row in rows if self._replay.is_late(row.id)]
        self._outbox.release([row.id for row in rows])

    def _leave(self, connection: Connection) -> None:
        self._leave_by_mono_s = None
        connection.close()
        self._connection = None
        self._is_connected = False

    def _strike(self, row: Stored, connection: Connection) -> bool:
        """Count that `row` was lost alone, where that says something about it; tell whether it did."""
        if connection.end_code == _PACKET_TOO_LARGE:
            return True
        # A broker that is sick, not offended, would strike any message: it must have taken another one just before.
        if not connection.has_delivered or connection.end_code == _KEEP_ALIVE_TIMEOUT:
            return False
        last, strikes = self._strikes
        self._strikes = (row.id, strikes + 1 if last == row.id else 1)
        return True

    def _is_poison(self, row: Stored, connection: Connection) -> bool:
        return connection.end_code == _PACKET_TOO_LARGE or self._strikes == (row.id, STRIKES)

    def _fill(self, connection: Connection) -> None:
        # Rows that the disk does not let go of hold up other rows only: states must go out all the same.
        while self._window > len(self._in_flight) and (retained := self._next_retained()) is not None:
            self._send(connection, retained)
        while self._window > len(self._in_flight) and (answer := self._commands.next_answer()) is not None:
            self._send(connection, answer.message, answer.correlation)
        if self._free() > 0 and time.monotonic() >= self._hold_until_mono_s:
            rows = self._next_rows(self._free())
            self._outbox_log.over()
            for row in rows:
                self._send_row(connection, row)

    def _next_rows(self, limit: int) -> list[Stored]:
        if self._suspects:
            rows = self._outbox.take_these(self._suspects, limit)
            sent = {sent.row.id for sent in self._in_flight.values() if sent.row is not None}
            if rows or sent.intersection(self._suspects):
                return rows
            self._suspects = []  # all are through, or have gone
        backlog = self._replay.backlog(self._outbox.last_id)
        rows = self._outbox.take(limit, backlog)
        self._replay.sent(sum(row.id <= backlog.until_id for row in rows))
        return rows

    def _free(self) -> int:
        # What could not be deleted or set aside yet counts too: a full disk must stop the stream, not repeat it.
        return self._window - len(self._in_flight) - len(self._delivered) - len(self._refused)

    def _next_retained(self) -> Message | None:
        with self._retained_lock:
            if not self._unsent_retained:
                return None
            topic = next(iter(self._unsent_retained))
            del self._unsent_retained[topic]
            return Message(topic, self._retained[topic], retain=True)

    def _send_row(self, connection: Connection, row: Stored) -> None:
        message = row.message
        if self._replay.is_late(row.id) and message.content_type == "application/json":
            message = replace(message, payload=as_replayed(message.payload))
        if message.expiry_s is not None:
            message = replace(message, expiry_s=max(1, int(message.expiry_s - row.age_s)))
        self._send(connection, message, row=row)

    def _send(
        self, connection: Connection, message: Message, correlation: bytes | None = None, row: Stored | None = None
    ) -> None:
        sent = _Sent(message.topic, row)
        if connection.is_too_large(message):
            self._give_up(sent, f"larger than the broker's maximum packet of {connection.max_packet} bytes")
            return
        if not self._in_flight:
            self._last_ack_mono_s = time.monotonic()
        try:
            mid = connection.publish(message, correlation)
        except ValueError as exc:
            self._give_up(sent, f"MQTT cannot carry it: {exc}")
            return
        self._in_flight[mid] = sent

    def _take_acks(self, connection: Connection) -> None:
        for mid, code in connection.acks:
            sent = self._in_flight.pop(mid, None)
            if sent is None:
                continue
            self._last_ack_mono_s = time.monotonic()
            if sent.row is not None:
                self._grow_window(connection)
            if code.value == _QUOTA_EXCEEDED and sent.row is not None:
                # The one refusal that time heals; the row keeps its place.
                self._outbox.release([sent.row.id])
                self._hold_until_mono_s = time.monotonic() + 1.0
            elif code.is_failure:
                self._give_up(sent, str(code))
            else:
                self._published += 1
                connection.has_delivered = True
                if sent.row is not None:
                    self._delivered.append(sent.row.id)
        connection.acks.clear()

    def _grow_window(self, connection: Connection) -> None:
        self._window = min(connection.window, self._window * 2)

    def _give_up(self, sent: _Sent, reason: str) -> None:
        if sent.row is not None:
            self._refuse(sent.row, reason)
        else:
            self._refusals += 1
            log.warning("broker refused a message", topic=sent.topic, reason=reason)

    def _refuse(self, row: Stored, reason: str) -> None:
        self._refusals += 1
        self._refused.append((row, reason))
        log.warning("broker refused a message, set aside", topic=row.message.topic, reason=reason)

    def _settle(self) -> None:
        """Write to disk what became of the rows; what the disk refuses is tried again next time."""
        if self._delivered:
            self._outbox.delete(self._delivered)
            self._delivered.clear()
        while self._refused:
            self._outbox.refuse(*self._refused[0])
            self._refused.pop(0)

    def _drain(self, deadline_mono_s: float) -> None:
        """Go on until everything is acknowledged or the time is up."""
        while self._connection is not None and time.monotonic() < deadline_mono_s:
            try:
                self._exchange(self._connection, 0.05)
                self._settle()
            except OutboxError as exc:
                self._outbox_log.trouble(exc.cause, "outbox cannot be used", str(exc))
                return
            if self._is_connected and not (self._in_flight or self._unsent_retained or self._outbox.depth()):
                return

    def _say_offline(self, deadline_mono_s: float, last_word: bytes | None) -> None:
        """Publish `last_word` in the will's place: a clean end withholds the will."""
        connection = self._connection
        if connection is None:
            return
        if not connection.is_up:
            self._leave(connection)
            return
        word = self._will if last_word is None else replace(self._will, payload=last_word)
        mid = connection.publish(word)
        self._in_flight[mid] = _Sent(self._will.topic, None)
        while mid in self._in_flight and connection.ended is None and time.monotonic() < deadline_mono_s:
            connection.step(self._wake_out, 0.05)
            self._take_acks(connection)
        self._leave(connection)
        with contextlib.suppress(OutboxError):  # undeleted rows are sent again: duplicates are allowed
            self._settle()
