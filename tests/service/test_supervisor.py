"""The service as a process: what systemd hears, signals, exit codes."""

import json
import socket
import threading
import time
import urllib.request

import pytest

CAMERAS = [{"name": "cam", "source": "sim:plates?rate=20&width=32&height=32"}]
HANGING = "from kizu_agent import pipeline\npipeline.Pipeline._deliver = lambda self: time.sleep(60)\n"


def test_systemd_hears_of_the_start_the_life_and_the_end(box, serve, systemd: socket.socket, free_port: int) -> None:
    """READY after the start, WATCHDOG while all is well, STOPPING at SIGTERM, exit 0; metrics meanwhile."""
    name = "@" + systemd.getsockname()[1:].decode()
    config = box.configure(CAMERAS, agent=f"metrics_port = {free_port}")
    service = serve(config, environment={"NOTIFY_SOCKET": name, "WATCHDOG_USEC": "2000000"})
    assert systemd.recv(200).startswith(b"READY=1")
    assert systemd.recv(200) == b"WATCHDOG=1"
    with urllib.request.urlopen(f"http://127.0.0.1:{free_port}/metrics", timeout=5) as answer:
        assert 'kizu_camera_running{camera="cam"} 0.0' in answer.read().decode()
    began = time.monotonic()
    service.ask_to_stop()
    heard = [systemd.recv(200)]
    while heard[-1] == b"WATCHDOG=1":
        heard.append(systemd.recv(200))
    assert heard[-1] == b"STOPPING=1"
    assert service.exit_code() == 0, service.log()
    assert time.monotonic() - began < 8
    assert "Traceback" not in service.log()


def test_what_keeps_it_from_starting_ends_with_3_and_a_sentence(box, serve, free_port: int) -> None:
    """An unusable state directory, a key that is none and a taken port: nothing that a restart would mend."""
    file = box.folder / "file"
    file.write_text("no folder and no key")
    box.state.mkdir()
    services = {
        "agent.state_dir": serve(box.configure(CAMERAS), environment={"KIZU_AGENT__STATE_DIR": f"{file}/state"}),
        "models.trusted_keys": serve(
            box.config_file, environment={"KIZU_MODELS__TRUSTED_KEYS": json.dumps([str(file)])}
        ),
    }
    with socket.socket() as other:
        other.bind(("127.0.0.1", free_port))
        other.listen()
        services["agent.metrics_port"] = serve(
            box.config_file, environment={"KIZU_AGENT__METRICS_PORT": str(free_port)}
        )
        for told, service in services.items():
            assert service.exit_code() == 3, service.log()
            assert service.log().startswith("kizu-agent: ")
            assert told in service.log()
            assert "Traceback" not in service.log()


def test_a_second_agent_on_the_same_state_is_told_so(box, serve) -> None:
    """Exit 1: the first may be about to leave, so trying again is right; the message says what holds it up."""
    first = serve(box.configure(CAMERAS))
    first.wait_started()
    impatient = "import sqlite3\nopen_it = sqlite3.connect\n"
    impatient += "sqlite3.connect = lambda path, **options: open_it(path, **{**options, 'timeout': 0.2})\n"
    second = serve(box.config_file, before=impatient)
    assert second.exit_code() == 1
    assert "another agent" in second.log()
    assert "Traceback" not in second.log()
    first.ask_to_stop()
    assert first.exit_code() == 0


def test_a_stage_that_dies_ends_the_service_by_name(box, serve) -> None:
    """A file where the model store's folder must be kills that stage: exit 1, and the last word says which and why."""
    box.state.mkdir()
    (box.state / "models").write_text("in the way")
    service = serve(box.configure(CAMERAS))
    assert service.exit_code() == 1
    word = _last(service.log(), "giving up")
    assert list(word["dead"]) == ["models"]
    assert "FileExistsError" in word["dead"]["models"]


def test_a_stage_that_hangs_ends_the_service_by_name(box, serve) -> None:
    """Without progress for its limit a stage is stuck: exit 1 within the deadline, naming it."""
    limit = HANGING + "pipeline.STUCK_S['delivery'] = 1.0\n"
    service = serve(box.configure(CAMERAS, agent="stop_deadline_s = 1"), before=limit)
    assert service.exit_code(15) == 1
    assert _last(service.log(), "giving up")["stuck"][0].startswith("delivery (")
    assert _last(service.log(), "stages did not stop")["left"] == ["delivery"]


@pytest.mark.parametrize(("deadline_s", "signals"), [(1, 1), (60, 2)])
def test_a_hang_does_not_outlive_sigterm(box, serve, deadline_s: int, signals: int) -> None:
    """One SIGTERM ends a service that hangs by the deadline, a second one at once."""
    service = serve(box.configure(CAMERAS, agent=f"stop_deadline_s = {deadline_s}"), before=HANGING)
    service.wait_started()
    began = time.monotonic()
    for _ in range(signals):
        service.ask_to_stop()
        time.sleep(0.3 if signals > 1 else 0)
    assert service.exit_code(15) == 1
    assert time.monotonic() - began < 6


@pytest.mark.parametrize("part", ["tick", "stop"])
def test_a_supervisor_that_hangs_itself_ends(box, serve, part: str) -> None:
    """Where the hang is in the supervisor's own way, the process still ends, and shows where its threads are."""
    before = (
        "from kizu_agent import pipeline, supervisor\nsupervisor.STALL_S, supervisor._GRACE_S = 2.0, 0.5\n"
        "def hang(self, *_):\n    self._hung = getattr(self, '_hung', 0) + 1\n"
        f"    time.sleep(60 if self._hung > 1 or {part == 'stop'} else 0)\n"
        f"pipeline.Pipeline.{part} = hang\n"
    )
    service = serve(box.configure(CAMERAS, agent="stop_deadline_s = 1"), before=before)
    service.wait_started()
    if part == "stop":
        service.ask_to_stop()
    assert service.exit_code(15) == 1
    assert "in hang" in service.log()


def test_a_supervisor_that_fails_still_stops_in_order(box, serve) -> None:
    """A bug in the supervisor's round ends the service with 1, after an orderly stop."""
    before = (
        "from kizu_agent import pipeline\ncalls = []\n"
        "def tick(self):\n    calls.append(1)\n    assert len(calls) < 2, 'a bug'\npipeline.Pipeline.tick = tick\n"
    )
    service = serve(box.configure(CAMERAS), before=before)
    assert service.exit_code() == 1
    assert "a bug" in service.log()
    assert _last(service.log(), "stopped")["code"] == 1


def test_a_camera_lost_for_ever_never_ends_it(box, serve) -> None:
    """`--until-ended` waits for a camera that is away, and still stops when asked."""
    before = "sys.argv.append('--until-ended')"
    box.give()
    cameras = [{"name": "here", "source": box.pictures("here", 1)}, {"name": "away", "source": "folder:/nowhere"}]
    service = serve(box.configure(cameras), before=before)
    service.wait_started()
    ended = threading.Event()
    deadline = time.monotonic() + 15
    while '"camera has ended"' not in service.log() and time.monotonic() < deadline:
        ended.wait(0.05)
    assert '"camera has ended"' in service.log()
    time.sleep(1.2)
    assert service.process.poll() is None
    service.ask_to_stop()
    assert service.exit_code() == 0


def _last(log: str, event: str) -> dict[str, object]:
    words = [json.loads(line) for line in log.splitlines() if line.startswith("{")]
    found = [word for word in words if word["event"].startswith(event)]
    assert found, log
    return found[-1]
