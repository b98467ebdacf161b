"""Pictures that are damaged, late, awaited, of another size or refused: what a capture makes of them."""

import os
import re
import signal
import socket
import struct
import time
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
import pytest
import structlog

from kizu_agent.cameras.registry import open_camera
from kizu_agent.cameras.simulated_faults import FAULTS, Faults
from kizu_agent.errors import CameraError
from kizu_contract.errors import PictureError

SMALL = "rate=50&width=64&height=64"


def _damaged_film(path: Path) -> None:
    """Eight frames, 30 grey levels apart; the fourth is cut short, the sixth has lost its head."""
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter.fourcc(*"MJPG"), 10, (64, 48))
    for number in range(8):
        writer.write(np.full((48, 64, 3), 30 * number, np.uint8))
    writer.release()
    data = bytearray(path.read_bytes())
    frames = [found.end() - 3 for found in re.finditer(rb"00dc....\xff\xd8\xff", bytes(data), re.DOTALL)]
    assert len(frames) == 8
    length = struct.unpack("<I", data[frames[3] - 4 : frames[3]])[0]
    data[frames[3] + length // 2 : frames[3] + length] = bytes(length - length // 2)
    data[frames[5] : frames[5] + 20] = bytes(20)
    path.write_bytes(data)


def test_damaged_pictures_of_a_film_are_not_judged(rig: Callable, tmp_path: Path) -> None:
    """Motion JPEG that is cut short is counted and passed over, instead of being filled up from the frame before."""
    _damaged_film(tmp_path / "film.avi")
    camera = rig(f"video:{tmp_path}/film.avi")
    frames = camera.frames(6)
    assert [round(float(frame.image.mean()) / 30) for frame in frames] == [0, 1, 2, 4, 6, 7]
    assert [frame.number for frame in frames] == [0, 1, 2, 4, 6, 7]
    status = camera.until(lambda seen: seen.condition == "ended")
    assert (status.losses, status.drops) == (0, {"unreadable": 2})


def test_some_damaged_pictures_are_no_loss(rig: Callable, tmp_path: Path) -> None:
    """A live camera that gives damaged pictures among good ones drops and counts them, over whatever time."""
    fault = tmp_path / "fault"
    camera = rig(f"sim:plates?{SMALL}&fault={fault}", read_timeout_s=2)
    began = time.monotonic()
    while time.monotonic() - began < 3:
        before = camera.capture.status()
        fault.write_text("corrupt")
        unreadable = before.drops.get("unreadable", 0)
        camera.until(lambda seen, unreadable=unreadable: seen.drops.get("unreadable", 0) > unreadable)
        fault.write_text("")
        camera.until(lambda seen, captured=before.captured: seen.captured > captured + 3)
    assert camera.capture.status().losses == 0


def test_slow_camera_that_runs_freely_is_not_idle(rig: Callable) -> None:
    """Idle is what waits for a trigger; a camera with a picture a second runs, however soon its verdict is stale."""
    camera = rig("sim:plates?rate=1&width=64&height=64", stale_after_s=0.1)
    camera.until(lambda seen: seen.condition == "running")
    seen = set()
    camera.until(lambda status: seen.add(status.condition) or status.captured >= 4)
    assert seen == {"running"}


def test_first_picture_may_be_late(rig: Callable) -> None:
    """A camera that needs three read timeouts for its first picture is not lost, and given up later."""
    camera = rig(f"sim:plates?{SMALL}&first=4", read_timeout_s=0.5, open_timeout_s=10)
    camera.frames(1, within_s=30)
    assert camera.capture.status().losses == 0


def test_first_picture_is_not_awaited_for_ever(rig: Callable) -> None:
    """A camera that opens and never gives a picture is lost after the open timeout."""
    camera = rig(f"sim:plates?{SMALL}&first=60", read_timeout_s=0.5, open_timeout_s=1)
    assert camera.until(lambda seen: seen.condition == "lost").cause == "hang"


def test_triggered_camera_is_well_before_its_first_trigger(rig: Callable, tmp_path: Path) -> None:
    """It is idle as soon as it is open, for longer than every timeout, runs with the first picture, and idles again."""
    fault = tmp_path / "fault"
    fault.write_text("silent")
    url = f"sim:plates?{SMALL}&trigger=true&fault={fault}"
    camera = rig(url, read_timeout_s=0.3, open_timeout_s=1, stale_after_s=0.5)
    camera.until(lambda seen: seen.condition == "idle")
    pid = camera.pid
    time.sleep(3.5)
    assert camera.capture.status().condition == "idle"
    fault.write_text("")
    camera.until(lambda seen: seen.condition == "running")
    fault.write_text("silent")
    status = camera.until(lambda seen: seen.condition == "idle")
    assert (camera.pid, status.losses, status.loss_causes) == (pid, 0, {})


def test_triggered_camera_is_back_without_a_trigger(rig: Callable, tmp_path: Path) -> None:
    """After an unplugging it need not wait for the next part to be told back; one in the dark must show a picture."""
    fault = tmp_path / "fault"
    fault.write_text("unplug")
    with structlog.testing.capture_logs() as logs:
        camera = rig(f"sim:plates?{SMALL}&trigger=true&fault={fault}", black_after_s=0.2)
        camera.until(lambda seen: seen.condition == "lost")
        fault.write_text("silent")
        camera.until(lambda seen: seen.condition == "idle")
        fault.write_text("black")
        camera.until(lambda seen: seen.cause == "black")
        # In one piece: a file that is written in place is empty for a moment, and that picture would be a good one.
        (tmp_path / "next").write_text("silent")
        (tmp_path / "next").replace(fault)
        pid = camera.pid
        os.kill(pid, signal.SIGKILL)
        camera.until(lambda seen: seen.cause == "crashed")
        camera.until(lambda _: camera.capture._child is not None and camera.capture._child.is_open)
        assert camera.capture.status().condition == "lost"
        fault.write_text("")
        status = camera.until(lambda seen: seen.condition == "running")
    assert status.loss_causes == {"unreachable": 1, "black": 1}
    shown = [entry["log_level"] for entry in logs if entry["log_level"] != "debug"]
    assert shown == ["warning", "info"] * 2


def test_given_size_holds_from_the_first_picture_on(rig: Callable) -> None:
    """With cameras.size a camera of another size never begins, and is named; with its own it does."""
    wrong = rig(f"sim:plates?{SMALL}", size={"width": 64, "height": 48})
    status = wrong.until(lambda seen: seen.condition == "lost")
    assert (status.cause, status.captured, status.drops) == ("size_changed", 0, {"size_changed": 1})
    rig(f"sim:plates?{SMALL}", size={"width": 64, "height": 64}).frames(1)


def test_size_and_frozen_picture_outlive_the_process(rig: Callable, tmp_path: Path) -> None:
    """Opened again, a camera is still frozen at that picture, and still wrong in size; good pictures end either."""
    fault = tmp_path / "fault"
    camera = rig(f"sim:plates?{SMALL}&fault={fault}", frozen_after_s=0.5)
    camera.frames(1)
    for word, cause in (("freeze", "frozen"), ("size", "size_changed")):
        fault.write_text(word)
        dropped = camera.until(lambda seen, cause=cause: seen.cause == cause).drops[cause]
        # In a process that knew nothing this would be a first good picture.
        status = camera.until(lambda seen, cause=cause, dropped=dropped: seen.drops[cause] > dropped)
        assert status.condition == "lost"
        fault.write_text("")
        camera.until(lambda seen: seen.condition == "running")
    assert camera.capture.status().loss_causes == {"frozen": 1, "size_changed": 1}


def test_files_may_show_anything(rig: Callable, tmp_path: Path) -> None:
    """Pictures of a folder are all judged, black, alike and of any size."""
    for number in range(6):
        cv2.imwrite(str(tmp_path / f"{number}.png"), np.zeros((32 + number % 2, 32), np.uint8))
    frames = rig(f"folder:{tmp_path}?rate=5", frozen_after_s=0.1, black_after_s=0.1).frames(6)
    assert [frame.number for frame in frames] == list(range(6))


@pytest.mark.slow
def test_camera_that_refuses_the_password_is_left_alone(rig: Callable) -> None:
    """User and password that were refused are not tried again before unauthorised_retry_s: accounts get locked."""
    asked: list[float] = []
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(0.2)
        port = server.getsockname()[1]
        camera = rig(f"rtsp://user:hush@127.0.0.1:{port}/live", open_timeout_s=5, unauthorised_retry_s=4)
        until = time.monotonic() + 30
        while len(asked) < 4 and time.monotonic() < until:
            asked += _refuse(server)
        # OpenCV's own attempt and the question why it failed, twice.
        assert len(asked) == 4
        assert asked[1] - asked[0] < 2
        assert asked[2] - asked[1] > 3.5
        status = camera.until(lambda seen: seen.cause == "unauthorised")
        assert status.losses == 1


def _refuse(server: socket.socket) -> list[float]:
    """Answer every request of the next connection with 401; the time it came, nothing where none did."""
    try:
        link, _ = server.accept()
    except TimeoutError:
        return []
    came = time.monotonic()
    with link:
        link.settimeout(5)
        while request := link.recv(4096).decode():
            number = re.search(r"CSeq: *(\d+)", request)
            assert number is not None
            refusal = ["RTSP/1.0 401 Unauthorized", f"CSeq: {number[1]}", 'WWW-Authenticate: Basic realm="x"', "", ""]
            link.sendall("\r\n".join(refusal).encode())
    return [came]


def test_fault_file_is_read_strictly(tmp_path: Path) -> None:
    """No file and an empty one mean no fault, a word that is none is refused, corrupt gives an unreadable picture."""
    path = tmp_path / "fault"
    faults = Faults(path)
    assert faults.now() == ""
    for word in ("", *FAULTS):
        path.write_text(f"{word}\n")
        assert faults.now() == word
    path.write_text("burn")
    with pytest.raises(CameraError, match="no fault 'burn'"):
        faults.now()
    with pytest.raises(PictureError):
        faults.spoil("corrupt", np.random.default_rng(1).integers(0, 256, (64, 64, 3), np.uint8))


def test_simulated_camera_without_pictures_is_lost(tmp_path: Path) -> None:
    """A free-running simulated camera that falls silent is lost after the read timeout, as a real one."""
    (tmp_path / "fault").write_text("silent")
    camera = open_camera(f"sim:plates?{SMALL}&fault={tmp_path}/fault", 1, 0.3)
    camera.open()
    began = time.monotonic()
    assert camera.read() is None
    time.sleep(0.3)
    with pytest.raises(CameraError, match="no picture") as caught:
        camera.read()
    assert (caught.value.cause, time.monotonic() - began >= 0.3) == ("lost", True)


class _Silent:
    """An opened V4L2 device whose `select` runs into its timeout: there is no such device on most machines."""

    def read(self) -> tuple[bool, None]:
        return False, None

    def release(self) -> None:
        pass


def test_device_may_be_late_with_its_first_picture(tmp_path: Path) -> None:
    """A device that is there may let a read or two time out before its first picture; one that is gone is lost."""
    path = tmp_path / "device"
    path.touch()
    camera = open_camera(f"v4l2:{path}", 5, 1)
    camera._capture, camera._opened_mono_s = _Silent(), time.monotonic()
    assert camera.read() is None
    camera._opened_mono_s -= 5
    with pytest.raises(CameraError, match="no picture"):
        camera.read()
    camera._opened_mono_s += 5
    path.unlink()
    with pytest.raises(CameraError, match="no picture"):
        camera.read()
