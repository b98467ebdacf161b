"""Inspections that were asked for: each has one answer, a verdict or why there is none, by its deadline at the latest.

trigger → capture (makes the picture) → inspection → settle; what goes wrong on the way misses, the deadline expires.
"""

import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

from kizu_agent.errors import CommandError
from kizu_agent.records import Inspection, Part, Trigger
from kizu_agent.stages import Stage

_IDLE_S = 0.5

Settle = Callable[[Inspection | CommandError], None]
"""Takes the verdict, or why there is none; called once, by the thread that knows, and must be quick."""


@dataclass(frozen=True)
class Order:
    """What is asked of a camera: `part` as far as the plant says what it is; seconds from `came_mono_ns`.

    `most`: so many orders may wait on this camera, this one included.
    """

    camera: str
    part: Part
    request_id: str | None
    came_mono_ns: int
    deadline_s: float
    most: int


@dataclass(frozen=True)
class _Waiting:
    trigger: Trigger
    deadline_mono_ns: int
    settle: Settle


class Triggers:
    """Keeps what is asked and not answered yet; from any thread. `shoot` has the picture made, or raises CommandError.

    `on_failure` is called when the thread that watches the deadlines dies (`stage` then holds the error).
    """

    def __init__(self, shoot: Callable[[Trigger], None], on_failure: Callable[[], None]) -> None:
        self.stage = Stage("triggers", self._watch, on_failure)
        self._shoot = shoot
        self._waiting: dict[int, _Waiting] = {}
        self._changed = threading.Condition()
        self._ordering = threading.Lock()
        self._numbers = 0
        self._is_stopped = False
        self._counts: Counter[tuple[str, str]] = Counter()

    def ask(self, order: Order, settle: Settle) -> None:
        """Have the next picture of a camera inspected. Raises CommandError, and `settle` is not called then."""
        # One at a time, so that pictures come in the order of the triggers.
        with self._ordering:
            trigger = self._admit(order, settle)
            try:
                self._shoot(trigger)
            except CommandError as exc:
                if self._take(trigger.number) is not None:
                    self._count(order.camera, exc.code)
                    raise

    def settle(self, inspection: Inspection) -> Inspection:
        """Answer by `inspection`; gives it back, marked as late where the trigger had been answered before."""
        trigger = inspection.frame.trigger
        if trigger is None:
            return inspection
        waiting = self._take(trigger.number)
        if waiting is None:
            self._count(trigger.camera, "late")
            return replace(inspection, is_late=True)
        self._count(trigger.camera, "answered")
        waiting.settle(inspection)
        return inspection

    def miss(self, trigger: Trigger, cause: str) -> None:
        """There will be no verdict; nothing happens where it was answered before."""
        waiting = self._take(trigger.number)
        if waiting is not None:
            self._count(trigger.camera, cause)
            waiting.settle(CommandError(cause, f"camera {trigger.camera}: no verdict: {cause}"))

    def stop(self) -> None:
        """Answer all that wait, and refuse what comes; idempotent."""
        with self._changed:
            self._is_stopped = True
            waiting = list(self._waiting.values())
            self._changed.notify_all()
        for each in waiting:
            self.miss(each.trigger, "stopped")

    def counts(self) -> Mapping[tuple[str, str], int]:
        """How orders ended, by camera and outcome: `answered`, `late` (after its answer), else why not."""
        with self._changed:
            return dict(self._counts)

    def waiting(self) -> int:
        """How many wait for their answer."""
        with self._changed:
            return len(self._waiting)

    def _admit(self, order: Order, settle: Settle) -> Trigger:
        with self._changed:
            if self._is_stopped:
                raise CommandError("stopped", "the agent is about to end")
            of_camera = sum(waiting.trigger.camera == order.camera for waiting in self._waiting.values())
            if of_camera >= order.most:
                self._counts[order.camera, "busy"] += 1
                raise CommandError("busy", f"camera {order.camera}: {of_camera} triggers wait already")
            self._numbers += 1
            trigger = Trigger(self._numbers, order.camera, order.request_id, order.part, order.came_mono_ns)
            deadline_mono_ns = order.came_mono_ns + round(order.deadline_s * 1e9)
            self._waiting[trigger.number] = _Waiting(trigger, deadline_mono_ns, settle)
            self._changed.notify_all()
            return trigger

    def _take(self, number: int) -> _Waiting | None:
        with self._changed:
            return self._waiting.pop(number, None)

    def _count(self, camera: str, outcome: str) -> None:
        with self._changed:
            self._counts[camera, outcome] += 1

    def _watch(self) -> None:
        """Wait for the next deadline, and answer those that have passed."""
        with self._changed:
            first_ns = min((waiting.deadline_mono_ns for waiting in self._waiting.values()), default=None)
            wait_s = _IDLE_S if first_ns is None else (first_ns - time.monotonic_ns()) / 1e9
            if wait_s > 0:
                self._changed.wait(min(wait_s, _IDLE_S))
            now_ns = time.monotonic_ns()
            over = [waiting.trigger for waiting in self._waiting.values() if waiting.deadline_mono_ns <= now_ns]
        for trigger in over:
            self.miss(trigger, "deadline")
