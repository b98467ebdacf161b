"""Keeps one camera running in its killable process, and says what state it is in.

A process that says nothing within the timeouts hangs in native code: it is killed, counted, and started again with a
growing, jittered pause. Pictures that show nothing are refused in the process itself (cameras/checks.py); what must
outlive a process for that, the size of its pictures and the one it froze at, is kept here.
"""

import random
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import structlog

from kizu_agent.camera_settings import CameraConfig
from kizu_agent.cameras.checks import PICTURE_CAUSES, Limits
from kizu_agent.capture_process import GRACE_S, HANG_GRACE_S, START_S, CaptureProcess
from kizu_agent.errors import CommandError
from kizu_agent.mailbox import Mailbox
from kizu_agent.outage import Backoff, OutageLog
from kizu_agent.records import CameraCondition, CameraStatus, Frame, Trigger
from kizu_agent.stages import Stage

log = structlog.get_logger(__name__)

STEADY_S = 10.0
"""A camera that was well for so long is opened again at once, and the wait after that is the shortest again."""
_POLL_S = 0.2


@dataclass
class _Condition:
    condition: CameraCondition = "starting"
    cause: str | None = None
    since_ns: int = 0
    losses: Counter[str] = field(default_factory=Counter)
    """By cause; here and not beside it, since `status` in another thread must see both change at once."""


class Capture:
    """Keeps one camera running and its frames coming into the mailbox; a camera that is away is no error.

    `on_miss` hears, in this camera's thread, of each trigger that will have no picture, and why. While `is_paused`
    nothing goes into the mailbox: a live camera's frames are dropped, files wait. `newest` is the last frame.
    """

    def __init__(
        self,
        config: CameraConfig,
        mailbox: Mailbox,
        on_miss: Callable[[Trigger, str], None] = lambda _trigger, _cause: None,
    ) -> None:
        self.is_paused = False
        self.newest: Frame | None = None
        self._config = config
        self._mailbox = mailbox
        self._on_miss = on_miss
        self._asked: dict[int, Trigger] = {}
        self._asking = threading.Lock()
        self._is_lossless = False
        self._child: CaptureProcess | None = None
        self._last_child: CaptureProcess | None = None
        self._condition = _Condition(since_ns=time.time_ns())
        self._captured = 0
        self._size = None if config.size is None else (config.size.width, config.size.height)
        self._frozen: str | None = None
        self._must_show_picture = False
        self._last_frame_mono_s = 0.0
        # Those of earlier children and those of this one; replaced together, for `status` may be reading them.
        self._drops: tuple[Counter[str], Mapping[str, int]] = (Counter(), {})
        self._pending: Frame | None = None
        self._backoff = Backoff(0.5, 30.0)
        self._next_attempt_mono_s = 0.0
        self._patience_to_end_s = GRACE_S
        self._outage = OutageLog(f"camera {config.name}")
        self._may_open = threading.Event()
        self._is_told_to_stop = threading.Event()
        self._has_left = threading.Event()
        self._stage = Stage(f"capture {config.name}", self._work, self._has_left.set)

    @property
    def failure(self) -> BaseException | None:
        """What killed the thread, a bug; None while it is well."""
        return self._stage.failure

    @property
    def progress_mono_ns(self) -> int:
        """`time.monotonic_ns()` of the thread's last progress; also before the start, where there is none to make."""
        return self._stage.progress_mono_ns if self._stage.is_running else time.monotonic_ns()

    def warm_up(self) -> None:
        """Start the camera's process, which takes a while, and open nothing yet; idempotent."""
        self._stage.start()

    def start(self) -> None:
        """Open the camera; idempotent."""
        self._may_open.set()
        self.warm_up()

    def stop(self, deadline_s: float) -> bool:
        """Stop camera and thread, at most `deadline_s`; idempotent. Tell whether both are gone."""
        deadline = time.monotonic() + deadline_s
        self._mailbox.close_lane(self._config.name)
        self._patience_to_end_s = min(GRACE_S, deadline_s / 2)
        self._is_told_to_stop.set()
        child = self._child
        if child is not None:
            child.ask_to_end()
        if self._stage.is_running:
            self._has_left.wait(deadline_s)
        is_gone = self._stage.stop(max(0.0, deadline - time.monotonic()))
        if is_gone:
            self._leave()
        elif (child := self._child) is not None:
            child.process.kill()
        return is_gone

    def status(self) -> CameraStatus:
        """Give the camera's state as last seen."""
        earlier, current = self._drops
        drops = earlier + Counter(current) + Counter(self._mailbox.drops(self._config.name))
        seen = self._condition
        return CameraStatus(
            self._config.name,
            seen.condition,
            seen.cause,
            seen.since_ns,
            self._captured,
            sum(seen.losses.values()),
            dict(drops),
            dict(seen.losses),
            self.is_paused,
        )

    def shoot(self, trigger: Trigger) -> None:
        """Have a picture made for `trigger`, from any thread; its frame carries it, or `on_miss` hears of it.

        Raises CommandError (`paused`, `camera_…`, `busy`), and no picture comes then.
        """
        with self._asking:
            child, condition = self._child, self._condition.condition
            if self.is_paused:
                raise CommandError("paused", f"camera {self._config.name} is paused")
            if child is None or condition not in ("running", "idle"):
                word = "camera_lost" if condition in ("running", "idle") else f"camera_{condition}"
                raise CommandError(word, f"camera {self._config.name} gives no pictures now: {condition}")
            if len(self._asked) >= self._config.trigger_queue or not child.shoot(trigger.number):
                raise CommandError("busy", f"camera {self._config.name}: {len(self._asked)} triggers wait already")
            self._asked[trigger.number] = trigger

    def _work(self) -> None:
        if self._is_told_to_stop.is_set():
            # Here and not in `stop`: the kernel kills the child with the thread that started it.
            self._leave()
            self._has_left.set()
            time.sleep(0.01)
        elif self._pending is not None:
            self._hand_over(self._pending)
        elif self._child is not None and not self._child.is_ordered:
            self._order(self._child)
        elif self._child is not None:
            self._attend(self._child)
        elif self._condition.condition == "ended" or time.monotonic() < self._next_attempt_mono_s:
            time.sleep(0.05)
        elif self._last_child is not None and self._last_child.is_alive():
            # Killed, yet inside the kernel still (a share that is away): another would only hang beside it.
            time.sleep(_POLL_S)
        else:
            self._start_child()

    def _start_child(self) -> None:
        try:
            self._child = CaptureProcess(self._config)
        except OSError as exc:
            self._lose("crashed", f"its capture process cannot be started: {exc}", 0.0)

    def _order(self, child: CaptureProcess) -> None:
        """Have the camera opened as soon as that is allowed; a process that ends before is started again."""
        if self._may_open.wait(_POLL_S):
            child.order(self._limits())
        elif not child.is_alive():
            self._lose("crashed", f"its capture process ended with {child.process.returncode}", 0.0)

    def _limits(self) -> Limits:
        config = self._config
        return Limits(
            frozen_after_s=config.frozen_after_s,
            black_after_s=config.black_after_s,
            white_after_s=config.white_after_s,
            black_level=config.black_level,
            size=self._size,
            frozen=self._frozen,
        )

    def _miss_all(self, cause: str) -> None:
        """No trigger that waits will have a picture any more."""
        with self._asking:
            asked, self._asked = self._asked, {}
        for trigger in asked.values():
            self._on_miss(trigger, cause)

    def _leave(self) -> None:
        self._miss_all("stopped")
        if self._pending is not None:
            self._pending = None
            self._drops = (self._drops[0] + Counter(stopped=1), self._drops[1])
        child, self._child = self._child, None
        if child is not None:
            child.end(self._patience_to_end_s)

    def _attend(self, child: CaptureProcess) -> None:
        message = child.receive(_POLL_S)
        if message is None:
            if child.silent_s() > self._patience_s(child):
                self._lose("hang", f"no sign of life for {child.silent_s():.1f} s; its process was killed", 0.0)
            return
        if "drops" in message:
            self._drops = (self._drops[0], message["drops"])
        self._hear(child, message)

    def _hear(self, child: CaptureProcess, message: dict[str, Any]) -> None:
        kind = message["kind"]
        if kind == "opened":
            self._opened(child, message)
        elif kind == "buffer":
            child.remap(message["slot_bytes"])
        elif kind == "frame":
            self._take(child, message)
        elif kind == "idle":
            self._see_idle(child)
        elif kind in ("fit", "unfit", "missed"):
            self._hear_of_picture(child, message)
        elif kind == "lost":
            self._frozen = message["frozen"] or self._frozen
            self._lose(message["cause"], message["message"], GRACE_S)
        elif kind == "gone" and not self._is_told_to_stop.is_set():
            child.end(GRACE_S)
            self._lose("crashed", f"its capture process ended with {child.process.returncode}", 0.0)

    def _hear_of_picture(self, child: CaptureProcess, message: dict[str, Any]) -> None:
        """A picture that is not handed over: nobody asked for it, or it may not be judged."""
        kind = message["kind"]
        if kind == "fit":
            child.has_given, self._frozen, self._must_show_picture = True, None, False
            if self._condition.condition != "running":
                self._be_well(child, "idle")
        elif kind == "unfit":
            child.has_given = True
            if message["is_loss"]:
                self._note_loss(message["cause"], message["message"])
        elif (trigger := self._take_asked(message["trigger"])) is not None:
            self._on_miss(trigger, message["cause"])

    def _patience_s(self, child: CaptureProcess) -> float:
        config = self._config
        if child.has_given:
            return config.read_timeout_s + HANG_GRACE_S
        if child.is_open:  # a camera may need longer for its first picture than between two
            return max(config.read_timeout_s, config.open_timeout_s) + HANG_GRACE_S
        return config.open_timeout_s + START_S

    def _opened(self, child: CaptureProcess, message: dict[str, Any]) -> None:
        child.is_open, child.is_triggered = True, message["is_triggered"]
        # A frame that somebody asked for is not dropped for a newer one.
        self._is_lossless = not message["is_live"] or self._config.trigger == "mqtt"
        self._mailbox.open_lane(self._config.name, self._config.queue_frames, is_lossless=self._is_lossless)
        # One that waits for its trigger has nothing to show for being back, unless it was its pictures that were bad.
        if child.is_triggered and not self._must_show_picture:
            self._be_well(child, "idle")

    def _see_idle(self, child: CaptureProcess) -> None:
        """A trigger that stays away is no loss; said when the last verdict has become stale as well."""
        idle_s = time.monotonic() - self._last_frame_mono_s
        if child.is_triggered and self._condition.condition == "running" and idle_s > self._config.stale_after_s:
            self._become("idle", None)

    def _take(self, child: CaptureProcess, message: dict[str, Any]) -> None:
        image = child.copy(message["slot"], tuple(message["shape"]))
        child.has_given = True
        self._captured += 1
        self._last_frame_mono_s = time.monotonic()
        self._frozen, self._must_show_picture = None, False
        self._size = self._size or (image.shape[1], image.shape[0])
        if self._condition.condition != "running":
            self._be_well(child, "running")
        self.newest = Frame(
            camera=self._config.name,
            number=message["number"],
            image=image,
            source=message["source"],
            captured_ns=message["captured_ns"],
            captured_mono_ns=message["captured_mono_ns"],
            trigger=self._take_asked(message["trigger"]),
        )
        self._hand_over(self.newest)

    def _take_asked(self, number: int | None) -> Trigger | None:
        with self._asking:
            return None if number is None else self._asked.pop(number, None)

    def _hand_over(self, frame: Frame) -> None:
        """Put the frame into the mailbox, or keep it for the next turn where a lossless lane is full."""
        if self.is_paused:
            self._hold(frame)
        else:
            self._pending = None if self._mailbox.put(frame, _POLL_S) else frame

    def _hold(self, frame: Frame) -> None:
        """A file waits for the end of the pause; what is live, or was asked for, has had its time."""
        if self._is_lossless and frame.trigger is None:
            self._pending = frame
            time.sleep(0.05)
            return
        self._pending = None
        self._drops = (self._drops[0] + Counter(paused=1), self._drops[1])
        if frame.trigger is not None:
            self._on_miss(frame.trigger, "paused")

    def _lose(self, cause: str, reason: str, patience_s: float) -> None:
        with self._asking:
            child, self._child = self._child, None
        self._last_child = child
        self._miss_all("camera_ended" if cause == "ended" else "camera_lost")
        if child is not None:
            child.end(patience_s)
        self._drops = (self._drops[0] + Counter(self._drops[1]), {})
        if cause == "ended":
            self._become("ended", cause)
            log.info("camera has ended", camera=self._config.name, reason=reason)
            return
        self._note_loss(cause, reason)
        # It stood still before that was called frozen.
        steady_s = STEADY_S + (self._config.frozen_after_s if cause == "frozen" else 0.0)
        if cause == "unauthorised":
            # Tried again soon and often, the camera would lock the account.
            pause_s = self._config.unauthorised_retry_s * random.uniform(1.0, 1.1)
        elif child is not None and child.is_steady(steady_s):
            self._backoff.reset()
            pause_s = 0.0
        else:
            pause_s = self._backoff.next_s()
        self._next_attempt_mono_s = time.monotonic() + pause_s

    def _note_loss(self, cause: str, reason: str) -> None:
        """Count and log a loss once; what else goes wrong until the return shows in the state."""
        before = self._condition
        self._must_show_picture = self._must_show_picture or cause in PICTURE_CAUSES
        if before.condition != "lost":
            self._condition = _Condition("lost", cause, time.time_ns(), before.losses + Counter([cause]))
            self._outage.trouble("lost", f"camera {self._config.name} lost ({cause})", reason)
        elif before.cause != cause:
            log.debug("camera still lost", camera=self._config.name, cause=cause, reason=reason)
            self._become("lost", cause)

    def _be_well(self, child: CaptureProcess, condition: CameraCondition) -> None:
        child.good_since_mono_s = child.good_since_mono_s or time.monotonic()
        self._become(condition, None)
        self._outage.over()

    def _become(self, condition: CameraCondition, cause: str | None) -> None:
        self._condition = _Condition(condition, cause, time.time_ns(), self._condition.losses)
