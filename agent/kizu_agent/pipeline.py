"""Owns the stages and their hand-offs, and the order in which they start and stop.

captures → mailbox → [inspection] → bounded queue → [delivery] → outbox → [publisher] → broker
↑ model keeper
"""

import contextlib
import os
import queue
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Protocol

import structlog

from kizu_agent.capture import Capture
from kizu_agent.config import Config
from kizu_agent.connection import client_id, greet_broker
from kizu_agent.credentials import CredentialKeeper
from kizu_agent.delivery import Delivery
from kizu_agent.encoding import to_bytes
from kizu_agent.errors import AgentError, ConfigError, OutboxError
from kizu_agent.frame_engine import AnyEngine
from kizu_agent.health import Figures, Health, Progress
from kizu_agent.inspection import inspect_frames
from kizu_agent.integration.home_assistant import discovery
from kizu_agent.integration.site import Site
from kizu_agent.mailbox import Mailbox
from kizu_agent.models import Loaded, ModelKeeper
from kizu_agent.operation import Operation
from kizu_agent.outbox import Outbox
from kizu_agent.payloads import model_report
from kizu_agent.products import ProductBook
from kizu_agent.publisher import Ignored, Publisher
from kizu_agent.records import (
    CommandAnswer,
    CommandRequest,
    Frame,
    Inspection,
    Message,
    ModelId,
    ModelReport,
    Priority,
)
from kizu_agent.settings import OutboxConfig
from kizu_agent.sinks import JsonSink, Sink
from kizu_agent.sparkplug.commands import HostCommands
from kizu_agent.sparkplug.node import open_node
from kizu_agent.stages import Stage
from kizu_agent.state import StateBoard, Vitals, offline_status
from kizu_agent.thresholds import ThresholdBook
from kizu_agent.topics import Topics
from kizu_contract.manifest import Manifest

FRAMES_AT_ONCE = 8
"""At most so many frames share a pass: enough to fill batches from several cameras, few enough to stay prompt."""
BYTES_AT_ONCE = 8 * 2**20
"""Nor more pixels than these or than fill every stream, but for a single frame: each has a map besides."""
QUEUED_PASSES = 4
"""Passes that may wait for delivery; more would only make results later."""
_WAIT_S = 0.5
_MODEL_WAIT_S = 0.05
"""Between two looks whether a model has come where there is none: a start waits for it."""
STUCK_S = {
    "inspection": 60.0,
    "delivery": 30.0,
    "models": 300.0,
    "publisher": 90.0,
    "credentials": 90.0,
    "sparkplug": 90.0,
    "disk": 120.0,
    "triggers": 30.0,
    "capture": 30.0,
}
"""A stage without progress for this long is stuck: the service gives up and systemd starts it again.

Inspection: eight large pictures on a slow box. Models: hashing and moving a large file on a slow card, while the old
model goes on. Publisher, sparkplug and credentials: resolving and connecting block in one piece (see
`Publisher.progress_mono_ns`). Disk: a sync on a worn card takes its time.
"""

log = structlog.get_logger(__name__)


class _Watched(Protocol):
    """What runs in a thread of its own: what killed it, and when it last made progress."""

    @property
    def failure(self) -> BaseException | None: ...

    @property
    def progress_mono_ns(self) -> int: ...


class Pipeline:
    """Everything that runs between a camera and the broker."""

    def __init__(self, config: Config, health: Health, wake: Callable[[], None]) -> None:
        """Build all parts; nothing runs yet. `wake` asks for a `tick` and a look at `failures`, from any thread.

        Raises AgentError when the state directory or the keys are unusable.
        """
        started_ns, kizu = time.time_ns(), version("kizu")
        state_dir = config.agent.state_dir
        topics = self._topics = Topics(config.agent.prefix, config.agent.name)
        self._config, self._wake = config, wake
        self._cameras = {camera.name: camera for camera in config.cameras}
        make_state_dir(state_dir)
        self._products = ProductBook(state_dir, config.products, config.cameras)
        self._models: Mapping[str | None, Loaded | None] = dict.fromkeys(self._products.slots)
        # First what the configuration may have wrong; the outbox is this process's alone from its opening on.
        self._keeper = ModelKeeper(config.models, config.engine_here, state_dir, self._models, self._report_model, wake)
        self._outbox = open_outbox(state_dir, config.outbox)
        will = Message(topics.status, offline_status(config, kizu, started_ns), retain=True)
        self._credentials = CredentialKeeper(
            config.mqtt, lambda found: greet_broker(config.mqtt, found).certificate, wake
        )
        self._publisher = Publisher(
            config.mqtt,
            client_id(topics.base),
            topics.base,
            will,
            self._outbox,
            self._command,
            wake,
            config.outbox.replay_per_s,
            self._note_ignored,
            credentials=self._credentials,
        )
        self._thresholds = ThresholdBook(state_dir, config.cameras, self._products.rates)
        operation = self._operation = Operation(config, topics, self._products, self._outbox, self._publisher, wake)
        host = HostCommands(self._thresholds, self._model_of, lambda: self._products.running.product, operation.audit)
        self._node = open_node(config, host, wake, self._credentials)
        sinks = self._make_sinks()
        self._board = StateBoard(config, sinks, kizu, started_ns)
        self._commands = operation.commands(
            kizu,
            self._board.status,
            self._thresholds,
            self._model_of,
            self._id_in,
            self._keeper,
            self._node.rebirth if self._node else None,
        )
        self._delivery = Delivery(config, self._outbox, self._board, sinks)
        self._mailbox = Mailbox()
        self._captures = {
            camera.name: Capture(camera, self._mailbox, operation.triggers.miss) for camera in config.cameras
        }
        operation.attach(self._captures)
        self._taken = self._delivered = self._scoring_ns = 0
        self._without_model = Counter(dict.fromkeys(self._cameras, 0))
        self._through_mono_ns: int | None = None
        self._passes: queue.Queue[list[Inspection]] = queue.Queue(QUEUED_PASSES)
        self._inspection = Stage("inspection", self._inspect, wake)
        self._deliverer = Stage("delivery", self._deliver, wake)
        self._is_stopping = threading.Event()
        self._next_sync_mono_s = 0.0
        self._disk = Stage("disk", self._sync, wake)
        self._watched: dict[str, _Watched] = {
            "inspection": self._inspection,
            "delivery": self._deliverer,
            "models": self._keeper,
            **({"publisher": self._publisher} if config.mqtt.json_topics else {}),
            **({"sparkplug": self._node} if self._node else {}),
            "credentials": self._credentials,
            "disk": self._disk,
            "triggers": operation.triggers.stage,
            **{f"capture {name}": capture for name, capture in self._captures.items()},
        }
        for name, stage in self._watched.items():
            health.watch(name, _progress_of(stage), STUCK_S[name.partition(" ")[0]])

    def start(self) -> None:
        """Start from the broker back to the cameras: nobody produces before somebody takes."""
        for capture in self._captures.values():
            capture.warm_up()
        if self._config.mqtt.home_assistant:
            self._announce()
        if self._config.mqtt.json_topics:
            self._publisher.start()
        if self._node:
            self._node.start()
        self._credentials.start()
        self._disk.start()
        self._keeper.start()
        self._deliverer.start()
        self._inspection.start()
        self._operation.start()
        self.tick()

    def tick(self) -> None:
        """Look after everything, about twice a second: cameras whose model has come, and the retained states."""
        for camera in self._config.cameras:
            # A camera starts with its first model: a folder read without one would be pictures thrown away.
            if self._serving(camera.name) is not None:
                self._captures[camera.name].start()
        self._board.tick(
            [capture.status() for capture in self._captures.values()],
            {name: _id_of(self._serving(name)) for name in self._cameras},
            self._vitals(),
        )

    def stop(self, deadline_s: float) -> list[str]:
        """Stop from the cameras on, so that what was captured is still inspected, committed and, if it can be, sent.

        Returns the names of the stages that were not gone by the deadline; it may be passed by half a second.
        """
        deadline = time.monotonic() + deadline_s
        # A stage that hangs must leave time for the publisher to say that this is the end.
        drain_by = deadline - min(2.0, deadline_s / 4)
        self._keeper.stop(0.0)
        # All at once, and half of the time: a camera that hangs must not take what is left for the others' frames.
        left = self._stop_captures(_left(deadline) / 2)
        self._mailbox.close()
        left += [stage.name for stage in (self._inspection, self._deliverer) if not self._drain(stage, drain_by)]
        if not self._keeper.stop(_left(deadline)):
            left.append("models")
        elif self._inspection.name not in left and not self.failures():
            self._keeper.keep_probation()
        if not self._credentials.stop(_left(deadline) / 2):
            left.append("credentials")
        if not self._operation.stop(_left(deadline)):
            left.append("triggers")
        self._board.stop()
        if self._node:
            self._node.stop(_left(deadline) / 2)
        self._publisher.stop(_left(deadline), to_bytes(self._board.status()))
        self._is_stopping.set()
        if not self._disk.stop(_left(deadline)):
            left.append("disk")
        if self._delivery.held:
            log.error("results are lost: the disk has not taken them", results=self._delivery.held)
        if not left:
            self._models = dict.fromkeys(self._models)
            self._keeper.free()
            self._outbox.close()
            if self._node:
                self._node.close()
        return left

    def failures(self) -> dict[str, BaseException]:
        """The stages that died, by name, with what killed them."""
        failures = {name: stage.failure for name, stage in self._watched.items()}
        return {name: failure for name, failure in failures.items() if failure is not None}

    def has_ended(self) -> bool:
        """Tell whether every camera has ended and all their results have been delivered."""
        is_through = (
            all(capture.status().condition == "ended" for capture in self._captures.values())
            and self._undelivered() == 0
            and self._outbox.depth() == 0
            and (self._node is None or self._node.store.depth() == 0)
        )
        if not is_through or self._through_mono_ns is None:
            self._through_mono_ns = time.monotonic_ns() if is_through else None
            return False
        # Frames that have left the mailbox and are not counted yet are seen once that pass has come to its end.
        return self._inspection.progress_mono_ns > self._through_mono_ns

    def figures(self) -> Figures:
        """Give the numbers behind the metrics."""
        cameras = [capture.status() for capture in self._captures.values()]
        drops = [({"camera": c.camera, "cause": cause}, count) for c in cameras for cause, count in c.drops.items()]
        drops += [({"camera": name, "cause": "no_model"}, count) for name, count in self._without_model.items()]
        commands = self._commands.counts.by_command()
        losses = [({"cause": cause, "kind": kind}, count) for (cause, kind), count in self._outbox.losses().items()]
        return {
            **self._operation.figures(),
            "commands_total": [({"command": name, "outcome": how}, n) for (name, how), n in commands.items()],
            "captured_frames_total": [({"camera": c.camera}, c.captured) for c in cameras],
            "dropped_frames_total": drops,
            "camera_losses_total": [
                ({"camera": c.camera, "cause": k}, n) for c in cameras for k, n in c.loss_causes.items()
            ],
            "camera_running": [({"camera": c.camera}, c.condition in ("running", "idle")) for c in cameras],
            "inspected_frames_total": [({}, self._taken)],
            "scoring_seconds_total": [({}, self._scoring_ns / 1e9)],
            "outbox_messages": [({}, self._outbox.depth())],
            "outbox_bytes": [({}, self._outbox.bytes())],
            "outbox_losses_total": losses,
            "held_results": [({}, self._delivery.held)],
            "broker_connected": [
                ({}, self._publisher.is_connected or (self._node is not None and self._node.is_connected))
            ],
            **(self._node.figures() if self._node else {}),
            "model_rollbacks_total": [({"cause": cause}, count) for cause, count in self._keeper.rollbacks.items()],
            "models_on_probation": [({}, self._keeper.on_probation)],
            "engine_building": [({}, self._keeper.building is not None)],
            "engine_batch_tiles": [
                ({"model": f"{loaded.id.name} {loaded.id.version}"}, loaded.inspector.engine.batch.size)
                for loaded in self._models.values()
                if loaded is not None
            ],
            "certificate_expires_timestamp_seconds": [
                ({"certificate": role}, end.timestamp()) for role, end in self._credentials.ends().items()
            ],
            "credential_renewals_total": [({"outcome": k}, n) for k, n in self._credentials.renewals.items()],
            "provider_degraded": [({}, any(engine.degraded_reason for engine in self._engines()))],
            "engine_out_of_memory_total": [({}, sum(engine.out_of_memory for engine in self._engines()))],
        }

    def _announce(self) -> None:
        for topic, text in discovery(Site.of(self._config), version("kizu")).items():
            self._publisher.publish_retained(topic, text.encode())

    def _make_sinks(self) -> list[Sink]:
        """What results, states and status go to; the node first, which has a store of its own (ADR 0019)."""
        publisher = self._publisher
        json = [JsonSink(self._config, publisher.publish_retained, publisher.wake)]
        return [*([self._node.sink] if self._node else []), *(json if self._config.mqtt.json_topics else [])]

    def _inspect(self) -> None:
        """One pass: take the models that hold from now on, then frames, and score each model's together."""
        known, self._models = self._models, {slot: self._keeper.current(slot) for slot in self._models}
        if any(known[slot] is None and loaded is not None for slot, loaded in self._models.items()):
            self._wake()  # for the cameras that have waited for it
        wait_s = _MODEL_WAIT_S if None in self._models.values() else _WAIT_S
        bytes_at_once = max([BYTES_AT_ONCE, *(m.inspector.busy_bytes for m in self._models.values() if m is not None)])
        frames = self._mailbox.take(FRAMES_AT_ONCE, wait_s, bytes_at_once, self._inspected_bytes)
        self._taken += len(frames)
        groups: dict[tuple[str | None, str | None], list[Frame]] = {}
        for frame, slot in map(self._products.mark, frames):
            groups.setdefault((slot, frame.part.product), []).append(frame)
        for (slot, product), group in groups.items():
            loaded = self._models.get(slot)
            if loaded is None:
                self._leave_out(group)
            else:
                self._inspect_group(loaded, product, group)

    def _inspected_bytes(self, frame: Frame) -> int:
        """Of `frame`'s pixels those in its camera's region."""
        region = self._cameras[frame.camera].region
        return frame.image.nbytes if region is None else region.width * region.height * frame.image.shape[2]

    def _inspect_group(self, loaded: Loaded, product: str | None, frames: list[Frame]) -> None:
        """Inspect frames of one product with its model; who asked for one hears of it at once."""
        thresholds = partial(self._thresholds.get, product=product)
        found = inspect_frames(frames, loaded.inspector, loaded.id, thresholds, self._operation.zones.views)
        found = [self._operation.triggers.settle(inspection) for inspection in found]
        self._keeper.observe(loaded, found)
        self._hand_over(found)

    def _leave_out(self, frames: list[Frame]) -> None:
        self._without_model.update(frame.camera for frame in frames)
        for frame in frames:
            if frame.trigger is not None:
                self._operation.triggers.miss(frame.trigger, "model_missing")

    def _hand_over(self, inspections: list[Inspection]) -> None:
        self._scoring_ns += sum(inspection.scoring_ns for inspection in inspections)
        # When delivery holds things up it is delivery that shall be named, and its death must not keep us here.
        while self._deliverer.failure is None:
            self._inspection.beat()
            with contextlib.suppress(queue.Full):
                self._passes.put(inspections, timeout=_WAIT_S)
                return

    def _deliver(self) -> None:
        try:
            inspections = self._passes.get(timeout=_WAIT_S)
        except queue.Empty:
            self._delivery.retry()
            return
        self._delivery.deliver(inspections)
        self._delivered += len(inspections)

    def _sync(self) -> None:
        interval_s = self._config.outbox.sync_s or _WAIT_S
        self._is_stopping.wait(min(interval_s, _WAIT_S))
        if time.monotonic() >= self._next_sync_mono_s:
            self._next_sync_mono_s = time.monotonic() + interval_s
            self._outbox.sync()
            if self._node:
                self._node.store.sync()

    def _undelivered(self) -> int:
        """Frames between capture and outbox, those included that wait in memory for the disk."""
        under_way = self._mailbox.depth() + self._taken - self._without_model.total() - self._delivered
        return under_way + self._delivery.held

    def _stop_captures(self, seconds: float) -> list[str]:
        with ThreadPoolExecutor(len(self._captures)) as pool:
            stopped = pool.map(lambda capture: capture.stop(seconds), self._captures.values())
            return [f"capture {name}" for name, is_gone in zip(self._captures, stopped, strict=True) if not is_gone]

    def _drain(self, stage: Stage, deadline: float) -> bool:
        """Let `stage` empty what is before it, then stop it; tell whether it is gone."""
        while time.monotonic() < deadline and not self.failures() and self._undelivered() > 0:
            time.sleep(0.02)
        return stage.stop(_left(deadline))

    def _command(self, request: CommandRequest) -> CommandAnswer | None:
        return self._commands.handle(request)

    def _note_ignored(self, name: str, why: Ignored) -> None:
        self._commands.counts.note(name, why)

    def _serving(self, camera: str) -> Loaded | None:
        """The model that judges `camera` now."""
        return self._models.get(self._products.slot_now(camera))

    def _model_of(self, camera: str) -> tuple[ModelId, Manifest] | None:
        loaded = self._serving(camera)
        return None if loaded is None else (loaded.id, loaded.manifest)

    def _id_in(self, slot: str | None) -> ModelId | None:
        return _id_of(self._models.get(slot))

    def _report_model(self, report: ModelReport) -> None:
        """Tell the plant what became of a dropped model; in the keeper's thread."""
        if not self._config.mqtt.json_topics:
            return  # the log has it, and devices show the model that judges
        payload = to_bytes(model_report(self._config.agent.name, report))
        try:
            self._outbox.put([Message(self._topics.model, payload, priority=Priority.EVENT)])
        except OutboxError as exc:
            log.warning("model report lost", report=report.kind, file=report.file, reason=str(exc))
        self._publisher.wake()

    def _vitals(self) -> Vitals:
        engines = self._engines()
        degraded = [engine for engine in engines if engine.degraded_reason]
        problems = [self._thresholds.problem, self._delivery.problem, self._outbox.sync_problem]
        problems += [self._credentials.problem]
        problems += [self._node.store.problem] if self._node else []
        problems += [*self._operation.problems, *self._keeper.problems, *(engine.memory_problem for engine in engines)]
        return Vitals(
            provider=(degraded or engines)[0].provider if engines else None,
            is_provider_degraded=bool(degraded),
            building=self._keeper.building,
            outbox_messages=self._outbox.depth(),
            outbox_bytes=self._outbox.bytes(),
            outbox_oldest_age_s=self._oldest_age_s(),
            outbox_losses=self._outbox.losses(),
            held_results=self._delivery.held,
            expiries=tuple(self._credentials.expiries()),
            certificate_ends=self._credentials.ends(),
            commands=self._commands.counts.by_outcome(),
            problems=tuple(problem for problem in problems if problem),
        )

    def _engines(self) -> list[AnyEngine]:
        return [loaded.inspector.engine for loaded in self._models.values() if loaded is not None]

    def _oldest_age_s(self) -> float:
        try:
            return self._outbox.oldest_age_s() or 0.0
        except OutboxError:
            return 0.0  # delivery.problem tells what is wrong with it


def _progress_of(stage: _Watched) -> Progress:
    return lambda: stage.progress_mono_ns


def _id_of(loaded: Loaded | None) -> ModelId | None:
    return loaded.id if loaded else None


def _left(deadline: float) -> float:
    return max(0.0, deadline - time.monotonic())


def open_outbox(state_dir: Path, config: OutboxConfig) -> Outbox:
    """Open the outbox in `state_dir`. Raises AgentError: another agent may be about to leave, a disk may get room."""
    try:
        return Outbox(state_dir / "outbox.sqlite3", config)
    except OutboxError as exc:
        hint = "; is another agent running with this agent.state_dir?" if "locked" in str(exc) else ""
        raise AgentError(f"{exc}{hint}") from exc


def make_state_dir(folder: Path) -> None:
    """Make the state directory. Raises ConfigError when it cannot be made or written to."""
    try:
        folder.mkdir(mode=0o750, parents=True, exist_ok=True)
    except OSError as exc:
        raise ConfigError(f"agent.state_dir {folder}: cannot be made: {exc.strerror}") from exc
    if not os.access(folder, os.W_OK | os.X_OK):
        raise ConfigError(f"agent.state_dir {folder}: is not writable by this user")
