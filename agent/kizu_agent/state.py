"""What is known right now: the retained state of each camera and of the agent; never a stale `ok`."""

import threading
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime

from kizu_agent.camera_state import CameraState, Inspected
from kizu_agent.certificates import Role
from kizu_agent.clock import Clock, read_quality
from kizu_agent.config import Config
from kizu_agent.encoding import to_bytes, utc_now, utc_text
from kizu_agent.outbox_transaction import Losses
from kizu_agent.payloads import (
    AgentState,
    CameraPart,
    CertificatesPart,
    CommandsPart,
    LossCausesPart,
    LossKindsPart,
    ModelPart,
    OutboxPart,
    ProblemsPart,
    ProviderPart,
    StatusPayload,
)
from kizu_agent.records import CameraStatus, ModelId
from kizu_agent.sinks import Sink

STATUS_HEARTBEAT_S = 10.0
STATUS_VALID_S = 3 * STATUS_HEARTBEAT_S
LOSS_SHOWN_S = 600.0
"""For this long after the outbox gave up messages the agent calls itself degraded."""


@dataclass(frozen=True)
class Vitals:
    """What the pipeline knows of the agent beside its cameras; `problems` are any others, in words."""

    provider: str | None = None
    is_provider_degraded: bool = False
    building: str | None = None
    """The model's file whose graph is being compiled for the GPU."""
    outbox_messages: int = 0
    outbox_bytes: int = 0
    outbox_oldest_age_s: float = 0.0
    outbox_losses: Losses = field(default_factory=Counter)
    held_results: int = 0
    expiries: tuple[str, ...] = ()
    """Certificates that have expired or will soon, in words."""
    certificate_ends: Mapping[Role, datetime] = field(default_factory=dict)
    commands: Mapping[str, int] = field(default_factory=dict)
    problems: tuple[str, ...] = ()


class StateBoard:
    """Keeps what holds now and tells it to the sinks; any thread may call it.

    A sink must not wait: it is called with the board locked, so that no older state can overtake a newer one.
    """

    def __init__(self, config: Config, sinks: Sequence[Sink], version: str, started_ns: int) -> None:
        self._config = config
        self._sinks = sinks
        self._cameras = {camera.name: CameraState(camera, config.agent.name) for camera in config.cameras}
        self._offline = offline_payload(config, version, started_ns)
        self._vitals = Vitals()
        self._clock = Clock()
        self._loss_mono_s: float | None = None
        self._since: tuple[AgentState, str] = ("offline", "")
        self._published: object = None
        self._published_mono_s = 0.0
        self._is_stopped = False
        self._lock = threading.Lock()

    def inspected(self, inspected: Inspected) -> None:
        """Note an inspection and publish its camera's state where that is due."""
        with self._lock:
            camera = self._cameras[inspected.inspection.frame.camera]
            camera.take(inspected)
            camera.refresh(self._sinks)

    def tick(self, cameras: Sequence[CameraStatus], models: Mapping[str, ModelId | None], vitals: Vitals) -> None:
        """Take what the pipeline sees, about once a second, and publish what changed or is due.

        `models`: the model in service for each camera, None where there is none.
        """
        with self._lock:
            if self._is_stopped:
                return
            for status in cameras:
                self._cameras[status.camera].see(status)
            for name, model in models.items():
                self._cameras[name].model = model
            if vitals.outbox_losses.total() > self._vitals.outbox_losses.total():
                self._loss_mono_s = time.monotonic()
            self._vitals = vitals
            for camera in self._cameras.values():
                camera.refresh(self._sinks)
            self._refresh_status()

    def stop(self) -> None:
        """Publish `unknown` for every camera and `offline` for the agent; nothing comes after. Idempotent."""
        with self._lock:
            if self._is_stopped:
                return
            self._is_stopped = True
            for camera in self._cameras.values():
                camera.is_stopped = True
                camera.refresh(self._sinks)
            now = utc_now()
            last_words = {"reason": "stopped", "since": now, "published_at": now}
            self._offline = self._offline.model_copy(update=last_words)
            self._tell(self._offline)

    def status(self) -> StatusPayload:
        """Give the agent's status as it is now."""
        with self._lock:
            return self._offline if self._is_stopped else self._status()

    def _refresh_status(self) -> None:
        status = self._status()
        known = (status.state, status.reason, status.provider, status.certificates, status.cameras)
        now = time.monotonic()
        if known != self._published or now - self._published_mono_s >= STATUS_HEARTBEAT_S:
            self._published, self._published_mono_s = known, now
            self._tell(status)

    def _tell(self, status: StatusPayload) -> None:
        for sink in self._sinks:
            sink.status(status)

    def _status(self) -> StatusPayload:
        vitals, reasons = self._vitals, self._reasons()
        state: AgentState = "degraded" if reasons else "online"
        if state != self._since[0]:
            self._since = (state, utc_now())
        return StatusPayload(
            agent=self._config.agent.name,
            state=state,
            reason="; ".join(reasons) or None,
            since=self._since[1],
            valid_until=utc_text(time.time_ns() + round(STATUS_VALID_S * 1e9)),
            published_at=utc_now(),
            started_at=self._offline.started_at,
            time_quality=self._clock.quality,
            version=self._offline.version,
            provider=ProviderPart(name=vitals.provider, degraded=vitals.is_provider_degraded, building=vitals.building),
            problems=self._problems(),
            certificates=CertificatesPart(
                **{f"{role}_expires_at": _utc_of(ends) for role, ends in vitals.certificate_ends.items()}
            ),
            outbox=OutboxPart(
                messages=vitals.outbox_messages,
                bytes=vitals.outbox_bytes,
                oldest_age_s=vitals.outbox_oldest_age_s,
                held=vitals.held_results,
                losses=vitals.outbox_losses.total(),
                lost_by_cause=LossCausesPart(**_sums(vitals.outbox_losses, 0)),
                lost_by_kind=LossKindsPart(**_sums(vitals.outbox_losses, 1)),
            ),
            cameras={name: camera.part() for name, camera in self._cameras.items()},
            commands=CommandsPart(**vitals.commands),
        )

    def _lost(self) -> list[tuple[str, str | None]]:
        conditions = ((name, *camera.condition()) for name, camera in self._cameras.items())
        return [(name, cause) for name, condition, cause in conditions if condition == "lost"]

    def _without_model(self) -> list[str]:
        return [name for name, camera in self._cameras.items() if camera.model is None]

    def _is_losing(self) -> bool:
        return self._loss_mono_s is not None and time.monotonic() - self._loss_mono_s < LOSS_SHOWN_S

    def _reasons(self) -> list[str]:
        vitals = self._vitals
        reasons = [f"camera {name} lost ({cause or 'cause unknown'})" for name, cause in self._lost()]
        reasons += [f"camera {name} has no model" for name in self._without_model()]
        if vitals.is_provider_degraded:
            reasons.append(f"runs on {vitals.provider} instead of {self._config.engine.provider}")
        if self._is_losing():
            reasons.append(f"outbox gave up {vitals.outbox_losses.total()} messages in all")
        return [*reasons, *vitals.expiries, *vitals.problems]

    def _problems(self) -> ProblemsPart:
        return ProblemsPart(
            cameras_lost=len(self._lost()),
            models_missing=len(self._without_model()),
            provider_degraded=self._vitals.is_provider_degraded,
            outbox_losing=self._is_losing(),
            certificates_expiring=len(self._vitals.expiries),
            other=len(self._vitals.problems),
        )


def offline_status(config: Config, version: str, started_ns: int) -> bytes:
    """Give the last will: what the broker publishes on the status topic when the agent is gone without a word."""
    return to_bytes(offline_payload(config, version, started_ns))


def offline_payload(config: Config, version: str, started_ns: int) -> StatusPayload:
    """Give the status of an agent that is not there: same shape as ever, no time of death, since nobody knows it."""
    nothing = CameraPart(condition="unknown", cause=None, model=ModelPart())
    return StatusPayload(
        agent=config.agent.name,
        state="offline",
        reason="disconnected",
        since=None,
        valid_until=None,
        published_at=None,
        started_at=utc_text(started_ns),
        time_quality=read_quality(),
        version=version,
        provider=ProviderPart(name=None, degraded=False, building=None),
        problems=ProblemsPart(cameras_lost=0, models_missing=0, provider_degraded=False, outbox_losing=False, other=0),
        certificates=CertificatesPart(),
        outbox=OutboxPart(messages=0, bytes=0, oldest_age_s=0.0),
        cameras={camera.name: nothing for camera in config.cameras},
    )


def _utc_of(moment: datetime) -> str:
    return utc_text(round(moment.timestamp()) * 1_000_000_000)


def _sums(losses: Losses, part: int) -> dict[str, int]:
    """Losses summed by cause (part 0) or by kind (part 1)."""
    sums: Counter[str] = Counter()
    for key, count in losses.items():
        sums[key[part]] += count
    return dict(sums)
