"""Cameras whose pictures somebody asks for, and those that give fewer than they could."""

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from kizu_agent.camera_settings import CameraConfig
from kizu_agent.cameras.pacing import Limiter
from kizu_agent.capture import Capture
from kizu_agent.errors import CommandError
from kizu_agent.mailbox import Mailbox
from kizu_agent.records import Frame, Part, Trigger

SMALL = "width=64&height=64"


class Line:
    """A camera that is told when; `missed` are triggers without a picture, with the cause."""

    def __init__(self, source: str, **settings: Any) -> None:
        self.mailbox = Mailbox()
        self.missed: list[tuple[int, str]] = []
        config = CameraConfig.model_validate({"name": "cam", "source": source, "trigger": "mqtt", **settings})
        self.capture = Capture(config, self.mailbox, lambda trigger, cause: self.missed.append((trigger.number, cause)))
        self.capture.start()

    def shoot(self, number: int) -> Trigger:
        trigger = Trigger(number, "cam", None, Part(f"part-{number}"), time.monotonic_ns())
        self.capture.shoot(trigger)
        return trigger

    def frames(self, count: int) -> list[Frame]:
        taken: list[Frame] = []
        deadline = time.monotonic() + 15
        while len(taken) < count and time.monotonic() < deadline:
            taken += self.mailbox.take(1, 0.1)
        assert len(taken) == count, (len(taken), self.capture.status())
        return taken

    def until(self, is_so: Callable[[], object]) -> None:
        deadline = time.monotonic() + 15
        while not is_so():
            assert time.monotonic() < deadline, (self.capture.status(), self.missed)
            time.sleep(0.01)


@pytest.fixture
def line() -> Iterator[Callable[..., Line]]:
    """Start triggered cameras and wait until they are idle; they are gone at the end."""
    lines: list[Line] = []

    def start(source: str, **settings: Any) -> Line:
        lines.append(Line(source, **settings))
        lines[-1].until(lambda: lines[-1].capture.status().condition == "idle")
        return lines[-1]

    yield start
    stopped = [each.capture.stop(5.0) for each in lines]
    assert all(stopped)


@pytest.mark.parametrize("rate", [0, 50])
def test_each_trigger_has_a_picture_of_its_own_in_order(line: Callable[..., Line], rate: int) -> None:
    """Without a trigger nothing comes; with some, each has one picture, captured after it, in their order."""
    camera = line(f"sim:plates?rate={rate}&{SMALL}")
    assert camera.mailbox.take(1, 0.3) == []
    triggers = [camera.shoot(number) for number in range(1, 9)]
    frames = camera.frames(8)
    assert [frame.trigger for frame in frames] == triggers
    assert all(frame.captured_mono_ns > frame.trigger.came_mono_ns for frame in frames if frame.trigger)
    assert len({frame.number for frame in frames}) == 8
    assert camera.mailbox.take(1, 0.2) == []
    assert camera.missed == []


def test_a_folder_gives_its_next_picture_for_each_trigger(
    line: Callable[..., Line], numbered: Callable[..., list[Path]], tmp_path: Path
) -> None:
    """Pictures of a folder are taken one a trigger; the trigger after the last hears that the camera has ended."""
    numbered(tmp_path, 2)
    camera = line(f"folder:{tmp_path}")
    camera.shoot(1)
    assert int(camera.frames(1)[0].image[0, 0, 0]) == 0
    camera.shoot(2)
    assert int(camera.frames(1)[0].image[0, 0, 0]) == 1
    camera.shoot(3)
    camera.until(lambda: camera.missed == [(3, "camera_ended")])
    camera.until(lambda: camera.capture.status().condition == "ended")
    with pytest.raises(CommandError, match="ended") as refused:
        camera.shoot(4)
    assert refused.value.code == "camera_ended"


def test_a_camera_that_is_lost_answers_every_trigger(line: Callable[..., Line], tmp_path: Path) -> None:
    """What waits when the camera goes is missed; what comes then is refused at once; when it is back all is well."""
    fault = tmp_path / "fault"
    fault.write_text("silent")
    camera = line(f"sim:plates?rate=0&{SMALL}&fault={fault}", read_timeout_s=5.0)
    camera.shoot(1)
    # In one piece: a file that is written in place is empty for a moment, and then nothing is wrong with the camera.
    (tmp_path / "next").write_text("unplug")
    (tmp_path / "next").replace(fault)
    camera.until(lambda: camera.missed == [(1, "camera_lost")])
    with pytest.raises(CommandError) as refused:
        camera.shoot(2)
    assert refused.value.code == "camera_lost"
    camera.until(lambda: camera.capture.status().losses == 1)
    fault.write_text("")
    camera.until(lambda: camera.capture.status().condition == "idle")
    camera.shoot(3)
    assert camera.frames(1)[0].trigger is not None


def test_a_picture_that_shows_nothing_is_no_answer(line: Callable[..., Line], tmp_path: Path) -> None:
    """A black picture misses its trigger; the camera is looked at until it shows something, without being asked."""
    fault = tmp_path / "fault"
    fault.write_text("")
    camera = line(f"sim:plates?rate=50&{SMALL}&fault={fault}", black_after_s=0.1)
    camera.shoot(1)
    camera.frames(1)
    fault.write_text("black")
    number = 1

    def is_lost() -> bool:
        nonlocal number
        number += 1
        try:
            camera.shoot(number)
        except CommandError as exc:
            return exc.code == "camera_lost"
        camera.mailbox.take(1, 0.1)
        return False

    camera.until(is_lost)
    assert "black" in {cause for _, cause in camera.missed}
    fault.write_text("")
    camera.until(lambda: camera.capture.status().condition == "idle")
    camera.shoot(1000)
    assert camera.frames(1)[0].trigger is not None


def test_too_many_triggers_are_refused(line: Callable[..., Line], tmp_path: Path) -> None:
    """No more than the queue takes wait for a picture; the next one is told so at once."""
    fault = tmp_path / "fault"
    fault.write_text("silent")
    camera = line(f"sim:plates?rate=0&{SMALL}&fault={fault}", trigger_queue=2)
    camera.shoot(1)
    camera.shoot(2)
    with pytest.raises(CommandError) as refused:
        camera.shoot(3)
    assert refused.value.code == "busy"
    fault.write_text("")
    assert [frame.trigger.number for frame in camera.frames(2) if frame.trigger] == [1, 2]


def test_a_paused_camera_gives_nothing_and_loses_no_file(
    rig: Callable[..., Any], numbered: Callable[..., list[Path]], tmp_path: Path
) -> None:
    """Files wait for the end of a pause; a live camera's frames are dropped and counted under it."""
    numbered(tmp_path, 30)
    files, live = rig(f"folder:{tmp_path}?rate=50"), rig(f"sim:plates?rate=50&{SMALL}")
    first = files.frames(3)
    live.frames(1)
    files.capture.is_paused = live.capture.is_paused = True
    live.until(lambda status: status.drops.get("paused", 0) > 5)
    held = files.mailbox.take(10, 0.1)
    held += files.mailbox.take(10, 0.1)
    assert files.mailbox.take(1, 0.3) == []
    files.capture.is_paused = live.capture.is_paused = False
    numbers = [frame.number for frame in [*first, *held, *files.frames(30 - len(first) - len(held))]]
    assert numbers == list(range(30))
    assert files.capture.status().drops == {}


def test_a_rate_lets_a_live_cameras_frames_go_by(rig: Callable[..., Any]) -> None:
    """At most so many frames a second are handed over; the others are counted as `rate`, and numbers show the gaps."""
    camera = rig(f"sim:plates?rate=100&{SMALL}", rate=10.0)
    frames = camera.frames(8)
    took_s = (frames[-1].captured_mono_ns - frames[0].captured_mono_ns) / 1e9
    assert took_s > 0.6
    assert frames[-1].number - frames[0].number > 30
    assert camera.capture.status().drops["rate"] > 30


def test_a_rate_slows_files_and_drops_none(
    rig: Callable[..., Any], numbered: Callable[..., list[Path]], tmp_path: Path
) -> None:
    """A folder is read no faster than the rate."""
    numbered(tmp_path, 6)
    frames = rig(f"folder:{tmp_path}", rate=10.0).frames(6)
    assert (frames[-1].captured_mono_ns - frames[0].captured_mono_ns) / 1e9 > 0.4
    assert [frame.number for frame in frames] == list(range(6))


def test_what_a_limiter_did_not_use_is_not_owed() -> None:
    """After a pause one goes at once and the next waits its time."""
    limiter = Limiter(20.0)
    assert limiter.wait_s == 0
    limiter.count()
    time.sleep(0.2)
    assert limiter.wait_s == 0
    limiter.count()
    assert limiter.wait_s > 0


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"source": "rtsp://host/x", "trigger": "line"}, "cannot be told from a lost one"),
        ({"source": "folder:/x", "trigger": "line"}, "sim:, v4l2:"),
        ({"source": "sim:gears", "trigger": "mqtt", "rate": 5.0}, "each trigger makes one picture"),
    ],
)
def test_triggers_that_make_no_sense_are_refused(settings: dict[str, Any], words: str) -> None:
    """The configuration says why."""
    with pytest.raises(ValueError, match=words):
        CameraConfig.model_validate({"name": "cam", **settings})


def test_a_line_triggered_camera_waits_for_ever(rig: Callable[..., Any], tmp_path: Path) -> None:
    """With a hardware trigger no picture is no loss; the picture that comes is taken."""
    fault = tmp_path / "fault"
    fault.write_text("silent")
    camera = rig(f"sim:plates?rate=50&{SMALL}&fault={fault}", trigger="line", read_timeout_s=0.3)
    camera.until(lambda status: status.condition == "idle")
    time.sleep(1.0)
    assert (camera.capture.status().condition, camera.capture.status().losses) == ("idle", 0)
    fault.write_text("")
    assert camera.frames(1)[0].trigger is None
