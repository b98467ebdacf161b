"""One connection to the broker: the only paho import.

Every connection gets a paho client of its own, which knows nothing of the last one: what was in flight is sent again
by the publisher, in order and within the window, where paho would send all of it at once (paho #492) or a poison
message for ever. One thread owns client and socket, so no callback races with a publish (paho #226) and none can kill
a loop that nobody watches.
"""

import contextlib
import hashlib
import os
import select
import socket
import ssl
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import paho.mqtt.client as paho
import structlog
from paho.mqtt.enums import CallbackAPIVersion
from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.properties import Properties
from paho.mqtt.reasoncodes import ReasonCode
from paho.mqtt.subscribeoptions import SubscribeOptions

from kizu_agent.credentials import CredentialKeeper, Credentials, load_credentials
from kizu_agent.errors import AgentError
from kizu_agent.records import CommandRequest, Message
from kizu_agent.settings import MqttConfig

log = structlog.get_logger(__name__)

WINDOW = 20
"""At most so many messages are with the broker and not yet acknowledged."""
CONNECT_TIMEOUT_S = 5.0
"""For the TCP connection and the TLS handshake, and again for the broker's answers to CONNECT and SUBSCRIBE."""
MAX_COMMAND_BYTES = 256 * 2**10
MAX_USER = 128
REJECTED = "broker rejects the connection"
_UNSPECIFIED = 0x80
_WITH_WILL = 0x04


@dataclass(frozen=True)
class Heard:
    """A message that came on one of a connection's own subscriptions."""

    topic: str
    payload: bytes
    is_retained: bool


class Connection:
    """One connection to the broker, from CONNECT to its end; used by one thread, never again after its end.

    It signs on with `credentials`, None: with what the configured files hold when it is opened. What comes below
    `commands_topic` are commands; what comes on `subscriptions` (QoS 1) is `heard`, retained or not.
    """

    def __init__(
        self,
        config: MqttConfig,
        client_id: str,
        will: Message | None,
        commands_topic: str | None,
        credentials: Credentials | None = None,
        subscriptions: Sequence[str] = (),
    ) -> None:
        self._config = config
        self.credentials = credentials
        self._is_v5 = config.protocol == "5"
        self._commands_topic = commands_topic
        self._subscriptions = tuple(subscriptions)
        self._opened_mono_s = time.monotonic()
        self.is_up = False
        """The broker took CONNECT and, where commands are wanted, answered SUBSCRIBE."""
        self.ended: tuple[str, str] | None = None
        """What happened and why, once it has ended."""
        self.has_delivered = False
        """A message was acknowledged on it."""
        self.end_code = 0
        """The reason code of its end, MQTT 5 numbers."""
        self._is_answered = False
        self.window = WINDOW
        self.max_packet: int | None = None
        self.acks: list[tuple[int, ReasonCode]] = []
        self.commands: list[CommandRequest] = []
        self.heard: list[Heard] = []
        self.fences: list[int] = []
        """Fences that the broker has passed, see `fence`."""
        self.ignored: list[tuple[str, Literal["retained", "oversized"]]] = []
        """Names of commands that go no further, and why."""
        self._client = self._make_client(client_id, will)

    def open(self) -> None:
        """Send CONNECT. Raises AgentError, OSError or ValueError where settings, files or the network do not serve."""
        config = self._config
        credentials = self.credentials = self.credentials or load_credentials(config)
        if credentials.context is not None:
            self._client.tls_set_context(credentials.context)
        if credentials.username is not None:
            password = credentials.password
            self._client.username_pw_set(
                credentials.username, None if password is None else password.get_secret_value()
            )
        options: dict[str, Any] = {}
        if self._is_v5:
            properties = _new_properties(PacketTypes.CONNECT)
            properties.MaximumPacketSize = MAX_COMMAND_BYTES
            if self._subscriptions:
                properties.SessionExpiryInterval = 0  # the default, but Sparkplug wants it said
            options = {"clean_start": True, "properties": properties}
        self._client.connect(config.host, config.port, config.keepalive_s, **options)
        if isinstance(sock := self._client.socket(), socket.socket):
            # A verdict must not wait until the broker has acknowledged the packet before it (Nagle's algorithm).
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    @property
    def broker_certificate(self) -> bytes | None:
        """The certificate (DER) that the broker showed; None without TLS, or where there is no connection."""
        sock = self._client.socket()
        return sock.getpeercert(binary_form=True) if isinstance(sock, ssl.SSLSocket) else None

    @property
    def tls_version(self) -> str | None:
        """As OpenSSL calls it, `TLSv1.3`; None without TLS, or where there is no connection."""
        sock = self._client.socket()
        return sock.version() if isinstance(sock, ssl.SSLSocket) else None

    def step(self, wake: socket.socket, timeout_s: float) -> None:
        """Wait for the network or `wake`, at most `timeout_s`, and do what is due; never raises."""
        try:
            self._step(wake, timeout_s)
        except Exception as exc:  # noqa: BLE001 - paho's parser meets bytes from outside
            self._end("broker lost", f"the broker's packet could not be handled: {type(exc).__name__}: {exc}")
        if self.ended is None and self._client.socket() is None:
            self._end("broker lost", self._how_it_closed())
        if self.ended is None and not self.is_up and time.monotonic() > self._opened_mono_s + 2 * CONNECT_TIMEOUT_S:
            self._end("broker does not answer", "no answer to CONNECT or SUBSCRIBE")

    def publish(self, message: Message, correlation: bytes | None = None) -> int:
        """Hand `message` to the socket and give its packet id. Raises ValueError where MQTT cannot carry it."""
        properties = self._properties(message, correlation)
        return self._client.publish(message.topic, message.payload, message.qos, message.retain, properties).mid

    def fence(self, topic: str) -> int | None:
        """Ask for a sign that the broker has read all that was sent before; its number, which comes into `fences`.

        A message of QoS 0 is not acknowledged. An UNSUBSCRIBE from a `topic` that was never subscribed changes nothing,
        and it is: MQTT 3.1.1 and 5, 3.10.4. None: the connection is ending.
        """
        return self._client.unsubscribe(topic)[1]

    def is_too_large(self, message: Message) -> bool:
        """Tell whether the broker would end the connection because of its size; only MQTT 5 says so beforehand."""
        if self.max_packet is None:
            return False
        # Fixed header at most 5 bytes, topic length and packet id 2 each, properties with their own headers.
        head = 9 + len(message.topic.encode()) + len(message.content_type) + 16
        return head + len(message.payload) > self.max_packet

    def close(self, is_with_will: bool = False) -> None:
        """End it so that the broker does not publish the will, where the socket still takes a DISCONNECT.

        `is_with_will`: in MQTT 5 it publishes the will all the same (reason 0x04); 3.1.1 cannot say so.
        """
        is_said = is_with_will and self._is_v5
        self._client.disconnect(ReasonCode(PacketTypes.DISCONNECT, identifier=_WITH_WILL) if is_said else None)
        self.drop()

    def drop(self) -> None:
        """End it without a word: the broker publishes the will."""
        if (sock := self._client.socket()) is not None:
            sock.close()
        self._end("broker lost", "closed by the agent")

    def _make_client(self, client_id: str, will: Message | None) -> paho.Client:
        client = paho.Client(
            CallbackAPIVersion.VERSION2,
            client_id,
            clean_session=None if self._is_v5 else True,
            protocol=paho.MQTTv5 if self._is_v5 else paho.MQTTv311,
            reconnect_on_failure=False,
        )
        client.connect_timeout = CONNECT_TIMEOUT_S
        if will is not None:
            client.will_set(will.topic, will.payload, will.qos, will.retain)
        client.on_connect = self._on_connect
        client.on_subscribe = self._on_subscribe
        client.on_disconnect = self._on_disconnect
        client.on_unsubscribe = self._on_unsubscribe
        client.on_publish = self._on_publish
        client.on_message = self._on_message
        return client

    def _step(self, wake: socket.socket, timeout_s: float) -> None:
        sock = self._client.socket()
        if sock is None:
            return
        is_tls_pending = isinstance(sock, ssl.SSLSocket) and sock.pending() > 0
        poll = select.poll()
        poll.register(wake, select.POLLIN)
        poll.register(sock, select.POLLIN | (select.POLLOUT if self._client.want_write() else 0))
        ready = dict(poll.poll(0 if is_tls_pending else timeout_s * 1000))
        at_socket = ready.get(sock.fileno(), 0)
        if wake.fileno() in ready:
            drain(wake)
        if is_tls_pending or at_socket & ~select.POLLOUT:
            self._client.loop_read()
        if at_socket & select.POLLOUT:
            self._client.loop_write()
        self._client.loop_misc()

    def _properties(self, message: Message, correlation: bytes | None) -> Properties | None:
        if not self._is_v5:
            return None
        properties = _new_properties(PacketTypes.PUBLISH)
        properties.ContentType = message.content_type
        if message.expiry_s is not None:
            properties.MessageExpiryInterval = message.expiry_s
        if correlation is not None:
            properties.CorrelationData = correlation
        return properties

    def _end(self, kind: str, reason: str) -> None:
        self.is_up = False
        if self.ended is None:
            self.ended = (kind, reason)

    def _on_connect(
        self, client: paho.Client, _data: object, _flags: object, code: ReasonCode, properties: Properties | None
    ) -> None:
        self._is_answered = True
        if code.is_failure:
            self._end(REJECTED, f"{code}; see user name, password and the broker's access rules")
            return
        self.max_packet = getattr(properties, "MaximumPacketSize", None)
        self.window = min(WINDOW, getattr(properties, "ReceiveMaximum", WINDOW))
        if self._subscriptions:
            client.subscribe([(topic, 1) for topic in self._subscriptions])
        elif self._commands_topic is None:
            self.is_up = True
        elif self._is_v5:
            # 2: do not even send retained commands; and show the flag of one that is published with it just now.
            options = SubscribeOptions(qos=1, retainAsPublished=True, retainHandling=2)
            client.subscribe(self._commands_topic + "+", options=options)
        else:
            client.subscribe(self._commands_topic + "+", qos=1)

    def _on_subscribe(
        self, _client: paho.Client, _data: object, _mid: int, codes: list[ReasonCode], _properties: object
    ) -> None:
        if any(code.is_failure for code in codes):
            topics = self._subscriptions or self._commands_topic
            log.warning("broker refuses commands", topic=topics, reason=", ".join(map(str, codes)))
        self.is_up = self.ended is None

    def _on_disconnect(
        self, _client: paho.Client, _data: object, _flags: object, code: ReasonCode, _properties: object
    ) -> None:
        self.end_code = code.value
        # paho has no better word for a connection that ended without a DISCONNECT.
        is_bare = code.value == _UNSPECIFIED
        self._end("broker lost", self._how_it_closed() if is_bare else str(code))

    def _how_it_closed(self) -> str:
        # With TLS 1.3 a client learns only after the handshake that the broker takes no such certificate, or none.
        is_unheard = self._config.tls is not None and not self._is_answered
        return "the connection was closed" + (" at once; does the broker take this certificate?" if is_unheard else "")

    def _on_unsubscribe(
        self, _client: paho.Client, _data: object, mid: int, _codes: list[ReasonCode], _properties: object
    ) -> None:
        self.fences.append(mid)

    def _on_publish(self, _client: paho.Client, _data: object, mid: int, code: ReasonCode, _properties: object) -> None:
        self.acks.append((mid, code))

    def _on_message(self, _client: paho.Client, _data: object, message: paho.MQTTMessage) -> None:
        if any(paho.topic_matches_sub(topic, message.topic) for topic in self._subscriptions):
            self.heard.append(Heard(message.topic, bytes(message.payload), message.retain))
            return
        name = message.topic.rpartition("/")[2]
        if message.retain or len(message.payload) > MAX_COMMAND_BYTES:
            self.ignored.append((name, "retained" if message.retain else "oversized"))
            return
        response_topic = getattr(message.properties, "ResponseTopic", None)
        correlation = getattr(message.properties, "CorrelationData", None)
        user = _user_of(message.properties)
        self.commands.append(CommandRequest(name, bytes(message.payload), response_topic, correlation, user))


@dataclass(frozen=True)
class Greeting:
    """What a broker that takes us says of itself; `certificate` (DER) and `tls` (its version) None without TLS."""

    max_packet: int | None
    certificate: bytes | None
    tls: str | None


def greet_broker(config: MqttConfig, credentials: Credentials | None = None) -> Greeting:
    """Log in at the broker under a name of its own, log out, and say what was found.

    Raises AgentError or OSError that says why it does not work.
    """
    connection = Connection(config, f"kizu-check-{os.getpid()}", None, None, credentials)
    never, other_end = socket.socketpair()
    try:
        connection.open()
        while not connection.is_up and connection.ended is None:
            connection.step(never, 0.1)
        if connection.ended is not None:
            raise AgentError(": ".join(connection.ended))
        return Greeting(connection.max_packet, connection.broker_certificate, connection.tls_version)
    except ssl.SSLError as exc:  # a ValueError too, where a certificate is not as it should be
        raise AgentError(f"TLS with the broker does not come about: {exc}") from exc
    except ValueError as exc:
        raise AgentError(f"the settings for the broker cannot be used: {exc}") from exc
    finally:
        connection.close()
        never.close()
        other_end.close()


def try_broker(config: MqttConfig, keeper: CredentialKeeper | None = None) -> str:
    """Say what `greet_broker` finds, in words; `keeper` learns of the broker's certificate. Raises as that does."""
    keeper = keeper or CredentialKeeper(config)
    greeting = greet_broker(config, keeper.take())
    keeper.note_broker(greeting.certificate)
    limit = "" if greeting.max_packet is None else f", packets of at most {greeting.max_packet} bytes"
    return f"takes connections with MQTT {config.protocol}{f' over {greeting.tls}' if greeting.tls else ''}{limit}"


def _user_of(properties: Properties | None) -> str | None:
    """Who the request says it is from: the MQTT 5 user property `user`, in so far as it is a name."""
    pairs: list[tuple[str, str]] = getattr(properties, "UserProperty", None) or []
    found = next((value for key, value in pairs if key == "user"), "")
    return found[:MAX_USER] if found.isprintable() and found else None


def client_id(topic: str) -> str:
    """An id for the one connection that publishes on `topic`, in the 23 characters that every broker takes."""
    return f"kizu-{hashlib.sha256(topic.encode()).hexdigest()[:16]}"


def drain(wake: socket.socket) -> None:
    """Take everything that lies in a wake-up socket; it must not block."""
    with contextlib.suppress(BlockingIOError):
        while wake.recv(4096):
            pass


def _new_properties(packet_type: int) -> Properties:
    return Properties(packet_type)  # type: ignore[no-untyped-call]
