"""A plant in small: Mosquitto, the agent as its own process with one camera, and a subscriber that sees what it says.

No pytest in here: the scenarios beside it are plain functions, for tests and for `scripts/bench faults` alike.
"""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import onnx
import paho.mqtt.client as paho
import psutil
from faults.plant import Outcome, free_port
from onnx import TensorProto, helper
from paho.mqtt.enums import CallbackAPIVersion

from kizu_contract.bundle import Bundle, Golden, write_bundle
from kizu_contract.calibration import Calibration, Tail
from kizu_contract.judging import Reduction
from kizu_contract.manifest import BatchProfile, DefaultThresholds, Graph, Manifest, Provenance
from kizu_contract.tiles import TileGrid

MOSQUITTO = shutil.which("mosquitto") or "/usr/sbin/mosquitto"
STATE = "plant/box/cam/state"
START_WITHIN_S = 60.0
_TILE, _CELL = 16, 8


@dataclass(frozen=True)
class CameraOutcome:
    """What a scenario showed. Seconds from the fault, or its mending, to the message that a subscriber got of it.

    `cause` as the state named it (None: no loss), `shown` every verdict told while the fault was known, `losses` and
    `drops` by cause as counted from the fault on, log lines of level warning or worse on the loss and of the return.
    """

    scenario: str
    done: str
    cause: str | None
    noticed_s: float
    recovered_s: float
    shown: tuple[str, ...]
    losses: Mapping[str, int]
    drops: Mapping[str, int]
    logs_on_loss: int
    logs_on_return: int

    def row(self) -> Outcome:
        """The same as a line of the table of all scenarios."""
        problems = [] if self.shown == ("unknown",) else [f"it showed {', '.join(self.shown)}"]
        lines = f"{self.logs_on_loss} and {self.logs_on_return} log lines"
        counted = ", ".join(f"{cause} {count}" for cause, count in self.drops.items()) or "none"
        return Outcome(
            f"camera: {self.scenario}",
            self.done,
            noticed_s=self.noticed_s,
            recovered_s=self.recovered_s,
            note=f"cause `{self.cause}`, losses {sum(self.losses.values())}, dropped: {counted}; {lines}",
            failed="; ".join(problems),
        )


def wait_until(is_so: Callable[[], object], within_s: float, what: str) -> None:
    """Wait until `is_so`; raises TimeoutError that says `what` did not happen."""
    deadline = time.monotonic() + within_s
    while not is_so():
        if time.monotonic() > deadline:
            raise TimeoutError(f"waited {within_s:g} s for {what}")
        time.sleep(0.01)


def answers(port: int) -> bool:
    """Tell whether somebody takes connections there."""
    try:
        socket.create_connection(("127.0.0.1", port), 0.2).close()
    except OSError:
        return False
    return True


def is_running(pid: int) -> bool:
    """Tell whether there is such a process that has not ended."""
    try:
        return bool(psutil.Process(pid).status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


class Process:
    """A child process that is surely gone at the end; its output goes into a file."""

    def __init__(self, command: list[str], log: Path) -> None:
        self.log = log
        with log.open("ab") as out:
            self._process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=out, stderr=out)
        self.pid = self._process.pid

    def signal(self, number: signal.Signals) -> None:
        """Send a signal."""
        self._process.send_signal(number)

    def end(self) -> int:
        """Ask it to end, then kill it; gives its exit code. Idempotent."""
        if self._process.poll() is None:
            self._process.send_signal(signal.SIGCONT)
            self._process.terminate()
            try:
                self._process.wait(20)
            except subprocess.TimeoutExpired:
                self.kill()
        return self._process.wait()

    def kill(self) -> None:
        """Kill it with SIGKILL and wait."""
        self._process.kill()
        self._process.wait()


class Plant:
    """One agent with the camera `cam` of this `source`; a context manager that ends everything it started."""

    def __init__(self, folder: Path, source: str, **options: float) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.fault = folder / "fault"
        self._folder = folder
        self._port = free_port()
        self._states: list[tuple[float, dict[str, Any]]] = []
        self._lock = threading.Lock()
        self._started: list[Process] = []
        self._config = folder / "agent.toml"
        settings = {"stale_after_s": 1.0, "read_timeout_s": 1.0, "open_timeout_s": 5.0, **options}
        self._config.write_text(
            f'[agent]\nname = "box"\nprefix = "plant"\nstate_dir = "{folder}/state"\nlog_format = "json"\n'
            f'[mqtt]\nport = {self._port}\n[models]\ndrop_dir = "{folder}/drop"\n'
            f'[[cameras]]\nname = "cam"\nsource = "{source.replace("FAULT", str(self.fault))}"\n'
            + "".join(f"{key} = {value}\n" for key, value in settings.items())
        )

    def __enter__(self) -> "Plant":  # noqa: PYI034 - Self came with Python 3.11
        try:
            self._start()
        except BaseException:
            self._end()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._end()

    def _start(self) -> None:
        broker = self._folder / "mosquitto.conf"
        user = "user root\n" if os.geteuid() == 0 else ""
        broker.write_text(f"listener {self._port} 127.0.0.1\nallow_anonymous true\n{user}")
        self._started.append(Process([MOSQUITTO, "-c", str(broker)], self._folder / "mosquitto.log"))
        wait_until(lambda: answers(self._port), 20, "mosquitto")
        self._listen()
        (self._folder / "drop").mkdir(exist_ok=True)
        write_bundle(brightness_bundle(), self._folder / "drop" / "plates.kizu")
        command = [sys.executable, "-m", "kizu_agent", "run", "--config", str(self._config)]
        self.agent = Process(command, self._folder / "agent.log")
        self._started.append(self.agent)

    def _listen(self) -> None:
        client = self._client = paho.Client(CallbackAPIVersion.VERSION2, protocol=paho.MQTTv5)
        client.on_connect = lambda *_: client.subscribe(STATE, 1)
        client.on_message = lambda _client, _data, message: self._note(message.payload)
        client.connect("127.0.0.1", self._port)
        client.loop_start()

    def _note(self, payload: bytes) -> None:
        with self._lock:
            self._states.append((time.monotonic(), json.loads(payload)))

    def _end(self) -> None:
        for process in reversed(self._started):
            process.end()
        if hasattr(self, "_client"):
            self._client.disconnect()
            self._client.loop_stop()

    def states(self, since_mono_s: float = 0.0) -> list[tuple[float, dict[str, Any]]]:
        """The states that came since, each with the time it came."""
        with self._lock:
            return [seen for seen in self._states if seen[0] >= since_mono_s]

    def until(
        self, is_so: Callable[[dict[str, Any]], object], since_mono_s: float, within_s: float, what: str
    ) -> tuple[float, dict[str, Any]]:
        """Wait for a state that is so; gives the first that came since, with its time."""
        found: list[tuple[float, dict[str, Any]]] = []

        def look() -> bool:
            found[:] = [seen for seen in self.states(since_mono_s) if is_so(seen[1])][:1]
            return bool(found)

        try:
            wait_until(look, within_s, what)
        except TimeoutError as exc:
            last = self.states()[-1:]
            raise TimeoutError(f"{exc}; the last state is {last}; log:\n{self.agent.log.read_text()}") from exc
        return found[0]

    def until_judged(self, since_mono_s: float = 0.0, within_s: float = START_WITHIN_S) -> tuple[float, dict[str, Any]]:
        """Wait until the camera runs and its verdict is known."""
        return self.until(_is_judged, since_mono_s, within_s, "a verdict")

    def log_lines(self) -> list[dict[str, Any]]:
        """What the agent has logged so far."""
        return [json.loads(line) for line in self.agent.log.read_text().splitlines() if line.startswith("{")]

    def captures(self) -> list[psutil.Process]:
        """The agent's capture processes."""
        children = psutil.Process(self.agent.pid).children()
        return [child for child in children if "kizu_agent.capture_child" in child.cmdline()]


def _is_judged(state: dict[str, Any]) -> bool:
    return state["condition"] == "running" and state["verdict"] != "unknown"


def counts(text: str | None) -> dict[str, int]:
    """Read `hang 1, lost 2` as the payload writes it."""
    pairs = (part.rsplit(" ", 1) for part in text.split(", ")) if text else ()
    return {name: int(count) for name, count in pairs}


def rise(before: str | None, after: str | None) -> dict[str, int]:
    """How much each count rose."""
    earlier = counts(before)
    return {name: count - earlier.get(name, 0) for name, count in counts(after).items() if count > earlier.get(name, 0)}


def brightness_bundle() -> Bundle:
    """A whole model that judges colour pictures by their mean brightness, and takes any for good."""
    calibration = Calibration(200, ((0.0, 0.0), (0.9, 300.0), (1.0, 400.0)), Tail(300.0, 0.1, 0.1, 30.0))
    limits = calibration.thresholds(0.01, 0.001)
    manifest = Manifest(
        schema=1,
        name="plates",
        version="1",
        created="2026-01-31T12:00:00.000Z",
        graph=Graph(
            17, "fp32", ("tiles",), tile_px=_TILE, channels=3, map_cell_px=_CELL, batch=BatchProfile(1, 16, 64)
        ),
        grid=TileGrid(_TILE, _TILE, 0),
        colour="rgb",
        reduction=Reduction("max", 0.0),
        calibration=calibration,
        thresholds=DefaultThresholds(limits.warn, limits.reject, 0.01, 0.001),
        provenance=Provenance("mean", {}, 1, "0" * 64, 1, "0.1.0", {}),
    )
    tiles = np.random.default_rng(1).integers(0, 256, (2, _TILE, _TILE, 3), np.uint8)
    side = _TILE // _CELL
    cells = tiles.reshape(2, side, _CELL, side, _CELL, 3).mean((2, 4, 5)).astype(np.float32)
    return Bundle(manifest, _graph().SerializeToString(), Golden(tiles, cells.max((1, 2)), cells), b"\x89PNG\r\n\x1a\n")


def _graph() -> onnx.ModelProto:
    nodes = [
        helper.make_node("Cast", ["tiles"], ["pixels"], to=TensorProto.FLOAT),
        helper.make_node("ReduceMean", ["pixels"], ["grey"], axes=[3], keepdims=0),
        helper.make_node("Unsqueeze", ["grey", "channel"], ["planes"]),
        helper.make_node("AveragePool", ["planes"], ["cells"], kernel_shape=[_CELL] * 2, strides=[_CELL] * 2),
        helper.make_node("Mul", ["cells", "gain"], ["gained"]),
        helper.make_node("Squeeze", ["gained", "channel"], ["map"]),
        helper.make_node("ReduceMax", ["map"], ["score"], axes=[1, 2], keepdims=0),
    ]
    constants = [
        helper.make_tensor("channel", TensorProto.INT64, [1], [1]),
        helper.make_tensor("gain", TensorProto.FLOAT, [1], [1.0]),
    ]
    side = _TILE // _CELL
    outputs = [
        helper.make_tensor_value_info("score", TensorProto.FLOAT, ["N"]),
        helper.make_tensor_value_info("map", TensorProto.FLOAT, ["N", side, side]),
    ]
    tiles = helper.make_tensor_value_info("tiles", TensorProto.UINT8, ["N", _TILE, _TILE, 3])
    graph = helper.make_graph(nodes, "scorer", [tiles], outputs, constants)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
