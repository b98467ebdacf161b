"""The plant's Mosquitto configuration: it starts, and lets each user say and hear what is theirs."""

import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[2] / "deploy" / "mosquitto"
LINE = "acme/osaka/press/line2"


def _program(name: str) -> str:
    path = shutil.which(name, path="/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin")
    if path is None:
        pytest.skip(f"{name} is not installed")
    return path


@pytest.fixture(scope="module")
def port(tmp_path_factory: pytest.TempPathFactory) -> Iterator[int]:
    """A broker on kizu.conf, its paths and its port those of this test, included by a main file as Debian's is."""
    mosquitto, passwd = _program("mosquitto"), _program("mosquitto_passwd")
    _program("mosquitto_pub")
    folder = tmp_path_factory.mktemp("mosquitto")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = int(free.getsockname()[1])
    text = (FOLDER / "kizu.conf").read_text()
    assert "\nlistener 1883\n" in text
    text = text.replace("\nlistener 1883\n", f"\nlistener {port} 127.0.0.1\n").replace("/etc/mosquitto", str(folder))
    (folder / "conf.d").mkdir()
    (folder / "conf.d" / "kizu.conf").write_text(text)
    shutil.copy(FOLDER / "kizu.acl", folder / "kizu.acl")
    (folder / "kizu.passwd").touch(0o600)
    for user in ("box1", "box2", "scada", "display"):
        subprocess.run([passwd, "-b", folder / "kizu.passwd", user, f"{user}-secret"], check=True, capture_output=True)
    main = folder / "mosquitto.conf"
    main.write_text(f"persistence true\npersistence_location {folder}/\nuser root\ninclude_dir {folder}/conf.d\n")
    log = folder / "log"
    with log.open("wb") as out:
        broker = subprocess.Popen([mosquitto, "-c", main], stdout=out, stderr=out)
    try:
        deadline = time.monotonic() + 10
        while not _answers(port):
            assert broker.poll() is None, log.read_text()
            assert time.monotonic() < deadline
            time.sleep(0.05)
        yield port
    finally:
        broker.terminate()
        broker.wait(10)
    assert "Error" not in log.read_text()


def _answers(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def _client(program: str, port: int, user: str | None, *options: str) -> "subprocess.CompletedProcess[str]":
    login = ["-u", user, "-P", f"{user}-secret"] if user else []
    command = [_program(program), "-V", "5", "-h", "127.0.0.1", "-p", str(port), *login, *options]
    return subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)


def _may_say(port: int, user: str, topic: str) -> bool:
    return "Not authorized" not in _client("mosquitto_pub", port, user, "-q", "1", "-t", topic, "-m", "x").stderr


def _may_hear(port: int, user: str, topic: str) -> bool:
    """Tell whether `user` receives a retained message on `topic`, written by one who may."""
    writer = "scada" if "/cmd/" in topic else topic.removeprefix("image/").split("/")[4]
    assert _client("mosquitto_pub", port, writer, "-q", "1", "-r", "-t", topic, "-m", "x").returncode == 0
    return _client("mosquitto_sub", port, user, "-q", "1", "-t", topic, "-C", "1", "-W", "1").stdout == "x\n"


def test_no_anonymous_clients(port: int) -> None:
    """Nobody without a password is let in."""
    assert _client("mosquitto_pub", port, None, "-t", "a", "-m", "x").returncode != 0


def test_agents_say_what_is_theirs(port: int) -> None:
    """An agent publishes on all of its topics and on no other agent's."""
    own = ["status", "model", "product", "audit", "cam1/state", "cam1/result", "cam1/event", "response/ping"]
    assert all(_may_say(port, "box1", f"{LINE}/box1/{topic}") for topic in own)
    assert _may_say(port, "box1", f"image/{LINE}/box1/cam1/heatmap")
    assert _may_say(port, "box1", f"image/{LINE}/box1/cam1/snapshot")
    assert not _may_say(port, "box1", f"{LINE}/box2/cmd/product")
    assert not any(_may_say(port, "box1", f"{LINE}/box2/{topic}") for topic in own)
    assert not _may_say(port, "box1", f"{LINE}/box1/cmd/ping")
    assert not _may_say(port, "box1", "elsewhere")


def test_commands_reach_their_agent_only(port: int) -> None:
    """The SCADA server commands an agent, which alone hears it; a display may not command."""
    assert _may_hear(port, "box1", f"{LINE}/box1/cmd/ping")
    assert not _may_hear(port, "box2", f"{LINE}/box1/cmd/thresholds")
    for command in ("ping", "inspect", "product", "pause", "model"):
        assert _may_say(port, "scada", f"{LINE}/box1/cmd/{command}")
        assert not _may_say(port, "display", f"{LINE}/box1/cmd/{command}")


def test_displays_and_scada_hear_the_line(port: int) -> None:
    """SCADA server and displays hear states and heatmaps; another agent does not."""
    for user in ("scada", "display"):
        assert _may_hear(port, user, f"{LINE}/box1/cam1/state")
        assert _may_hear(port, user, f"image/{LINE}/box1/cam1/heatmap")
    assert not _may_hear(port, "box2", f"{LINE}/box1/cam1/state")
