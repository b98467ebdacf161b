"""What commands are answered with: payloads like all others, of one shape for each command."""

from typing import Literal

from pydantic import Field

from kizu_agent.payloads import Document, HeatmapPart, ModelPart, Payload, StatusPayload, Time
from kizu_agent.records import ModelState
from kizu_contract.judging import Verdict


class ErrorPart(Payload):
    """Why a command was refused; both null when it was not."""

    code: str | None = None
    message: str | None = None


class Answer(Document):
    """What every command answers with; the whole answer where the command is unknown."""

    id: str
    request_id: str | None = None
    agent: str
    command: str
    ok: bool = True
    error: ErrorPart = ErrorPart()
    answered_at: Time


class PingAnswer(Answer):
    """`echo` is what was sent."""

    echo: str | None = None
    version: str


class ThresholdSettingPart(Payload):
    """Thresholds in effect, all null where there is no model to know them by.

    `origin`: `command` (set by command), `product`, `config` or `bundle`. Rates are null where the scores were set
    directly. `note` says what is set and cannot be applied, and why.
    """

    origin: Literal["bundle", "config", "product", "command"] | None = None
    warn: float | None = None
    reject: float | None = None
    warn_rate: float | None = None
    reject_rate: float | None = None
    note: str | None = None


class ThresholdsAnswer(Answer):
    """`old` and `new` are the same unless something was set. They are those of `product`, null while none runs."""

    camera: str | None = None
    product: str | None = None
    model: ModelPart = ModelPart()
    old: ThresholdSettingPart = ThresholdSettingPart()
    new: ThresholdSettingPart = ThresholdSettingPart()


class ModelSlotPart(Payload):
    """What serves the cameras that ask for `slot` (null: for any model), and what a rollback leads to."""

    slot: str | None
    active: ModelPart
    on_probation: bool
    previous: ModelPart
    since: Time | None


class StoredModelPart(Payload):
    """A model in the store; `reason` says why it is `failed`, `signed_by` is the fingerprint of a trusted key."""

    file: str
    model: ModelPart
    state: ModelState
    since: Time
    reason: str | None
    signed_by: str | None = None


class ModelAnswer(Answer):
    """What is in service and in the store as the command comes in.

    `outcome`: `listed`, `accepted` (the outcome follows on the model topic) or `unchanged`; `target` is the model that
    shall serve. Both null where the command is refused.
    """

    outcome: Literal["listed", "accepted", "unchanged"] | None = None
    target: ModelPart = ModelPart()
    slots: list[ModelSlotPart] = Field(default_factory=list)
    models: list[StoredModelPart] = Field(default_factory=list)


class JudgedByPart(Payload):
    """The thresholds that judged, null where nothing was."""

    warn: float | None = None
    reject: float | None = None


class InspectAnswer(Answer):
    """The verdict; `unknown` with its `reason` where there is none. The result of the same id follows on its topic.

    `picture_ms` from the command's arrival to the picture, `waited_ms` from there to scoring, `elapsed_ms` all of it.
    """

    camera: str | None = None
    part_id: str | None = None
    batch: str | None = None
    product: str | None = None
    verdict: Verdict = Verdict.UNKNOWN
    reason: str | None = None
    score: float | None = None
    ratio: float | None = None
    thresholds: JudgedByPart = JudgedByPart()
    model: ModelPart = ModelPart()
    result_id: str | None = None
    frame: int | None = None
    captured_at: Time | None = None
    picture_ms: float | None = None
    waited_ms: float | None = None
    scoring_ms: float | None = None
    elapsed_ms: float | None = None


class ZoneSettingPart(Payload):
    """One zone as it is set; corners in pixels of the camera's whole picture."""

    name: str
    kind: Literal["include", "exclude"]
    polygon: list[list[int]]
    threshold_factor: float
    min_area_px: int
    min_area_mm2: float


class ZonesPart(Payload):
    """Zones in effect; `origin`: `command` or `config`."""

    origin: Literal["config", "command"] | None = None
    zones: list[ZoneSettingPart] = Field(default_factory=list)


class ZonesAnswer(Answer):
    """`old` and `new` are the same unless something was set."""

    camera: str | None = None
    old: ZonesPart = ZonesPart()
    new: ZonesPart = ZonesPart()


class RunningPart(Payload):
    """What runs, since when."""

    product: str | None = None
    batch: str | None = None
    since: Time | None = None


class ProductCameraPart(Payload):
    """The model that judges a camera now."""

    camera: str
    model: ModelPart


class ProductAnswer(Answer):
    """`old` and `new` are the same unless something was set. `products`: all that the configuration knows."""

    old: RunningPart = RunningPart()
    new: RunningPart = RunningPart()
    products: list[str] = Field(default_factory=list)
    cameras: list[ProductCameraPart] = Field(default_factory=list)


class PausedPart(Payload):
    """Cameras that are paused."""

    cameras: list[str] = Field(default_factory=list)


class PauseAnswer(Answer):
    """Of `pause` and `resume`: which cameras were paused, and which are now."""

    old: PausedPart = PausedPart()
    new: PausedPart = PausedPart()


class SnapshotAnswer(Answer):
    """Where the picture is, and when it was captured: a camera that waits may have an old one."""

    camera: str | None = None
    frame: int | None = None
    captured_at: Time | None = None
    snapshot: HeatmapPart = HeatmapPart()


class RebirthAnswer(Answer):
    """The births are on their way."""


class StatusAnswer(Answer):
    """The agent's status, as on its topic."""

    status: StatusPayload
