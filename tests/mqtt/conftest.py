"""A real broker for each test that asks, independent listeners, and outboxes on real files."""

import contextlib
import shutil
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import paho.mqtt.client as paho
import pytest
from paho.mqtt.enums import CallbackAPIVersion

from kizu_agent.outbox import Outbox
from kizu_agent.publisher import Publisher
from kizu_agent.records import CommandAnswer, CommandRequest, Message
from kizu_agent.settings import MqttConfig, OutboxConfig

BASE = "acme/line/agent"


@pytest.fixture
def outbox_path(tmp_path: Path) -> Path:
    """Where a test keeps its outbox."""
    return tmp_path / "state" / "outbox.sqlite3"


@pytest.fixture
def outbox(outbox_path: Path) -> Iterator[Outbox]:
    """An empty outbox with the default caps."""
    box = Outbox(outbox_path, OutboxConfig())
    yield box
    box.close()


class Broker:
    """A private Mosquitto on loopback; `lines` are added to its configuration."""

    def __init__(self, folder: Path, lines: tuple[str, ...] = (), tls: tuple[str, ...] = ()) -> None:
        self.binary = shutil.which("mosquitto", path="/usr/sbin:/usr/local/sbin:/usr/bin:/opt/homebrew/sbin")
        if self.binary is None:
            pytest.fail(
                "these tests need a real broker: install mosquitto (apt-get install mosquitto), or run scripts/test"
            )
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        folder.mkdir(parents=True, exist_ok=True)
        self.log_path = folder / "mosquitto.log"
        self.config = folder / "mosquitto.conf"
        access = (
            ()
            if any(line.startswith(("allow_anonymous", "password_file")) for line in lines)
            else ("allow_anonymous true",)
        )
        # The user line: as root Mosquitto would change to a user that cannot read the test's folder.
        head = (f"listener {self.port} 127.0.0.1", *tls, "user root", "log_type all")
        self.config.write_text("\n".join((*head, *access, *lines)) + "\n")
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start it and wait until it listens."""
        with self.log_path.open("ab") as out:
            self.process = subprocess.Popen([str(self.binary), "-c", self.config], stdout=out, stderr=out)
        deadline = time.monotonic() + 10
        while time.monotonic() < deadline:
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", self.port), 1):
                return
            time.sleep(0.02)
        pytest.fail(f"mosquitto did not start: {self.log_path.read_text()}")

    def stop(self, number: int = signal.SIGTERM) -> None:
        """End it by a signal; SIGKILL for a crash."""
        if self.process is not None:
            self.process.send_signal(number)
            if number == signal.SIGTERM:
                self.process.send_signal(signal.SIGCONT)
            self.process.wait(10)
            self.process = None

    def kill(self) -> None:
        """Crash it."""
        self.stop(signal.SIGKILL)

    def mqtt(self, protocol: str = "5", **more: Any) -> MqttConfig:
        """The configuration of an agent at this broker."""
        return MqttConfig.model_validate({"host": "127.0.0.1", "port": self.port, "protocol": protocol, **more})


@pytest.fixture
def make_broker(tmp_path: Path) -> Iterator[Callable[..., Broker]]:
    """Give a maker of running brokers; its arguments are lines of their configuration."""
    brokers: list[Broker] = []

    def make(*lines: str, tls: tuple[str, ...] = (), is_running: bool = True) -> Broker:
        broker = Broker(tmp_path / f"broker{len(brokers)}", lines, tls)
        brokers.append(broker)
        if is_running:
            broker.start()
        return broker

    yield make
    for broker in brokers:
        broker.stop()


@pytest.fixture
def broker(make_broker: Callable[..., Broker]) -> Broker:
    """A broker that takes everybody."""
    return make_broker()


class Listener:
    """An independent client that keeps what it received, in order, and comes back after an outage."""

    def __init__(self, port: int, *topics: str, protocol: int = paho.MQTTv5, qos: int = 1) -> None:
        self.messages: list[paho.MQTTMessage] = []
        self.changed = threading.Condition()
        self.topics = topics
        self.subscribed = threading.Event()
        self.client = paho.Client(CallbackAPIVersion.VERSION2, protocol=protocol)
        # Back before the publisher, whose first wait is longer: what it misses while away nobody keeps for it.
        self.client.reconnect_delay_set(0.05, 0.05)  # type: ignore[arg-type]
        self.client.on_connect = lambda client, *_: client.subscribe([(topic, qos) for topic in topics])
        self.client.on_subscribe = lambda *_: self.subscribed.set()
        self.client.on_message = self._keep
        self.client.connect_async("127.0.0.1", port, keepalive=5)
        self.client.loop_start()

    def _keep(self, _client: object, _data: object, message: paho.MQTTMessage) -> None:
        with self.changed:
            self.messages.append(message)
            self.changed.notify_all()

    def payloads(self, topic: str | None = None) -> list[str]:
        """Payloads received so far, of one topic or all."""
        with self.changed:
            return [m.payload.decode() for m in self.messages if topic in (None, m.topic)]

    def wait_for(self, is_there: Callable[[list[paho.MQTTMessage]], object], timeout_s: float = 20) -> None:
        """Wait until the messages fulfil `is_there`."""
        with self.changed:
            if not self.changed.wait_for(lambda: is_there(self.messages), timeout_s):
                pytest.fail(f"not received: have {len(self.messages)}: {[m.payload[:60] for m in self.messages][-5:]}")

    def close(self) -> None:
        """End it."""
        self.client.disconnect()
        self.client.loop_stop()
        self.client._reset_sockets()  # paho leaves its inner pair to the garbage collector, which warns


@pytest.fixture
def listen() -> Iterator[Callable[..., Listener]]:
    """Give a maker of listeners that have subscribed; its arguments are the port and topics."""
    listeners: list[Listener] = []

    def make(port: int, *topics: str, **more: Any) -> Listener:
        listener = Listener(port, *topics, **more)
        listeners.append(listener)
        assert listener.subscribed.wait(10)
        return listener

    yield make
    for listener in listeners:
        listener.close()


@pytest.fixture
def make_publisher(outbox: Outbox) -> Iterator[Callable[..., Publisher]]:
    """Give a maker of started publishers on the test's outbox; its argument is their configuration."""
    publishers: list[Publisher] = []

    def echo(request: CommandRequest) -> CommandAnswer:
        return CommandAnswer(b"pong " + request.payload)

    def make(
        config: MqttConfig, on_command: Callable[[CommandRequest], CommandAnswer] = echo, replay_per_s: float = 1e6
    ) -> Publisher:
        will = Message(f"{BASE}/status", b'{"status": "offline"}', retain=True)
        publisher = Publisher(config, "agent", BASE, will, outbox, on_command, replay_per_s=replay_per_s)
        publishers.append(publisher)
        publisher.start()
        return publisher

    yield make
    for publisher in publishers:
        # Longer than its sleep between two attempts: one that is not gone by the deadline keeps its sockets.
        publisher.stop(2.0)
        assert publisher.failure is None


class SilentBroker:
    """A peer that takes CONNECT and SUBSCRIBE and never acknowledges a PUBLISH; `publishes` counts them."""

    def __init__(self) -> None:
        self.publishes: list[int] = []
        self._server = socket.create_server(("127.0.0.1", 0))
        self._peers: list[socket.socket] = []
        self._thread = threading.Thread(target=self._accept)
        self._thread.start()
        self._readers: list[threading.Thread] = []

    def mqtt(self, **more: Any) -> MqttConfig:
        """The configuration of an agent at this peer."""
        return MqttConfig.model_validate({"port": self._server.getsockname()[1], **more})

    def hang_up(self) -> None:
        """Close all connections."""
        for peer in self._peers:
            with contextlib.suppress(OSError):
                peer.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """End it."""
        self._server.shutdown(socket.SHUT_RDWR)
        self._server.close()
        self.hang_up()
        for thread in (self._thread, *self._readers):
            thread.join(10)
        for peer in self._peers:
            peer.close()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                peer, _ = self._server.accept()
                self._peers.append(peer)
                self._readers.append(threading.Thread(target=self._serve, args=(peer,)))
                self._readers[-1].start()

    def _serve(self, peer: socket.socket) -> None:
        with contextlib.suppress(OSError), peer.makefile("rb") as stream:
            while head := stream.read(1):
                length = shift = 0
                while (byte := stream.read(1)[0]) >= 0x80:
                    length, shift = length | (byte & 0x7F) << shift, shift + 7
                body = stream.read(length | byte << shift)
                kind = head[0] >> 4
                if kind == 1:
                    peer.sendall(b"\x20\x03\x00\x00\x00")
                elif kind == 8:
                    peer.sendall(b"\x90\x04" + body[:2] + b"\x00\x01")
                elif kind == 12:
                    peer.sendall(b"\xd0\x00")
                elif kind == 3:
                    self.publishes.append(len(body))


@pytest.fixture
def silent_broker() -> Iterator[SilentBroker]:
    """A peer that never acknowledges."""
    peer = SilentBroker()
    yield peer
    peer.close()


@pytest.fixture(scope="session")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two authorities, ca.pem and other.pem, and certificates of the first for broker and agent, made by openssl."""
    folder = tmp_path_factory.mktemp("certificates")

    def openssl(*arguments: str) -> None:
        subprocess.run(["openssl", *arguments], cwd=folder, check=True, capture_output=True)

    for name in ("ca", "other"):
        openssl(
            "req",
            "-x509",
            "-newkey",
            "rsa:2048",
            "-nodes",
            "-days",
            "9",
            "-subj",
            f"/CN={name}",
            # Python 3.13 takes no authority without it, and no certificate without its issuer's key id.
            "-addext",
            "keyUsage=critical,keyCertSign,cRLSign",
            "-keyout",
            f"{name}.key",
            "-out",
            f"{name}.pem",
        )
    (folder / "names").write_text("subjectAltName=IP:127.0.0.1\nauthorityKeyIdentifier=keyid\n")
    for name in ("broker", "agent"):
        openssl(
            "req",
            "-newkey",
            "rsa:2048",
            "-nodes",
            "-subj",
            f"/CN={name}",
            "-keyout",
            f"{name}.key",
            "-out",
            f"{name}.csr",
        )
        openssl(
            "x509",
            "-req",
            "-in",
            f"{name}.csr",
            "-CA",
            "ca.pem",
            "-CAkey",
            "ca.key",
            "-CAcreateserial",
            "-days",
            "9",
            "-extfile",
            "names",
            "-out",
            f"{name}.pem",
        )
    return folder


@pytest.fixture
def wait_until() -> Callable[..., None]:
    """Give a function that waits until a condition holds."""

    def wait(is_true: Callable[[], object], what: str = "", timeout_s: float = 20) -> None:
        deadline = time.monotonic() + timeout_s
        while not is_true():
            if time.monotonic() > deadline:
                pytest.fail(f"did not happen in {timeout_s} s: {what}")
            time.sleep(0.01)

    return wait
