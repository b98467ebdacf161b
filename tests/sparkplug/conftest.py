"""An edge node at a private Mosquitto, an independent host in Node.js, and a tap that keeps what goes over the wire."""

import contextlib
import json
import re
import shutil
import socket
import subprocess
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from faults.plant import Broker

from kizu_agent.config import Config
from kizu_agent.encoding import utc_now
from kizu_agent.held import Thumbnail
from kizu_agent.payloads import (
    CertificatesPart,
    CountersPart,
    EventPayload,
    HeatmapPart,
    ModelPart,
    OutboxPart,
    ProblemsPart,
    ProviderPart,
    ResultPayload,
    StatePayload,
    StatusPayload,
    ThresholdsPart,
    TimingPart,
)
from kizu_agent.records import EventKind, ModelId, Priority
from kizu_agent.sinks import Numbered
from kizu_agent.sparkplug.commands import HostCommands
from kizu_agent.sparkplug.node import Node
from kizu_agent.sparkplug.payload import Metric, decode
from kizu_agent.sparkplug.store import open_store
from kizu_agent.thresholds import ThresholdBook
from kizu_contract.judging import Verdict
from kizu_contract.manifest import Manifest

HOST = Path(__file__).parent / "host"
GROUP, NODE = "acme:osaka:line2", "box1"
MODEL = ModelId("plates", "1.0.0", "ab" * 32)
PATIENCE_S = 20.0


def wait_for(condition: Callable[[], object], what: str = "it", seconds: float = PATIENCE_S) -> None:
    """Wait until `condition` holds; fail after `seconds`."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"waited {seconds} s for {what}"
        time.sleep(0.01)


@pytest.fixture
def wait() -> Callable[..., None]:
    """Give the function that waits."""
    return wait_for


@pytest.fixture(scope="session")
def host_folder() -> Path:
    """Where the host's packages are installed: by scripts/test, else here once."""
    if shutil.which("node") is None or shutil.which("npm") is None:
        pytest.fail("the Sparkplug tests need Node.js and npm: apt-get install nodejs npm, or run scripts/test")
    if not (HOST / "node_modules" / ".package-lock.json").exists():
        command = ["npm", "ci", "--ignore-scripts", "--no-audit", "--no-fund"]
        done = subprocess.run(command, cwd=HOST, capture_output=True, text=True, timeout=100, check=False)
        assert done.returncode == 0, f"npm ci in {HOST} failed; run scripts/test\n{done.stderr}"
    return HOST


@pytest.fixture
def broker(tmp_path: Path) -> Iterator[Broker]:
    """A private Mosquitto that takes everybody."""
    broker = Broker(tmp_path / "broker")
    broker.start()
    yield broker
    broker.close()


class Host:
    """The host application as a process; what it decoded, and what it holds against the edge."""

    def __init__(self, folder: Path, port: int, host_id: str) -> None:
        self.messages: list[dict[str, Any]] = []
        self.violations: list[dict[str, str]] = []
        self.others: list[dict[str, Any]] = []
        self._process = subprocess.Popen(
            ["node", "host.js", str(port), host_id],
            cwd=folder,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self._reader = threading.Thread(target=self._read)
        self._reader.start()
        wait_for(lambda: any(other["kind"] == "ready" for other in self.others), "the host")

    def do(self, what: str, **more: Any) -> None:
        """Have it act; see host.js."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps({"do": what, "group": GROUP, "node": NODE, **more}) + "\n")
        self._process.stdin.flush()

    def of(self, kind: str, device: str | None = None) -> list[dict[str, Any]]:
        """Messages of a type so far, of one device or all."""
        return [m for m in list(self.messages) if m["type"] == kind and device in (None, m["device"])]

    def values(self, name: str, device: str | None = None, *, is_historical: bool | None = None) -> list[Any]:
        """Every value of a metric so far, in order, births included."""
        return [
            metric["value"]
            for message in list(self.messages)
            if device in (None, message["device"])
            for metric in message["metrics"]
            if metric["name"] == name and is_historical in (None, metric["historical"])
        ]

    def await_count(self, kind: str, count: int = 1, device: str | None = None) -> list[dict[str, Any]]:
        """Wait until so many messages of a type are there."""
        wait_for(lambda: len(self.of(kind, device)) >= count, f"{count} × {kind}; there are {self.order()}")
        return self.of(kind, device)

    def order(self) -> list[str]:
        """Types of the messages so far, with their devices."""
        return [m["type"] + (f" {m['device']}" if m["device"] else "") for m in list(self.messages)]

    def close(self) -> None:
        """End it."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(10)
        self._reader.join(10)
        assert self._process.stdout is not None
        self._process.stdout.close()

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            found = json.loads(line)
            {"message": self.messages, "violation": self.violations}.get(found["kind"], self.others).append(found)


@pytest.fixture
def make_host(host_folder: Path, broker: Broker) -> Iterator[Callable[..., Host]]:
    """Give a maker of hosts at the test's broker."""
    hosts: list[Host] = []

    def make(host_id: str = "scada", port: int = 0) -> Host:
        hosts.append(Host(host_folder, port or broker.port, host_id))
        return hosts[-1]

    yield make
    for host in hosts:
        host.close()


@pytest.fixture
def host(make_host: Callable[..., Host]) -> Host:
    """A host that listens."""
    return make_host()


@dataclass(frozen=True)
class Packet:
    """An MQTT packet as the client sent it: type, flags of the fixed header, and the rest."""

    kind: int
    flags: int
    body: bytes


@dataclass(frozen=True)
class Connect:
    """What a CONNECT says (MQTT 3.1.1 and 5, 3.1)."""

    version: int
    is_clean: bool
    session_expiry_s: int | None
    will_topic: str
    will_payload: bytes
    will_qos: int
    will_retain: bool

    @property
    def bd_seq(self) -> Metric:
        """The will's only metric."""
        (metric,) = decode(self.will_payload).metrics
        return metric


@dataclass
class Tap:
    """A relay before the broker that keeps the packets of every client connection, and can cut them all."""

    to_port: int
    connections: list[list[Packet]] = field(default_factory=list)
    is_open: bool = True

    def __post_init__(self) -> None:
        self._server = socket.create_server(("127.0.0.1", 0))
        self.port = int(self._server.getsockname()[1])
        self._pairs: list[tuple[socket.socket, socket.socket]] = []
        self._threads = [threading.Thread(target=self._accept)]
        self._threads[0].start()

    def packets(self, kind: int) -> list[Packet]:
        """All packets of a type, over all connections."""
        return [packet for connection in list(self.connections) for packet in list(connection) if packet.kind == kind]

    def connects(self) -> list[Connect]:
        """Every CONNECT."""
        return [_connect_of(packet.body) for packet in self.packets(1)]

    def published(self, connection: int) -> list[str]:
        """Types of the Sparkplug messages of a connection, in order."""
        return [_topic_of(p).split("/")[2] for p in list(self.connections[connection]) if p.kind == 3]

    def cut(self) -> None:
        """Break every connection, without a word."""
        for pair in self._pairs:
            for end in pair:
                with contextlib.suppress(OSError):
                    end.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """End it."""
        with contextlib.suppress(OSError):
            self._server.shutdown(socket.SHUT_RDWR)
        self.cut()
        for thread in list(self._threads):
            thread.join(10)
        self._server.close()
        for pair in self._pairs:
            for end in pair:
                end.close()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                client, _ = self._server.accept()
                if not self.is_open:
                    client.close()
                    continue
                broker = socket.create_connection(("127.0.0.1", self.to_port), 5)
                broker.settimeout(None)
                self._pairs.append((client, broker))
                kept: list[Packet] = []
                self.connections.append(kept)
                for one, other, keep in ((client, broker, kept), (broker, client, None)):
                    self._threads.append(threading.Thread(target=_pump, args=(one, other, keep)))
                    self._threads[-1].start()


def _pump(one: socket.socket, other: socket.socket, keep: list[Packet] | None) -> None:
    rest = b""
    with contextlib.suppress(OSError):
        while data := one.recv(65536):
            if keep is not None:
                rest = _split(rest + data, keep)
            other.sendall(data)
    for end in (one, other):
        with contextlib.suppress(OSError):
            end.shutdown(socket.SHUT_RDWR)


def _split(data: bytes, keep: list[Packet]) -> bytes:
    """Take whole packets off `data`; what is left."""
    while len(data) >= 2:
        length, used = _varint(data, 1)
        if used == 0 or len(data) < used + length:
            return data
        keep.append(Packet(data[0] >> 4, data[0] & 15, data[used : used + length]))
        data = data[used + length :]
    return data


def _varint(data: bytes, at: int) -> tuple[int, int]:
    """The variable byte integer at `at` and the place after it; 0 where it is not whole."""
    value = shift = 0
    for place in range(at, min(len(data), at + 4)):
        value |= (data[place] & 0x7F) << shift
        shift += 7
        if data[place] < 0x80:
            return value, place + 1
    return 0, 0


def _text(data: bytes, at: int) -> tuple[bytes, int]:
    length = int.from_bytes(data[at : at + 2], "big")
    return data[at + 2 : at + 2 + length], at + 2 + length


def _topic_of(packet: Packet) -> str:
    return _text(packet.body, 0)[0].decode()


def _connect_of(body: bytes) -> Connect:
    _, at = _text(body, 0)
    version, flags, at = body[at], body[at + 1], at + 4
    expiry = None
    if version == 5:
        length, at = _varint(body, at)
        properties, at = body[at : at + length], at + length
        place = properties.find(b"\x11")  # the only one with this number that we send first
        expiry = int.from_bytes(properties[place + 1 : place + 5], "big") if place == 0 else None
    _, at = _text(body, at)
    if version == 5:
        length, at = _varint(body, at)
        at += length
    topic, at = _text(body, at)
    payload, _ = _text(body, at)
    return Connect(version, bool(flags & 2), expiry, topic.decode(), payload, flags >> 3 & 3, bool(flags & 32))


@pytest.fixture
def tap(broker: Broker) -> Iterator[Tap]:
    """A tap before the broker."""
    tap = Tap(broker.port)
    yield tap
    tap.close()


class Edge:
    """A node that runs, and what stands for the rest of the agent: results, states and status on demand."""

    def __init__(self, config: Config, manifest: Manifest) -> None:
        self.config = config
        self.book = ThresholdBook(config.agent.state_dir, config.cameras)
        self.model: tuple[ModelId, Manifest] | None = (MODEL, manifest)
        self.commands = HostCommands(self.book, lambda _camera: self.model)
        self.node = Node(config, open_store(config), self.commands, lambda: None)
        self._seqs: dict[str, int] = {}
        for camera in config.cameras:
            self.state(camera.name)
        self.status()

    def start(self) -> "Edge":
        """Start the node."""
        self.node.start()
        return self

    def stop(self, seconds: float = 3.0) -> None:
        """End it in good order; idempotent."""
        self.node.stop(seconds)
        self.node.close()
        assert self.node.failure is None

    def result(self, camera: str = "top", verdict: Verdict = Verdict.OK, score: float | None = 1.5, **more: Any) -> str:
        """Commit a result and tell the state that follows; its id."""
        found = self.make(camera, verdict, score, **more)
        self.node.sink.commit(found, None)  # type: ignore[arg-type]  # the node has a store of its own
        self.state(camera, verdict=verdict, score=score, last_result_seq=found.result.seq)
        return found.result.id

    def make(
        self,
        camera: str,
        verdict: Verdict,
        score: float | None,
        event: EventKind | None = None,
        jpeg: bytes | None = None,
    ) -> Numbered:
        """A result with the camera's next number."""
        seq = self._seqs[camera] = self._seqs.get(camera, 0) + 1
        heatmap = HeatmapPart() if jpeg is None else HeatmapPart(
            topic="image", id="1", width=8, height=6, bytes=len(jpeg), sha256="cd" * 32, content_type="image/jpeg"
        )  # fmt: skip
        result = ResultPayload(
            id=str(uuid.uuid4()), seq=seq, agent=NODE, camera=camera, frame=seq, source=None, captured_at=utc_now(),
            inspected_at=utc_now(), time_quality="synchronised", verdict=verdict, reason=None, score=score,
            ratio=None if score is None else score / 2, thresholds=ThresholdsPart(warn=1.0, reject=2.0),
            model=ModelPart.of(MODEL), width=8, height=6, tiles=1, event_id="e1" if event else None, heatmap=heatmap,
            timing=TimingPart(waited_ms=1.0, scoring_ms=2.0, total_ms=3.0),
        )  # fmt: skip
        found = None if event is None else EventPayload(
            id="e1", seq=1, agent=NODE, camera=camera, kind=event, worst_verdict=verdict, worst_ratio=1.5, frames=1,
            opened_at=utc_now(), captured_at=utc_now(), closed_at=None, result_id=result.id, result_seq=seq,
            model=ModelPart.of(MODEL),
        )  # fmt: skip
        thumbnail = None if jpeg is None else Thumbnail(jpeg, 8, 6)
        priority = Priority.OK if verdict is Verdict.OK else Priority.REJECT
        return Numbered(result, found, thumbnail, priority)

    def state(self, camera: str, **changes: Any) -> None:
        """Tell a camera's state; by default it runs and nothing is known of a part."""
        now = utc_now()
        values: dict[str, Any] = {
            "verdict": Verdict.UNKNOWN, "reason": "starting", "condition": "running", "cause": None, "score": None,
            "ratio": None if changes.get("score") is None else changes["score"] / 2,
            "last_result_seq": None, **({"reason": None} if "verdict" in changes else {}), **changes,
        }  # fmt: skip
        self.node.sink.state(StatePayload(
            agent=NODE, camera=camera, since=now, valid_until=None, published_at=now, captured_at=None,
            last_result_id=None, event_id=None, model=ModelPart.of(MODEL), counters=CountersPart(), **values,
        ))  # fmt: skip

    def status(self, **changes: Any) -> None:
        """Tell the agent's status; by default it is well."""
        now = utc_now()
        values: dict[str, Any] = {"state": "online", "reason": None, **changes}
        self.node.sink.status(StatusPayload(
            agent=NODE, since=now, valid_until=now, published_at=now, started_at=now, time_quality="synchronised",
            version="1", provider=ProviderPart(name="cpu", degraded=False), cameras={},
            problems=ProblemsPart(
                cameras_lost=0, models_missing=0, provider_degraded=False, outbox_losing=False, other=0
            ),
            outbox=OutboxPart(messages=0, bytes=0, oldest_age_s=0.0), certificates=CertificatesPart(), **values,
        ))  # fmt: skip


@pytest.fixture
def make_edge(tmp_path: Path, broker: Broker, manifest: Manifest) -> Iterator[Callable[..., Edge]]:
    """Give a maker of edges with two cameras, `top` and `side`; its arguments are options of `[sparkplug]`."""
    edges: list[Edge] = []

    def make(port: int = 0, mqtt: Mapping[str, Any] | None = None, **options: Any) -> Edge:
        config = Config.model_validate({
            "agent": {"name": NODE, "prefix": GROUP.replace(":", "/"), "state_dir": tmp_path / "state"},
            "mqtt": {"port": port or broker.port, "keepalive_s": 5, **(mqtt or {})},
            "sparkplug": {"enabled": True, "rebirth_pause_s": 0.0, **options},
            "cameras": [{"name": name, "source": "sim:gears"} for name in ("top", "side")],
        })  # fmt: skip
        edges.append(Edge(config, manifest))
        return edges[-1]

    yield make
    for edge in edges:
        edge.stop()


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """Say how many requirements of docs/sparkplug.md the tests of this run have shown."""
    doc = (HOST.parents[2] / "docs" / "sparkplug.md").read_text("utf-8")
    rows = re.findall(r"^\| `[a-zA-Z0-9-]+` \| (.*) \|$", doc, re.MULTILINE)
    reports = {kind: terminalreporter.stats.get(kind, []) for kind in ("passed", "failed", "error")}
    done = {kind: {_short(report.nodeid) for report in found} for kind, found in reports.items()}
    shown = done["passed"] - done["failed"] - done["error"]
    covered = sum(set(re.findall(r"`(\w+::\w+)`", tests)) <= shown for tests in rows)
    terminalreporter.write_line(
        f"Sparkplug B 3.0 edge node: {covered} of {len(rows)} requirement ids shown by this run"
    )


def _short(nodeid: str) -> str:
    """`name::test` of a test in this folder."""
    return re.sub(r"\[.*", "", nodeid.rpartition("sparkplug/test_")[2]).replace(".py", "")
