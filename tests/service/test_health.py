"""Health: stuck stages, the watchdog, metrics."""

import contextlib
import re
import socket
import time
import urllib.request
from pathlib import Path

import pytest

from kizu_agent.health import Health, MetricsServer, notify


def test_a_stage_is_stuck_after_its_own_limit() -> None:
    """Each stage has its own limit, and a stuck one is named with its seconds."""
    health = Health()
    old = time.monotonic_ns() - 40 * 10**9
    health.watch("patient", lambda: old, 60)
    health.watch("well", time.monotonic_ns, 0.5)
    assert health.stuck() == []
    health.watch("delivery", lambda: old, 30)
    assert health.stuck() == ["delivery (40 s)"]


def test_notify_reaches_a_socket_by_path_and_by_abstract_name(
    tmp_path: Path, systemd: socket.socket, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both forms of NOTIFY_SOCKET work."""
    monkeypatch.setenv("NOTIFY_SOCKET", "@" + systemd.getsockname()[1:].decode())
    notify("READY=1")
    assert systemd.recv(100) == b"READY=1"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as listening:
        listening.bind(str(tmp_path / "n"))
        monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "n"))
        notify("STOPPING=1")
        assert listening.recv(100) == b"STOPPING=1"


def test_notify_without_a_listener_is_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No systemd, or one that is gone, is no error."""
    notify("READY=1")
    monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "gone"))
    notify("READY=1")


def test_notify_does_not_wait_for_a_listener_that_hangs(
    systemd: socket.socket, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A full buffer holds the service up for a second at most."""
    monkeypatch.setenv("NOTIFY_SOCKET", "@" + systemd.getsockname()[1:].decode())
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as flood:
        flood.setblocking(False)  # noqa: FBT003 - its only argument
        _fill(flood, systemd)
    began = time.monotonic()
    notify("WATCHDOG=1")
    assert time.monotonic() - began < 3


def test_the_watchdog_is_fed_twice_a_period(systemd: socket.socket, monkeypatch: pytest.MonkeyPatch) -> None:
    """However often the supervisor comes round, systemd hears twice a period."""
    monkeypatch.setenv("NOTIFY_SOCKET", "@" + systemd.getsockname()[1:].decode())
    monkeypatch.setenv("WATCHDOG_USEC", "400000")
    health = Health()
    until = time.monotonic() + 0.9
    while time.monotonic() < until:
        health.feed_watchdog()
        time.sleep(0.005)
    assert _heard(systemd) in ([b"WATCHDOG=1"] * 4, [b"WATCHDOG=1"] * 5)
    monkeypatch.delenv("WATCHDOG_USEC")
    Health().feed_watchdog()
    assert _heard(systemd) == []


def test_metrics_answer_over_http(free_port: int) -> None:
    """Figures come as Prometheus text: counters and gauges, with labels, read at the moment of the question."""
    count = [0]

    def read() -> dict[str, list[tuple[dict[str, str], float]]]:
        count[0] += 1
        return {
            "captured_frames_total": [({"camera": "cam"}, 3)],
            "outbox_messages": [({}, count[0])],
            "dropped_frames_total": [],
        }

    server = MetricsServer(free_port, read)
    try:
        first, second = (_scrape(free_port) for _ in range(2))
    finally:
        server.close()
    assert 'kizu_captured_frames_total{camera="cam"} 3.0' in first
    assert "# TYPE kizu_captured_frames_total counter" in first
    assert "# TYPE kizu_outbox_messages gauge" in first
    shown = [float(re.findall(r"^kizu_outbox_messages (\S+)$", text, re.MULTILINE)[0]) for text in (first, second)]
    assert shown[1] == shown[0] + 1
    with pytest.raises(OSError, match="refused"):
        _scrape(free_port)


def _fill(sender: socket.socket, listening: socket.socket) -> None:
    with contextlib.suppress(BlockingIOError):
        while True:
            sender.sendto(b"x", listening.getsockname())


def _heard(listening: socket.socket) -> list[bytes]:
    heard: list[bytes] = []
    listening.settimeout(0.05)
    with contextlib.suppress(TimeoutError):
        while True:
            heard.append(listening.recv(100))
    return heard


def _scrape(port: int) -> str:
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=5) as answer:
        return str(answer.read().decode())
