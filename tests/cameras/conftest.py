"""Captures that are always stopped, and pictures to replay."""

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest

from kizu_agent.camera_settings import CameraConfig
from kizu_agent.capture import Capture
from kizu_agent.mailbox import Mailbox
from kizu_agent.records import CameraStatus, Frame


class Rig:
    """One capture with its mailbox, and ways to wait for things."""

    def __init__(self, source: str, **settings: Any) -> None:
        self.mailbox = Mailbox()
        self.capture = Capture(CameraConfig(name="cam", source=source, **settings), self.mailbox)

    @property
    def pid(self) -> int:
        child = self.capture._child
        assert child is not None
        return child.process.pid

    def frames(self, count: int, within_s: float = 15.0) -> list[Frame]:
        taken: list[Frame] = []
        deadline = time.monotonic() + within_s
        while len(taken) < count and time.monotonic() < deadline:
            taken += self.mailbox.take(1, 0.1)
        assert len(taken) == count, f"{len(taken)} frames of {count}; {self.capture.status()}"
        return taken

    def until(self, is_so: Callable[[CameraStatus], bool], within_s: float = 15.0) -> CameraStatus:
        deadline = time.monotonic() + within_s
        while not is_so(status := self.capture.status()):
            assert time.monotonic() < deadline, f"not within {within_s} s: {status}"
            time.sleep(0.01)
        return status


@pytest.fixture
def rig() -> Iterator[Callable[..., Rig]]:
    """Start captures of one camera; they are stopped at the end, and must be gone in time."""
    rigs: list[Rig] = []

    def start(source: str, **settings: Any) -> Rig:
        rigs.append(Rig(source, **settings))
        rigs[-1].capture.start()
        return rigs[-1]

    yield start
    assert all(each.capture.stop(5.0) for each in rigs)


@pytest.fixture
def numbered() -> Callable[..., list[Path]]:
    """Write pictures whose brightness is their number (0 to 255)."""

    def write(folder: Path, count: int, sizes: tuple[tuple[int, int], ...] = ((24, 32),)) -> list[Path]:
        folder.mkdir(parents=True, exist_ok=True)
        paths = [folder / f"{number:03}.png" for number in range(count)]
        for number, path in enumerate(paths):
            height, width = sizes[number % len(sizes)]
            cv2.imwrite(str(path), np.full((height, width), number % 256, np.uint8))
        return paths

    return write
