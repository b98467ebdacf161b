"""What a simulated camera does wrong, on demand: a file says what, for tests, trials of a configuration and demos."""

import ctypes
import os
import resource
import signal
from pathlib import Path

import cv2
import numpy as np
from numpy.typing import NDArray

from kizu_agent.errors import CameraError
from kizu_contract.pictures import decode_picture

FAULTS = ("unplug", "silent", "freeze", "black", "white", "size", "corrupt", "hang", "crash")


class Faults:
    """The fault that stands in `path` now; none where the file is empty, is not there, or None is given."""

    def __init__(self, path: Path | None) -> None:
        self._path = path
        self._noise = np.random.default_rng(1)

    def now(self) -> str:
        """The present fault, one of FAULTS, or an empty string. Raises CameraError (`invalid`) for another word."""
        try:
            word = "" if self._path is None else self._path.read_text("utf-8", "replace").strip()
        except OSError:
            return ""
        if word and word not in FAULTS:
            raise CameraError("invalid", f"{self._path}: no fault {word!r}; there are {', '.join(FAULTS)}")
        return word

    def strike(self, fault: str) -> None:
        """Do what ends or stops the process or the connection; nothing for faults of the picture alone."""
        if fault == "unplug":
            raise CameraError("lost", "the simulated camera is unplugged")
        if fault == "hang":
            # A native call that keeps the interpreter's lock, as a bad driver does: no Python runs in here any more.
            ctypes.PyDLL(None).pause()
        if fault == "crash":
            resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
            os.kill(os.getpid(), signal.SIGSEGV)

    def spoil(self, fault: str, image: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """Give `image`, uint8 [H, W, 3], as the fault leaves it. Raises PictureError for `corrupt`."""
        if fault == "black":
            return np.asarray(self._noise.integers(0, 8, image.shape), np.uint8)
        if fault == "white":
            return np.asarray(self._noise.integers(253, 256, image.shape), np.uint8)
        if fault == "size":
            return np.ascontiguousarray(image[::2, ::2])
        if fault == "corrupt":
            whole: bytes = cv2.imencode(".jpg", image)[1].tobytes()
            return decode_picture(whole[: len(whole) // 2])
        return image
