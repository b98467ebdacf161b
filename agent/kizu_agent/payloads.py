"""What goes over MQTT: topics, payload models of schema 1, and their bytes.

The shape of a payload never changes while an agent runs: keys never come and go, what is not there is null, an object
stays an object. Numbers with a fraction always carry a decimal point, since a SCADA takes a tag's type from the first
value it sees. docs/mqtt.md shows one example of each.
"""

import math
import time
import uuid
from dataclasses import dataclass
from datetime import datetime, timezone
from json.encoder import encode_basestring
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from kizu_agent.clock import TimeQuality
from kizu_agent.records import EventKind, ModelId, ModelReport, ModelReportKind, ModelState
from kizu_contract.judging import Verdict

SCHEMA_VERSION = 1
"""Version of every payload; it rises when a key changes its meaning or goes away."""

Time = Annotated[str, Field(pattern=r"^\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z$")]
"""UTC, RFC 3339 with milliseconds."""

Condition = Literal["starting", "running", "idle", "lost", "ended", "unknown"]
"""A camera's condition; `unknown` when the agent is not there to tell."""

AgentState = Literal["online", "degraded", "offline"]


@dataclass(frozen=True)
class Topics:
    """Every topic of the agent `agent` below the plant's path `prefix`; no payload topic lies under another."""

    prefix: str
    agent: str

    @property
    def base(self) -> str:
        """What all JSON topics begin with."""
        return f"{self.prefix}/{self.agent}"

    @property
    def status(self) -> str:
        """Retained: the agent itself; its last will goes here too."""
        return f"{self.base}/status"

    def state(self, camera: str) -> str:
        """Retained: the present verdict of `camera`."""
        return f"{self.base}/{camera}/state"

    def result(self, camera: str) -> str:
        """One message an inspection of `camera`."""
        return f"{self.base}/{camera}/result"

    def event(self, camera: str) -> str:
        """Open, update and close of the anomalies of `camera`."""
        return f"{self.base}/{camera}/event"

    def heatmap(self, camera: str) -> str:
        """Raw JPEG, beside the JSON topics so that no SCADA makes tags of it."""
        return f"image/{self.base}/{camera}/heatmap"

    @property
    def model(self) -> str:
        """What became of a dropped or stored model."""
        return f"{self.base}/model"

    def command(self, name: str) -> str:
        """Where the command `name` is awaited."""
        return f"{self.base}/cmd/{name}"

    def response(self, name: str) -> str:
        """Where the command `name` is answered."""
        return f"{self.base}/response/{name}"


class Payload(BaseModel):
    """Base of all payloads and their parts: no key more, no key less."""

    model_config = ConfigDict(extra="forbid", frozen=True, populate_by_name=True, protected_namespaces=())


class Document(Payload):
    """Base of whole payloads."""

    schema_version: Literal[1] = Field(default=1, alias="schema")


class ModelPart(Payload):
    """Which model; all null where there is none."""

    name: str | None = None
    version: str | None = None
    sha256: str | None = None

    @classmethod
    def of(cls, model: ModelId | None) -> "ModelPart":
        """Take the parts of `model`."""
        return cls() if model is None else cls(name=model.name, version=model.version, sha256=model.sha256)


class ThresholdsPart(Payload):
    """Scores at which a frame is at least `warn`, at least `reject`."""

    warn: float
    reject: float


class TimingPart(Payload):
    """Milliseconds: capture to start of scoring, this frame's share of scoring, capture to commit."""

    waited_ms: float
    scoring_ms: float
    total_ms: float


class HeatmapPart(Payload):
    """Where the inspection's heatmap is and how to know it; all null where none was made."""

    topic: str | None = None
    id: str | None = None
    width: int | None = None
    height: int | None = None
    bytes: int | None = None
    sha256: str | None = None
    content_type: str | None = None


class ResultPayload(Document):
    """One inspection. `event_id`: the anomaly that was open after it. `replayed`: sent late, after an outage.

    `time_quality`: whether the times can be trusted: is the box's clock synchronised?
    """

    id: str
    seq: int
    replayed: bool = False
    agent: str
    camera: str
    frame: int
    source: str | None
    captured_at: Time
    inspected_at: Time
    time_quality: TimeQuality
    verdict: Verdict
    reason: str | None
    score: float | None
    ratio: float | None
    thresholds: ThresholdsPart
    model: ModelPart
    width: int
    height: int
    tiles: int
    timing: TimingPart
    event_id: str | None
    heatmap: HeatmapPart


class EventPayload(Document):
    """One message in the life of an anomaly; `id` stays, `seq` rises by one with every event message of the camera.

    `worst_verdict`, `worst_ratio` and `frames` (warn or worse) cover the frames that opened it as well.
    """

    id: str
    seq: int
    replayed: bool = False
    agent: str
    camera: str
    kind: EventKind
    worst_verdict: Verdict
    worst_ratio: float
    frames: int
    opened_at: Time
    captured_at: Time
    closed_at: Time | None
    result_id: str
    result_seq: int
    model: ModelPart


class CountersPart(Payload):
    """Since the agent started. `dropped` frames were captured and not inspected; `drop_causes` counts them by cause."""

    inspected: int = 0
    ok: int = 0
    warn: int = 0
    reject: int = 0
    unknown: int = 0
    captured: int = 0
    dropped: int = 0
    drop_causes: str | None = None
    losses: int = 0
    loss_causes: str | None = None


class StatePayload(Document):
    """Retained: what is known of a camera now. After `valid_until` it is to be read as `unknown`; null: no end."""

    agent: str
    camera: str
    verdict: Verdict
    reason: str | None
    since: Time
    valid_until: Time | None
    published_at: Time
    condition: Condition
    cause: str | None
    score: float | None
    ratio: float | None
    captured_at: Time | None
    last_result_id: str | None
    last_result_seq: int | None
    event_id: str | None
    model: ModelPart
    counters: CountersPart


class CameraPart(Payload):
    """A camera in the agent's status, with its model in service; its verdict is on its own topic."""

    condition: Condition
    cause: str | None
    model: ModelPart


class ProviderPart(Payload):
    """What runs the graph, and whether that is less than the configuration asks for."""

    name: str | None
    degraded: bool


class ProblemsPart(Payload):
    """What makes the agent degraded, counted, for alarms that want no text."""

    cameras_lost: int
    models_missing: int
    provider_degraded: bool
    outbox_losing: bool
    other: int


class LossCausesPart(Payload):
    """Why messages were given up: outbox full, too old, past their own expiry, refused, damaged database, no disk."""

    bytes: int = 0
    age: int = 0
    expired: int = 0
    refused: int = 0
    corrupt: int = 0
    disk: int = 0


class LossKindsPart(Payload):
    """What was given up: `event` counts model reports too, `warn` results without a verdict too."""

    event: int = 0
    reject: int = 0
    warn: int = 0
    ok: int = 0
    heatmap: int = 0
    unknown: int = 0


class OutboxPart(Payload):
    """The durable queue: what waits for the broker, and how many messages were ever given up, why and what.

    `held`: results that wait in memory, because the disk does not take them.
    """

    messages: int
    bytes: int
    oldest_age_s: float
    held: int = 0
    losses: int = 0
    lost_by_cause: LossCausesPart = LossCausesPart()
    lost_by_kind: LossKindsPart = LossKindsPart()


class StatusPayload(Document):
    """Retained and last will: the agent itself. After `valid_until` it is to be read as `offline`.

    `reason` lists every problem, separated by `; `. `cameras` has one key for each configured camera.
    """

    agent: str
    state: AgentState
    reason: str | None
    since: Time | None
    valid_until: Time | None
    published_at: Time | None
    started_at: Time
    time_quality: TimeQuality
    version: str
    provider: ProviderPart
    problems: ProblemsPart
    outbox: OutboxPart
    cameras: dict[str, CameraPart]


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

    `origin`: `command` (set by command), `config` or `bundle`. Rates are null where the scores were set directly.
    `note` says what is set and cannot be applied, and why.
    """

    origin: Literal["bundle", "config", "command"] | None = None
    warn: float | None = None
    reject: float | None = None
    warn_rate: float | None = None
    reject_rate: float | None = None
    note: str | None = None


class ThresholdsAnswer(Answer):
    """`old` and `new` are the same unless something was set."""

    camera: str | None = None
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
    """A model in the store; `reason` says why it is `failed`."""

    file: str
    model: ModelPart
    state: ModelState
    since: Time
    reason: str | None


class ModelAnswer(Answer):
    """What is in service and in the store as the command comes in.

    `outcome`: `listed`, `accepted` (the outcome follows on the model topic) or `unchanged`; `target` is the model that
    shall serve. Both null where the command is refused.
    """

    outcome: Literal["listed", "accepted", "unchanged"] | None = None
    target: ModelPart = ModelPart()
    slots: list[ModelSlotPart] = []
    models: list[StoredModelPart] = []


class StatusAnswer(Answer):
    """The agent's status, as on its topic."""

    status: StatusPayload


class ModelReportPayload(Document):
    """What became of a dropped or stored model (see records.ModelReport); seconds are null where nothing took them.

    `file` is its name in the drop directory, or in the store after a restart; `slot` the name cameras ask for, null
    for any. `swap_s` runs from the offer to the first batch that used it.
    """

    id: str
    replayed: bool = False
    agent: str
    kind: ModelReportKind
    file: str
    slot: str | None
    model: ModelPart
    reason: str | None
    cause: str | None
    verify_s: float | None
    self_test_s: float | None
    load_s: float | None
    swap_s: float | None
    reported_at: Time


def model_report(agent: str, report: ModelReport) -> ModelReportPayload:
    """Make the payload that tells `report`."""
    return ModelReportPayload(
        id=str(uuid.uuid4()),
        agent=agent,
        kind=report.kind,
        file=report.file,
        slot=report.slot,
        model=ModelPart.of(report.model),
        reason=report.reason,
        cause=report.cause,
        verify_s=report.verify_s,
        self_test_s=report.self_test_s,
        load_s=report.load_s,
        swap_s=report.swap_s,
        reported_at=utc_text(report.at_ns),
    )


def to_bytes(payload: Payload) -> bytes:
    """Encode as compact UTF-8 JSON; NaN and infinities become null, every float has a decimal point."""
    # A path may hold bytes that are no UTF-8; MQTT would refuse them.
    return _encode(payload.model_dump(by_alias=True)).encode("utf-8", "replace")


def utc_text(utc_ns: int) -> str:
    """Write nanoseconds since the epoch as RFC 3339 UTC with milliseconds."""
    seconds, milliseconds = divmod(utc_ns // 1_000_000, 1000)
    moment = datetime.fromtimestamp(seconds, timezone.utc)
    return f"{moment:%Y-%m-%dT%H:%M:%S}.{milliseconds:03d}Z"


def utc_now() -> str:
    """Write the present moment as RFC 3339 UTC with milliseconds."""
    return utc_text(time.time_ns())


def finite(number: float) -> float | None:
    """`number`, or None where it is no finite number."""
    return float(number) if math.isfinite(number) else None


def _encode(value: Any) -> str:  # noqa: PLR0911 - one return a JSON type reads as a table
    if isinstance(value, str):  # before int: Verdict and EventKind are str as well as Enum
        return encode_basestring(getattr(value, "value", value))
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, float):
        return _encode_float(value)
    if isinstance(value, dict):
        return "{" + ",".join([f"{encode_basestring(key)}:{_encode(item)}" for key, item in value.items()]) + "}"
    if isinstance(value, list | tuple):
        return "[" + ",".join([_encode(item) for item in value]) + "]"
    return str(int(value))


def _encode_float(number: float) -> str:
    if not math.isfinite(number):
        return "null"
    text = repr(float(number))
    if "." in text:
        return text
    digits, _, exponent = text.partition("e")  # 1e-07: the only form of a float without a point
    return f"{digits}.0e{exponent}"
