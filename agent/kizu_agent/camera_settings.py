"""The table of one camera in the agent's configuration, and the tables in it."""

from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator

from kizu_agent.cameras.registry import check_url
from kizu_agent.errors import CameraError
from kizu_agent.records import TriggerKind
from kizu_agent.settings import Name, Section

RESERVED_CAMERA_NAMES = frozenset({"status", "cmd", "response", "model", "product", "audit"})
"""Topic levels of the agent itself, beside which cameras stand."""

Rate = Annotated[float, Field(gt=0, lt=1)]
Pixel = Annotated[int, Field(ge=0, le=65535, strict=True)]


class EventsConfig(Section):
    """When an anomaly opens and closes.

    It opens when `open_n` of the last `open_m` verdicts are at least `at`, and closes after `close_n` verdicts in a
    row below it whose score lies below `hysteresis` times that threshold: scores about a limit would flutter.
    """

    at: Literal["warn", "reject"] = "reject"
    open_n: Annotated[int, Field(ge=1, le=1000)] = 1
    open_m: Annotated[int, Field(ge=1, le=1000)] = 1
    close_n: Annotated[int, Field(ge=1, le=1000)] = 3
    hysteresis: Annotated[float, Field(gt=0, le=1)] = 0.9
    hold_s: Annotated[float, Field(ge=0, le=86_400)] = 0.0
    """It stays open for so long after the last frame that was not good."""

    @model_validator(mode="after")
    def _n_of_m(self) -> "EventsConfig":
        if self.open_n > self.open_m:
            raise ValueError(f"open_n {self.open_n} is more than open_m {self.open_m}")
        return self


class HeatmapConfig(Section):
    """Which inspections get a heatmap thumbnail, and how it looks."""

    when: Literal["always", "every_nth", "warn", "reject", "never"] = "warn"
    every_n: Annotated[int, Field(ge=1)] = 10
    width_px: Annotated[int, Field(ge=16, le=4096)] = 320
    quality: Annotated[int, Field(ge=1, le=100)] = 80
    qos: Literal[0, 1] = 1


class Region(Section):
    """The part of the frame that is inspected, in pixels from its upper left corner."""

    x: Annotated[int, Field(ge=0)]
    y: Annotated[int, Field(ge=0)]
    width: Annotated[int, Field(ge=1)]
    height: Annotated[int, Field(ge=1)]


class ZoneConfig(Section):
    """A part of the picture: a polygon in pixels of the camera's whole picture, judged by itself or left out.

    `threshold_factor` multiplies the camera's thresholds (2.0: half as strict). A flaw counts from `min_area_px`
    pixels and from `min_area_mm2` on, measured where the map is at least at the zone's threshold.
    """

    name: Name
    kind: Literal["include", "exclude"] = "include"
    polygon: Annotated[tuple[tuple[Pixel, Pixel], ...], Field(min_length=3, max_length=1000)]
    threshold_factor: Annotated[float, Field(gt=0, le=1000)] = 1.0
    min_area_px: Annotated[int, Field(ge=0, le=2**31)] = 0
    min_area_mm2: Annotated[float, Field(ge=0, le=1e9)] = 0.0

    @model_validator(mode="after")
    def _excluded_has_no_limits(self) -> "ZoneConfig":
        limits = {"threshold_factor": 1.0, "min_area_px": 0, "min_area_mm2": 0.0}
        given = [name for name, default in limits.items() if getattr(self, name) != default]
        if self.kind == "exclude" and given:
            raise ValueError(f"{', '.join(given)}: what is excluded is not judged")
        return self

    @field_validator("polygon")
    @classmethod
    def _has_an_area(cls, polygon: tuple[tuple[int, int], ...]) -> tuple[tuple[int, int], ...]:
        ahead = (*polygon[1:], polygon[0])
        doubled = sum(x * below - right * y for (x, y), (right, below) in zip(polygon, ahead, strict=True))
        if doubled == 0:
            raise ValueError("the corners of the polygon lie on one line")
        return polygon


class FrameSize(Section):
    """Size of a live camera's pictures in pixels; one of another size is not judged."""

    width: Annotated[int, Field(ge=1, le=65536)]
    height: Annotated[int, Field(ge=1, le=65536)]


class ThresholdRates(Section):
    """Thresholds as false alarm rates among good frames; the model's calibration turns them into scores."""

    warn_rate: Rate = 0.01
    reject_rate: Rate = 0.001

    @model_validator(mode="after")
    def _rising(self) -> "ThresholdRates":
        if self.reject_rate > self.warn_rate:
            raise ValueError(f"reject_rate {self.reject_rate} is above warn_rate {self.warn_rate}")
        return self


class CameraConfig(Section):
    """One camera. `source`: sim:…, folder:…, video:…, rtsp://…, rtsps://… or v4l2:… (docs/operations.md)."""

    name: Name
    source: str
    model: Name | None = None
    """Take only bundles of this name; None: any bundle that no other camera asks for by name."""
    region: Region | None = None
    zones: tuple[ZoneConfig, ...] = ()
    """Parts that are judged by themselves or left out; none: the whole region by the bundle's own reduction."""
    mm_per_px: Annotated[float, Field(gt=0, le=1000)] | None = None
    """Scale of the picture, for areas in mm²."""
    thresholds: ThresholdRates | None = None
    """None: the bundle's own."""
    stale_after_s: Annotated[float, Field(gt=0, le=86_400)] = 5.0
    """Without a new inspection for this long, the state is unknown."""
    open_timeout_s: Annotated[float, Field(gt=0, le=300)] = 10.0
    read_timeout_s: Annotated[float, Field(gt=0, le=300)] = 5.0
    size: FrameSize | None = None
    """None: that of the first picture since the agent started. For live cameras only, as the four below."""
    frozen_after_s: Annotated[float, Field(ge=0, le=86_400)] = 10.0
    black_after_s: Annotated[float, Field(ge=0, le=86_400)] = 2.0
    white_after_s: Annotated[float, Field(ge=0, le=86_400)] = 0.0
    black_level: Annotated[int, Field(ge=0, le=254)] = 16
    unauthorised_retry_s: Annotated[float, Field(ge=1, le=86_400)] = 600.0
    """Pause after a camera has refused user and password: a few refusals more would lock the account."""
    queue_frames: Annotated[int, Field(ge=1, le=1000)] = 4
    trigger: TriggerKind = "free"
    """What makes its pictures: itself, the command `inspect`, or a hardware trigger of the line."""
    trigger_queue: Annotated[int, Field(ge=1, le=1000)] = 16
    """Triggers that may wait for their verdict at a time; the next one is answered `busy`."""
    trigger_deadline_s: Annotated[float, Field(gt=0, le=60)] = 1.0
    """A trigger without a verdict for so long is answered with `unknown`, unless it names its own deadline."""
    rate: Annotated[float, Field(gt=0, le=1000)] | None = None
    """At most so many inspections a second while it runs freely; None: as many as it gives."""
    events: EventsConfig = EventsConfig()
    heatmap: HeatmapConfig = HeatmapConfig()

    @model_validator(mode="after")
    def _zones_fit(self) -> "CameraConfig":
        names = [zone.name for zone in self.zones]
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise ValueError(f"zones share a name: {', '.join(twice)}")
        if self.mm_per_px is None and any(zone.min_area_mm2 for zone in self.zones):
            raise ValueError("min_area_mm2 needs the camera's mm_per_px")
        return self

    @field_validator("name")
    @classmethod
    def _not_reserved(cls, name: str) -> str:
        if name in RESERVED_CAMERA_NAMES:
            raise ValueError(f"{name!r} is a topic of the agent itself; choose another name")
        return name

    @field_validator("source")
    @classmethod
    def _makes_sense(cls, source: str) -> str:
        try:
            check_url(source)
        except CameraError as exc:
            raise ValueError(str(exc)) from exc
        return source

    @model_validator(mode="after")
    def _trigger_fits(self) -> "CameraConfig":
        if self.trigger != "free" and self.rate is not None:
            raise ValueError(f'rate is for trigger = "free"; with {self.trigger!r} each trigger makes one picture')
        try:
            check_url(self.source, is_line_triggered=self.trigger == "line")
        except CameraError as exc:
            raise ValueError(str(exc)) from exc
        return self
