"""One killable process per camera: what comes through, and what happens when it dies, hangs or is away."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
import psutil
import pytest
import structlog

from kizu_agent.simulation import SimulatedLine

if not sys.platform.startswith("linux"):
    pytest.skip("captures need Linux", allow_module_level=True)


def test_simulated_frames_are_the_lines_own(rig: Callable) -> None:
    """Frame n of a simulated camera is picture n of its line, pixel for pixel, with both times of its arrival."""
    before_ns, before_mono_ns = time.time_ns(), time.monotonic_ns()
    frames = rig("sim:plates?rate=0&seed=4&width=96&height=64&defects=0.5&count=20").frames(20)
    line = SimulatedLine("plates", 4, 0.5, 96, 64)
    assert [frame.number for frame in frames] == list(range(20))
    assert all(np.array_equal(frame.image, line.draw(frame.number).image) for frame in frames)
    assert frames[7].source == "sim:plates#7"
    assert before_ns < frames[0].captured_ns < time.time_ns()
    assert before_mono_ns < frames[0].captured_mono_ns < frames[1].captured_mono_ns < time.monotonic_ns()


def test_folder_is_lossless_behind_a_slow_consumer(rig: Callable, numbered: Callable, tmp_path: Path) -> None:
    """Every picture of a folder comes once and in order, however slowly frames are taken."""
    numbered(tmp_path, 200)
    camera = rig(f"folder:{tmp_path}", queue_frames=2)
    seen = []
    while len(seen) < 200:
        taken = camera.mailbox.take(3, 5.0)
        assert taken
        seen += [(frame.number, int(frame.image[0, 0, 0]), frame.source) for frame in taken]
        time.sleep(0.003)
    assert seen == [(n, n, str(tmp_path / f"{n:03}.png")) for n in range(200)]
    status = camera.until(lambda seen: seen.condition == "ended")
    assert (status.captured, status.losses, status.drops) == (200, 0, {})


def test_newest_frame_of_a_live_camera_wins(rig: Callable) -> None:
    """A live camera's consumer gets the newest frames; every other is counted as dropped."""
    camera = rig("sim:plates?rate=100&width=64&height=64", queue_frames=2)
    camera.until(lambda seen: seen.captured >= 60)
    first, second = camera.frames(2)
    status = camera.capture.status()
    assert first.number >= 50
    assert second.number == first.number + 1
    assert time.monotonic_ns() - second.captured_mono_ns < 1e9
    assert status.drops["inspection_busy"] >= 50
    assert status.condition == "running"


def test_pictures_of_changing_size(rig: Callable, numbered: Callable, tmp_path: Path) -> None:
    """Pictures of one folder may differ in size, in both directions, without loss."""
    sizes = ((24, 32), (300, 200), (8, 8), (700, 640))
    numbered(tmp_path, 40, sizes)
    frames = rig(f"folder:{tmp_path}").frames(40)
    assert [frame.image.shape[:2] for frame in frames] == [sizes[n % 4] for n in range(40)]
    assert all((frame.image == frame.number).all() for frame in frames)


def test_corrupt_picture_is_counted_and_passed_over(rig: Callable, numbered: Callable, tmp_path: Path) -> None:
    """A file that is no picture costs one count, not the camera."""
    paths = numbered(tmp_path, 5)
    paths[2].write_bytes(paths[2].read_bytes()[:20])
    (tmp_path / "004.jpg").write_bytes(b"\xff\xd8\xff no more")
    camera = rig(f"folder:{tmp_path}")
    assert [int(frame.image[0, 0, 0]) for frame in camera.frames(4)] == [0, 1, 3, 4]
    assert camera.until(lambda seen: seen.condition == "ended").drops == {"unreadable": 2}


def test_looped_folder_starts_again(rig: Callable, numbered: Callable, tmp_path: Path) -> None:
    """With loop=true the first picture follows the last, and numbers go on."""
    numbered(tmp_path, 3)
    frames = rig(f"folder:{tmp_path}?loop=true").frames(8)
    assert [int(frame.image[0, 0, 0]) for frame in frames] == [0, 1, 2, 0, 1, 2, 0, 1]
    assert [frame.number for frame in frames] == list(range(8))


def test_folder_that_appears_later(rig: Callable, numbered: Callable, tmp_path: Path) -> None:
    """A folder that is not there at the start is no error; it is read once it has come."""
    camera = rig(f"folder:{tmp_path / 'late'}")
    assert camera.until(lambda seen: seen.condition == "lost").cause == "unreachable"
    numbered(tmp_path / "late", 2)
    assert len(camera.frames(2)) == 2


def test_video_file_comes_whole_and_in_rgb(rig: Callable, tmp_path: Path) -> None:
    """Every frame of a video file comes once, in order, red as red."""
    path = tmp_path / "a film.avi"
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter.fourcc(*"MJPG"), 10, (64, 48))
    assert writer.isOpened()
    for number in range(12):
        writer.write(np.full((48, 64, 3), (0, 0, 20 * number), np.uint8))
    writer.release()
    camera = rig(f"video:{tmp_path}/a%20film.avi")
    frames = camera.frames(12)
    assert [round(float(frame.image[..., 0].mean()) / 20) for frame in frames] == list(range(12))
    assert frames[11].image[..., 1:].max() < 10
    assert camera.until(lambda seen: seen.condition == "ended").losses == 0


def test_killed_child_is_replaced(rig: Callable) -> None:
    """After `kill -9` of its process the camera comes back; the loss is counted and logged once, the return once."""
    with structlog.testing.capture_logs() as logs:
        camera = rig("sim:plates?rate=50&width=64&height=64")
        camera.frames(3)
        os.kill(camera.pid, signal.SIGKILL)
        status = camera.until(lambda seen: seen.condition == "lost")
        assert (status.cause, status.losses) == ("crashed", 1)
        assert camera.until(lambda seen: seen.condition == "running").losses == 1
    events = [entry["event"] for entry in logs]
    assert len(events) == 2, events
    assert "lost (crashed)" in events[0]
    assert "back" in events[1]


def test_hanging_child_is_noticed_and_replaced(rig: Callable) -> None:
    """A process that says nothing within the read timeout and its grace is killed, with the cause `hang`."""
    camera = rig("sim:plates?rate=50&width=64&height=64", read_timeout_s=0.5)
    camera.frames(3)
    pid = camera.pid
    os.kill(pid, signal.SIGSTOP)
    began = time.monotonic()
    assert camera.until(lambda seen: seen.condition == "lost").cause == "hang"
    assert 2.0 < time.monotonic() - began < 5.0
    camera.until(lambda seen: seen.condition == "running")
    assert not psutil.pid_exists(pid)


def test_waiting_for_a_slow_consumer_is_no_hang(rig: Callable, numbered: Callable, tmp_path: Path) -> None:
    """A lossless camera whose consumer pauses longer than every timeout goes on where it was."""
    numbered(tmp_path, 20)
    camera = rig(f"folder:{tmp_path}", read_timeout_s=0.1, queue_frames=1)
    first = camera.frames(1)
    time.sleep(3.5)
    progress_age_s = (time.monotonic_ns() - camera.capture.progress_mono_ns) / 1e9
    assert progress_age_s < 1.0
    assert [frame.number for frame in first + camera.frames(19)] == list(range(20))
    assert camera.until(lambda seen: seen.condition == "ended").losses == 0


def test_dead_rtsp_address_fails_in_time_and_backs_off(rig: Callable, capfd: pytest.CaptureFixture[str]) -> None:
    """An RTSP camera that is away is lost with a cause, tried again at growing intervals, its password never shown."""
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        port = closed.getsockname()[1]
    with structlog.testing.capture_logs() as logs:
        camera = rig(f"rtsp://user:hush@127.0.0.1:{port}/live", open_timeout_s=2.0)
        assert camera.until(lambda seen: seen.condition == "lost").cause == "unreachable"
        pids = set()
        until = time.monotonic() + 4
        while time.monotonic() < until:
            child = camera.capture._child
            if child is not None:
                pids.add(child.process.pid)
                with contextlib.suppress(ProcessLookupError):  # it may end in this very moment
                    assert "hush" not in Path(f"/proc/{child.process.pid}/cmdline").read_text()
            time.sleep(0.02)
    assert 1 <= len(pids) <= 4
    assert len(logs) == 1, logs
    assert "hush" not in str(logs) + "".join(capfd.readouterr())


def test_silent_rtsp_server_times_out(rig: Callable) -> None:
    """A server that accepts and says nothing is given up after the open timeout, with the cause `timeout`."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        camera = rig(f"rtsp://127.0.0.1:{server.getsockname()[1]}/live", open_timeout_s=1.0)
        assert camera.until(lambda seen: seen.condition == "lost", within_s=10).cause == "timeout"


def test_missing_device_is_unreachable(rig: Callable) -> None:
    """A V4L2 device that is not plugged in is a loss, not an error."""
    camera = rig("v4l2:/dev/v4l/by-id/none?width=640&height=480")
    assert camera.until(lambda seen: seen.condition == "lost").cause == "unreachable"


def _is_alive(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


@pytest.mark.parametrize("hangs", [False, True])
def test_child_goes_with_its_parent(tmp_path: Path, hangs: bool) -> None:
    """When the agent is killed, its capture processes are gone within two seconds, even those that hang."""
    script = tmp_path / "agent.py"
    script.write_text(
        "import time\n"
        "from kizu_agent.capture import Capture\n"
        "from kizu_agent.camera_settings import CameraConfig\n"
        "from kizu_agent.mailbox import Mailbox\n"
        "mailbox = Mailbox()\n"
        "capture = Capture(CameraConfig(name='cam', source='sim:gears?rate=20'), mailbox)\n"
        "capture.start()\n"
        "mailbox.take(1, 20.0)\n"
        "while not mailbox.take(1, 1.0): pass\n"
        "print(capture._child.process.pid, flush=True)\n"
        "time.sleep(60)\n"
    )
    with subprocess.Popen([sys.executable, script], stdout=subprocess.PIPE, text=True) as agent:
        assert agent.stdout is not None
        pid = int(agent.stdout.readline())
        if hangs:
            os.kill(pid, signal.SIGSTOP)
        agent.kill()
    deadline = time.monotonic() + 2
    while (is_left := _is_alive(pid)) and time.monotonic() < deadline:
        time.sleep(0.01)
    if is_left:
        os.kill(pid, signal.SIGKILL)
    assert not is_left


def test_camera_closes_its_device_when_stopped(rig: Callable) -> None:
    """A stopped camera ends by itself, so that its driver gives the device back; it is not killed."""
    camera = rig("sim:plates?rate=50&width=64&height=64")
    camera.frames(1)
    process = camera.capture._child.process
    assert camera.capture.stop(5.0)
    assert process.returncode == 0


def test_stop_wakes_a_capture_behind_a_full_lane(rig: Callable, numbered: Callable, tmp_path: Path) -> None:
    """A capture waiting for room in its lane stops at once; its waiting frame is counted."""
    numbered(tmp_path, 20)
    camera = rig(f"folder:{tmp_path}", queue_frames=1)
    camera.until(lambda seen: seen.captured >= 2)
    began = time.monotonic()
    assert camera.capture.stop(5.0)
    assert time.monotonic() - began < 2.0
    assert camera.capture.status().drops == {"stopped": 1}
    assert len(camera.mailbox.take(5, 0)) == 1


@pytest.mark.slow
def test_nothing_leaks_over_many_starts(rig: Callable) -> None:
    """Twenty starts and stops, some of them while starting, leave no descriptor, process or thread behind."""
    me = psutil.Process()
    before = me.num_fds()
    for turn in range(20):
        camera = rig("sim:plates?rate=50&width=64&height=64")
        if turn % 4 == 0:
            camera.frames(1)
        camera.capture.start()
        assert camera.capture.stop(5.0)
        assert camera.capture.stop(5.0)
    assert me.num_fds() <= before
    assert not [child for child in me.children() if "capture_child" in " ".join(child.cmdline())]
