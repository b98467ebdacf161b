"""From a camera's URL to its driver: the only place that knows them all."""

import re
from collections.abc import Callable
from pathlib import Path

import cv2

from kizu_agent.cameras.base import Camera
from kizu_agent.cameras.folder import FolderCamera
from kizu_agent.cameras.urls import boolean, invalid, number, split_url, whole
from kizu_agent.cameras.video import VideoCamera, VideoSource, device_options, stream_options

Open = Callable[[str, float, float, bool], Camera]


def open_camera(url: str, open_timeout_s: float, read_timeout_s: float, *, is_line_triggered: bool = False) -> Camera:
    """Make the driver for `url`, not yet opened; `is_line_triggered`: the device waits for a hardware trigger.

    Raises CameraError (cause `invalid`) for a URL that makes no sense, or a device that cannot tell a trigger that
    stays away from a broken connection.
    """
    scheme = url.partition(":")[0]
    if scheme not in _DRIVERS:
        raise invalid(url, f"no camera {scheme!r}; there are {', '.join(f'{name}:' for name in _DRIVERS)}")
    if is_line_triggered and scheme not in _LINE_TRIGGERED:
        able = ", ".join(f"{name}:" for name in _LINE_TRIGGERED)
        raise invalid(url, f'trigger = "line" is for {able}; another camera that waits cannot be told from a lost one')
    return _DRIVERS[scheme](url, open_timeout_s, read_timeout_s, is_line_triggered)


def check_url(url: str, *, is_line_triggered: bool = False) -> None:
    """Raise CameraError (cause `invalid`) when `url` makes no sense; opens nothing."""
    open_camera(url, 1, 1, is_line_triggered=is_line_triggered)


def _simulated(url: str, _open_timeout_s: float, read_timeout_s: float, is_triggered: bool) -> Camera:
    # Only where one is simulated: it would make every agent and every capture process start later.
    from kizu_agent.cameras.simulated import SimulatedCamera  # noqa: PLC0415
    from kizu_agent.simulation import read_url  # noqa: PLC0415

    return SimulatedCamera(read_url(url), read_timeout_s, is_triggered=is_triggered)


def _folder(url: str, _open_timeout_s: float, _read_timeout_s: float, _is_triggered: bool) -> Camera:
    path, settings = split_url(url, {"loop": boolean, "rate": number(0, 1000)})
    return FolderCamera(_path(url, path), loop=settings.get("loop", False), rate=settings.get("rate", 0.0))


def _video(url: str, open_timeout_s: float, read_timeout_s: float, _is_triggered: bool) -> Camera:
    path, settings = split_url(url, {"loop": boolean, "rate": number(0, 1000)})
    options = stream_options(open_timeout_s, read_timeout_s)
    return VideoCamera(VideoSource(str(_path(url, path)), cv2.CAP_FFMPEG, options, is_live=False, **settings))


def _stream(url: str, open_timeout_s: float, read_timeout_s: float, _is_triggered: bool) -> Camera:
    if not re.fullmatch(r"rtsps?://[^/\s]\S*", url):
        raise invalid(url, "must be like rtsp://user:password@host:554/path")
    options = stream_options(open_timeout_s, read_timeout_s)
    return VideoCamera(VideoSource(url, cv2.CAP_FFMPEG, options, is_live=True))


def _device(url: str, open_timeout_s: float, _read_timeout_s: float, is_triggered: bool) -> Camera:
    known = {"width": whole(1, 65536), "height": whole(1, 65536), "fps": number(1, 10000), "fourcc": _fourcc}
    path, settings = split_url(url, known)
    wanted = {key: settings.get(key) for key in known}
    options = device_options(**wanted)
    name = str(_path(url, path))
    return VideoCamera(
        VideoSource(name, cv2.CAP_V4L2, options, is_live=True, first_s=open_timeout_s, is_triggered=is_triggered)
    )


def _path(url: str, path: str) -> Path:
    if not path:
        raise invalid(url, "names no path")
    return Path(path)


def _fourcc(text: str) -> str:
    if not re.fullmatch(r"[A-Za-z0-9 ]{4}", text):
        raise ValueError("must be four characters, like MJPG")
    return text


_DRIVERS: dict[str, Open] = {
    "sim": _simulated,
    "folder": _folder,
    "video": _video,
    "rtsp": _stream,
    "rtsps": _stream,
    "v4l2": _device,
}
_LINE_TRIGGERED = ("sim", "v4l2")
