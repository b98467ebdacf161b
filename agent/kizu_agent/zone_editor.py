"""A page on which a technician draws the zones of a camera over a reference picture: one HTML file, no server."""

import base64
import html
import json
from importlib.resources import files
from pathlib import Path
from typing import Any

import cv2

from kizu_agent.camera_settings import CameraConfig, ZoneConfig
from kizu_agent.config import Config
from kizu_agent.errors import ConfigError
from kizu_contract.pictures import read_picture


def zone_page(camera: str, picture: Path, zones: tuple[ZoneConfig, ...] = ()) -> str:
    """The page for `camera` over `picture`, with the `zones` that are there. Raises PictureError."""
    given = {"picture": _data_uri(picture), "zones": [_plain(zone) for zone in zones]}
    # "<" would end the script element wherever it stood in a name.
    text = json.dumps(given).replace("<", "\\u003c")
    page = files("kizu_agent").joinpath("zone_editor.html").read_text("utf-8")
    return page.replace("__CAMERA__", html.escape(camera)).replace("__GIVEN__", text)


def write_zone_page(config: Config | None, camera: str | None, picture: Path, out: Path) -> None:
    """Write the page to `out`, for a camera of `config` with its zones where one is given.

    Raises ConfigError for a camera that is not there, PictureError for what is no picture, OSError.
    """
    found = None if config is None else _camera(config, camera)
    name = found.name if found else camera or picture.stem
    out.write_text(zone_page(name, picture, found.zones if found else ()), encoding="utf-8")


def _camera(config: Config, name: str | None) -> CameraConfig:
    found = [camera for camera in config.cameras if name is None or camera.name == name]
    if len(found) != 1:
        names = ", ".join(camera.name for camera in config.cameras)
        raise ConfigError(f"--camera {name or '(none given)'}: name one of {names}")
    return found[0]


def _data_uri(picture: Path) -> str:
    _, encoded = cv2.imencode(".png", cv2.cvtColor(read_picture(picture, "rgb"), cv2.COLOR_RGB2BGR))
    return f"data:image/png;base64,{base64.b64encode(encoded.tobytes()).decode()}"


def _plain(zone: ZoneConfig) -> dict[str, Any]:
    return zone.model_dump(mode="json")
