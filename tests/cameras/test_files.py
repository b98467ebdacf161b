"""Folders and video files as cameras: rates, rounds, and files that hold nothing."""

import time
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
import pytest

from kizu_agent.cameras.base import Camera, Picture
from kizu_agent.cameras.registry import open_camera
from kizu_agent.errors import CameraEnded, CameraError


def _read(camera: Camera, count: int) -> list[Picture]:
    pictures: list[Picture] = []
    while len(pictures) < count:
        picture = camera.read()
        if picture is not None:
            pictures.append(picture)
    return pictures


@pytest.fixture
def film(tmp_path: Path) -> Path:
    """Six frames of 64 × 48, each 30 grey levels brighter."""
    path = tmp_path / "film.avi"
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter.fourcc(*"MJPG"), 10, (64, 48))
    for number in range(6):
        writer.write(np.full((48, 64, 3), 30 * number, np.uint8))
    writer.release()
    return path


def test_folder_keeps_its_rate(numbered: Callable, tmp_path: Path) -> None:
    """With a rate, pictures come at that pace and none sooner."""
    numbered(tmp_path, 5)
    camera = open_camera(f"folder:{tmp_path}?rate=20", 1, 1)
    began = time.monotonic()
    camera.open()
    _read(camera, 5)
    assert 0.2 <= time.monotonic() - began < 1.0


def test_folder_through_is_ended(numbered: Callable, tmp_path: Path) -> None:
    """After its last picture a folder has ended, in the order of paths, sub-folders included, hidden files not."""
    numbered(tmp_path / "b", 2)
    numbered(tmp_path / "a", 1)
    numbered(tmp_path / ".hidden", 1)
    camera = open_camera(f"folder:{tmp_path}", 1, 1)
    camera.open()
    assert [picture.source for picture in _read(camera, 3)] == [
        str(tmp_path / name) for name in ("a/000.png", "b/000.png", "b/001.png")
    ]
    with pytest.raises(CameraEnded):
        camera.read()


def test_folder_without_pictures(tmp_path: Path) -> None:
    """A folder that holds no pictures is lost with the cause `empty`, a missing one with `unreachable`."""
    (tmp_path / "notes.txt").write_text("no picture")
    for url, cause in ((f"folder:{tmp_path}", "empty"), (f"folder:{tmp_path}/none", "unreachable")):
        with pytest.raises(CameraError) as caught:
            open_camera(url, 1, 1).open()
        assert caught.value.cause == cause


def test_loop_over_nothing_readable(tmp_path: Path) -> None:
    """A looped folder without one readable picture is lost, and does not spin."""
    (tmp_path / "a.png").write_bytes(b"no picture")
    camera = open_camera(f"folder:{tmp_path}?loop=true", 1, 1)
    camera.open()
    assert camera.read() is None
    with pytest.raises(CameraError) as caught:
        camera.read()
    assert caught.value.cause == "unreadable"
    assert camera.drops == {"unreadable": 1}


def test_looped_folder_sees_new_pictures(numbered: Callable, tmp_path: Path) -> None:
    """Each round of a looped folder takes the pictures that are there by then."""
    numbered(tmp_path, 1)
    camera = open_camera(f"folder:{tmp_path}?loop=true", 1, 1)
    camera.open()
    _read(camera, 1)
    numbered(tmp_path, 3)
    assert [int(picture.image[0, 0, 0]) for picture in _read(camera, 3)] == [0, 1, 2]


def test_video_once_and_looped(film: Path) -> None:
    """A video ends after its last frame; looped it starts again."""
    once, looped = open_camera(f"video:{film}", 5, 5), open_camera(f"video:{film}?loop=true", 5, 5)
    once.open()
    looped.open()
    assert [round(picture.image.mean() / 30) for picture in _read(once, 6)] == list(range(6))
    with pytest.raises(CameraEnded):
        once.read()
    assert [round(picture.image.mean() / 30) for picture in _read(looped, 9)] == [0, 1, 2, 3, 4, 5, 0, 1, 2]
    once.close()
    looped.close()


def test_video_without_a_picture(tmp_path: Path) -> None:
    """A file that is no video is lost with the cause `unreachable`, which names it."""
    path = tmp_path / "film.avi"
    path.write_bytes(b"no film")
    with pytest.raises(CameraError, match=r"film\.avi") as caught:
        open_camera(f"video:{path}", 5, 5).open()
    assert caught.value.cause == "unreachable"
