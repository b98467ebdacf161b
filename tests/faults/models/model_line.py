"""A line for fault scenarios: a real broker, the agent as a process that is started again, and who listens."""

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import numpy as np
import paho.mqtt.client as paho
import psutil
from faults.plant import free_port
from paho.mqtt.enums import CallbackAPIVersion

PATIENCE_S = 60.0
RATE = 25
"""Pictures a second."""


class Heard(NamedTuple):
    """A message: when it came (monotonic seconds), its topic and its JSON."""

    at_s: float
    topic: str
    payload: dict[str, Any]


class Line:
    """One camera with pictures of a mean of about 100, one agent, one broker; what the broker sends on, in order.

    `before` is Python that runs in the agent's process first, to break it from inside. An agent that ends is started
    again, as systemd would (`ends` keeps its exit codes).
    """

    def __init__(self, folder: Path, seed: int, before: str = "", models: str = "") -> None:
        self.folder, self.drop, self.state = folder, folder / "drop", folder / "state"
        self.ends: list[int] = []
        self.heard: list[Heard] = []
        self._before = before
        self._lock = threading.Lock()
        self._agent: subprocess.Popen[bytes] | None = None
        self.drop.mkdir()
        _draw(folder / "pictures", seed)
        self._port = free_port()
        self._configure(models)
        self._broker = subprocess.Popen([_mosquitto(), "-c", folder / "mosquitto.conf"], stderr=subprocess.DEVNULL)
        self._client = self._listen()

    @property
    def results(self) -> list[Heard]:
        """Results so far."""
        return self.of("/cam/result")

    @property
    def reports(self) -> list[Heard]:
        """What was said of models so far."""
        return self.of("/box/model")

    def of(self, ending: str) -> list[Heard]:
        """Messages so far on topics that end so."""
        with self._lock:
            return [heard for heard in self.heard if heard.topic.endswith(ending)]

    def start(self) -> None:
        """Start the agent."""
        code = f"import sys\n{self._before}\nfrom kizu_agent.__main__ import main\nsys.exit(main(sys.argv[1:]))"
        command = [sys.executable, "-c", code, "run", "--config", str(self.folder / "agent.toml")]
        with (self.folder / "agent.log").open("ab") as log:
            self._agent = subprocess.Popen(command, stdout=log, stderr=log)

    def kill(self) -> None:
        """End the agent as a power cut would: nothing is said, nothing is written any more."""
        assert self._agent is not None
        self._agent.send_signal(signal.SIGKILL)
        self._agent.wait(10)
        self._agent = None

    def stop(self) -> None:
        """End the agent in good order."""
        assert self._agent is not None
        self._agent.terminate()
        self._agent.wait(20)
        self._agent = None

    def give(self, path: Path, name: str | None = None) -> float:
        """Drop a file as a careful user does; the moment (monotonic seconds)."""
        temporary = self.drop / f".{path.name}"
        shutil.copy(path, temporary)
        temporary.rename(self.drop / (name or path.name))
        return time.monotonic()

    def wait(self, what: str, found: Callable[[], Heard | bool | None], patience_s: float = PATIENCE_S) -> float:
        """Wait until `found` gives something, starting the agent again when it ends; when it came or was seen."""
        deadline = time.monotonic() + patience_s
        while True:
            there = found()
            if there:
                return there.at_s if isinstance(there, Heard) else time.monotonic()
            if time.monotonic() > deadline:
                raise TimeoutError(f"no {what} in {patience_s:g} s; log:\n{self.log()[-4000:]}")
            self._tend()
            time.sleep(0.02)

    def report(self, kind: str, version: str | None = None, file: str | None = None) -> Heard | None:
        """The last report of this kind, of this version or file."""
        found = (heard for heard in reversed(self.reports) if heard.payload["kind"] == kind)
        return next((h for h in found if version in (None, _version(h)) and file in (None, h.payload["file"])), None)

    def result(self, version: str, after_s: float = 0.0, count: int = 1) -> Heard | None:
        """The result by a model of this version that is the `count`th after this moment."""
        found = [heard for heard in self.results if _version(heard) == version and heard.at_s > after_s]
        return found[count - 1] if len(found) >= count else None

    def versions(self) -> list[str]:
        """The versions that judged, in order, each once for each time it came to serve."""
        judged = [_version(heard) or "" for heard in self.results]
        return [version for i, version in enumerate(judged) if i == 0 or judged[i - 1] != version]

    def ask(self, action: dict[str, Any], patience_s: float = PATIENCE_S) -> dict[str, Any]:
        """Send the command `model` and give its answer."""
        before = len(self.of("/response/model"))
        self._client.publish("plant/line/box/cmd/model", json.dumps(action), qos=1)
        self.wait("answer", lambda: len(self.of("/response/model")) > before, patience_s)
        return self.of("/response/model")[-1].payload

    def is_running(self) -> bool:
        """Tell whether the agent lives."""
        return self._agent is not None and self._agent.poll() is None

    def memory_bytes(self) -> int:
        """What the agent's own process has resident."""
        assert self._agent is not None
        return int(psutil.Process(self._agent.pid).memory_info().rss)

    def log(self) -> str:
        """What the agent logged."""
        return (self.folder / "agent.log").read_text(errors="replace")

    def close(self) -> None:
        """End everything."""
        if self._agent is not None:
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._agent.terminate()
                self._agent.wait(15)
            self._agent.kill()
            self._agent.wait(10)
        self._client.disconnect()
        self._client.loop_stop()
        self._client._reset_sockets()  # paho leaves its inner pair to the garbage collector, which warns
        self._broker.terminate()
        self._broker.wait(10)

    def _tend(self) -> None:
        if self._agent is not None and self._agent.poll() is not None:
            self.ends.append(self._agent.returncode)
            self.start()

    def _configure(self, models: str) -> None:
        (self.folder / "mosquitto.conf").write_text(
            f"listener {self._port} 127.0.0.1\nallow_anonymous true\nuser root\nmax_queued_messages 0\n"
        )
        source = f"folder:{self.folder / 'pictures'}?loop=true&rate={RATE}"
        (self.folder / "agent.toml").write_text(
            f'[agent]\nname = "box"\nprefix = "plant/line"\nstate_dir = "{self.state}"\nlog_format = "json"\n'
            f"[mqtt]\nport = {self._port}\n[engine]\nthreads = 1\n"
            f'[models]\ndrop_dir = "{self.drop}"\n{models}'
            f'[[cameras]]\nname = "cam"\nsource = "{source}"\n'
        )

    def _listen(self) -> paho.Client:
        _wait_for_port(self._port)
        client = paho.Client(CallbackAPIVersion.VERSION2, protocol=paho.MQTTv5)
        subscribed = threading.Event()
        client.on_connect = lambda client, *_: client.subscribe("plant/#", qos=1)
        client.on_subscribe = lambda *_: subscribed.set()
        client.on_message = self._keep
        client.connect("127.0.0.1", self._port)
        client.loop_start()
        if not subscribed.wait(10):
            raise TimeoutError("the listener could not subscribe")
        return client

    def _keep(self, _client: object, _data: object, message: paho.MQTTMessage) -> None:
        if "/cmd/" not in message.topic:
            with self._lock:
                self.heard.append(Heard(time.monotonic(), message.topic, json.loads(message.payload)))


@contextmanager
def line_with(folder: Path, seed: int, **options: str) -> Iterator[Line]:
    """Give a line in `folder`, and end it whatever happens."""
    folder.mkdir(parents=True, exist_ok=True)
    line = Line(folder, seed, **options)
    try:
        line.start()
        yield line
    finally:
        line.close()


def _version(heard: Heard) -> str | None:
    version = heard.payload["model"]["version"]
    return None if version is None else str(version)


def _draw(folder: Path, seed: int) -> None:
    folder.mkdir()
    random = np.random.default_rng(seed)
    for number in range(20):
        cv2.imwrite(str(folder / f"{number}.png"), random.integers(80, 120, (16, 16), np.uint8))


def _mosquitto() -> str:
    found = shutil.which("mosquitto", path=f"{os.environ.get('PATH', '')}:/usr/sbin:/usr/local/sbin")
    if found is None:
        raise FileNotFoundError("these scenarios need a real broker: install mosquitto (apt-get install mosquitto)")
    return found


def _wait_for_port(port: int) -> None:
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
            return
        time.sleep(0.02)
    raise TimeoutError("mosquitto did not start")
