"""What goes over MQTT: payload models of schema 1. Answers to commands are in answers.py, topics in topics.py.

The shape of a payload never changes while an agent runs: keys never come and go, what is not there is null, an object
stays an object. Numbers with a fraction always carry a decimal point, since a SCADA takes a tag's type from the first
value it sees. docs/mqtt.md shows one example of each.
"""

import uuid
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

from kizu_agent.clock import TimeQuality
from kizu_agent.encoding import utc_text
from kizu_agent.records import EventKind, ModelId, ModelReport, ModelReportKind, TriggerKind
from kizu_contract.judging import Thresholds, Verdict

SCHEMA_VERSION = 1
"""Version of every payload; it rises when a key changes its meaning or goes away."""

Time = Annotated[str, Field(pattern=r"^\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z$")]
"""UTC, RFC 3339 with milliseconds."""

Condition = Literal["starting", "running", "idle", "lost", "ended", "unknown"]
"""A camera's condition; `unknown` when the agent is not there to tell."""

AgentState = Literal["online", "degraded", "offline"]


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

    @classmethod
    def of(cls, thresholds: Thresholds) -> "ThresholdsPart":
        """Take the scores of `thresholds`."""
        return cls(warn=thresholds.warn, reject=thresholds.reject)


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


class ZonePart(Payload):
    """What was found in a zone.

    `area_px` of the largest flaw at or above the zone's `warn`, `area_mm2` the same where the scale is known.
    """

    verdict: Verdict
    score: float | None
    ratio: float | None
    thresholds: ThresholdsPart
    area_px: int
    area_mm2: float | None


class ResultPayload(Document):
    """One inspection.

    `event_id`: the anomaly that was open after it. `replayed`: sent late, after an outage. `zone`: the worst zone,
    whose score and thresholds these are; `zones` has one key for each zone that is judged.

    `time_quality`: whether the times can be trusted: is the box's clock synchronised? `trigger`: what made the picture,
    with the `request_id` of the command; `late`: that command had been answered before, by `unknown`.
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
    zone: str | None = None
    zones: dict[str, ZonePart] = Field(default_factory=dict)
    part_id: str | None = None
    batch: str | None = None
    product: str | None = None
    trigger: TriggerKind = "free"
    request_id: str | None = None
    late: bool = False


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
    part_id: str | None = None
    batch: str | None = None
    product: str | None = None


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
    part_id: str | None = None
    batch: str | None = None
    product: str | None = None


class CameraPart(Payload):
    """A camera in the agent's status, with its model in service; its verdict is on its own topic."""

    condition: Condition
    cause: str | None
    model: ModelPart
    paused: bool = False


class ProviderPart(Payload):
    """What runs the graph, and whether that is less than the configuration asks for.

    `building`: the file of a model whose graph is being compiled for this box, which takes minutes; else null.
    """

    name: str | None
    degraded: bool
    building: str | None = None


class ProblemsPart(Payload):
    """What makes the agent degraded, counted, for alarms that want no text."""

    cameras_lost: int
    models_missing: int
    provider_degraded: bool
    outbox_losing: bool
    certificates_expiring: int = 0
    other: int


class CertificatesPart(Payload):
    """When the certificates towards the broker end; null without TLS, or where it is not known (yet)."""

    client_expires_at: Time | None = None
    ca_expires_at: Time | None = None
    broker_expires_at: Time | None = None


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


class CommandsPart(Payload):
    """Commands since the agent started, by what became of them (see command_counts.CommandOutcome)."""

    done: int = 0
    refused: int = 0
    repeated: int = 0
    rate_limited: int = 0
    expired: int = 0
    retained: int = 0
    oversized: int = 0
    dropped: int = 0


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
    certificates: CertificatesPart
    outbox: OutboxPart
    cameras: dict[str, CameraPart]
    commands: CommandsPart = CommandsPart()


class ProductPayload(Document):
    """Retained: which product and batch run, since when; null: none was set, and cameras judge as configured.

    Without `known` the configuration has no such product: the cameras that judge by products are `unknown`.
    """

    agent: str
    product: str | None
    batch: str | None
    since: Time
    known: bool
    published_at: Time


class AuditPayload(Document):
    """What a command changed: who (as far as the request says), what, and both states as JSON in a text."""

    id: str
    replayed: bool = False
    agent: str
    command: str
    subject: str
    user: str | None
    request_id: str | None
    old: str | None
    new: str | None
    changed_at: Time
    time_quality: TimeQuality


class ModelReportPayload(Document):
    """What became of a dropped or stored model (see records.ModelReport); seconds are null where nothing took them.

    `file` is its name in the drop directory, or in the store after a restart; `slot` the name cameras ask for, null
    for any. `swap_s` runs from the offer to the first batch that used it. `signed_by`: fingerprint of a trusted key.
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
    signed_by: str | None = None
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
        signed_by=report.signed_by,
        verify_s=report.verify_s,
        self_test_s=report.self_test_s,
        load_s=report.load_s,
        swap_s=report.swap_s,
        reported_at=utc_text(report.at_ns),
    )
