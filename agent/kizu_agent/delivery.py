"""From inspections to committed messages: verdicts over time, the heatmap, and all of a frame in one transaction."""

import hashlib
import time
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import cv2
import structlog

from kizu_agent.camera_state import Inspected
from kizu_agent.config import CameraConfig, Config, HeatmapConfig
from kizu_agent.errors import OutboxError
from kizu_agent.events import EventTracker, Judged, OpenEvents
from kizu_agent.outbox import Outbox
from kizu_agent.payloads import (
    EventPayload,
    HeatmapPart,
    ModelPart,
    ResultPayload,
    ThresholdsPart,
    TimingPart,
    Topics,
    finite,
    to_bytes,
    utc_text,
)
from kizu_agent.records import Event, Inspection, Message
from kizu_agent.state import StateBoard
from kizu_contract.heatmap import overlay
from kizu_contract.judging import Verdict

log = structlog.get_logger(__name__)

EVENT_PRIORITY, RESULT_PRIORITY, HEATMAP_PRIORITY = 0, 1, 2
JPEG = "image/jpeg"

_WANTED = {
    "warn": frozenset({Verdict.WARN, Verdict.REJECT}),
    "reject": frozenset({Verdict.REJECT}),
    "always": frozenset(Verdict),
    "every_nth": frozenset(Verdict),
    "never": frozenset[Verdict](),
}


@dataclass(frozen=True)
class Thumbnail:
    """An encoded heatmap, `width` × `height` pixels."""

    jpeg: bytes
    width: int
    height: int


@dataclass(frozen=True, eq=False)
class _Outcome:
    """A frame with all that is to be told of it. `event_id`: the anomaly it opened, went on with or closed."""

    inspection: Inspection
    result_id: str
    event: Event | None
    event_id: str | None
    thumbnail: Thumbnail | None


class _Lane:
    """What delivery keeps for one camera."""

    def __init__(self, config: CameraConfig, resumed: Event | None) -> None:
        self.config = config
        self.tracker = EventTracker(config.name, config.events, resumed)
        self._inspected = 0

    def judge(self, inspection: Inspection) -> _Outcome:
        """Follow the anomaly and draw the heatmap where one is wanted."""
        result_id = str(uuid.uuid4())
        event = self.tracker.observe(_judged(inspection, result_id))
        thumbnail = draw_heatmap(inspection, result_id, self.config.heatmap) if self._wants(inspection) else None
        self._inspected += 1
        followed = event or self.tracker.open_event
        return _Outcome(inspection, result_id, event, followed.id if followed else None, thumbnail)

    def _wants(self, inspection: Inspection) -> bool:
        heatmap = self.config.heatmap
        if inspection.frame_map is None or inspection.verdict not in _WANTED[heatmap.when]:
            return False
        return heatmap.when != "every_nth" or self._inspected % heatmap.every_n == 0


class Delivery:
    """Delivers inspections, called by one thread; whoever publishes is woken through `wake`.

    A result that the outbox refuses is lost: it is counted in `undelivered`, `problem` says why until a commit
    succeeds again, and the anomaly is as if the frame had never been. The retained state still tells the verdict.
    """

    def __init__(self, config: Config, outbox: Outbox, board: StateBoard, wake: Callable[[], None]) -> None:
        self.undelivered = 0
        self.problem: str | None = None
        self._topics = Topics(config.agent.prefix, config.agent.name)
        self._heatmap_expiry_s = config.mqtt.heatmap_expiry_s
        self._outbox = outbox
        self._board = board
        self._wake = wake
        self._open_events = OpenEvents(config.agent.state_dir)
        resumed = self._open_events.load()
        self._lanes = {camera.name: _Lane(camera, resumed.get(camera.name)) for camera in config.cameras}
        for camera in sorted(resumed.keys() - self._lanes.keys()):
            log.warning("an anomaly stays open: its camera is no longer configured", camera=camera)

    def deliver(self, inspections: Sequence[Inspection]) -> None:
        """Commit each inspection's messages, in order. Raises OutboxError `closed` when called after the end."""
        for inspection in inspections:
            self._deliver_one(inspection, self._lanes[inspection.frame.camera])
        self._wake()

    def _deliver_one(self, inspection: Inspection, lane: _Lane) -> None:
        before = lane.tracker.track
        outcome = lane.judge(inspection)
        self._keep_open_events()
        try:
            seq = self._commit(outcome, lane.config)
        except OutboxError as exc:
            if exc.cause == "closed":
                raise
            lane.tracker.track = before
            self._keep_open_events()
            self._note_loss(exc)
            result_id, seq = None, None
        else:
            result_id = outcome.result_id
            self._note_success()
        open_event = lane.tracker.open_event
        self._board.inspected(Inspected(inspection, result_id, seq, open_event.id if open_event else None))

    def _commit(self, outcome: _Outcome, camera: CameraConfig) -> int:
        """Commit a frame's messages and give the result's number."""
        try:
            return self._commit_once(outcome, camera)
        except OutboxError as exc:
            if exc.cause != "corrupt":
                raise
        # The damaged database was replaced by a fresh one.
        return self._commit_once(outcome, camera)

    def _commit_once(self, outcome: _Outcome, camera: CameraConfig) -> int:
        with self._outbox.transaction() as transaction:
            seq = transaction.next_seq(camera.name)
            if outcome.event is not None:
                # Events have numbers of their own: a subscriber of one topic can see its gaps.
                event_seq = transaction.next_seq(f"{camera.name}/event")
                transaction.put([self._event_message(outcome, outcome.event, event_seq, seq)])
            transaction.put([self._result_message(outcome, seq)])
            if outcome.thumbnail is not None:
                transaction.put([self._heatmap_message(outcome.thumbnail, camera)])
            return seq

    def _result_message(self, outcome: _Outcome, seq: int) -> Message:
        inspection, frame = outcome.inspection, outcome.inspection.frame
        payload = ResultPayload(
            id=outcome.result_id,
            seq=seq,
            agent=self._topics.agent,
            camera=frame.camera,
            frame=frame.number,
            source=frame.source,
            captured_at=utc_text(frame.captured_ns),
            inspected_at=utc_text(frame.captured_ns + inspection.waited_ns + inspection.scoring_ns),
            verdict=inspection.verdict,
            reason=inspection.reason,
            score=finite(inspection.score),
            ratio=finite(inspection.thresholds.ratio(inspection.score)),
            thresholds=ThresholdsPart(warn=inspection.thresholds.warn, reject=inspection.thresholds.reject),
            model=ModelPart.of(inspection.model),
            width=inspection.region.shape[1],
            height=inspection.region.shape[0],
            tiles=inspection.tiles,
            timing=_timing(inspection),
            event_id=outcome.event_id,
            heatmap=self._heatmap_part(outcome),
        )
        return Message(self._topics.result(frame.camera), to_bytes(payload), priority=RESULT_PRIORITY)

    def _event_message(self, outcome: _Outcome, event: Event, seq: int, result_seq: int) -> Message:
        payload = EventPayload(
            id=event.id,
            seq=seq,
            agent=self._topics.agent,
            camera=event.camera,
            kind=event.kind,
            worst_verdict=event.verdict,
            worst_ratio=event.worst_ratio,
            frames=event.frames,
            opened_at=utc_text(event.opened_ns),
            captured_at=utc_text(event.updated_ns),
            closed_at=None if event.closed_ns is None else utc_text(event.closed_ns),
            result_id=event.result_id,
            result_seq=result_seq,
            model=ModelPart.of(outcome.inspection.model),
        )
        return Message(self._topics.event(event.camera), to_bytes(payload), priority=EVENT_PRIORITY)

    def _heatmap_message(self, thumbnail: Thumbnail, camera: CameraConfig) -> Message:
        return Message(
            self._topics.heatmap(camera.name),
            thumbnail.jpeg,
            qos=camera.heatmap.qos,
            content_type=JPEG,
            expiry_s=self._heatmap_expiry_s,
            priority=HEATMAP_PRIORITY,
        )

    def _heatmap_part(self, outcome: _Outcome) -> HeatmapPart:
        thumbnail = outcome.thumbnail
        if thumbnail is None:
            return HeatmapPart()
        return HeatmapPart(
            topic=self._topics.heatmap(outcome.inspection.frame.camera),
            id=outcome.result_id,
            width=thumbnail.width,
            height=thumbnail.height,
            bytes=len(thumbnail.jpeg),
            sha256=hashlib.sha256(thumbnail.jpeg).hexdigest(),
            content_type=JPEG,
        )

    def _keep_open_events(self) -> None:
        opened = {name: lane.tracker.open_event for name, lane in self._lanes.items()}
        self._open_events.save({name: event for name, event in opened.items() if event is not None})

    def _note_loss(self, exc: OutboxError) -> None:
        self.undelivered += 1
        if self.problem is None:
            log.error("results are lost", cause=exc.cause, error=str(exc))
        self.problem = f"results are lost: {exc}"

    def _note_success(self) -> None:
        if self.problem is not None:
            log.info("results are delivered again", lost=self.undelivered)
        self.problem = None


def draw_heatmap(inspection: Inspection, result_id: str, config: HeatmapConfig) -> Thumbnail | None:
    """Draw the map over the picture as a JPEG that carries `result_id` in its comment; None without a map."""
    if inspection.frame_map is None:
        return None
    picture = overlay(inspection.region, inspection.frame_map, inspection.thresholds, config.width_px)
    _, encoded = cv2.imencode(
        ".jpg", cv2.cvtColor(picture, cv2.COLOR_RGB2BGR), [cv2.IMWRITE_JPEG_QUALITY, config.quality]
    )
    height, width = picture.shape[:2]
    return Thumbnail(_with_comment(encoded.tobytes(), f"kizu result {result_id}"), width, height)


def _with_comment(jpeg: bytes, text: str) -> bytes:
    """Add a COM segment after the JFIF header, which 3.1.1 subscribers see too (ITU-T T.81, B.2.4)."""
    after_header = 4 + int.from_bytes(jpeg[4:6], "big")
    comment = text.encode()
    return jpeg[:after_header] + b"\xff\xfe" + (len(comment) + 2).to_bytes(2, "big") + comment + jpeg[after_header:]


def _judged(inspection: Inspection, result_id: str) -> Judged:
    thresholds = inspection.thresholds
    return Judged(
        result_id=result_id,
        verdict=inspection.verdict,
        ratio=thresholds.ratio(inspection.score),
        warn_ratio=thresholds.ratio(thresholds.warn),
        captured_ns=inspection.frame.captured_ns,
        captured_mono_ns=inspection.frame.captured_mono_ns,
    )


def _timing(inspection: Inspection) -> TimingPart:
    total_ns = time.monotonic_ns() - inspection.frame.captured_mono_ns
    return TimingPart(
        waited_ms=inspection.waited_ns / 1e6, scoring_ms=inspection.scoring_ns / 1e6, total_ms=total_ns / 1e6
    )
