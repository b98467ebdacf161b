"""A service on disk and as a process: configuration, pictures, models, a socket like systemd's."""

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TextIO

import cv2
import numpy as np
import pytest

from kizu_agent.config import Config, load_config
from kizu_agent.health import Health
from kizu_agent.pipeline import Pipeline
from kizu_contract.bundle import Bundle, write_bundle

MOSQUITTO = shutil.which("mosquitto") or "/usr/sbin/mosquitto"
MOSQUITTO_PASSWD = shutil.which("mosquitto_passwd") or "/usr/bin/mosquitto_passwd"
FREE_PORT_OF_NOBODY = 1


def wait_for(condition: Callable[[], object], seconds: float = 20.0, what: str = "it") -> None:
    """Wait until `condition` holds; fail after `seconds`."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"waited {seconds} s for {what}"
        time.sleep(0.02)


@pytest.fixture
def wait() -> Callable[..., None]:
    return wait_for


@pytest.fixture(autouse=True)
def _no_foreign_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(os.environ):
        if name.startswith("KIZU_") or name in ("CREDENTIALS_DIRECTORY", "NOTIFY_SOCKET", "WATCHDOG_USEC"):
            monkeypatch.delenv(name)


@pytest.fixture
def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class Box:
    """The folders of one agent and its configuration file."""

    def __init__(self, folder: Path, bundle: Bundle) -> None:
        self.folder, self.state, self.drop = folder, folder / "state", folder / "drop"
        self.config_file = folder / "agent.toml"
        self._bundle = bundle
        self.drop.mkdir()

    def pictures(self, name: str, count: int, height: int = 8, width: int = 12) -> str:
        """Write `count` grey pictures and give the URL of their folder."""
        folder = self.folder / name
        folder.mkdir()
        random = np.random.default_rng(count)
        for number in range(count):
            cv2.imwrite(str(folder / f"{number}.png"), random.integers(0, 256, (height, width), np.uint8))
        return f"folder:{folder}"

    def give(self, name: str = "plates") -> None:
        """Drop a model of this name."""
        renamed = replace(self._bundle, manifest=replace(self._bundle.manifest, name=name))
        write_bundle(renamed, self.drop / f"{name}.kizu")

    def configure(
        self, cameras: Sequence[Mapping[str, str]], agent: str = "", mqtt: str = f"port = {FREE_PORT_OF_NOBODY}"
    ) -> Path:
        """Write the configuration; by default there is no broker."""
        text = f'[agent]\nname = "box"\nprefix = "plant"\nstate_dir = "{self.state}"\nlog_format = "json"\n{agent}\n'
        text += f'[mqtt]\n{mqtt}\n[models]\ndrop_dir = "{self.drop}"\n'
        for camera in cameras:
            text += "[[cameras]]\n" + "".join(f'{key} = "{value}"\n' for key, value in camera.items())
        self.config_file.write_text(text)
        return self.config_file

    def config(self, cameras: Sequence[Mapping[str, str]], agent: str = "", mqtt: str = "port = 1") -> Config:
        return load_config(self.configure(cameras, agent, mqtt))


@pytest.fixture
def box(tmp_path: Path, bundle: Bundle) -> Box:
    return Box(tmp_path, bundle)


@pytest.fixture
def broker(tmp_path: Path, free_port: int) -> Iterator[int]:
    """The port of a private Mosquitto that knows one user, `line` with the password `right`."""
    passwords = tmp_path / "passwords"
    subprocess.run([MOSQUITTO_PASSWD, "-b", "-c", str(passwords), "line", "right"], check=True, capture_output=True)
    passwords.chmod(0o644)
    config = tmp_path / "mosquitto.conf"
    config.write_text(f"listener {free_port} 127.0.0.1\npassword_file {passwords}\nallow_anonymous false\nuser root\n")
    process = subprocess.Popen([MOSQUITTO, "-c", str(config)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    wait_for(lambda: _answers(free_port), 10, "mosquitto")
    yield free_port
    process.terminate()
    process.wait(10)


def _answers(port: int) -> bool:
    try:
        socket.create_connection(("127.0.0.1", port), 0.2).close()
    except OSError:
        return False
    return True


class Service:
    """An agent as a process; `before` is Python that runs in it first, to break it from inside."""

    def __init__(
        self, folder: Path, config: Path, before: str = "", environment: Mapping[str, str] | None = None
    ) -> None:
        self._log: TextIO = (folder / f"service-{time.monotonic_ns()}.log").open("w+")
        code = f"import sys, time\n{before}\nfrom kizu_agent.__main__ import main\nsys.exit(main(sys.argv[1:]))"
        self.process = subprocess.Popen(
            [sys.executable, "-c", code, "run", "--config", str(config)],
            stdout=self._log,
            stderr=self._log,
            env={**os.environ, **(environment or {})},
        )

    def log(self) -> str:
        return Path(self._log.name).read_text()

    def wait_started(self) -> None:
        wait_for(lambda: '"started"' in self.log() or self.process.poll() is not None, 20, "the start")
        assert self.process.poll() is None, self.log()

    def ask_to_stop(self) -> None:
        self.process.send_signal(signal.SIGTERM)

    def exit_code(self, seconds: float = 20.0) -> int:
        return self.process.wait(seconds)

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()
        self._log.close()


@pytest.fixture
def serve(tmp_path: Path) -> Iterator[Callable[..., Service]]:
    services: list[Service] = []

    def start(config: Path, before: str = "", environment: Mapping[str, str] | None = None) -> Service:
        services.append(Service(tmp_path, config, before, environment))
        return services[-1]

    yield start
    for service in services:
        service.close()


@pytest.fixture
def systemd() -> Iterator[socket.socket]:
    """A socket that listens as systemd does, in the abstract namespace; its name is in NOTIFY_SOCKET's form."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as listening:
        listening.bind("")  # the kernel chooses an abstract name
        listening.settimeout(20)
        yield listening


@pytest.fixture
def begin() -> Iterator[Callable[[Config], Pipeline]]:
    """Give a starter of pipelines, which are stopped at the end."""
    begun: list[Pipeline] = []

    def begin(config: Config) -> Pipeline:
        begun.append(Pipeline(config, Health(), lambda: None))
        begun[-1].start()
        return begun[-1]

    yield begin
    for pipeline in begun:
        pipeline.stop(5.0)
