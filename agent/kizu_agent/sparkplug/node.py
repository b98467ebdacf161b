"""The edge node: one thread that owns the connection, the session and what is under way."""

import contextlib
import select
import socket
import time
from collections.abc import Callable, Iterable, Mapping

import structlog

from kizu_agent.config import Config
from kizu_agent.connection import REJECTED, Connection, Heard, client_id, drain
from kizu_agent.credentials import CredentialKeeper
from kizu_agent.errors import AgentError
from kizu_agent.health import Figures
from kizu_agent.outage import Backoff, OutageLog
from kizu_agent.payloads import StatePayload, StatusPayload
from kizu_agent.records import Message
from kizu_agent.replay import PACE_S
from kizu_agent.sparkplug import metrics
from kizu_agent.sparkplug.commands import HostCommands
from kizu_agent.sparkplug.ids import EdgeNode, state_topic
from kizu_agent.sparkplug.payload import Metric, message_class
from kizu_agent.sparkplug.primary_host import PrimaryHost
from kizu_agent.sparkplug.results import Results
from kizu_agent.sparkplug.session import Session, death
from kizu_agent.sparkplug.sink import SparkplugSink
from kizu_agent.sparkplug.store import Store, open_store
from kizu_agent.stages import Stage

log = structlog.get_logger(__name__)

NO_SIGN_S = 30.0
"""A broker that owes a sign for so long is left and connected to again."""
STEADY_S = 10.0
_IDLE_S = 0.5


def open_node(
    config: Config, commands: HostCommands, on_failure: Callable[[], None], credentials: CredentialKeeper
) -> "Node | None":
    """Make the configured node with its store; None where none is wanted. Raises AgentError."""
    if not config.sparkplug.enabled:
        return None
    message_class()  # before the store is opened: a build without the schema leaves nothing behind
    return Node(config, open_store(config), commands, on_failure, credentials)


class Node:
    """Speaks Sparkplug B for the agent, on a connection of its own; the will of one can only be one (ADR 0018).

    Results go through `store` and are deleted when the broker has read them; what was committed before the present
    births goes as history. States and status go when they change. `credentials` are looked after by somebody else: when
    they are renewed the node says NDEATH and signs on with the new ones.
    """

    def __init__(
        self,
        config: Config,
        store: Store,
        commands: HostCommands,
        on_failure: Callable[[], None],
        credentials: CredentialKeeper | None = None,
    ) -> None:
        """Build it; nothing runs yet."""
        self._mqtt, self._settings = config.mqtt, config.sparkplug
        self._id = EdgeNode.of(config)
        self.store, self._commands = store, commands
        self._credentials = credentials or CredentialKeeper(config.mqtt)
        self._credentials.attach(lambda: self.is_connected, self.wake)
        self.sink = SparkplugSink(config, store, self.wake)
        self._devices = tuple(camera.name for camera in config.cameras)
        self._node_values = metrics.node_blank()
        self._device_values = {name: metrics.device_blank(self._settings.images) for name in self._devices}
        self._stage = Stage("sparkplug", self._work, on_failure)
        self._connection: Connection | None = None
        self._session: Session | None = None
        self._bd_seq = 0
        self._host = PrimaryHost(self._settings.primary_host)
        self._results = Results(self._settings, store, self._ask_fence)
        self._told_status: StatusPayload | None = None
        self._backoff = Backoff(0.5, 30.0)
        self._broker_log = OutageLog("broker (sparkplug)")
        self._next_attempt_mono_s = self._up_since_mono_s = 0.0
        self._reborn_mono_s = float("-inf")
        self._is_rebirth_wanted = self._is_stopping = False
        self._publications = self._rebirths = 0
        self._wake_in, self._wake_out = socket.socketpair()
        self._wake_in.settimeout(0)
        self._wake_out.settimeout(0)

    def start(self) -> None:
        """Start connecting, whether or not broker and host are there; idempotent."""
        self._stage.start()

    def wake(self) -> None:
        """There is something new; without it the node looks twice a second."""
        with contextlib.suppress(OSError):
            self._wake_in.send(b"\0")

    def rebirth(self) -> None:
        """Send all births again, as a host may ask for; from any thread, at most one in `rebirth_pause_s`."""
        self._is_rebirth_wanted = True
        self.wake()

    def stop(self, deadline_s: float) -> None:
        """Send what can be sent within `deadline_s`, say NDEATH, disconnect; the rest stays in the store."""
        deadline_mono_s = time.monotonic() + deadline_s
        self._is_stopping = True
        self.wake()
        if not self._stage.stop(deadline_s):
            log.warning("sparkplug node did not end in time; unsent results stay in its store")
            return
        if self._connection is not None:
            # From here on this thread owns the connection.
            self._drain(deadline_mono_s - min(1.0, deadline_s / 4))
            self._say_death(deadline_mono_s)
        self._wake_in.close()
        self._wake_out.close()

    @property
    def is_in_session(self) -> bool:
        """Whether the births are out: broker there, and the primary host where one is waited for."""
        return self._session is not None

    @property
    def is_connected(self) -> bool:
        """Whether the broker is there."""
        connection = self._connection
        return connection is not None and connection.is_up

    @property
    def progress_mono_ns(self) -> int:
        """When the thread last came round; as the publisher's, it may be half a minute ago while connecting."""
        return self._stage.progress_mono_ns

    @property
    def failure(self) -> BaseException | None:
        """The bug that ended the thread, None while it lives."""
        return self._stage.failure

    def figures(self) -> Figures:
        """Give the numbers behind the metrics; counts since the start, but the losses since the store was made."""
        losses = [({"cause": cause, "kind": kind}, count) for (cause, kind), count in self.store.losses().items()]
        return {
            "sparkplug_in_session": [({}, self.is_in_session)],
            "sparkplug_messages_total": [({}, self._publications)],
            "sparkplug_rebirths_total": [({}, self._rebirths)],
            "sparkplug_waiting": [({}, self.store.depth())],
            "sparkplug_losses_total": losses,
            "sparkplug_commands_total": [({"outcome": name}, n) for name, n in self._commands.outcomes.items()],
        }

    def close(self) -> None:
        """Close the store, after `stop`; idempotent."""
        self.store.close()

    # -- the thread --------------------------------------------------------------------------------------------------

    def _work(self) -> None:
        if self._is_stopping:
            time.sleep(0.01)  # `stop` is about to end this thread and take over
            return
        if self._connection is None:
            self._connect()
        else:
            self._exchange(self._connection, _IDLE_S)

    def _connect(self) -> None:
        wait_s = self._next_attempt_mono_s - time.monotonic()
        if wait_s > 0:
            if select.select([self._wake_out], [], [], min(wait_s, _IDLE_S))[0]:
                drain(self._wake_out)
            return
        self._bd_seq = self.store.next_bd_seq()
        topics = [self._id.topic("NCMD"), self._id.device_topic("DCMD", "+")]
        topics += [state_topic(self._settings.primary_host)] if self._settings.primary_host else []
        try:
            connection = self._open(topics)
        except (AgentError, OSError, ValueError) as exc:
            reason = f"{self._mqtt.host}:{self._mqtt.port}: {exc}; trying on"
            self._broker_log.trouble("away", "broker cannot be reached (sparkplug)", reason)
            self._next_attempt_mono_s = time.monotonic() + self._backoff.next_s()
            return
        self._connection = connection

    def _open(self, topics: list[str]) -> Connection:
        will, credentials = death(self._id, self._bd_seq), self._credentials.take()
        connection = Connection(self._mqtt, client_id(self._id.topic("NBIRTH")), will, None, credentials, topics)
        connection.open()
        self._credentials.note_broker(connection.broker_certificate)
        return connection

    def _exchange(self, connection: Connection, timeout_s: float) -> None:
        """One turn: take what came, say what is due, wait for the network."""
        if connection.is_up and self._session is None and self._host.is_online:
            self._begin(connection)
        if connection.is_up and self._session is not None:
            self._tell(self._session)
        connection.step(self._wake_out, min(timeout_s, PACE_S) if self._results.is_pressed else timeout_s)
        connection.acks.clear()
        self._results.passed(connection.fences)
        connection.fences.clear()
        for heard in connection.heard:
            self._hear(heard)
        connection.heard.clear()
        if self._results.silent_s > NO_SIGN_S:
            log.warning("broker gives no sign (sparkplug)", silent_s=round(self._results.silent_s))
            connection.drop()
        if connection.ended is not None:
            self._lose(connection, *connection.ended)
        elif self._session is not None and not self._host.is_online:
            log.info("sparkplug session ends: the primary host is offline")
            self._leave(connection)
        elif not (self._is_stopping or self._credentials.is_current(connection.credentials)):
            log.info("sparkplug session ends: renewed credentials are there")
            self._backoff.reset()
            self._leave(connection)

    def _begin(self, connection: Connection) -> None:
        self._broker_log.over()
        self._up_since_mono_s = time.monotonic()
        self._session = Session(
            self._id,
            self._bd_seq,
            self._sender(connection),
            self._settings.include_datatype,
            self._node_values,
            self._device_values,
        )
        self._give_birth(self._session)
        self._results.begin()

    def _give_birth(self, session: Session) -> None:
        """Send all births; what was committed before them is history from now on."""
        self._is_rebirth_wanted, self._reborn_mono_s = False, time.monotonic()
        last_id, latest = self.sink.latest()
        self._results.all_is_late(last_id)
        states, status = self.sink.states()
        if status is not None:
            _note(self._node_values, metrics.of_status(status))
        self._told_status = status
        _note(self._node_values, self._history())
        for device, values in self._device_values.items():
            _note(values, latest.get(device, ()))
            _note(values, self._present(device, states.get(device)))
        # Those that are lost too: a DBIRTH after data may only be a return (payloads-dbirth-order).
        session.begin(self._devices)
        self._come_and_go(session, states, is_coming=False)

    def _tell(self, session: Session) -> None:
        """Say everything that is due, in an order in which nothing old covers anything new."""
        if self._is_rebirth_wanted:
            # No data from the request to the births (operational-behavior-data-commands-rebirth-action-1).
            if time.monotonic() - self._reborn_mono_s < self._settings.rebirth_pause_s:
                return
            self._rebirths += 1
            self._give_birth(session)
        states, status = self.sink.states()
        self._come_and_go(session, states, is_coming=True)
        self._results.send(session)
        for device in tuple(session.devices):
            session.device_data(device, self._present(device, states.get(device)))
        self._come_and_go(session, states, is_coming=False)
        # With each status, and not with each result that comes and goes.
        if status is not None and status is not self._told_status:
            self._told_status = status
            session.node_data([*metrics.of_status(status), *self._history()])

    def _come_and_go(self, session: Session, states: Mapping[str, StatePayload], is_coming: bool) -> None:
        for device in self._devices:
            is_dead = _is_dead(states.get(device))
            if is_coming and not is_dead and device not in session.devices:
                _note(self._device_values[device], self._present(device, states.get(device)))
                session.birth(device)
            elif not is_coming and is_dead and device in session.devices:
                session.death(device)

    def _present(self, device: str, state: StatePayload | None) -> list[Metric]:
        """What holds now for a device beside its results."""
        found = metrics.of_thresholds(self._commands.effective(device))
        if state is None:
            return found
        # A result that was told already and has not reached the state yet is newer than the state's verdict.
        told = metrics.sequence_of(self._device_values[device])
        is_newest = state.last_result_seq is None or state.last_result_seq >= told
        return [*found, *metrics.of_state(state, is_newest)]

    def _history(self) -> list[Metric]:
        return metrics.of_history(self._results.waiting, self.store.losses().total())

    def _ask_fence(self) -> int | None:
        connection = self._connection
        return None if connection is None else connection.fence(f"{self._id.topic('NCMD')}/read")

    # -- what hosts say ----------------------------------------------------------------------------------------------

    def _hear(self, heard: Heard) -> None:
        _, _, kind, *rest = heard.topic.split("/")
        if heard.topic.startswith(state_topic("")):
            self._host.hear(heard.payload)
        elif heard.is_retained:
            self._commands.ignore("retained", heard.topic)
        elif kind == "NCMD":
            self._is_rebirth_wanted = self._commands.asks_for_rebirth(heard.payload) or self._is_rebirth_wanted
        elif rest[-1] not in self._devices:
            self._commands.ignore("unknown", heard.topic)
        elif self._commands.write(rest[-1], heard.payload):
            self._answer(rest[-1])

    def _answer(self, device: str) -> None:
        """Tell the thresholds that hold, changed or refused; births that are due tell them anyway."""
        if self._session is not None and device in self._session.devices and not self._is_rebirth_wanted:
            self._session.device_answer(device, metrics.of_thresholds(self._commands.effective(device)))

    # -- the end -----------------------------------------------------------------------------------------------------

    def _lose(self, connection: Connection, event: str, reason: str) -> None:
        self._broker_log.trouble(reason if event == REJECTED else "away", f"{event} (sparkplug)", reason)
        if self._session is not None and time.monotonic() - self._up_since_mono_s > STEADY_S:
            self._backoff.reset()
        if self._results.broken(reason):
            self._backoff.reset()
            log.warning("a result is set aside: the broker closes the connection over it", reason=reason)
        connection.close()
        self._forget()

    def _leave(self, connection: Connection) -> None:
        """Say NDEATH and leave; the node connects again, and waits for its primary host where that is gone.

        Source: operational-behavior-edge-node-termination-host-offline, -offline-reconnect.
        """
        if self._session is None:
            connection.close(is_with_will=True)
            self._forget()
            return
        self._results.fence()
        self._finish(connection, time.monotonic() + 1.0)
        self._results.left()
        self._forget()

    def _forget(self) -> None:
        self._connection = self._session = None
        self._host.disconnected()
        self._next_attempt_mono_s = time.monotonic() + self._backoff.next_s()

    def _finish(self, connection: Connection, deadline_mono_s: float) -> None:
        """Publish NDEATH, wait until the broker has it, and disconnect with the will as MQTT 5 has to."""
        mid = connection.publish(death(self._id, self._bd_seq))
        is_taken = False
        while not is_taken and connection.ended is None and time.monotonic() < deadline_mono_s:
            connection.step(self._wake_out, 0.05)
            is_taken = any(number == mid for number, _ in connection.acks)
            self._results.passed(connection.fences)
            connection.fences.clear()
        connection.close(is_with_will=True)

    def _drain(self, deadline_mono_s: float) -> None:
        """Go on until every result of a living device is read by the broker, or the time is up."""
        while (connection := self._connection) is not None and time.monotonic() < deadline_mono_s:
            self._results.fence()
            self._exchange(connection, PACE_S)
            if self._session is None or self._results.is_through:
                return

    def _say_death(self, deadline_mono_s: float) -> None:
        connection = self._connection
        if connection is None:
            return
        if self._session is None or not connection.is_up:
            connection.close(is_with_will=True)
        else:
            self._finish(connection, deadline_mono_s)
        self._results.left()
        self._connection = self._session = None

    def _sender(self, connection: Connection) -> Callable[[Message], bool]:
        def send(message: Message) -> bool:
            if connection.is_too_large(message):
                log.warning("larger than the broker takes", topic=message.topic, bytes=len(message.payload))
                return False
            connection.publish(message)
            self._publications += 1
            return True

        return send


def _note(values: metrics.Values, found: Iterable[Metric]) -> None:
    values.update({metric.name: metric for metric in found})


def _is_dead(state: StatePayload | None) -> bool:
    """Whether the camera is lost; of one that starts, or has ended, something is known."""
    return state is not None and state.condition == "lost"
