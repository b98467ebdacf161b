"""The command `zones`: read, set, reset or revert the zones of a camera."""

from collections.abc import Callable
from typing import Annotated, Literal

from pydantic import Field, ValidationError

from kizu_agent.answers import ZonesAnswer, ZoneSettingPart, ZonesPart
from kizu_agent.audit import Change
from kizu_agent.camera_settings import CameraConfig, ZoneConfig
from kizu_agent.commands import Command
from kizu_agent.errors import CommandError
from kizu_agent.records import Frame
from kizu_agent.requests import Request, explain
from kizu_agent.zone_book import ZoneBook, ZoneSetting
from kizu_agent.zones import masks_of

Newest = Callable[[str], Frame | None]
"""The last picture of a camera, None where it has given none."""


class ZonesRequest(Request):
    """Read, set, reset (to what is configured) or revert (the last change) a camera's zones; set takes all of them."""

    action: Literal["get", "set", "reset", "revert"] = "get"
    camera: Annotated[str, Field(min_length=1, max_length=64)]
    zones: Annotated[list[ZoneConfig], Field(max_length=100)] | None = None


def zones_command(book: ZoneBook, newest: Newest) -> Command[ZonesRequest, ZonesAnswer]:
    """The command on `book`; zones must fit the `newest` picture of their camera, where there is one."""
    return Command("zones", ZonesRequest, ZonesAnswer, _Zones(book, newest).carry_out, _audited)


def _audited(request: ZonesRequest, answer: ZonesAnswer) -> Change | None:
    return None if request.action == "get" else Change(f"zones of camera {answer.camera}", answer.old, answer.new)


class _Zones:
    def __init__(self, book: ZoneBook, newest: Newest) -> None:
        self._book, self._newest = book, newest

    def carry_out(self, request: ZonesRequest, answer: ZonesAnswer) -> ZonesAnswer:
        """Answer `request`. Raises CommandError, and then nothing has changed."""
        camera = self._book.camera(request.camera)
        if (request.zones is None) == (request.action == "set"):
            raise CommandError("invalid", "set takes zones, a list; get, reset and revert take none")
        old = _part(self._book.get(camera.name))
        try:
            self._change(request, camera)
        except OSError as exc:
            raise CommandError("failed", f"zones cannot be kept, nothing was changed: {exc.strerror}") from exc
        new = _part(self._book.get(camera.name))
        return answer.model_copy(update={"camera": camera.name, "old": old, "new": new})

    def _change(self, request: ZonesRequest, camera: CameraConfig) -> None:
        if request.zones is not None:
            self._book.set(camera.name, self._checked(tuple(request.zones), camera))
        elif request.action == "reset":
            self._book.set(camera.name, None)
        elif request.action == "revert":
            self._book.revert(camera.name)

    def _checked(self, zones: tuple[ZoneConfig, ...], camera: CameraConfig) -> tuple[ZoneConfig, ...]:
        try:
            CameraConfig.model_validate({**camera.model_dump(), "zones": zones})
        except ValidationError as exc:
            raise CommandError("invalid", explain(exc)) from exc
        frame = self._newest(camera.name)
        if zones and frame is not None:
            region = camera.region
            size = frame.image.shape[:2] if region is None else (region.height, region.width)
            try:
                masks_of(zones, region, *size)
            except ValueError as exc:
                raise CommandError("invalid", f"they do not fit the camera's picture: {exc}") from exc
        return zones


def _part(setting: ZoneSetting) -> ZonesPart:
    zones = [ZoneSettingPart.model_validate(zone.model_dump(mode="json")) for zone in setting.zones]
    return ZonesPart(origin=setting.origin, zones=zones)
