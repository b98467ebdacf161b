"""Which metrics node and devices have, and how they follow from payloads. docs/sparkplug.md lists them.

Names are letters, digits, `_`, `-` and `/` for folders; no two differ by case alone. Every metric that will ever be
sent stands in these tables, for births must name them all.
"""

import time
from collections.abc import Iterable, Mapping
from datetime import datetime
from enum import Enum
from operator import attrgetter
from typing import NamedTuple

from pydantic import BaseModel

from kizu_agent.payloads import EventPayload, ResultPayload, StatePayload, StatusPayload
from kizu_agent.sparkplug.payload import DataType, Metric, Value
from kizu_contract.judging import Thresholds, Verdict

REBIRTH = "Node Control/Rebirth"
BD_SEQ = "bdSeq"
WARN, REJECT = "Thresholds/Warn", "Thresholds/Reject"
IMAGE = "Heatmap/Image"
VERDICT_CODES = {Verdict.UNKNOWN: 0, Verdict.OK: 1, Verdict.WARN: 2, Verdict.REJECT: 3}
"""`unknown` is 0, so that a tag which was never written does not read as ok."""

_INT32, _INT64, _DOUBLE = DataType.INT32, DataType.INT64, DataType.DOUBLE
_BOOLEAN, _STRING, _BYTES = DataType.BOOLEAN, DataType.STRING, DataType.BYTES


class Definition(NamedTuple):
    """A metric: its name, its type, and the attribute of the payload that it shows."""

    name: str
    datatype: DataType
    path: str


_JUDGED = (
    Definition("Inspection/Verdict", _STRING, "verdict"),
    Definition("Inspection/Verdict_Code", _INT32, "verdict"),
    Definition("Inspection/Reason", _STRING, "reason"),
    Definition("Inspection/Score", _DOUBLE, "score"),
    Definition("Inspection/Ratio", _DOUBLE, "ratio"),
)
"""In results and states: after the last result a state may still take its verdict back."""
RESULT = (
    *_JUDGED,
    Definition("Inspection/Result_ID", _STRING, "id"),
    Definition("Inspection/Sequence", _INT64, "seq"),
    Definition("Inspection/Frame", _INT64, "frame"),
    Definition("Inspection/Source", _STRING, "source"),
    Definition("Inspection/Time_Quality", _STRING, "time_quality"),
    Definition("Inspection/Warn_At", _DOUBLE, "thresholds.warn"),
    Definition("Inspection/Reject_At", _DOUBLE, "thresholds.reject"),
    Definition("Inspection/Waited_ms", _DOUBLE, "timing.waited_ms"),
    Definition("Inspection/Scoring_ms", _DOUBLE, "timing.scoring_ms"),
    Definition("Inspection/Total_ms", _DOUBLE, "timing.total_ms"),
    Definition("Model/Name", _STRING, "model.name"),
    Definition("Model/Version", _STRING, "model.version"),
    Definition("Model/SHA256", _STRING, "model.sha256"),
    Definition("Part/ID", _STRING, "part_id"),
    Definition("Part/Batch", _STRING, "batch"),
    Definition("Part/Product", _STRING, "product"),
    Definition("Inspection/Zone", _STRING, "zone"),
    Definition("Event/ID", _STRING, "event_id"),
    Definition("Heatmap/ID", _STRING, "heatmap.id"),
    Definition("Heatmap/Width", _INT32, "heatmap.width"),
    Definition("Heatmap/Height", _INT32, "heatmap.height"),
    Definition("Heatmap/Size", _INT64, "heatmap.bytes"),
    Definition("Heatmap/SHA256", _STRING, "heatmap.sha256"),
    Definition("Heatmap/Content_Type", _STRING, "heatmap.content_type"),
)
EVENT = (
    Definition("Event/Kind", _STRING, "kind"),
    Definition("Event/Sequence", _INT64, "seq"),
    Definition("Event/Worst_Verdict", _STRING, "worst_verdict"),
    Definition("Event/Worst_Ratio", _DOUBLE, "worst_ratio"),
    Definition("Event/Frames", _INT64, "frames"),
    Definition("Event/Opened_At", _STRING, "opened_at"),
    Definition("Event/Closed_At", _STRING, "closed_at"),
)
STATE = (
    Definition("Camera/Condition", _STRING, "condition"),
    Definition("Camera/Cause", _STRING, "cause"),
    Definition("Counters/Inspected", _INT64, "counters.inspected"),
    Definition("Counters/OK", _INT64, "counters.ok"),
    Definition("Counters/Warn", _INT64, "counters.warn"),
    Definition("Counters/Reject", _INT64, "counters.reject"),
    Definition("Counters/Unknown", _INT64, "counters.unknown"),
    Definition("Counters/Captured", _INT64, "counters.captured"),
    Definition("Counters/Dropped", _INT64, "counters.dropped"),
    Definition("Counters/Drop_Causes", _STRING, "counters.drop_causes"),
    Definition("Counters/Losses", _INT64, "counters.losses"),
    Definition("Counters/Loss_Causes", _STRING, "counters.loss_causes"),
)
THRESHOLDS = (Definition(WARN, _DOUBLE, "warn"), Definition(REJECT, _DOUBLE, "reject"))
STATUS = (
    Definition("Agent/State", _STRING, "state"),
    Definition("Agent/Reason", _STRING, "reason"),
    Definition("Agent/Version", _STRING, "version"),
    Definition("Agent/Started_At", _STRING, "started_at"),
    Definition("Agent/Time_Quality", _STRING, "time_quality"),
    Definition("Agent/Provider", _STRING, "provider.name"),
    Definition("Agent/Provider_Degraded", _BOOLEAN, "provider.degraded"),
    Definition("Problems/Cameras_Lost", _INT32, "problems.cameras_lost"),
    Definition("Problems/Models_Missing", _INT32, "problems.models_missing"),
    Definition("Problems/Other", _INT32, "problems.other"),
    Definition("Outbox/Messages", _INT64, "outbox.messages"),
    Definition("Outbox/Held", _INT64, "outbox.held"),
    Definition("Outbox/Losses", _INT64, "outbox.losses"),
)
HISTORY_WAITING = "History/Waiting"
HISTORY_LOSSES = "History/Losses"
_HISTORY = (HISTORY_WAITING, HISTORY_LOSSES)

Values = dict[str, Metric]
"""The current value of each metric by its name."""


def now_ms() -> int:
    """The present moment, milliseconds since the epoch, UTC."""
    return time.time_ns() // 1_000_000


def node_blank() -> Values:
    """Every metric of the node that may change, null; Rebirth and bdSeq are the session's."""
    blank = _blank(STATUS)
    return blank | {name: Metric(name, _INT64, None, now_ms()) for name in _HISTORY}


def device_blank(has_images: bool) -> Values:
    """Every metric of a device, null but for the verdict, which is `unknown`."""
    blank = _blank((*RESULT, *EVENT, *STATE, *THRESHOLDS))
    if has_images:
        blank[IMAGE] = Metric(IMAGE, _BYTES, None, now_ms())
    for name, value in (("Inspection/Verdict", "unknown"), ("Inspection/Verdict_Code", 0)):
        blank[name] = Metric(name, blank[name].datatype, value, now_ms())
    return blank


def of_result(result: ResultPayload, event: EventPayload | None) -> list[Metric]:
    """A result with the event that it caused, as of the picture's capture."""
    captured_ms = _ms(result.captured_at)
    return [*_read(RESULT, result, captured_ms), *(_read(EVENT, event, captured_ms) if event else [])]


def of_image(result: ResultPayload, jpeg: bytes) -> list[Metric]:
    """The result's heatmap itself."""
    captured_ms = _ms(result.captured_at)
    return [Metric(IMAGE, _BYTES, jpeg, captured_ms, content_type=result.heatmap.content_type)]


def of_state(state: StatePayload, has_verdict: bool) -> list[Metric]:
    """What holds now for a camera; with its verdict only where no newer result has told one."""
    return _read((*(_JUDGED if has_verdict else ()), *STATE), state, _ms(state.published_at))


def of_thresholds(thresholds: Thresholds | None) -> list[Metric]:
    """The thresholds in effect; null without a model."""
    return _read(THRESHOLDS, thresholds, now_ms())


def of_status(status: StatusPayload) -> list[Metric]:
    """How the agent is."""
    return _read(STATUS, status, now_ms())


def of_history(waiting: int, losses: int) -> list[Metric]:
    """How many results wait to be sent, and how many were ever given up."""
    return [Metric(name, _INT64, count, now_ms()) for name, count in zip(_HISTORY, (waiting, losses), strict=True)]


def sequence_of(values: Mapping[str, Metric]) -> int:
    """The number of the result that these values show; 0 where there is none."""
    value = values["Inspection/Sequence"].value
    return value if isinstance(value, int) else 0


def _blank(definitions: Iterable[Definition]) -> Values:
    now = now_ms()
    return {name: Metric(name, datatype, None, now) for name, datatype, _ in definitions}


def _read(definitions: Iterable[Definition], source: BaseModel | Thresholds | None, timestamp_ms: int) -> list[Metric]:
    return [
        Metric(name, datatype, None if source is None else _value(source, path, datatype), timestamp_ms)
        for name, datatype, path in definitions
    ]


def _value(source: object, path: str, datatype: DataType) -> Value:
    value: Value | Enum = attrgetter(path)(source)
    if isinstance(value, Verdict) and datatype is _INT32:
        return VERDICT_CODES[value]
    return str(value.value) if isinstance(value, Enum) else value


def _ms(text: str) -> int:
    """Milliseconds since the epoch of an RFC 3339 text in UTC."""
    return round(datetime.fromisoformat(text.replace("Z", "+00:00")).timestamp() * 1000)
