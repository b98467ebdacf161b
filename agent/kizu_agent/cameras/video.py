"""`video:`, `rtsp:` and `v4l2:` — everything that OpenCV opens, with its timeouts asked for at opening.

OpenCV honours timeouts only with CAP_FFMPEG given explicitly, and since 4.x no longer asks for TCP by itself (opencv
#22677, #23207, #27091). It can still hang in native code: that is why a camera lives in a process of its own.

Motion JPEG is taken from FFmpeg as it comes and decoded here: FFmpeg fills what is missing of a damaged picture with
grey or with the picture before, and says so to nobody.
"""

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from kizu_agent.cameras.base import Picture
from kizu_agent.cameras.pacing import Pacer
from kizu_agent.cameras.rtsp_probe import describe_status
from kizu_agent.cameras.urls import redact
from kizu_agent.errors import CameraEnded, CameraError
from kizu_contract.pictures import decode_picture, swap_red_and_blue

_MOTION_JPEG = frozenset({b"mjpg", b"jpeg", b"mjpe"})
"""Tags of Motion JPEG in lower case; the last is what OpenCV makes of a stream without one (FFmpeg's `mjpeg`)."""


@dataclass(frozen=True)
class VideoSource:
    """What OpenCV shall open: `name` with the backend `api` and the pairs `options` of property and value."""

    name: str
    api: int
    options: tuple[int, ...]
    is_live: bool
    loop: bool = False
    rate: float = 0.0
    first_s: float = 0.0
    """Seconds after opening in which a device need not have given its first picture."""
    is_triggered: bool = False
    """A device that is set to wait for its hardware trigger: no picture is no loss while it is there."""

    def wanted(self, prop: int) -> int | None:
        """The value asked for property `prop`, None where none was."""
        return dict(zip(self.options[::2], self.options[1::2], strict=True)).get(prop)


class VideoCamera:
    """A video file, network stream or V4L2 device."""

    def __init__(self, source: VideoSource) -> None:
        self.is_live = source.is_live
        self.is_triggered = source.is_triggered
        self.is_on_demand = False
        self.is_drawn = False
        self.drops: dict[str, int] = {}
        self._source = source
        self._pacer = Pacer(source.rate)
        self._capture: cv2.VideoCapture | None = None
        self._is_encoded = False
        self._opened_mono_s = 0.0
        self._number = 0

    def open(self) -> None:
        """Open afresh; a lost V4L2 device must be reopened fully.

        Raises CameraError: `timeout`, `unauthorised`, `not_found`, `unreachable`, or `unsupported` when a device gives
        another size than asked for.
        """
        self.close()
        source = self._source
        if source.api == cv2.CAP_V4L2 and not Path(source.name).exists():
            raise CameraError("unreachable", f"{source.name}: there is no such device")
        began_mono_s = time.monotonic()
        try:
            capture = cv2.VideoCapture(source.name, source.api, source.options)
        except cv2.error as exc:
            raise CameraError("unreachable", f"{redact(source.name)}: cannot be opened: {exc.err}") from exc
        if not capture.isOpened():
            capture.release()
            raise self._unopened(time.monotonic() - began_mono_s)
        self._capture = capture
        self._check_size(capture)
        self._is_encoded = _asks_for_packets(capture, source.api)
        self._pacer, self._opened_mono_s = Pacer(source.rate), time.monotonic()

    def read(self) -> Picture | None:
        """Wait for the next picture, as RGB.

        Raises CameraError `lost`, CameraEnded at the end of a file, PictureError for a damaged picture of Motion JPEG.
        """
        capture = self._opened()
        if not self._pacer.is_due():
            return None
        is_read, image = capture.read()
        if not self._has_come(is_read):
            return None
        return Picture(decode_picture(image.tobytes()) if self._is_encoded else _as_rgb(image), None)

    def skip(self) -> bool:
        """Wait for the next picture and leave it undecoded, as far as the backend lets it be."""
        capture = self._opened()
        return self._pacer.is_due() and self._has_come(capture.grab())

    def close(self) -> None:
        """Give the device back."""
        if self._capture is not None:
            self._capture.release()
            self._capture = None

    def _opened(self) -> cv2.VideoCapture:
        if self._capture is None:
            raise CameraError("lost", f"{redact(self._source.name)}: is not open")
        return self._capture

    def _has_come(self, is_read: bool) -> bool:
        """Tell whether a picture came; count it. Raises CameraError where none will, or should have."""
        if is_read:
            self._number += 1
            return True
        if self._source.loop and self._number:
            self._number = 0
            self.open()
            return False
        if self._is_first_awaited() or (self.is_triggered and Path(self._source.name).exists()):
            return False
        raise self._end()

    def _is_first_awaited(self) -> bool:
        """A device that is still there may let its first picture wait for longer than the next ones."""
        is_early = time.monotonic() - self._opened_mono_s < self._source.first_s
        return self._number == 0 and is_early and Path(self._source.name).exists()

    def _unopened(self, took_s: float) -> CameraError:
        name, limit_ms = redact(self._source.name), self._source.wanted(cv2.CAP_PROP_OPEN_TIMEOUT_MSEC)
        if limit_ms is not None and took_s * 1000 >= 0.9 * limit_ms:
            return CameraError("timeout", f"{name}: did not answer within {took_s:.1f} s")
        status = describe_status(self._source.name) if self.is_live else None
        if status in (401, 403):
            return CameraError("unauthorised", f"{name}: refuses user and password (RTSP status {status})")
        if status == 404:
            return CameraError("not_found", f"{name}: the camera answers, but has no such path (RTSP status 404)")
        answer = "" if status is None else f"; it answers with RTSP status {status}"
        return CameraError("unreachable", f"{name}: cannot be opened{answer}; check address, port and path")

    def _check_size(self, capture: cv2.VideoCapture) -> None:
        """A driver that does not know the size takes the nearest: the model would see another scale."""
        for prop, side in ((cv2.CAP_PROP_FRAME_WIDTH, "width"), (cv2.CAP_PROP_FRAME_HEIGHT, "height")):
            wanted, given = self._source.wanted(prop), round(capture.get(prop))
            if wanted is not None and wanted != given:
                self.close()
                raise CameraError("unsupported", f"{self._source.name}: gives {side} {given} instead of {wanted}")

    def _end(self) -> CameraError:
        name = redact(self._source.name)
        if self.is_live:
            return CameraError("lost", f"{name}: no picture came in time, or the connection broke")
        if self._number == 0:
            return CameraError("unreadable", f"{name}: holds no picture that can be decoded")
        return CameraEnded(f"{name}: the video is over")


def _asks_for_packets(capture: cv2.VideoCapture, api: int) -> bool:
    """Ask FFmpeg for Motion JPEG as it comes; tell whether pictures must be decoded now."""
    tag = (int(capture.get(cv2.CAP_PROP_FOURCC)) & 0xFFFFFFFF).to_bytes(4, "little").lower()
    return api == cv2.CAP_FFMPEG and tag in _MOTION_JPEG and capture.set(cv2.CAP_PROP_FORMAT, -1)


def _as_rgb(image: Any) -> NDArray[np.uint8]:
    picture = np.asarray(image, np.uint8)
    if picture.ndim == 2:
        return picture[:, :, None]
    if picture.shape[2] == 3:
        return swap_red_and_blue(picture)
    return picture


def stream_options(open_timeout_s: float, read_timeout_s: float) -> tuple[int, ...]:
    """FFmpeg's timeouts as OpenCV options."""
    open_ms, read_ms = (round(seconds * 1000) for seconds in (open_timeout_s, read_timeout_s))
    return (cv2.CAP_PROP_OPEN_TIMEOUT_MSEC, open_ms, cv2.CAP_PROP_READ_TIMEOUT_MSEC, read_ms)


def device_options(width: int | None, height: int | None, fps: float | None, fourcc: str | None) -> tuple[int, ...]:
    """What a V4L2 device shall deliver; None leaves it as it is."""
    code = cv2.VideoWriter.fourcc(*fourcc) if fourcc else None
    wanted: Sequence[tuple[int, float | None]] = (
        (cv2.CAP_PROP_FOURCC, code),
        (cv2.CAP_PROP_FRAME_WIDTH, width),
        (cv2.CAP_PROP_FRAME_HEIGHT, height),
        (cv2.CAP_PROP_FPS, fps),
    )
    return tuple(number for prop, value in wanted if value is not None for number in (prop, round(value)))


def environment(read_timeout_s: float) -> dict[str, str]:
    """What OpenCV reads from the environment, partly when it is imported: set it where the process is started.

    Its messages would come with each attempt, and FFmpeg's may hold a URL with its password.
    """
    return {
        "OPENCV_FFMPEG_CAPTURE_OPTIONS": "rtsp_transport;tcp",
        "OPENCV_FFMPEG_LOGLEVEL": "-8",
        "OPENCV_LOG_LEVEL": "SILENT",
        "OPENCV_VIDEOIO_V4L_SELECT_TIMEOUT": str(max(1, math.ceil(read_timeout_s))),
    }
