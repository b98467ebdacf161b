"""The hand-off between cameras and inspection: one bounded lane per camera, served in turn."""

import math
import threading
import time
from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass, field

from kizu_agent.records import Frame


@dataclass
class _Lane:
    capacity: int
    is_lossless: bool
    frames: deque[Frame] = field(default_factory=deque)
    drops: Counter[str] = field(default_factory=Counter)
    is_open: bool = True


class Mailbox:
    """Frames of all cameras on their way to inspection; any thread may use it.

    A live camera's full lane drops its oldest frame and counts it: the newest wins. A lossless lane makes `put` wait.
    """

    def __init__(self) -> None:
        self._lanes: dict[str, _Lane] = {}
        self._turn = 0
        self._is_closed = False
        self._changed = threading.Condition()

    def open_lane(self, camera: str, capacity: int, *, is_lossless: bool) -> None:
        """Open, or open again, the lane of `camera` for at most `capacity` frames; what lies in it stays.

        In a closed mailbox the lane is there, and closed.
        """
        with self._changed:
            lane = self._lanes.get(camera)
            if lane is None:
                lane = self._lanes[camera] = _Lane(capacity, is_lossless)
            lane.capacity, lane.is_lossless, lane.is_open = capacity, is_lossless, not self._is_closed
            self._changed.notify_all()

    def close_lane(self, camera: str) -> None:
        """Take no more frames of `camera` and wake whoever waits to put one; what lies in the lane is still taken."""
        with self._changed:
            if camera in self._lanes:
                self._lanes[camera].is_open = False
            self._changed.notify_all()

    def put(self, frame: Frame, timeout_s: float) -> bool:
        """Put `frame` into its camera's open lane; False when a lossless lane stayed full, or the lane is closed."""
        deadline = time.monotonic() + timeout_s
        with self._changed:
            lane = self._lanes[frame.camera]
            while lane.is_open and lane.is_lossless and len(lane.frames) >= lane.capacity:
                left_s = deadline - time.monotonic()
                if left_s <= 0 or not self._changed.wait(left_s):
                    return False
            if not lane.is_open:
                return False
            while len(lane.frames) >= lane.capacity:
                lane.frames.popleft()
                lane.drops["inspection_busy"] += 1
            lane.frames.append(frame)
            self._changed.notify_all()
            return True

    def take(
        self,
        max_frames: int,
        timeout_s: float,
        max_bytes: float = math.inf,
        bytes_of: Callable[[Frame], int] = lambda frame: frame.image.nbytes,
    ) -> list[Frame]:
        """Take up to `max_frames`, one lane after the other in turn, each lane's oldest first.

        The frames after the first end where all together would have more than `max_bytes` bytes of pixels, `bytes_of`
        each.
        Waits at most `timeout_s` for the first; an empty list when none came, or the mailbox was closed meanwhile.
        """
        with self._changed:
            was_closed = self._is_closed
            self._changed.wait_for(
                lambda: any(lane.frames for lane in self._lanes.values()) or self._is_closed != was_closed, timeout_s
            )
            taken: list[Frame] = []
            left = math.inf
            while len(taken) < max_frames and (frame := self._next(left, bytes_of)) is not None:
                taken.append(frame)
                max_bytes -= bytes_of(frame)
                left = max_bytes
            if taken:
                self._changed.notify_all()
            return taken

    def depth(self) -> int:
        """How many frames wait."""
        with self._changed:
            return sum(len(lane.frames) for lane in self._lanes.values())

    def drops(self, camera: str) -> dict[str, int]:
        """Frames of `camera` dropped here, by cause."""
        with self._changed:
            return dict(self._lanes[camera].drops) if camera in self._lanes else {}

    def close(self) -> None:
        """Close every lane for good and wake everyone; what lies in them is still taken. Idempotent."""
        with self._changed:
            self._is_closed = True
            for lane in self._lanes.values():
                lane.is_open = False
            self._changed.notify_all()

    def _next(self, max_bytes: float, bytes_of: Callable[[Frame], int]) -> Frame | None:
        """Take the oldest frame of the next lane in turn that has one; None also where that one is too large."""
        lanes = list(self._lanes.values())
        for step in range(len(lanes)):
            lane = lanes[(self._turn + step) % len(lanes)]
            if lane.frames:
                if bytes_of(lane.frames[0]) > max_bytes:
                    return None
                self._turn = (self._turn + step + 1) % len(lanes)
                return lane.frames.popleft()
        return None
