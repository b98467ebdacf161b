"""`folder:` — pictures from a folder, in the order of their relative paths, once or again and again, none skipped."""

import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from kizu_agent.cameras.base import Picture
from kizu_agent.cameras.pacing import Pacer
from kizu_agent.errors import CameraEnded, CameraError
from kizu_contract.errors import PictureError
from kizu_contract.pictures import MAX_PICTURE_BYTES, decode_picture, picture_names


class FolderCamera:
    """Replays the pictures of `folder`; `source` is the path as configured, joined with the picture's own.

    A picture that cannot be read is counted in `drops` as `unreadable` and passed over. With `loop` the folder is
    listed anew for each round.
    """

    is_live = False
    is_triggered = False
    is_on_demand = True
    is_drawn = False

    def __init__(self, folder: Path, *, loop: bool, rate: float) -> None:
        self.drops: dict[str, int] = {}
        self._folder = folder
        self._is_loop = loop
        self._rate = rate
        self._pacer = Pacer(rate)
        self._pictures: Iterator[str] = iter(())
        self._given_this_round = 0

    def open(self) -> None:
        """List the folder. Raises CameraError: `unreachable` when it is not there, `empty` without pictures."""
        self._pacer = Pacer(self._rate)
        self._begin_round()

    def read(self) -> Picture | None:
        """Give the next picture when it is due. Raises CameraEnded after the last, unless looping."""
        if not self._pacer.is_due():
            return None
        name = next(self._pictures, None)
        if name is None:
            self._end_round()
            return None
        path = os.path.join(self._folder, name)
        try:
            image = _read(path)
        except (OSError, PictureError):
            self.drops["unreadable"] = self.drops.get("unreadable", 0) + 1
            return None
        self._given_this_round += 1
        # A name that is no UTF-8 must not stop the result that carries it.
        return Picture(image, os.fsencode(path).decode("utf-8", "replace"))

    def skip(self) -> bool:
        """Pass over a picture."""
        return self.read() is not None

    def close(self) -> None:
        """Nothing is held."""

    def _begin_round(self) -> None:
        if not self._folder.is_dir():
            raise CameraError("unreachable", f"{self._folder}: there is no such folder")
        try:
            pictures = picture_names(self._folder)
        except OSError as exc:
            raise CameraError("unreachable", f"{self._folder}: cannot be listed: {exc.strerror}") from exc
        if not pictures:
            raise CameraError("empty", f"{self._folder}: holds no pictures")
        self._pictures, self._given_this_round = iter(pictures), 0

    def _end_round(self) -> None:
        if not self._is_loop:
            raise CameraEnded(f"{self._folder}: every picture was given")
        if not self._given_this_round:
            raise CameraError("unreadable", f"{self._folder}: none of its pictures can be read")
        self._begin_round()


def _read(path: str) -> NDArray[np.uint8]:
    """Read the picture in its own colour; the contract's `read_picture` would convert it."""
    if os.stat(path).st_size > MAX_PICTURE_BYTES:
        raise PictureError(f"{path}: pictures may have at most {MAX_PICTURE_BYTES} bytes")
    with open(path, "rb") as file:
        return decode_picture(file.read())
