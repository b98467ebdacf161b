"""One killable child process per camera, and the thread that looks after it.

Frames come through anonymous shared memory (memfd), so a killed run leaves nothing behind in /dev/shm; messages through
a SOCK_SEQPACKET socket (see capture_child.py and docs/decisions/0005). A child that says nothing within the timeouts
hangs in native code: it is killed, counted, and started again with a growing, jittered pause.
"""

import contextlib
import json
import mmap
import os
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import structlog

from kizu_agent.cameras.video import environment
from kizu_agent.capture_child import MAX_PACKET
from kizu_agent.config import CameraConfig
from kizu_agent.mailbox import Mailbox
from kizu_agent.outage import Backoff, OutageLog
from kizu_agent.records import CameraCondition, CameraStatus, Frame
from kizu_agent.stages import Stage

log = structlog.get_logger(__name__)

SLOTS = 3
"""Pictures in shared memory: one being written, one being read, one on its way."""
HANG_GRACE_S = 1.8
"""Beyond the read timeout a child is given this long to say something: a loss is known within two seconds of it."""
GRACE_S = 2.0
"""A child may take this long to close its camera, and the kernel to end it."""
START_S = 15.0
"""A child may take this long to start Python and OpenCV on a slow box."""
STEADY_S = 10.0
"""A camera that ran so long is opened again at once, and the wait after that is the shortest again."""
_POLL_S = 0.2


class _Child:
    """A running capture process with its ends of socket and memory."""

    def __init__(self, config: CameraConfig) -> None:
        self._memory = os.memfd_create(f"kizu-{config.name}")
        try:
            self.link, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        except OSError:
            os.close(self._memory)
            raise
        self._map: mmap.mmap | None = None
        self._slot_bytes = 0
        self.is_open = False
        self.last_word_mono_s = self.started_mono_s = time.monotonic()
        command = [sys.executable, "-m", "kizu_agent.capture_child", str(theirs.fileno()), str(self._memory)]
        try:
            with theirs:
                # A session of its own: Ctrl-C at a terminal is for the service to handle.
                self.process = subprocess.Popen(
                    command,
                    stdin=subprocess.DEVNULL,
                    pass_fds=(theirs.fileno(), self._memory),
                    start_new_session=True,
                    env={**environment(config.read_timeout_s), **os.environ},
                )
        except OSError:
            self._free()
            raise
        order = {
            "url": config.source,
            "open_timeout_s": config.open_timeout_s,
            "read_timeout_s": config.read_timeout_s,
            "slots": SLOTS,
            "parent": os.getpid(),
        }
        with contextlib.suppress(OSError):  # a child that is gone already is noticed by `receive`
            self.link.send(json.dumps(order).encode())

    def receive(self, wait_s: float) -> dict[str, Any] | None:
        """Wait for a message; None when none came, `{"kind": "gone"}` when the child has ended."""
        self.link.settimeout(wait_s)
        try:
            packet = self._next_packet()
        except TimeoutError:
            return None
        except OSError:
            packet = b""
        self.last_word_mono_s = time.monotonic()
        message: dict[str, Any] = json.loads(packet) if packet else {"kind": "gone"}
        return message

    def _next_packet(self) -> bytes:
        try:
            return self.link.recv(MAX_PACKET)
        except ConnectionResetError:
            # The child left slots unread that were given back. The kernel says so once, ahead of its last messages.
            return self.link.recv(MAX_PACKET)

    def remap(self, slot_bytes: int) -> None:
        """Map the memory anew after the child has made its slots larger."""
        if self._map is not None:
            self._map.close()
        self._slot_bytes = slot_bytes
        self._map = mmap.mmap(self._memory, slot_bytes * SLOTS, prot=mmap.PROT_READ)

    def copy(self, slot: int, shape: tuple[int, ...]) -> "np.ndarray[Any, np.dtype[np.uint8]]":
        """Copy the picture out of `slot` and give the slot back."""
        assert self._map is not None  # noqa: S101 - the child announces its memory before its first frame
        at = slot * self._slot_bytes
        data = self._map[at : at + int(np.prod(shape))]
        with contextlib.suppress(OSError):  # the child may be gone; the picture is whole
            self.link.send(json.dumps({"release": slot}).encode())
        return np.frombuffer(data, np.uint8).reshape(shape)

    def silent_s(self) -> float:
        """Seconds since its last message, or since its start."""
        return time.monotonic() - self.last_word_mono_s

    def ask_to_end(self) -> None:
        """Close the conversation: the child ends itself, and whoever waits in `receive` hears that it is gone."""
        with contextlib.suppress(OSError):
            self.link.shutdown(socket.SHUT_RDWR)

    def is_alive(self) -> bool:
        """Tell whether the process is still there; a killed one may be while it waits inside the kernel."""
        return self.process.poll() is None

    def end(self, patience_s: float) -> None:
        """Ask it to end, wait `patience_s`, then kill it; frees everything. Idempotent."""
        self.ask_to_end()
        try:
            self.process.wait(patience_s)
        except subprocess.TimeoutExpired:
            self._kill()
        self._free()

    def _kill(self) -> None:
        self.process.kill()
        try:
            self.process.wait(GRACE_S)
        except subprocess.TimeoutExpired:
            log.error(  # noqa: TRY400 - the trace says nothing that the pid does not
                "capture process cannot be killed: it waits inside the kernel", pid=self.process.pid
            )

    def _free(self) -> None:
        self.link.close()
        if self._map is not None:
            self._map.close()
        if self._memory >= 0:
            os.close(self._memory)
            self._memory = -1


@dataclass
class _Condition:
    condition: CameraCondition = "starting"
    cause: str | None = None
    since_ns: int = 0


class Capture:
    """Keeps one camera running and its frames coming into the mailbox; a camera that is away is no error."""

    def __init__(self, config: CameraConfig, mailbox: Mailbox) -> None:
        self._config = config
        self._mailbox = mailbox
        self._child: _Child | None = None
        self._last_child: _Child | None = None
        self._condition = _Condition(since_ns=time.time_ns())
        self._captured = self._losses = 0
        # Those of earlier children and those of this one; replaced together, for `status` may be reading them.
        self._drops: tuple[Counter[str], Mapping[str, int]] = (Counter(), {})
        self._pending: Frame | None = None
        self._backoff = Backoff(0.5, 30.0)
        self._next_attempt_mono_s = 0.0
        self._patience_to_end_s = GRACE_S
        self._outage = OutageLog(f"camera {config.name}")
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

    def start(self) -> None:
        """Start the camera; idempotent."""
        self._stage.start()

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
            self._config.name, seen.condition, seen.cause, seen.since_ns, self._captured, self._losses, dict(drops)
        )

    def _work(self) -> None:
        if self._is_told_to_stop.is_set():
            # Here and not in `stop`: the kernel kills the child with the thread that started it.
            self._leave()
            self._has_left.set()
            time.sleep(0.01)
        elif self._pending is not None:
            self._hand_over(self._pending)
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
            self._child = _Child(self._config)
        except OSError as exc:
            self._lose("crashed", f"its capture process cannot be started: {exc}", 0.0)

    def _leave(self) -> None:
        if self._pending is not None:
            self._pending = None
            self._drops = (self._drops[0] + Counter(stopped=1), self._drops[1])
        child, self._child = self._child, None
        if child is not None:
            child.end(self._patience_to_end_s)

    def _attend(self, child: _Child) -> None:
        message = child.receive(_POLL_S)
        if message is None:
            if child.silent_s() > self._patience_s(child):
                self._lose("hang", f"no sign of life for {child.silent_s():.1f} s; its process was killed", 0.0)
            return
        kind = message["kind"]
        if kind == "opened":
            child.is_open = True
            queued = self._config.queue_frames
            self._mailbox.open_lane(self._config.name, queued, is_lossless=not message["is_live"])
        elif kind == "buffer":
            child.remap(message["slot_bytes"])
        elif kind == "frame":
            self._take(child, message)
        elif kind == "lost":
            self._drops = (self._drops[0], message["drops"])
            self._lose(message["cause"], message["message"], GRACE_S)
        elif kind == "gone" and not self._is_told_to_stop.is_set():
            child.end(GRACE_S)
            self._lose("crashed", f"its capture process ended with {child.process.returncode}", 0.0)

    def _patience_s(self, child: _Child) -> float:
        if child.is_open:
            return self._config.read_timeout_s + HANG_GRACE_S
        return self._config.open_timeout_s + START_S

    def _take(self, child: _Child, message: dict[str, Any]) -> None:
        image = child.copy(message["slot"], tuple(message["shape"]))
        self._drops = (self._drops[0], message["drops"])
        self._captured += 1
        if self._condition.condition != "running":
            self._become("running", None)
            self._outage.over()
        self._hand_over(
            Frame(
                camera=self._config.name,
                number=message["number"],
                image=image,
                source=message["source"],
                captured_ns=message["captured_ns"],
                captured_mono_ns=message["captured_mono_ns"],
            )
        )

    def _hand_over(self, frame: Frame) -> None:
        """Put the frame into the mailbox, or keep it for the next turn where a lossless lane is full."""
        self._pending = None if self._mailbox.put(frame, _POLL_S) else frame

    def _lose(self, cause: str, reason: str, patience_s: float) -> None:
        child = self._child
        if child is not None:
            child.end(patience_s)
        self._child, self._last_child = None, child
        self._drops = (self._drops[0] + Counter(self._drops[1]), {})
        if cause == "ended":
            self._become("ended", cause)
            log.info("camera has ended", camera=self._config.name, reason=reason)
            return
        if self._condition.condition != "lost":
            self._losses += 1
        self._become("lost", cause)
        self._outage.trouble(cause, f"camera {self._config.name} lost ({cause})", reason)
        if child is not None and time.monotonic() - child.started_mono_s > STEADY_S and child.is_open:
            self._backoff.reset()
        else:
            self._next_attempt_mono_s = time.monotonic() + self._backoff.next_s()

    def _become(self, condition: CameraCondition, cause: str | None) -> None:
        self._condition = _Condition(condition, cause, time.time_ns())
