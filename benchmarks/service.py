"""For measurements of all of it: a private Mosquitto, the agent as a process, a subscriber that notes times."""

import contextlib
import json
import re
import shutil
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import paho.mqtt.client as mqtt
import psutil
from paho.mqtt.enums import CallbackAPIVersion

_PATH = "/usr/sbin:/usr/local/sbin:/usr/bin:/opt/homebrew/sbin"
_WAIT_S = 240.0
"""For results: a busy machine, sixteen cameras that start on two cores, a model that proves itself first."""


class Arrival(NamedTuple):
    """A message as the subscriber got it, `at` of `time.monotonic()` in seconds."""

    at: float
    topic: str
    payload: bytes

    @property
    def json(self) -> dict[str, Any]:
        """The payload's object."""
        return dict(json.loads(self.payload))


class Memory(NamedTuple):
    """MiB of a process: all pages that it sees (RSS), and with each shared page divided by those who share it (PSS)."""

    rss: float
    pss: float


def wait_for(condition: Callable[[], object], seconds: float, what: str) -> None:
    """Wait until `condition` holds. Raises TimeoutError after `seconds`."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError(f"waited {seconds:g} s for {what}")
        time.sleep(0.01)


def free_port() -> int:
    """A port of loopback that nobody uses now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextmanager
def broker(work: Path) -> Iterator[int]:
    """The port of a Mosquitto that ends with the block."""
    binary = shutil.which("mosquitto", path=_PATH)
    if binary is None:
        raise SystemExit("mosquitto is not there: apt-get install mosquitto")
    port = free_port()
    work.mkdir(parents=True, exist_ok=True)
    config = work / "mosquitto.conf"
    # A packet must not wait for the acknowledgement of the one before it: that would be measured as ours.
    config.write_text(f"listener {port} 127.0.0.1\nallow_anonymous true\nset_tcp_nodelay true\n")
    process = subprocess.Popen([binary, "-c", str(config)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        wait_for(lambda: _answers(port), 10, "mosquitto")
        yield port
    finally:
        process.terminate()
        process.wait(10)


def _answers(port: int) -> bool:
    with contextlib.suppress(OSError):
        socket.create_connection(("127.0.0.1", port), 0.2).close()
        return True
    return False


class Subscriber:
    """Hears everything below a topic and keeps it; a context manager."""

    def __init__(self, port: int, topic: str) -> None:
        self.arrivals: list[Arrival] = []
        self._is_subscribed = threading.Event()
        self._client = mqtt.Client(CallbackAPIVersion.VERSION2)
        self._client.on_message = self._note
        self._client.on_subscribe = lambda *_: self._is_subscribed.set()
        self._client.connect("127.0.0.1", port)
        self._client.subscribe(topic, 1)

    def __enter__(self) -> "Subscriber":  # noqa: PYI034 - typing.Self came with Python 3.11
        self._client.loop_start()
        if not self._is_subscribed.wait(10):
            raise TimeoutError("the broker did not answer SUBSCRIBE")
        return self

    def __exit__(self, *_: object) -> None:
        self._client.disconnect()
        self._client.loop_stop()

    def between(self, began: float, ended: float) -> list[Arrival]:
        """What came in that time, by `time.monotonic()`."""
        return [arrival for arrival in list(self.arrivals) if began <= arrival.at < ended]

    def _note(self, _client: object, _data: object, message: mqtt.MQTTMessage) -> None:
        self.arrivals.append(Arrival(time.monotonic(), message.topic, message.payload))


class Service:
    """`kizu-agent run` as a process with folders of its own; a context manager that ends it.

    `cameras` and `more` are TOML tables. What it publishes lies below `topic`.
    """

    def __init__(self, work: Path, port: int, bundle: Path, cameras: str, more: str = "") -> None:
        self.topic = f"bench/{work.name}"
        self.metrics_port = free_port()
        self._log, self._config = work / "agent.log", work / "agent.toml"
        drop = work / "drop"
        drop.mkdir(parents=True, exist_ok=True)
        shutil.copy(bundle, drop / bundle.name)
        self._config.write_text(
            f'[agent]\nname = "{work.name}"\nprefix = "bench"\nstate_dir = "{work / "state"}"\n'
            f"metrics_port = {self.metrics_port}\n[mqtt]\nport = {port}\n"
            f'[models]\ndrop_dir = "{drop}"\n{more}\n{cameras}'
        )
        self.process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> "Service":  # noqa: PYI034 - typing.Self came with Python 3.11
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def start(self) -> None:
        """Start the process."""
        with self._log.open("ab") as log:
            command = [sys.executable, "-m", "kizu_agent", "run", "--config", str(self._config)]
            self.process = subprocess.Popen(command, stdout=log, stderr=log)

    def stop(self) -> None:
        """End it, at first politely."""
        if self.process is None:
            return
        self.process.terminate()
        try:
            self.process.wait(30)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait(10)
        self.process = None

    def await_results(self, subscriber: Subscriber, count: int) -> None:
        """Wait until `count` more messages have come. Raises SystemExit with the log where they do not."""
        wanted = len(subscriber.arrivals) + count
        try:
            wait_for(lambda: len(subscriber.arrivals) >= wanted, _WAIT_S, "results")
        except TimeoutError as exc:
            raise SystemExit(f"{exc}; the agent's log:\n{self._log.read_text(errors='replace')}") from None

    def cpu_s(self) -> float:
        """CPU seconds of it and of its capture processes so far, also of those that have ended."""
        total = 0.0
        for each in self._family():
            times = each.cpu_times()
            total += times.user + times.system + times.children_user + times.children_system
        return total

    def memory(self) -> dict[str, Memory]:
        """MiB of the agent's own process (`agent`) and of its capture processes (`capture`, their sum)."""
        found = {"agent": Memory(0.0, 0.0), "capture": Memory(0.0, 0.0)}
        for index, each in enumerate(self._family()):
            full, name = each.memory_full_info(), "capture" if index else "agent"
            mib = Memory(full.rss / 2**20, full.pss / 2**20)
            found[name] = Memory(found[name].rss + mib.rss, found[name].pss + mib.pss)
        return found

    def metric(self, name: str, *labels: str) -> dict[tuple[str, ...], float]:
        """The series of a metric, by the values of `labels`."""
        with urllib.request.urlopen(f"http://127.0.0.1:{self.metrics_port}/metrics", timeout=10) as answer:
            text = answer.read().decode()
        found = {}
        for inner, value in re.findall(rf"^kizu_{name}{{(.*)}} (\S+)$", text, re.MULTILINE):
            own = dict(re.findall(r'(\w+)="([^"]*)"', inner))
            found[tuple(own[label] for label in labels)] = float(value)
        return found

    def _family(self) -> list[psutil.Process]:
        assert self.process is not None
        own = psutil.Process(self.process.pid)
        return [own, *own.children(recursive=True)]
