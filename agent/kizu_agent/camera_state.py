"""The retained state of one camera: the verdict that may be shown now, which is `unknown` wherever there is doubt."""

import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from kizu_agent.camera_settings import CameraConfig
from kizu_agent.encoding import finite, utc_now, utc_text
from kizu_agent.payloads import CameraPart, Condition, CountersPart, ModelPart, StatePayload
from kizu_agent.records import CameraStatus, Inspection, ModelId
from kizu_agent.sinks import Sink
from kizu_contract.judging import Verdict

HEARTBEAT_S = 1.0
"""A camera's state is published again after this long while results flow, sooner where it would go stale sooner."""


@dataclass(frozen=True)
class Inspected:
    """An inspection as far as the state needs it; id and number are None where its result could not be committed.

    It is kept until the next one comes: without pixels, of which sixteen cameras have many.
    """

    inspection: Inspection
    result_id: str | None
    result_seq: int | None
    event_id: str | None


class CameraState:
    """One camera: what was seen of it, and the verdict that follows from that."""

    def __init__(self, config: CameraConfig, agent: str) -> None:
        self.name = config.name
        self.status: CameraStatus | None = None
        self.model: ModelId | None = None
        self.is_stopped = False
        self._agent = agent
        self._stale_after_ns = round(config.stale_after_s * 1e9)
        # Three times within the validity: one heartbeat may be late.
        self._heartbeat_ns = min(round(HEARTBEAT_S * 1e9), self._stale_after_ns // 3)
        self._last: Inspected | None = None
        self._last_mono_ns = 0
        self._counts: Counter[Verdict] = Counter()
        self._verdict = Verdict.UNKNOWN
        self._since = utc_now()
        self._published: object = None
        self._published_mono_ns = 0

    def take(self, inspected: Inspected) -> None:
        """Note an inspection."""
        self._last, self._last_mono_ns = inspected, time.monotonic_ns()
        self.model = self.model or inspected.inspection.model
        self._counts[inspected.inspection.verdict] += 1

    def see(self, status: CameraStatus) -> None:
        """Note the camera's condition."""
        self.status = status
        if status.is_paused:
            self._last_mono_ns = 0  # what was seen before the pause is no verdict after it

    def refresh(self, sinks: Sequence[Sink]) -> None:
        """Tell the state where it changed, and as a heartbeat while results flow."""
        verdict, reason = self._judge()
        if verdict is not self._verdict:
            self._verdict, self._since = verdict, utc_now()
        known = (verdict, reason, self._shown_model(), self.condition(), self._last.event_id if self._last else None)
        now = time.monotonic_ns()
        is_due = self._last_mono_ns > self._published_mono_ns and now - self._published_mono_ns >= self._heartbeat_ns
        if known != self._published or is_due:
            self._published, self._published_mono_ns = known, now
            payload = self._payload(verdict, reason)
            for sink in sinks:
                sink.state(payload)

    def part(self) -> CameraPart:
        """Give what the agent's status says of this camera."""
        condition, cause = self.condition()
        return CameraPart(condition=condition, cause=cause, model=ModelPart.of(self.model), paused=self._is_paused())

    def condition(self) -> tuple[Condition, str | None]:
        """Give the camera's condition and the cause of it."""
        if self.is_stopped:
            return "unknown", None
        return (self.status.condition, self.status.cause) if self.status else ("starting", None)

    def _judge(self) -> tuple[Verdict, str | None]:
        """Give the verdict that may be shown now, and why where that is not plain."""
        doubt = self._doubt()
        if doubt is not None or self._last is None:
            return Verdict.UNKNOWN, doubt
        return self._last.inspection.verdict, self._last.inspection.reason

    def _doubt(self) -> str | None:
        condition, _ = self.condition()
        if self.is_stopped:
            return "stopped"
        if condition in ("lost", "ended"):
            return f"camera_{condition}"
        return "paused" if self._is_paused() else self._age_doubt(condition)

    def _is_paused(self) -> bool:
        return self.status is not None and self.status.is_paused and not self.is_stopped

    def _age_doubt(self, condition: Condition) -> str | None:
        if self.model is None:
            return "model_missing"
        is_stale = time.monotonic_ns() - self._last_mono_ns > self._stale_after_ns
        if condition == "idle" and (self._last is None or is_stale):
            return "camera_idle"
        if self._last is None:
            return "starting"
        return "stale" if is_stale else None

    def _shown_model(self) -> ModelId | None:
        """The model that gave the verdict; the one in service before there is any."""
        return self._last.inspection.model if self._last and self.model else self.model

    def _valid_until(self) -> str:
        # From the monotonic clock each time: a step of the wall clock is mended by the next heartbeat.
        return utc_text(time.time_ns() - time.monotonic_ns() + self._last_mono_ns + self._stale_after_ns)

    def _payload(self, verdict: Verdict, reason: str | None) -> StatePayload:
        condition, cause = self.condition()
        last = self._last
        inspection = last.inspection if last else None
        return StatePayload(
            agent=self._agent,
            camera=self.name,
            verdict=verdict,
            reason=reason,
            since=self._since,
            valid_until=None if verdict is Verdict.UNKNOWN else self._valid_until(),
            published_at=utc_now(),
            condition=condition,
            cause=cause,
            score=finite(inspection.score) if inspection else None,
            ratio=finite(inspection.thresholds.ratio(inspection.score)) if inspection else None,
            captured_at=utc_text(inspection.frame.captured_ns) if inspection else None,
            last_result_id=last.result_id if last else None,
            last_result_seq=last.result_seq if last else None,
            event_id=last.event_id if last else None,
            model=ModelPart.of(self._shown_model()),
            counters=self._counters(),
            part_id=inspection.frame.part.part_id if inspection else None,
            batch=inspection.frame.part.batch if inspection else None,
            product=inspection.frame.part.product if inspection else None,
        )

    def _counters(self) -> CountersPart:
        drops, losses = (self.status.drops, self.status.loss_causes) if self.status else ({}, {})
        return CountersPart(
            inspected=self._counts.total(),
            ok=self._counts[Verdict.OK],
            warn=self._counts[Verdict.WARN],
            reject=self._counts[Verdict.REJECT],
            unknown=self._counts[Verdict.UNKNOWN],
            captured=self.status.captured if self.status else 0,
            dropped=sum(drops.values()),
            drop_causes=_listed(drops),
            losses=self.status.losses if self.status else 0,
            loss_causes=_listed(losses),
        )


def _listed(counts: Mapping[str, int]) -> str | None:
    """Counts as one text, `hang 1, lost 2`; None where there are none."""
    return ", ".join(f"{cause} {count}" for cause, count in sorted(counts.items())) or None
