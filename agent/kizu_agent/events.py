"""Verdicts over time: many frames of one flaw are one anomaly, which opens, gets worse and closes."""

import uuid
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import structlog
from pydantic import TypeAdapter, ValidationError

from kizu_agent.camera_settings import EventsConfig
from kizu_agent.records import Event, EventKind
from kizu_contract.judging import Verdict

log = structlog.get_logger(__name__)

UPDATE_INTERVAL_NS = 1_000_000_000
"""A rising ratio alone is told at most this often; a worse verdict at once."""

_EVENTS = TypeAdapter(dict[str, Event])
_RANK = {Verdict.UNKNOWN: -1, Verdict.OK: 0, Verdict.WARN: 1, Verdict.REJECT: 2}


@dataclass(frozen=True)
class Judged:
    """What the tracker sees of a result: `ratio` and `warn_ratio` are score and warn threshold ÷ reject threshold.

    Times are those of the frame's capture, UTC for the record and monotonic for intervals.
    """

    result_id: str
    verdict: Verdict
    ratio: float
    warn_ratio: float
    captured_ns: int
    captured_mono_ns: int


@dataclass(frozen=True)
class Track:
    """All that a tracker remembers: it can be put back when what came of a verdict could not be committed.

    `open` is the anomaly as it stands, `told` as subscribers know it; `window` the last known verdicts while none is
    open, `good_in_row` the row that will close it, `bad_mono_ns` when the last frame was not good.
    """

    open: Event | None = None
    told: Event | None = None
    window: tuple[Judged, ...] = ()
    good_in_row: int = 0
    next_update_mono_ns: int = 0
    bad_mono_ns: int | None = None


class EventTracker:
    """Follows one camera's verdicts and says when its anomaly opens, gets worse and closes; not thread-safe.

    N of M counts the last `open_m` known verdicts. An unknown verdict is no evidence: it opens nothing, closes nothing,
    takes no place in the window, and it breaks the row of good frames that would close an open anomaly. So an anomaly
    whose camera is lost stays open until the part is seen good again.
    """

    def __init__(self, camera: str, config: EventsConfig, resumed: Event | None = None) -> None:
        """Go on with `resumed`, the anomaly that was open when the agent last stopped."""
        self.track = Track(open=resumed, told=resumed)
        self._camera = camera
        self._config = config
        self._at = Verdict(config.at)

    @property
    def open_event(self) -> Event | None:
        """The anomaly that is open, as it stands now."""
        return self.track.open

    def observe(self, judged: Judged) -> Event | None:
        """Take the next verdict; return the message it gives rise to, if any."""
        if judged.verdict is Verdict.UNKNOWN:
            self.track = replace(self.track, good_in_row=0)
            return None
        if self.track.open is None:
            return self._maybe_open(judged)
        event = _worsened(self.track.open, judged)
        is_good, bad_ns = self._is_good(judged), self.track.bad_mono_ns
        good_in_row = self.track.good_in_row + 1 if is_good else 0
        # Resumed after a restart, nobody knows when it was bad last: the hold begins anew.
        bad_ns = bad_ns if is_good and bad_ns is not None else judged.captured_mono_ns
        is_held = judged.captured_mono_ns - bad_ns < self._config.hold_s * 1e9
        if good_in_row >= self._config.close_n and not is_held:
            self.track = Track()
            return replace(event, kind=EventKind.CLOSE, closed_ns=judged.captured_ns)
        self.track = replace(self.track, open=event, good_in_row=good_in_row, bad_mono_ns=bad_ns)
        return self._maybe_update(event, judged)

    def _is_hit(self, judged: Judged) -> bool:
        return _RANK[judged.verdict] >= _RANK[self._at]

    def _is_good(self, judged: Judged) -> bool:
        limit = 1.0 if self._at is Verdict.REJECT else judged.warn_ratio
        return not self._is_hit(judged) and judged.ratio < self._config.hysteresis * limit

    def _maybe_open(self, judged: Judged) -> Event | None:
        window = (*self.track.window, judged)[-self._config.open_m :]
        if sum(map(self._is_hit, window)) < self._config.open_n:
            self.track = Track(window=window)
            return None
        event = Event(
            id=str(uuid.uuid4()),
            kind=EventKind.OPEN,
            camera=self._camera,
            verdict=max((seen.verdict for seen in window), key=_RANK.__getitem__),
            opened_ns=judged.captured_ns,
            updated_ns=judged.captured_ns,
            closed_ns=None,
            frames=sum(_RANK[seen.verdict] >= _RANK[Verdict.WARN] for seen in window),
            worst_ratio=max(seen.ratio for seen in window),
            result_id=judged.result_id,
        )
        return self._tell(event, judged)

    def _maybe_update(self, event: Event, judged: Judged) -> Event | None:
        told = self.track.told
        is_worse = told is None or event.verdict is not told.verdict
        has_risen = told is None or event.worst_ratio > told.worst_ratio
        if is_worse or (has_risen and judged.captured_mono_ns >= self.track.next_update_mono_ns):
            return self._tell(event, judged)
        return None

    def _tell(self, event: Event, judged: Judged) -> Event:
        # The window goes: what opened this anomaly must not help to open the next.
        self.track = Track(
            open=event,
            told=event,
            good_in_row=self.track.good_in_row,
            next_update_mono_ns=judged.captured_mono_ns + UPDATE_INTERVAL_NS,
            bad_mono_ns=self.track.bad_mono_ns if self.track.open else judged.captured_mono_ns,
        )
        return event


class OpenEvents:
    """The anomalies that are open, on disk, so that they keep their id over a restart of the agent.

    Written without syncing: it survives the death of the process; a power cut may bring back an older state, and a
    subscriber then sees an anomaly that is never closed or a second id for it.
    """

    def __init__(self, state_dir: Path) -> None:
        self._path = state_dir / "events.json"
        self._saved: dict[str, Event] = {}

    def load(self) -> dict[str, Event]:
        """Give the anomaly that was open for each camera; none where the file is missing or damaged."""
        try:
            self._saved = _EVENTS.validate_json(self._path.read_bytes())
        except FileNotFoundError:
            return {}
        except (OSError, ValidationError) as exc:
            log.warning("open anomalies lost, they will not be closed", path=str(self._path), error=str(exc)[:200])
        return dict(self._saved)

    def save(self, events: Mapping[str, Event]) -> None:
        """Keep `events` where another anomaly is open than before; a disk that refuses is logged."""
        if {event.id for event in events.values()} == {event.id for event in self._saved.values()}:
            return
        self._saved = dict(events)
        temporary = self._path.with_suffix(".tmp")
        try:
            temporary.write_bytes(_EVENTS.dump_json(self._saved))
            temporary.replace(self._path)
        except OSError as exc:
            log.warning("open anomalies not kept", path=str(self._path), error=str(exc))


def _worsened(event: Event, judged: Judged) -> Event:
    return replace(
        event,
        kind=EventKind.UPDATE,
        verdict=max(event.verdict, judged.verdict, key=_RANK.__getitem__),
        updated_ns=judged.captured_ns,
        frames=event.frames + (_RANK[judged.verdict] >= _RANK[Verdict.WARN]),
        worst_ratio=max(event.worst_ratio, judged.ratio),
        result_id=judged.result_id,
    )
