"""The frozen records that cross threads, one for each hop."""

import re
import time
import uuid
from dataclasses import dataclass, field, replace
from enum import Enum, IntEnum
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from kizu_contract.judging import Thresholds, Verdict

TriggerKind = Literal["free", "mqtt", "line"]
"""What makes a camera's pictures: its own rate, the command `inspect`, or the line (a hardware trigger)."""
_NO_PIXELS = np.empty((0, 0, 1), np.uint8)


@dataclass(frozen=True)
class Part:
    """What a picture shows, as far as the plant said so: a part's id, its batch, and the product that was running."""

    part_id: str | None = None
    batch: str | None = None
    product: str | None = None


@dataclass(frozen=True)
class Trigger:
    """One order to inspect the next picture. `number` is its own for the life of the agent.

    `came_mono_ns` of `time.monotonic_ns()`: the picture must be captured after it.
    """

    number: int
    camera: str
    request_id: str | None
    part: Part
    came_mono_ns: int


@dataclass(frozen=True, eq=False)
class Frame:
    """One picture of a camera, on its way from capture to inspection.

    `image` is uint8 [H, W, C], C 1 or 3 (RGB), owned by this record. `number` counts the camera's own frames from 0
    since it was opened; for `sim:` it is the index into the simulator's truth. `source` names the picture where the
    camera knows a name (a file path, `sim:gears#12`), else None. Times: `captured_ns` UTC since the epoch,
    `captured_mono_ns` of `time.monotonic_ns()`, both taken when the picture arrived.
    """

    camera: str
    number: int
    image: NDArray[np.uint8]
    source: str | None
    captured_ns: int
    captured_mono_ns: int
    trigger: Trigger | None = None
    """The order that it was made for; None where the camera gave it by itself."""
    part: Part = Part()
    """Set where the inspection begins: what holds at the moment of the trigger, or of the capture."""


@dataclass(frozen=True)
class ModelId:
    """Which model judged: manifest name and version, and the bundle's content hash (64 hex digits)."""

    name: str
    version: str
    sha256: str


ModelReportKind = Literal["accepted", "active", "confirmed", "unchanged", "rolled_back", "rejected", "failed"]


@dataclass(frozen=True)
class ModelReport:
    """What became of a dropped or stored model; one message on `<prefix>/<agent>/model`.

    `accepted`: it proved itself and is stored; `active`: it is in service; `unchanged`: it was already; `rejected`:
    the file is in quarantine; `failed`: trouble that is not the file's own, or a stored model that cannot be used.
    `confirmed`: its probation is over; `rolled_back`: it left service again, and `cause` is a stable word for why.
    `file` is the name in the drop directory, or in the store after a restart. `slot` is the name that cameras ask
    for, None for any. `swap_s` from the offer to the first batch that used it, None where nothing was inspected.
    `at_ns` UTC. `signed_by`: fingerprint of the trusted key that signed it, None where none is known to have.
    """

    kind: ModelReportKind
    file: str
    slot: str | None = None
    model: ModelId | None = None
    reason: str | None = None
    verify_s: float | None = None
    self_test_s: float | None = None
    load_s: float | None = None
    swap_s: float | None = None
    at_ns: int = field(default_factory=time.time_ns)
    cause: str | None = None
    signed_by: str | None = None


ModelState = Literal["active", "probation", "previous", "stored", "failed"]


@dataclass(frozen=True)
class StoredModel:
    """A model in the store. `since`: UTC text, when it was stored; `reason`: why it is `failed`, None else.

    `signed_by`: fingerprint of the trusted key, None where none is known to have signed it.
    """

    file: str
    model: ModelId
    state: ModelState
    since: str
    reason: str | None
    signed_by: str | None = None


@dataclass(frozen=True)
class ModelSlot:
    """What serves the cameras that ask for `slot` (None: for any model), and what a rollback would lead to.

    `since`: UTC text, None where nothing serves.
    """

    slot: str | None
    active: ModelId | None
    is_on_probation: bool
    previous: ModelId | None
    since: str | None


@dataclass(frozen=True)
class ModelListing:
    """The store and its slots at one moment."""

    slots: tuple[ModelSlot, ...] = ()
    models: tuple[StoredModel, ...] = ()


@dataclass(frozen=True)
class ModelOrder:
    """What a command asks of the model keeper: to activate the stored `file`, or (None) to roll `slot` back."""

    slot: str | None
    file: str | None = None


@dataclass(frozen=True)
class ZoneJudgement:
    """What was found in a zone. `area_px` of the largest piece at or above `thresholds.warn`, 0 where there is none."""

    name: str
    thresholds: Thresholds
    score: float
    verdict: Verdict
    area_px: int

    @property
    def ratio(self) -> float:
        """Score over the zone's reject threshold."""
        return self.thresholds.ratio(self.score)


@dataclass(frozen=True, eq=False)
class Inspection:
    """A frame with everything the inspector found, on its way to judging over time and to delivery.

    `score` is NaN and `frame_map` None where the scorer failed; `verdict` is then `unknown` and `reason` says why.
    `frame_map` is float32 [H, W] of the inspected region, whose pixels are `region` uint8 [H, W, C].
    `waited_ns` from capture to the start of scoring, `scoring_ns` for this frame's share of its batches. With zones,
    `zones` tells what was found in each, score and thresholds are those of the worst, `zone`, and `inside` bool [H, W]
    is what was judged at all; `zone` and `inside` are None where nothing was. `id` becomes the result's. `is_late`: the
    trigger that asked for it had been answered before, by `unknown`.
    """

    frame: Frame
    model: ModelId
    thresholds: Thresholds
    score: float
    verdict: Verdict
    frame_map: NDArray[np.float32] | None
    region: NDArray[np.uint8]
    tiles: int
    waited_ns: int
    scoring_ns: int
    reason: str | None = None
    zone: str | None = None
    zones: tuple[ZoneJudgement, ...] = ()
    inside: NDArray[np.bool_] | None = None
    id: str = field(default_factory=lambda: str(uuid.uuid4()))
    is_late: bool = False

    def without_pixels(self) -> "Inspection":
        """The same without picture, region, map and mask, several bytes a pixel, for those who keep it."""
        frame = replace(self.frame, image=_NO_PIXELS)
        return replace(self, frame=frame, region=_NO_PIXELS, frame_map=None, inside=None)


class EventKind(str, Enum):
    """What happened to an anomaly."""

    OPEN = "open"
    UPDATE = "update"
    CLOSE = "close"


@dataclass(frozen=True)
class Event:
    """One message in the life of an anomaly; `id` stays the same from open to close.

    `worst_ratio` so far, `frames` judged `warn` or worse since it opened; times UTC nanoseconds.
    """

    id: str
    kind: EventKind
    camera: str
    verdict: Verdict
    opened_ns: int
    updated_ns: int
    closed_ns: int | None
    frames: int
    worst_ratio: float
    result_id: str
    """Id of the result that caused this message."""


CameraCondition = Literal["starting", "running", "idle", "lost", "ended"]


@dataclass(frozen=True)
class CameraStatus:
    """A camera's state as its capture thread last saw it; `cause` is None while it is running.

    `idle`: it is well and waits for its trigger. `drops` counts frames not inspected, by cause; `captured` all frames
    received, `losses` how often it was lost, `loss_causes` the same by the cause that came first each time.
    """

    camera: str
    condition: CameraCondition
    cause: str | None
    since_ns: int
    captured: int
    losses: int
    drops: dict[str, int]
    loss_causes: dict[str, int] = field(default_factory=dict)
    is_paused: bool = False


class Priority(IntEnum):
    """What goes first when there is a backlog, and is sacrificed last when the outbox is full.

    EVENT: events and reports of models. REJECT: results that reject. WARN: those that warn or could not be judged.
    """

    EVENT = 0
    REJECT = 1
    WARN = 2
    OK = 3
    HEATMAP = 4


KINDS = tuple(priority.name.lower() for priority in Priority)
"""What losses are counted by: the names of the priorities, at their numbers."""


@dataclass(frozen=True)
class Message:
    """One MQTT message on its way into the outbox.

    `priority` is a `Priority`; order is kept within one. `expiry_s` counts from the commit; a message older than that
    is dropped, not sent.

    A JSON object that can come late carries exactly one member `"replayed": false` (any spacing): `as_replayed` sets
    it when the row was committed before the present connection to the broker was made, or waited long.
    """

    topic: str
    payload: bytes
    qos: Literal[0, 1] = 1
    retain: bool = False
    content_type: str = "application/json"
    expiry_s: int | None = None
    priority: int = Priority.OK


_NOT_REPLAYED = re.compile(rb'"replayed"(\s*:\s*)false')


def as_replayed(payload: bytes) -> bytes:
    """The JSON `payload` with its member `"replayed": false` set to true; unchanged where it has none.

    Inside a JSON string the quotes would be escaped, so only a member can match.
    """
    return _NOT_REPLAYED.sub(rb'"replayed"\1true', payload, count=1)


@dataclass(frozen=True)
class CommandRequest:
    """A command as it came in on `<prefix>/<agent>/cmd/<name>`; retained ones never get here.

    `payload` is whatever the requester sent. The publisher keeps where the answer goes besides
    `<prefix>/<agent>/response/<name>`: the MQTT 5 response topic and correlation data. `user` is what its MQTT 5 user
    property `user` says, unproven: the broker does not tell who published. `came_mono_ns` of `time.monotonic_ns()`.
    """

    name: str
    payload: bytes
    response_topic: str | None = None
    correlation: bytes | None = None
    user: str | None = None
    came_mono_ns: int = field(default_factory=time.monotonic_ns)


@dataclass(frozen=True)
class CommandAnswer:
    """What a command handler says; the publisher sends it to every place the requester may listen."""

    payload: bytes
    content_type: str = "application/json"
