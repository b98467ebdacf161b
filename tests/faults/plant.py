"""A small plant for fault scenarios: real broker, real agent processes, an independent subscriber, and a gate between.

Used by the tests here and by `scripts/bench faults`. Everything listens on loopback and ends with its `close`.
"""

import contextlib
import json
import os
import re
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import numpy as np
from children import children_of
from onnx import TensorProto, helper

from kizu_contract.bundle import Bundle, Golden, write_bundle
from kizu_contract.calibration import Calibration, Tail
from kizu_contract.judging import Reduction
from kizu_contract.manifest import BatchProfile, DefaultThresholds, Graph, Manifest, Provenance
from kizu_contract.tiles import TileGrid

BASE = "plant/line/box"
TILE_PX, CELL_PX = 16, 4
_PATH = "/usr/sbin:/usr/local/sbin:/usr/bin:/opt/homebrew/sbin"


@dataclass(frozen=True)
class Outcome:
    """What a scenario showed; a figure is None where the scenario does not measure it.

    `done` says what was done how often. `committed` results (by their numbers), `lost` and `duplicated` as an
    independent subscriber saw them, `in_order` for each camera and priority, seconds until the fault was noticed and
    until all was well again (the longest). `failed` says what was not as promised; empty: nothing.
    """

    scenario: str
    done: str
    committed: int | None = None
    lost: int | None = None
    duplicated: int | None = None
    in_order: bool | None = None
    noticed_s: float | None = None
    recovered_s: float | None = None
    note: str = ""
    failed: str = ""


def wait_for(condition: Callable[[], object], seconds: float, what: str) -> float:
    """Wait until `condition` holds and give the seconds it took. Raises TimeoutError after `seconds`."""
    began = time.monotonic()
    while not condition():
        if time.monotonic() > began + seconds:
            raise TimeoutError(f"waited {seconds:g} s for {what}")
        time.sleep(0.01)
    return time.monotonic() - began


def free_port() -> int:
    """A port of loopback that nobody uses now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class Broker:
    """A private Mosquitto that can be killed, stopped and started again at the same port."""

    def __init__(self, folder: Path, *lines: str) -> None:
        binary = shutil.which("mosquitto", path=_PATH)
        if binary is None:
            raise FileNotFoundError("these scenarios need mosquitto: apt-get install mosquitto mosquitto-clients")
        folder.mkdir(parents=True, exist_ok=True)
        self.port = free_port()
        self._config = folder / "mosquitto.conf"
        head = (f"listener {self.port} 127.0.0.1", "allow_anonymous true", "max_queued_messages 0", "user root")
        self._config.write_text("\n".join((*head, *lines)) + "\n")
        self._command = [binary, "-c", str(self._config)]
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start it and wait until it answers."""
        self.process = subprocess.Popen(self._command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        wait_for(self._answers, 10, "mosquitto")

    def kill(self, number: int = signal.SIGKILL) -> None:
        """End it without a word."""
        if self.process is not None:
            self.process.send_signal(number)
            self.process.send_signal(signal.SIGCONT)
            self.process.wait(10)
            self.process = None

    def _answers(self) -> bool:
        with contextlib.suppress(OSError):
            socket.create_connection(("127.0.0.1", self.port), 0.2).close()
            return True
        return False

    close = kill


class Gate:
    """A TCP relay before the broker: closed, it refuses and breaks connections, as a network does.

    It lets a scenario bring the subscriber back before the agent: what a broker acknowledges while nobody listens is
    the broker's to lose.
    """

    def __init__(self, to_port: int) -> None:
        self._to_port = to_port
        self._server = socket.create_server(("127.0.0.1", 0))
        self.port = int(self._server.getsockname()[1])
        self._is_open = False
        self._pairs: list[tuple[socket.socket, socket.socket]] = []
        self._lock = threading.Lock()
        self._thread = threading.Thread(target=self._accept, daemon=True)
        self._thread.start()

    def open(self) -> None:
        """Let connections through."""
        self._is_open = True

    def shut(self) -> None:
        """Break what is connected and let nothing through."""
        self._is_open = False
        with self._lock:
            for pair in self._pairs:
                for end in pair:
                    with contextlib.suppress(OSError):
                        end.shutdown(socket.SHUT_RDWR)
            self._pairs.clear()

    def close(self) -> None:
        """End it."""
        self.shut()
        with contextlib.suppress(OSError):
            self._server.shutdown(socket.SHUT_RDWR)
        self._server.close()
        self._thread.join(5)

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._server.accept()
            except OSError:
                return
            try:
                if not self._is_open:
                    raise ConnectionRefusedError
                broker = socket.create_connection(("127.0.0.1", self._to_port), 1)
                broker.settimeout(None)
            except OSError:
                client.close()
                continue
            with self._lock:
                self._pairs.append((client, broker))
            for one, other in ((client, broker), (broker, client)):
                threading.Thread(target=_pump, args=(one, other), daemon=True).start()


def _pump(one: socket.socket, other: socket.socket) -> None:
    with contextlib.suppress(OSError):
        while data := one.recv(65536):
            other.sendall(data)
    for end in (one, other):
        with contextlib.suppress(OSError):
            end.shutdown(socket.SHUT_RDWR)
    one.close()


@dataclass(frozen=True)
class Heard:
    """A message as the subscriber got it; `at` of its own monotonic clock, `at_utc` of the wall clock, in seconds."""

    at: float
    at_utc: float
    topic: str
    payload: bytes
    retained: bool

    @property
    def json(self) -> dict[str, Any]:
        """The payload's object."""
        return dict(json.loads(self.payload))


class Subscriber:
    """mosquitto_sub, which shares no code with kizu, at QoS 0: Mosquitto writes its copy before it acknowledges ours.

    It comes back by itself within a fraction of a second when the broker is there again.
    """

    def __init__(self, port: int, topic: str = f"{BASE}/#") -> None:
        binary = shutil.which("mosquitto_sub", path=_PATH)
        if binary is None:
            raise FileNotFoundError("these scenarios need mosquitto_sub: apt-get install mosquitto-clients")
        self._command = [binary, "-p", str(port), "-V", "5", "-q", "0", "-t", topic, "-F", "%r\t%t\t%p"]
        self.messages: list[Heard] = []
        self._process: subprocess.Popen[bytes] | None = None
        self._reader: threading.Thread | None = None

    def start(self) -> None:
        """Connect and wait until a message of our own comes back."""
        self._process = subprocess.Popen(self._command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
        self._reader = threading.Thread(target=self._read, args=(self._process,), daemon=True)
        self._reader.start()

    def await_subscribed(self, port: int) -> None:
        """Publish marks until one comes through: from then on nothing is missed."""
        mark = f"{BASE}/mark"
        before = self._marks(mark)
        deadline = time.monotonic() + 10
        while self._marks(mark) == before:
            if time.monotonic() > deadline:
                raise TimeoutError("the subscriber hears nothing")
            command = [
                shutil.which("mosquitto_pub", path=_PATH) or "mosquitto_pub",
                "-p",
                str(port),
                "-t",
                mark,
                "-m",
                "0",
            ]
            subprocess.run(command, check=False, stderr=subprocess.DEVNULL, timeout=10)
            time.sleep(0.05)

    def of(self, ending: str) -> list[Heard]:
        """Messages so far whose topic ends so, marks of our own left out."""
        return [message for message in list(self.messages) if message.topic.endswith(ending)]

    def results(self) -> list[Heard]:
        """Results so far."""
        return self.of("/result")

    def close(self) -> None:
        """Disconnect."""
        if self._process is not None:
            self._process.terminate()
            self._process.wait(10)
            self._process = None
        if self._reader is not None:
            self._reader.join(10)
            self._reader = None

    def _marks(self, topic: str) -> int:
        return sum(message.topic == topic for message in list(self.messages))

    def _read(self, process: "subprocess.Popen[bytes]") -> None:
        assert process.stdout is not None
        with process.stdout as lines:
            for line in lines:
                retained, _, rest = line.rstrip(b"\n").partition(b"\t")
                topic, _, payload = rest.partition(b"\t")
                heard = Heard(time.monotonic(), time.time(), topic.decode(errors="replace"), payload, retained == b"1")
                self.messages.append(heard)


class Agent:
    """`kizu-agent run` as a process, with its folders and its configuration."""

    def __init__(self, folder: Path, port: int, cameras: str, more: str = "", state: Path | None = None) -> None:
        self.folder, self.drop, self.state = folder, folder / "drop", state or folder / "state"
        self.log, self.config = folder / "agent.log", folder / "agent.toml"
        self.metrics_port = free_port()
        for made in (folder, self.drop, self.state):
            made.mkdir(parents=True, exist_ok=True)
        self.config.write_text(
            f'[agent]\nname = "box"\nprefix = "plant/line"\nstate_dir = "{self.state}"\nlog_format = "json"\n'
            f"metrics_port = {self.metrics_port}\n[mqtt]\nport = {port}\nkeepalive_s = 5\n"
            f'[models]\ndrop_dir = "{self.drop}"\n{more}\n{cameras}'
        )
        self.process: subprocess.Popen[bytes] | None = None

    def start(self, *arguments: str, **environment: str) -> None:
        """Start the process."""
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "kizu_agent", "run", "--config", str(self.config), *arguments],
                stdout=log,
                stderr=log,
                env={**os.environ, **environment},
            )

    def kill(self) -> None:
        """SIGKILL."""
        assert self.process is not None
        self.process.kill()
        self.process.wait(10)

    def stop(self, seconds: float = 30.0) -> int:
        """SIGTERM; the exit code."""
        assert self.process is not None
        if self.process.poll() is None:
            self.process.terminate()
        return self.process.wait(seconds)

    def close(self) -> None:
        """End it whatever it does."""
        if self.process is not None and self.process.poll() is None:
            self.process.send_signal(signal.SIGCONT)
            self.process.kill()
            self.process.wait(10)

    def metric(self, name: str) -> float | None:
        """The sum of a metric's series; None while it cannot be asked."""
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{self.metrics_port}/metrics", timeout=2) as answer:
                text = answer.read().decode()
        except OSError:
            return None
        found = re.findall(rf"^kizu_{name}(?:{{.*}})? (\S+)$", text, re.MULTILINE)
        return sum(map(float, found)) if found else None

    def log_events(self) -> list[dict[str, Any]]:
        """What it logged, one object a line; lines that are none are left out."""
        events = []
        for line in self.log.read_text(errors="replace").splitlines():
            with contextlib.suppress(ValueError):
                events.append(dict(json.loads(line)))
        return events

    def children(self) -> list[int]:
        """Its child processes: one capture a camera, and self-tests."""
        assert self.process is not None
        return sorted(children_of(self.process.pid))

    def captures(self) -> list[int]:
        """Its capture processes; beside them a new model may still be measuring its batches in a process of its own."""
        found = []
        for pid in self.children():
            with contextlib.suppress(OSError):  # one that has just ended
                if b"kizu_agent.capture_child" in Path(f"/proc/{pid}/cmdline").read_bytes():
                    found.append(pid)
        return found


@contextlib.contextmanager
def _copied_outbox(state: Path) -> Iterator[sqlite3.Connection]:
    """A copy of the outbox in `state`, whose owner has ended: looking must not change what is looked at."""
    with tempfile.TemporaryDirectory() as folder:
        for file in state.glob("outbox.sqlite3*"):
            if file.suffix != ".damaged":
                shutil.copy(file, folder)
        with contextlib.closing(sqlite3.connect(Path(folder) / "outbox.sqlite3", timeout=5)) as database:
            yield database


def committed_numbers(state: Path) -> dict[str, int]:
    """Of an agent that has ended: the last number given to each camera's results and events."""
    with _copied_outbox(state) as database:
        return dict(database.execute("SELECT camera, last FROM sequences"))


def waiting_ids(state: Path) -> set[str]:
    """Of an agent that has ended: ids of results that wait in its outbox."""
    with _copied_outbox(state) as database:
        rows = database.execute("SELECT payload FROM messages WHERE topic LIKE '%/result'").fetchall()
    return {str(json.loads(payload)["id"]) for (payload,) in rows}


def account(results: list[Heard], last: dict[str, int]) -> tuple[int, int, int, str]:
    """Committed, lost and duplicated results, and where order was broken (empty: nowhere).

    Every number from 1 to each camera's last must have come, with one id each. Order: of first arrivals, by camera,
    verdict's priority and whether they were replayed.
    """
    first: dict[tuple[str, int], str] = {}
    lanes: dict[tuple[str, str, bool], int] = {}
    duplicates, disorder = 0, ""
    for heard in results:
        result = heard.json
        key = (result["camera"], result["seq"])
        if key in first:
            duplicates += 1
            if first[key] != result["id"]:
                disorder = disorder or f"number {key} has two ids"
            continue
        first[key] = result["id"]
        lane = (result["camera"], "warn" if result["verdict"] == "unknown" else result["verdict"], result["replayed"])
        if result["seq"] < lanes.get(lane, 0):
            disorder = disorder or f"{lane}: {result['seq']} came after {lanes[lane]}"
        lanes[lane] = max(result["seq"], lanes.get(lane, 0))
    cameras = {name: number for name, number in last.items() if "/" not in name}
    wanted = {(name, seq) for name, number in cameras.items() for seq in range(1, number + 1)}
    return len(wanted), len(wanted - first.keys()), duplicates, disorder


class Account(NamedTuple):
    """What an agent that was stopped in good order had committed, and what of it came to the subscriber."""

    committed: int
    lost: int
    duplicated: int
    disorder: str
    exit_code: int

    def outcome(
        self,
        scenario: str,
        done: str,
        problems: Sequence[str],
        *,
        noticed_s: float | None = None,
        recovered_s: float | None = None,
        note: str = "",
    ) -> Outcome:
        """The scenario's outcome: what it found itself, and what is wrong with the account."""
        own = [self.disorder] if self.disorder else []
        own += [f"{self.lost} results lost"] if self.lost else []
        own += [f"the stop gave {self.exit_code}"] if self.exit_code else []
        return Outcome(
            scenario,
            done,
            self.committed,
            self.lost,
            self.duplicated,
            not self.disorder,
            noticed_s,
            recovered_s,
            note,
            "; ".join([*problems, *own]),
        )


class Plant(NamedTuple):
    """A broker and a subscriber that are there, a gate that is shut, and an agent with a model that is not started."""

    broker: Broker
    gate: Gate
    agent: Agent
    subscriber: Subscriber

    def begin(self, results: int = 1, **environment: str) -> None:
        """Open the gate, start the agent, and wait for the first `results`."""
        self.gate.open()
        self.agent.start(**environment)
        wait_for(lambda: len(self.subscriber.results()) >= results, 30, "the first results")


def settle(site: Plant) -> Account:
    """Stop the agent in good order, wait for what is on its way, and account for everything."""
    code = site.agent.stop()
    site.subscriber.await_subscribed(site.broker.port)
    return Account(*account(site.subscriber.results(), committed_numbers(site.agent.state)), code)


def longest_pause_s(heard: list[Heard]) -> float:
    """The longest time between two messages that came one after the other."""
    return max((later.at - earlier.at for earlier, later in pairwise(heard)), default=0.0)


def brightness_bundle(version: str = "1", gain: float = 1.0, name: str = "plates") -> Bundle:
    """A model whose score is the brightest cell's mean times `gain`: warn at 200, reject at 220."""
    cells = TILE_PX // CELL_PX
    nodes = [
        helper.make_node("Cast", ["tiles"], ["pixels"], to=TensorProto.FLOAT),
        helper.make_node("Transpose", ["pixels"], ["planes"], perm=[0, 3, 1, 2]),
        helper.make_node("AveragePool", ["planes"], ["means"], kernel_shape=[CELL_PX] * 2, strides=[CELL_PX] * 2),
        helper.make_node("Mul", ["means", "gain"], ["gained"]),
        helper.make_node("Squeeze", ["gained", "channel"], ["map"]),
        helper.make_node("ReduceMax", ["map"], ["score"], axes=[1, 2], keepdims=0),
    ]
    constants = [
        helper.make_tensor("gain", TensorProto.FLOAT, [1], [gain]),
        helper.make_tensor("channel", TensorProto.INT64, [1], [1]),
    ]
    inputs = [helper.make_tensor_value_info("tiles", TensorProto.UINT8, ["N", TILE_PX, TILE_PX, 1])]
    outputs = [
        helper.make_tensor_value_info("score", TensorProto.FLOAT, ["N"]),
        helper.make_tensor_value_info("map", TensorProto.FLOAT, ["N", cells, cells]),
    ]
    graph = helper.make_graph(nodes, "scorer", inputs, outputs, constants)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    tiles = np.random.default_rng(1).integers(0, 256, (3, TILE_PX, TILE_PX, 1), np.uint8)
    means = tiles.reshape(3, cells, CELL_PX, cells, CELL_PX).mean((2, 4), dtype=np.float32) * np.float32(gain)
    manifest = Manifest(
        schema=1,
        name=name,
        version=version,
        created="2026-01-31T12:00:00.000Z",
        graph=Graph(17, "fp32", ("tiles",), TILE_PX, 1, CELL_PX, BatchProfile(1, 8, 64)),
        grid=TileGrid(TILE_PX, TILE_PX),
        colour="grey",
        reduction=Reduction("max", 0.0),
        calibration=Calibration(200, ((0.0, 100.0), (0.99, 199.0)), Tail(199.0, 0.01, 0.0, 9.0)),
        thresholds=DefaultThresholds(200.0, 220.0, 0.01, 0.001),
        provenance=Provenance("raw_gaussian", {}, 0, "", 100, "0.1.0", {}),
    )
    return Bundle(manifest, model.SerializeToString(), Golden(tiles, means.max((1, 2)), means), b"\x89PNG\r\n\x1a\n")


def give(agent: Agent, bundle: Bundle) -> None:
    """Drop a model as a careful user does: under another name first."""
    temporary = agent.drop / ".incoming"
    write_bundle(bundle, temporary)
    temporary.rename(agent.drop / f"{bundle.manifest.name}-{bundle.manifest.version}.kizu")


def pictures(folder: Path, count: int = 60, high: int = 32, wide: int = 48) -> Path:
    """Grey pictures for that model: every tenth rejects, every tenth warns, the others are ok."""
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(count):
        level = {3: 240, 7: 210}.get(number % 10, 60 + number % 100)
        picture = np.full((high, wide), 40, np.uint8)
        picture[8:16, 8:16] = level
        cv2.imwrite(str(folder / f"{number:04}.png"), picture)
    return folder


@contextlib.contextmanager
def plant(
    folder: Path, cameras: str, more: str = "", state: Path | None = None, broker_lines: Sequence[str] = ()
) -> Iterator[Plant]:
    """A plant below `folder`; everything in it ends with the block."""
    broker = Broker(folder / "broker", *broker_lines)
    broker.start()
    gate, subscriber = Gate(broker.port), Subscriber(broker.port)
    agent = Agent(folder / "agent", gate.port, cameras, more, state)
    try:
        subscriber.start()
        subscriber.await_subscribed(broker.port)
        give(agent, brightness_bundle())
        yield Plant(broker, gate, agent, subscriber)
    finally:
        agent.close()
        subscriber.close()
        gate.close()
        broker.close()
