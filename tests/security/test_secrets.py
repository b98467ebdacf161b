"""A real agent with a marked secret in every place that holds one: nothing that it writes or shows holds a mark."""

import contextlib
import os
import re
import subprocess
import sys
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from faults.plant import Agent, Subscriber, brightness_bundle, give, pictures, wait_for

LINE = "acme/osaka/press/line2"
PASSWORD, CAMERA, TOKEN, ODD = "MARKpassword91", "MARKcamera92", "MARKtoken93", "MARK%40odd94"


class Site:
    """An agent whose secrets are marked, at a broker with TLS, and everything that can be seen of it."""

    def __init__(self, folder: Path, broker: Any, authority: Any, log_format: str) -> None:
        self.pair = authority.issue("box1")
        self.marks = [PASSWORD, CAMERA, TOKEN, ODD, ODD.replace("%40", "@")]
        # Any line of the private key gives it away.
        self.marks += self.pair[1].read_text().splitlines()[1:-1]
        self.credentials = folder / "credentials"
        self.credentials.mkdir(parents=True)
        (self.credentials / "mqtt__password").write_text(PASSWORD)
        tls = f'[mqtt.tls]\nca_file = "{authority.ca}"\ncert_file = "{self.pair[0]}"\nkey_file = "{self.pair[1]}"\n'
        sources = {
            "good": f"folder:{pictures(folder / 'pictures')}?rate=10&loop=true",
            "rtsp": f"rtsp://admin:{CAMERA}@127.0.0.1:1/stream?token={TOKEN}",
            "odd": f"rtsp://admin:{ODD}@127.0.0.1:1/a",
        }
        cameras = "".join(
            f'[[cameras]]\nname = "{name}"\nsource = "{source}"\nopen_timeout_s = 1.0\n'
            for name, source in sources.items()
        )
        self.agent = Agent(folder, broker.port, cameras, tls)
        text = self.agent.config.read_text().replace('"plant/line"', f'"{LINE}"').replace('"box"', '"box1"')
        text = text.replace('log_format = "json"', f'log_format = "{log_format}"')
        self.agent.config.write_text(text.replace("keepalive_s = 5", 'keepalive_s = 5\nusername = "box1"'))
        self.agent.config.chmod(0o640)
        self.heard = Subscriber(broker.port, f"{LINE}/#")
        cert, key = authority.issue("scada")
        self.login = ["-h", "127.0.0.1", "--cafile", str(authority.ca), "--cert", str(cert), "--key", str(key)]
        self.heard._command += self.login
        self.raw = folder / "raw"
        self.children: dict[int, tuple[bytes, bytes]] = {}
        self.port = broker.port
        give(self.agent, brightness_bundle())

    @contextlib.contextmanager
    def listening(self) -> Iterator[None]:
        """Hear every message, and keep every picture."""
        topics = ["-t", f"image/{LINE}/#"]
        with self.raw.open("wb") as out:
            process = subprocess.Popen(["mosquitto_sub", "-p", str(self.port), *self.login, *topics], stdout=out)
        self.heard.start()
        try:
            yield
        finally:
            self.agent.close()
            self.heard.close()
            process.terminate()
            process.wait(10)

    def command(self, name: str, payload: str) -> None:
        """Send a command as the SCADA server does."""
        options = ["-p", str(self.port), "-q", "1", "-t", f"{LINE}/box1/cmd/{name}", "-m", payload]
        subprocess.run(["mosquitto_pub", *self.login, *options], check=True, timeout=10)

    def shown(self) -> Iterator[tuple[str, bytes]]:
        """Everything that the agent wrote or shows, by its place."""
        yield "log", self.agent.log.read_bytes()
        for message in list(self.heard.messages):
            yield f"message {message.topic}", message.payload
        yield "pictures", self.raw.read_bytes()
        for path in self.agent.state.rglob("*"):
            if path.is_file():
                yield f"file {path.name}", path.read_bytes()
        with urllib.request.urlopen(f"http://127.0.0.1:{self.agent.metrics_port}/metrics", timeout=5) as page:
            yield "metrics", page.read()
        assert self.agent.process is not None
        yield "arguments of the agent", Path(f"/proc/{self.agent.process.pid}/cmdline").read_bytes()
        for pid, (arguments, environment) in self.children.items():
            yield f"arguments of {pid}", arguments
            yield f"environment of {pid}", environment

    def meet_children(self) -> int:
        """Look at the child processes of this moment; how many were met so far."""
        for pid in self.agent.children():
            with contextlib.suppress(OSError):  # a lost camera's process ends soon
                process = Path(f"/proc/{pid}")
                arguments, environment = (process / "cmdline").read_bytes(), (process / "environ").read_bytes()
                if b"kizu_agent." in arguments and environment:  # before its exec it still looks like the agent
                    self.children[pid] = arguments, environment
        return len(self.children)

    def leaks(self) -> list[str]:
        """Places that hold a mark."""
        return [place for place, data in self.shown() if any(mark.encode() in data for mark in self.marks)]


@pytest.mark.parametrize("log_format", ["json", "console"])
def test_no_secret_gets_out(tmp_path: Path, broker: Any, authority: Any, log_format: str) -> None:
    """Passwords, camera URLs, tokens and keys are nowhere in log, messages, state, metrics, arguments, children."""
    site = Site(tmp_path / "agent", broker, authority, log_format)
    with site.listening():
        wait_for(lambda: broker.log.read_text().count("u'scada'") == 2, 10, "the subscribers")
        site.agent.start(CREDENTIALS_DIRECTORY=str(site.credentials), KIZU_MQTT__KEEPALIVE_S="6")
        # One for each camera, and one for the model's self-test.
        wait_for(lambda: site.meet_children() >= 4, 40, "child processes")
        wait_for(lambda: len(site.heard.results()) > 5, 40, "results")
        wait_for(lambda: "rtsp lost" in _status(site) and "odd lost" in _status(site), 20, "the lost cameras")
        for name, payload in (("status", ""), ("ping", '{"echo": "x"}'), ("thresholds", '{"camera": "rtsp"}')):
            site.command(name, payload)
        site.command("model", "{}")
        site.command("nonsense", "{")
        wait_for(lambda: len(site.heard.of("/response/nonsense")) == 1, 10, "the answers")
        # A pair that does not fit is told in log and status.
        site.pair[1].write_bytes(site.pair[1].read_bytes()[:150])
        wait_for(lambda: "not taken up" in _status(site), 20, "the refused renewal")
        assert site.leaks() == []
        names = {place.partition(" ")[0] for place, _ in site.shown()}
        assert names == {"log", "message", "pictures", "file", "metrics", "arguments", "environment"}
        assert site.raw.stat().st_size > 0
        assert b"KIZU_MQTT" not in b"".join(data for place, data in site.shown() if place.startswith("environment"))
        assert site.agent.stop() == 0
        assert not any(mark in site.agent.log.read_text() for mark in site.marks)


def _status(site: Site) -> str:
    found = site.heard.of("/box1/status")
    return str(found[-1].json["reason"]) if found else ""


def test_check_tells_no_secret(tmp_path: Path, broker: Any, authority: Any) -> None:
    """`kizu-agent check` and a configuration with errors show no secret; open files and passwords in them are told."""
    site = Site(tmp_path / "agent", broker, authority, "console")
    site.agent.config.chmod(0o644)
    site.pair[1].chmod(0o644)
    environment = {**os.environ, "CREDENTIALS_DIRECTORY": str(site.credentials)}

    def run() -> str:
        command = [sys.executable, "-m", "kizu_agent", "check", "--config", str(site.agent.config)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, env=environment, check=False)
        return done.stdout + done.stderr

    shown = run()
    for words in ("certificate (client): client certificate CN=box1 holds until", "certificate (broker)", "TLSv1."):
        assert words in shown
    for path in (site.pair[1], site.agent.config):
        assert f"WARN file permissions: {path} can be read by everybody" in shown
    site.agent.config.write_text(
        re.sub(r"127\.0\.0\.1:1/a", "127.0.0.1:x/a", site.agent.config.read_text()) + "\nodd = 1\n"
    )
    broken = run()
    assert "problem" in broken
    assert not [mark for mark in site.marks if mark in shown + broken]


_CRASH = """
import sys
from pathlib import Path
from kizu_agent.config import load_config
from kizu_agent.stages import Stage
from kizu_agent.supervisor import configure_logging

config = load_config(Path(sys.argv[1]))
configure_logging(config.agent)

def work():
    url = config.cameras[0].source
    local = "".join(["M", "ARK", "local"])
    raise RuntimeError(f"a library quotes {url} and {sys.argv[2]}")

stage = Stage("crashing", work, lambda: None)
stage.start()
stage._thread.join()
"""


@pytest.mark.parametrize("log_format", ["json", "console"])
def test_a_crash_tells_no_secret(tmp_path: Path, log_format: str) -> None:
    """A stage that dies is logged with its traceback: without the values of variables, and secrets masked in words."""
    config = tmp_path / "agent.toml"
    config.write_text(
        f'[agent]\nname = "a"\nprefix = "b"\nlog_format = "{log_format}"\n[mqtt]\npassword = "{PASSWORD}\\""\n'
        f'[[cameras]]\nname = "c"\nsource = "rtsp://admin:{ODD}@127.0.0.1:1/a"\n'
    )
    command = [sys.executable, "-c", _CRASH, str(config), f'{PASSWORD}"']
    done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True)
    assert "a library quotes rtsp://***" in done.stderr
    assert "Traceback" in done.stderr
    assert "MARK" not in done.stdout + done.stderr


def test_the_state_directory_is_private(
    tmp_path: Path, broker: Any, authority: Any, wait_until: Callable[..., None]
) -> None:
    """A state directory that the agent makes is closed to others."""
    site = Site(tmp_path / "agent", broker, authority, "json")
    site.agent.state.rmdir()
    site.agent.start(CREDENTIALS_DIRECTORY=str(site.credentials))
    try:
        wait_until(site.agent.state.is_dir, "the state directory")
        assert site.agent.state.stat().st_mode & 0o007 == 0
    finally:
        site.agent.close()
