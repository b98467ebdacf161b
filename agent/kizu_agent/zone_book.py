"""The zones of every camera: set by command and kept on disk, else configured."""

import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from kizu_agent.camera_settings import CameraConfig, ZoneConfig
from kizu_agent.errors import CommandError, unknown_camera
from kizu_agent.state_file import StateFile
from kizu_agent.zones import View

FILE_NAME = "zones.json"

Zones = tuple[ZoneConfig, ...]
Origin = Literal["config", "command"]


class _Kept(BaseModel):
    """What is set for a camera, and what was before; None: what is configured."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    zones: Zones | None = None
    previous: Zones | None = None


class _File(BaseModel):
    model_config = ConfigDict(extra="forbid")

    schema_version: Literal[1] = 1
    cameras: dict[str, _Kept] = Field(default_factory=dict)


@dataclass(frozen=True)
class ZoneSetting:
    """Zones in effect and where they come from."""

    origin: Origin
    zones: Zones


class ZoneBook:
    """Which zones judge; from any thread. `problem` says in words that what commands had set is lost."""

    def __init__(self, state_dir: Path, cameras: Sequence[CameraConfig]) -> None:
        self._cameras = {camera.name: camera for camera in cameras}
        self._file = StateFile(state_dir / FILE_NAME, _File)
        self._changing = threading.Lock()
        self._kept = dict((self._file.load() or _File()).cameras)
        self.views: Mapping[str, View] = self._views()
        """What of each camera's picture is judged; replaced as a whole, so that a pass of inspection sees one."""

    @property
    def problem(self) -> str | None:
        """Why it is not known which zones were set; None where it is."""
        return self._file.problem

    def get(self, camera: str) -> ZoneSetting:
        """Give the zones of `camera`. Raises CommandError where there is no such camera."""
        configured = self.camera(camera).zones
        zones = self._kept.get(camera, _Kept()).zones
        return ZoneSetting("config", configured) if zones is None else ZoneSetting("command", zones)

    def camera(self, name: str) -> CameraConfig:
        """The configuration of camera `name`. Raises CommandError where there is none."""
        if name not in self._cameras:
            raise unknown_camera(name, sorted(self._cameras))
        return self._cameras[name]

    def set(self, camera: str, zones: Zones | None) -> None:
        """Use `zones` from the next pass on, None: those configured. Raises OSError, and nothing has changed then."""
        with self._changing:
            self._keep(camera, _Kept(zones=zones, previous=self._kept.get(camera, _Kept()).zones))

    def revert(self, camera: str) -> None:
        """Take the last change back; once more takes the taking back back.

        Raises CommandError where nothing was changed, OSError as `set`.
        """
        with self._changing:
            kept = self._kept.get(camera)
            if kept is None:
                raise CommandError("no_previous", f"no command has changed the zones of {camera}")
            self._keep(camera, _Kept(zones=kept.previous, previous=kept.zones))

    def _keep(self, camera: str, kept: _Kept) -> None:
        found = {**self._kept, camera: kept}
        self._file.save(_File(cameras=found))
        self._kept = found
        self.views = self._views()

    def _views(self) -> dict[str, View]:
        return {
            name: View(camera.region, self.get(name).zones, camera.mm_per_px) for name, camera in self._cameras.items()
        }
