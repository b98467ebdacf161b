"""What a capture does when its process, its limits or its moment are bad."""

import json
import os
import resource
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

import pytest

from kizu_agent.camera_settings import CameraConfig
from kizu_agent.cameras.checks import Limits
from kizu_agent.capture import Capture
from kizu_agent.mailbox import Mailbox

SMALL = "rate=100&width=64&height=64"


def test_last_pictures_of_a_process_that_has_ended(rig: Callable, numbered: Callable, tmp_path: Path) -> None:
    """What a process handed over before it ended still comes, long after, and the end is no crash."""
    numbered(tmp_path, 5)
    camera = rig(f"folder:{tmp_path}", queue_frames=1)
    numbers = []
    for _ in range(5):
        numbers += [frame.number for frame in camera.frames(1)]
        time.sleep(0.4)
    assert numbers == list(range(5))
    status = camera.until(lambda seen: seen.condition == "ended")
    assert (status.captured, status.losses) == (5, 0)


def test_frames_on_their_way_survive_their_process(rig: Callable, numbered: Callable, tmp_path: Path) -> None:
    """Frames that a killed process had handed over still come, also where the kernel resets its connection."""
    numbered(tmp_path, 20)
    camera = rig(f"folder:{tmp_path}", queue_frames=1)
    camera.until(lambda seen: seen.captured == 2)
    time.sleep(0.5)  # the process fills its three slots
    pid = camera.pid
    os.kill(pid, signal.SIGSTOP)
    numbers = [frame.number for frame in camera.frames(1)]
    camera.until(lambda seen: seen.captured == 3)  # a slot goes back that is never read
    os.kill(pid, signal.SIGKILL)
    os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
    numbers += [frame.number for frame in camera.frames(4)]
    assert numbers == [0, 1, 2, 3, 4]
    assert camera.until(lambda seen: seen.condition == "lost").cause == "crashed"


def test_hang_is_known_within_two_seconds_of_the_read_timeout(rig: Callable) -> None:
    """Read timeout and two seconds after its last word, a hanging camera is known to be lost."""
    camera = rig(f"sim:plates?{SMALL}", read_timeout_s=0.3)
    camera.frames(3)
    os.kill(camera.pid, signal.SIGSTOP)
    began = time.monotonic()
    camera.until(lambda seen: seen.condition == "lost")
    # Half a second more than promised: the machine that runs the tests may be busy.
    assert time.monotonic() - began < 0.3 + 2.5


def test_stop_kills_a_process_that_hangs(rig: Callable) -> None:
    """A stop with a short deadline keeps it, and takes the hanging process with it."""
    camera = rig(f"sim:plates?{SMALL}")
    camera.frames(1)
    process = camera.capture._child.process
    os.kill(process.pid, signal.SIGSTOP)
    began = time.monotonic()
    assert camera.capture.stop(1.0)
    assert time.monotonic() - began < 1.5
    assert process.returncode == -signal.SIGKILL


def test_stop_without_start() -> None:
    """A capture that was never started stops at once, and does not start afterwards."""
    capture = Capture(CameraConfig(name="cam", source=f"sim:plates?{SMALL}"), Mailbox())
    assert capture.stop(1.0)
    capture.start()
    assert capture.stop(1.0)
    assert capture.status().captured == 0


@contextmanager
def _no_more_descriptors() -> Iterator[None]:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    lowest_free = os.dup(0)
    os.close(lowest_free)
    resource.setrlimit(resource.RLIMIT_NOFILE, (lowest_free, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_box_out_of_descriptors(rig: Callable) -> None:
    """Where no process can be started the camera is lost, not the service; it comes with the means."""
    with _no_more_descriptors():
        camera = rig(f"sim:plates?{SMALL}")
        status = camera.until(lambda seen: seen.condition == "lost")
    assert (status.cause, status.losses) == ("crashed", 1)
    assert camera.capture.failure is None
    camera.frames(1)


def test_counts_never_go_back(rig: Callable) -> None:
    """Whoever reads the status while processes come and go sees counters that only rise."""
    camera = rig(f"sim:plates?{SMALL}", queue_frames=1)
    seen: list[tuple[int, int, int]] = []
    is_over = threading.Event()

    def read() -> None:
        while not is_over.is_set():
            status = camera.capture.status()
            seen.append((status.captured, status.losses, sum(status.drops.values())))

    reader = threading.Thread(target=read)
    reader.start()
    try:
        for losses in (1, 2):
            camera.until(lambda status: status.condition == "running" and status.captured > 20)
            os.kill(camera.pid, signal.SIGKILL)
            camera.until(lambda status, losses=losses: status.losses == losses)
    finally:
        is_over.set()
        reader.join()
    for column in zip(*seen, strict=True):
        assert list(column) == sorted(column)
    assert seen[-1][2] > 15


@pytest.fixture
def child() -> Callable[..., tuple[int, str, bytes]]:
    """Run a capture process alone on an order; its exit code, its standard error and what it said."""

    def run(order: dict[str, object], *, is_heard: bool) -> tuple[int, str, bytes]:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        memory = os.memfd_create("test")
        with ours, theirs, os.fdopen(memory, "wb"):
            usual = {"open_timeout_s": 1, "read_timeout_s": 1, "slots": 3, "limits": asdict(Limits())}
            usual |= {"trigger": "free", "rate": 0.0}
            ours.send(json.dumps({**usual, **order}).encode())
            if not is_heard:
                ours.shutdown(socket.SHUT_RDWR)
            done = subprocess.run(
                [sys.executable, "-m", "kizu_agent.capture_child", str(theirs.fileno()), str(memory)],
                pass_fds=(theirs.fileno(), memory),
                capture_output=True,
                text=True,
                timeout=30,
                check=False,
            )
            ours.settimeout(0)
            said = b"" if not is_heard else ours.recv(4096)
        return done.returncode, done.stderr, said

    return run


def test_last_word_that_nobody_hears(child: Callable, tmp_path: Path) -> None:
    """A camera that is lost just when its parent is gone ends without a word on standard error."""
    order = {"url": f"folder:{tmp_path / 'none'}", "parent": os.getpid()}
    code, errors, said = child(order, is_heard=True)
    assert (code, errors) == (0, "")
    assert json.loads(said)["cause"] == "unreachable"
    assert child(order, is_heard=False)[:2] == (0, "")


def test_orphan_opens_nothing(child: Callable, tmp_path: Path) -> None:
    """A process whose parent died before it was up ends, instead of opening a camera that nobody wants."""
    with pytest.raises(BlockingIOError):
        child({"url": f"folder:{tmp_path}", "parent": 2**30}, is_heard=True)
