"""One connection to the broker: the only paho import.

Every connection gets a paho client of its own, which knows nothing of the last one: what was in flight is sent again
by the publisher, in order and within the window, where paho would send all of it at once (paho #492) or a poison
message for ever. One thread owns client and socket, so no callback races with a publish (paho #226) and none can kill
a loop that nobody watches.
"""

import contextlib
import os
import select
import socket
import ssl
import time
from typing import Any, Literal

import paho.mqtt.client as paho
import structlog
from paho.mqtt.enums import CallbackAPIVersion
from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.properties import Properties
from paho.mqtt.reasoncodes import ReasonCode
from paho.mqtt.subscribeoptions import SubscribeOptions

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


class _TlsSocket(ssl.SSLSocket):
    """Closes itself when the handshake fails, where paho leaves the socket to the garbage collector."""

    def do_handshake(self, block: bool = False) -> None:
        try:
            super().do_handshake(block)
        except BaseException:
            self.close()
            raise


class Connection:
    """One connection to the broker, from CONNECT to its end; used by one thread, never again after its end."""

    def __init__(self, config: MqttConfig, client_id: str, will: Message | None, commands_topic: str | None) -> None:
        self._config = config
        self._is_v5 = config.protocol == "5"
        self._commands_topic = commands_topic
        self._opened_mono_s = time.monotonic()
        self.is_up = False
        """The broker took CONNECT and, where commands are wanted, answered SUBSCRIBE."""
        self.ended: tuple[str, str] | None = None
        """What happened and why, once it has ended."""
        self.has_delivered = False
        """A message was acknowledged on it."""
        self.end_code = 0
        """The reason code of its end, MQTT 5 numbers."""
        self.window = WINDOW
        self.max_packet: int | None = None
        self.acks: list[tuple[int, ReasonCode]] = []
        self.commands: list[CommandRequest] = []
        self.ignored: list[tuple[str, Literal["retained", "oversized"]]] = []
        """Names of commands that go no further, and why."""
        self._client = self._make_client(client_id, will)

    def open(self) -> None:
        """Send CONNECT. Raises OSError or ValueError where host, port, TLS files or the network do not serve."""
        config = self._config
        if config.tls is not None:
            context = ssl.create_default_context(cafile=config.tls.ca_file)
            if config.tls.cert_file is not None:
                context.load_cert_chain(config.tls.cert_file, config.tls.key_file)
            context.sslsocket_class = _TlsSocket
            self._client.tls_set_context(context)
        options: dict[str, Any] = {}
        if self._is_v5:
            properties = _new_properties(PacketTypes.CONNECT)
            properties.MaximumPacketSize = MAX_COMMAND_BYTES
            options = {"clean_start": True, "properties": properties}
        self._client.connect(config.host, config.port, config.keepalive_s, **options)
        if isinstance(sock := self._client.socket(), socket.socket):
            # A verdict must not wait until the broker has acknowledged the packet before it (Nagle's algorithm).
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def step(self, wake: socket.socket, timeout_s: float) -> None:
        """Wait for the network or `wake`, at most `timeout_s`, and do what is due; never raises."""
        try:
            self._step(wake, timeout_s)
        except Exception as exc:  # noqa: BLE001 - paho's parser meets bytes from outside
            self._end("broker lost", f"the broker's packet could not be handled: {type(exc).__name__}: {exc}")
        if self.ended is None and self._client.socket() is None:
            self._end("broker lost", "the connection was closed")
        if self.ended is None and not self.is_up and time.monotonic() > self._opened_mono_s + 2 * CONNECT_TIMEOUT_S:
            self._end("broker does not answer", "no answer to CONNECT or SUBSCRIBE")

    def publish(self, message: Message, correlation: bytes | None = None) -> int:
        """Hand `message` to the socket and give its packet id. Raises ValueError where MQTT cannot carry it."""
        properties = self._properties(message, correlation)
        return self._client.publish(message.topic, message.payload, message.qos, message.retain, properties).mid

    def is_too_large(self, message: Message) -> bool:
        """Tell whether the broker would end the connection because of its size; only MQTT 5 says so beforehand."""
        if self.max_packet is None:
            return False
        # Fixed header at most 5 bytes, topic length and packet id 2 each, properties with their own headers.
        head = 9 + len(message.topic.encode()) + len(message.content_type) + 16
        return head + len(message.payload) > self.max_packet

    def close(self) -> None:
        """End it so that the broker does not publish the will, where the socket still takes a DISCONNECT."""
        self._client.disconnect()
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
        if self._config.username is not None:
            password = self._config.password
            client.username_pw_set(self._config.username, None if password is None else password.get_secret_value())
        client.on_connect = self._on_connect
        client.on_subscribe = self._on_subscribe
        client.on_disconnect = self._on_disconnect
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
        if code.is_failure:
            self._end(REJECTED, f"{code}; see user name, password and the broker's access rules")
            return
        self.max_packet = getattr(properties, "MaximumPacketSize", None)
        self.window = min(WINDOW, getattr(properties, "ReceiveMaximum", WINDOW))
        if self._commands_topic is None:
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
            log.warning("broker refuses commands", topic=self._commands_topic, reason=str(codes[0]))
        self.is_up = self.ended is None

    def _on_disconnect(
        self, _client: paho.Client, _data: object, _flags: object, code: ReasonCode, _properties: object
    ) -> None:
        self.end_code = code.value
        # paho has no better word for a connection that ended without a DISCONNECT.
        is_bare = code.value == _UNSPECIFIED
        self._end("broker lost", "the connection was closed" if is_bare else str(code))

    def _on_publish(self, _client: paho.Client, _data: object, mid: int, code: ReasonCode, _properties: object) -> None:
        self.acks.append((mid, code))

    def _on_message(self, _client: paho.Client, _data: object, message: paho.MQTTMessage) -> None:
        name = message.topic.rpartition("/")[2]
        if message.retain or len(message.payload) > MAX_COMMAND_BYTES:
            self.ignored.append((name, "retained" if message.retain else "oversized"))
            return
        response_topic = getattr(message.properties, "ResponseTopic", None)
        correlation = getattr(message.properties, "CorrelationData", None)
        user = _user_of(message.properties)
        self.commands.append(CommandRequest(name, bytes(message.payload), response_topic, correlation, user))


def try_broker(config: MqttConfig) -> str:
    """Log in at the broker under a name of its own, log out, and say what was found.

    Raises AgentError or OSError that says why it does not work.
    """
    connection = Connection(config, f"kizu-check-{os.getpid()}", None, None)
    never, other_end = socket.socketpair()
    try:
        connection.open()
        while not connection.is_up and connection.ended is None:
            connection.step(never, 0.1)
        if connection.ended is not None:
            raise AgentError(": ".join(connection.ended))
        limit = "" if connection.max_packet is None else f", packets of at most {connection.max_packet} bytes"
    except ValueError as exc:
        raise AgentError(f"the settings for the broker cannot be used: {exc}") from exc
    finally:
        connection.close()
        never.close()
        other_end.close()
    return f"takes connections with MQTT {config.protocol}{limit}"


def _user_of(properties: Properties | None) -> str | None:
    """Who the request says it is from: the MQTT 5 user property `user`, in so far as it is a name."""
    pairs: list[tuple[str, str]] = getattr(properties, "UserProperty", None) or []
    found = next((value for key, value in pairs if key == "user"), "")
    return found[:MAX_USER] if found.isprintable() and found else None


def drain(wake: socket.socket) -> None:
    """Take everything that lies in a wake-up socket; it must not block."""
    with contextlib.suppress(BlockingIOError):
        while wake.recv(4096):
            pass


def _new_properties(packet_type: int) -> Properties:
    return Properties(packet_type)  # type: ignore[no-untyped-call]
