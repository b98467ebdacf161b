"""A real broker, a real model trained through the commands, and the agent as a process."""

import json
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from kizu_agent.simulation import SimulatedLine, write_dataset

MOSQUITTO = shutil.which("mosquitto") or "/usr/sbin/mosquitto"


def wait_for(condition: Callable[[], object], seconds: float = 30.0, what: str = "it") -> None:
    """Wait until `condition` holds; fail after `seconds`."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"waited {seconds} s for {what}"
        time.sleep(0.05)


@pytest.fixture
def wait() -> Callable[..., None]:
    return wait_for


@dataclass(frozen=True)
class Product:
    """Pictures of a product in the MVTec layout and two bundles trained on them."""

    pictures: Path
    first: Path
    second: Path


def command(*arguments: str, code: int = 0) -> str:
    """Run a kizu command as a user would; its standard output."""
    done = subprocess.run([sys.executable, "-m", *arguments], capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == code, f"{arguments} gave {done.returncode}:\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.fixture(scope="session")
def run_command() -> Callable[..., str]:
    return command


@pytest.fixture(scope="session")
def product(tmp_path_factory: pytest.TempPathFactory) -> Product:
    """Train, export, train, export: through the commands, on drawn pictures."""
    folder = tmp_path_factory.mktemp("product")
    line = SimulatedLine("plates", seed=3, width=128, height=96)
    write_dataset(folder / "pictures", line, good=24, test_good=6, defective=6)
    bundles = []
    for version in ("1", "2"):
        run = folder / f"run{version}"
        settings = ["--set", "train.steps=25", "--set", "grid.stride_px=16", "--seed", version]
        command("kizu_train", "fit", "patch_vae", "--data", str(folder / "pictures"), "--out", str(run), *settings)
        bundle = folder / f"plates-{version}.kizu"
        command("kizu_export", str(run), "--out", str(bundle), "--name", "plates", "--version", version)
        bundles.append(bundle)
    return Product(folder / "pictures", *bundles)


class Broker:
    """A private Mosquitto on loopback that can be stopped and started again."""

    def __init__(self, folder: Path) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = int(probe.getsockname()[1])
        self._config = folder / "mosquitto.conf"
        self._config.write_text(f"listener {self.port} 127.0.0.1\nallow_anonymous true\nmax_queued_messages 0\n")
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        self._process = subprocess.Popen([MOSQUITTO, "-c", str(self._config)], stderr=subprocess.DEVNULL)
        wait_for(self._answers, 10, "mosquitto")

    def stop(self) -> None:
        if self._process is not None:
            self._process.terminate()
            self._process.wait(10)
            self._process = None

    def _answers(self) -> bool:
        try:
            socket.create_connection(("127.0.0.1", self.port), 0.2).close()
        except OSError:
            return False
        return True


@pytest.fixture
def broker(tmp_path: Path) -> Iterator[Broker]:
    broker = Broker(tmp_path)
    broker.start()
    yield broker
    broker.stop()


class Listener:
    """mosquitto_sub, a client that shares no code with kizu: every message it hears, in order."""

    def __init__(self, port: int, folder: Path) -> None:
        self._file = folder / f"heard-{time.monotonic_ns()}.txt"
        with self._file.open("wb") as out:
            topics = ["-t", "plant/#"]
            line = "%r\t%t\t%p"
            self._process = subprocess.Popen(
                ["mosquitto_sub", "-p", str(port), "-q", "1", "-V", "5", *topics, "-F", line], stdout=out
            )

    def messages(self, ending: str) -> list[dict[str, Any]]:
        """Payloads of the topics that end in `ending`, as heard so far."""
        lines = (line.split("\t", 2) for line in self._file.read_text().splitlines() if line.count("\t") >= 2)
        return [json.loads(payload) for _, topic, payload in lines if topic.endswith(ending)]

    def close(self) -> None:
        self._process.terminate()
        self._process.wait(10)


@pytest.fixture
def listen(broker: Broker, tmp_path: Path) -> Iterator[Callable[[], Listener]]:
    listeners: list[Listener] = []

    def start() -> Listener:
        listeners.append(Listener(broker.port, tmp_path))
        time.sleep(0.3)
        return listeners[-1]

    yield start
    for listener in listeners:
        listener.close()


class Agent:
    """`kizu-agent run` as a process, with its folders."""

    def __init__(self, folder: Path, port: int, source: str, more: str = "") -> None:
        self.drop, self.state, self.config = folder / "drop", folder / "state", folder / "agent.toml"
        self.log = folder / "agent.log"
        self.drop.mkdir(exist_ok=True)
        self.config.write_text(
            f'[agent]\nname = "box"\nprefix = "plant/line"\nstate_dir = "{self.state}"\nlog_format = "json"\n'
            f'[mqtt]\nport = {port}\n[models]\ndrop_dir = "{self.drop}"\n'
            f'[[cameras]]\nname = "cam"\nsource = "{source}"\n{more}'
        )
        self.process: subprocess.Popen[bytes] | None = None

    def start(self, *arguments: str) -> None:
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "kizu_agent", "run", "--config", str(self.config), *arguments],
                stdout=log,
                stderr=log,
            )

    def give(self, bundle: Path, name: str | None = None) -> None:
        """Drop a bundle as a careful user does: under another name, then renamed."""
        temporary = self.drop / ".incoming"
        shutil.copy(bundle, temporary)
        temporary.rename(self.drop / (name or bundle.name))

    def stop(self, seconds: float = 20.0) -> int:
        assert self.process is not None
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        try:
            return self.process.wait(seconds)
        finally:
            self.process = None

    def close(self) -> None:
        if self.process is not None and self.process.poll() is None:
            self.process.kill()
            self.process.wait()


@pytest.fixture
def make_agent(tmp_path: Path, broker: Broker) -> Iterator[Callable[..., Agent]]:
    agents: list[Agent] = []

    def make(source: str, more: str = "") -> Agent:
        agents.append(Agent(tmp_path, broker.port, source, more))
        return agents[-1]

    yield make
    for agent in agents:
        agent.close()
