"""From inspections to committed messages: verdicts over time, the heatmap, and all of a frame in one transaction."""

import hashlib
import json
import time
from collections.abc import Sequence
from dataclasses import asdict

import cv2
import numpy as np
import structlog
from numpy.typing import NDArray

from kizu_agent.camera_settings import CameraConfig, HeatmapConfig
from kizu_agent.camera_state import Inspected
from kizu_agent.clock import Clock
from kizu_agent.config import Config
from kizu_agent.encoding import finite, utc_text
from kizu_agent.errors import OutboxError
from kizu_agent.events import EventTracker, Judged, OpenEvents
from kizu_agent.held import Held, Outcome, Thumbnail
from kizu_agent.outbox import Outbox
from kizu_agent.payloads import (
    EventPayload,
    HeatmapPart,
    ModelPart,
    ResultPayload,
    ThresholdsPart,
    TimingPart,
    ZonePart,
)
from kizu_agent.records import Event, Inspection, Priority
from kizu_agent.sinks import Numbered, Sink
from kizu_agent.state import StateBoard
from kizu_agent.topics import Topics
from kizu_contract.heatmap import overlay
from kizu_contract.judging import Verdict

log = structlog.get_logger(__name__)

RETRY_S = 1.0
"""A disk that refused is tried again after this long."""
JPEG = "image/jpeg"
_EDGE = (0, 200, 255)
"""Colour of the zones' edges in a heatmap, RGB."""

_WANTED = {
    "warn": frozenset({Verdict.WARN, Verdict.REJECT}),
    "reject": frozenset({Verdict.REJECT}),
    "always": frozenset(Verdict),
    "every_nth": frozenset(Verdict),
    "never": frozenset[Verdict](),
}


class _Lane:
    """What delivery keeps for one camera."""

    def __init__(self, config: CameraConfig, resumed: Event | None) -> None:
        self.config = config
        self.tracker = EventTracker(config.name, config.events, resumed)
        self._inspected = 0

    def wants_heatmap(self, inspection: Inspection) -> bool:
        """Tell whether this inspection gets a heatmap; counts it."""
        heatmap = self.config.heatmap
        is_turn = heatmap.when != "every_nth" or self._inspected % heatmap.every_n == 0
        self._inspected += 1
        return is_turn and inspection.frame_map is not None and inspection.verdict in _WANTED[heatmap.when]


class Delivery:
    """Delivers inspections to the sinks, called by one thread; they are woken when something was committed.

    What the outbox refuses is held in memory, without its heatmap, and committed when the disk is back (see `held`);
    `problem` says so until then. The retained state tells the verdict all the same.
    """

    def __init__(self, config: Config, outbox: Outbox, board: StateBoard, sinks: Sequence[Sink]) -> None:
        self.problem: str | None = None
        self._topics = Topics(config.agent.prefix, config.agent.name)
        self._outbox = outbox
        self._board = board
        self._sinks = sinks
        self._clock = Clock()
        self._held = Held(lambda priority: outbox.note_loss("disk", priority))
        self._next_attempt_mono_s = 0.0
        self._open_events = OpenEvents(config.agent.state_dir)
        resumed = self._open_events.load()
        self._lanes = {camera.name: _Lane(camera, resumed.get(camera.name)) for camera in config.cameras}
        for camera in sorted(resumed.keys() - self._lanes.keys()):
            log.warning("an anomaly stays open: its camera is no longer configured", camera=camera)

    @property
    def held(self) -> int:
        """Results in memory that no disk has taken yet: they are lost if the process ends now."""
        return len(self._held)

    def deliver(self, inspections: Sequence[Inspection]) -> None:
        """Commit each inspection's messages, in order. Raises OutboxError `closed` when called after the end."""
        for inspection in inspections:
            self._deliver_one(inspection, self._lanes[inspection.frame.camera])
        self._wake()

    def retry(self) -> None:
        """Try again to commit what is held; for when nothing new comes. Raises as `deliver`."""
        if self._held:
            self._commit_held()
            self._wake()

    def _deliver_one(self, inspection: Inspection, lane: _Lane) -> None:
        outcome = self._judge(inspection, lane)
        self._keep_open_events()
        self._held.add(outcome)
        seqs = self._commit_held()
        seq = seqs.get(outcome.result.id)
        open_event = lane.tracker.open_event
        result_id, event_id = None if seq is None else outcome.result.id, open_event.id if open_event else None
        self._board.inspected(Inspected(inspection.without_pixels(), result_id, seq, event_id))

    def _judge(self, inspection: Inspection, lane: _Lane) -> Outcome:
        """Follow the anomaly and draw the heatmap where one is wanted and the disk takes it."""
        result_id = inspection.id
        event = lane.tracker.observe(_judged(inspection, result_id))
        wants = lane.wants_heatmap(inspection)
        thumbnail = draw_heatmap(inspection, result_id, lane.config.heatmap) if wants and not self._held else None
        if wants and self._held:
            self._outbox.note_loss("disk", Priority.HEATMAP)
        followed = event or lane.tracker.open_event
        event_id = followed.id if followed else None
        return Outcome(
            self._result(inspection, result_id, event_id, thumbnail),
            self._event(inspection, event) if event else None,
            thumbnail,
        )

    def _commit_held(self) -> dict[str, int]:
        """Commit what is held, oldest first; the numbers given, by result id."""
        seqs: dict[str, int] = {}
        if self.problem is not None and time.monotonic() < self._next_attempt_mono_s:
            return seqs
        try:
            while (outcome := self._held.oldest()) is not None:
                seqs[outcome.result.id] = self._commit(outcome)
                self._held.remove_oldest()
        except OutboxError as exc:
            if exc.cause == "closed":
                raise
            self._note_trouble(exc)
        else:
            self._note_success()
        return seqs

    def _commit(self, outcome: Outcome) -> int:
        """Commit a frame's messages and give the result's number."""
        try:
            return self._commit_once(outcome)
        except OutboxError as exc:
            if exc.cause != "corrupt":
                raise
        # The damaged database was replaced by a fresh one.
        return self._commit_once(outcome)

    def _commit_once(self, outcome: Outcome) -> int:
        with self._outbox.transaction() as transaction:
            numbered = Numbered.of(outcome, transaction)
            for sink in self._sinks:
                sink.commit(numbered, transaction)
            return numbered.result.seq

    def _wake(self) -> None:
        for sink in self._sinks:
            sink.wake()

    def _result(
        self, inspection: Inspection, result_id: str, event_id: str | None, thumbnail: Thumbnail | None
    ) -> ResultPayload:
        """The result, but for its number, which comes with the commit."""
        frame = inspection.frame
        return ResultPayload(
            id=result_id,
            seq=0,
            agent=self._topics.agent,
            camera=frame.camera,
            frame=frame.number,
            source=frame.source,
            captured_at=utc_text(frame.captured_ns),
            inspected_at=utc_text(frame.captured_ns + inspection.waited_ns + inspection.scoring_ns),
            time_quality=self._clock.quality,
            verdict=inspection.verdict,
            reason=inspection.reason,
            score=finite(inspection.score),
            ratio=finite(inspection.thresholds.ratio(inspection.score)),
            thresholds=ThresholdsPart.of(inspection.thresholds),
            model=ModelPart.of(inspection.model),
            width=inspection.region.shape[1],
            height=inspection.region.shape[0],
            tiles=inspection.tiles,
            timing=_timing(inspection),
            event_id=event_id,
            heatmap=self._heatmap_part(frame.camera, result_id, thumbnail),
            zone=inspection.zone,
            zones=_zone_parts(inspection, self._lanes[frame.camera].config.mm_per_px),
            part_id=frame.part.part_id,
            batch=frame.part.batch,
            product=frame.part.product,
            trigger=self._lanes[frame.camera].config.trigger,
            request_id=None if frame.trigger is None else frame.trigger.request_id,
            late=inspection.is_late,
        )

    def _event(self, inspection: Inspection, event: Event) -> EventPayload:
        """The event, but for its number and the result's."""
        return EventPayload(
            id=event.id,
            seq=0,
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
            result_seq=0,
            model=ModelPart.of(inspection.model),
            part_id=inspection.frame.part.part_id,
            batch=inspection.frame.part.batch,
            product=inspection.frame.part.product,
        )

    def _heatmap_part(self, camera: str, result_id: str, thumbnail: Thumbnail | None) -> HeatmapPart:
        if thumbnail is None:
            return HeatmapPart()
        return HeatmapPart(
            topic=self._topics.heatmap(camera),
            id=result_id,
            width=thumbnail.width,
            height=thumbnail.height,
            bytes=len(thumbnail.jpeg),
            sha256=hashlib.sha256(thumbnail.jpeg).hexdigest(),
            content_type=JPEG,
        )

    def _keep_open_events(self) -> None:
        opened = {name: lane.tracker.open_event for name, lane in self._lanes.items()}
        self._open_events.save({name: event for name, event in opened.items() if event is not None})

    def _note_trouble(self, exc: OutboxError) -> None:
        self._held.strip()
        self._next_attempt_mono_s = time.monotonic() + RETRY_S
        if self.problem is None:
            log.error("results are held in memory", cause=exc.cause, error=str(exc))
        self.problem = f"results are held in memory: {exc}"

    def _note_success(self) -> None:
        if self.problem is not None:
            log.info("results are committed again")
        self.problem = None


def draw_heatmap(inspection: Inspection, result_id: str, config: HeatmapConfig) -> Thumbnail | None:
    """Draw the map over the picture as a JPEG; its comment has `result_id` and what the part is. None without a map."""
    if inspection.frame_map is None:
        return None
    picture = _picture(inspection, inspection.frame_map, config.width_px)
    _, encoded = cv2.imencode(
        ".jpg", cv2.cvtColor(picture, cv2.COLOR_RGB2BGR), [cv2.IMWRITE_JPEG_QUALITY, config.quality]
    )
    height, width = picture.shape[:2]
    part = json.dumps(asdict(inspection.frame.part), ensure_ascii=False)
    return Thumbnail(with_comment(encoded.tobytes(), f"kizu result {result_id}\n{part}"), width, height)


def _picture(inspection: Inspection, frame_map: NDArray[np.float32], width_px: int) -> NDArray[np.uint8]:
    """The overlay, uint8 [H, W, 3]; with zones nothing shows outside of them, and their edge is drawn."""
    if inspection.inside is None:
        return overlay(inspection.region, frame_map, inspection.thresholds, width_px)
    inside = inspection.inside
    picture = overlay(inspection.region, np.where(inside, frame_map, np.float32(0)), inspection.thresholds, width_px)
    height, width = picture.shape[:2]
    small = cv2.resize(inside.astype(np.uint8), (width, height), interpolation=cv2.INTER_NEAREST)
    outlines, _ = cv2.findContours(small, cv2.RETR_LIST, cv2.CHAIN_APPROX_NONE)
    return np.asarray(cv2.drawContours(np.ascontiguousarray(picture), outlines, -1, _EDGE, 1), np.uint8)


def _zone_parts(inspection: Inspection, mm_per_px: float | None) -> dict[str, ZonePart]:
    return {
        zone.name: ZonePart(
            verdict=zone.verdict,
            score=finite(zone.score),
            ratio=finite(zone.ratio),
            thresholds=ThresholdsPart.of(zone.thresholds),
            area_px=zone.area_px,
            area_mm2=None if mm_per_px is None else zone.area_px * mm_per_px**2,
        )
        for zone in inspection.zones
    }


def with_comment(jpeg: bytes, text: str) -> bytes:
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
