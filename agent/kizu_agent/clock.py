"""Whether the wall clock can be trusted. Durations never come from it, only timestamps for others to read."""

import ctypes
import time
from typing import Literal

TimeQuality = Literal["synchronised", "unsynchronised", "unknown"]
"""What the kernel knows of the clock: kept right by NTP or PTP, or not; `unknown` where it cannot be asked."""

_ASK_AGAIN_S = 5.0
_TIME_ERROR = 5
"""What adjtimex(2) returns while the clock is not synchronised; smaller numbers are states of one that is."""
_STRUCT_TIMEX_BYTES = 1024
"""More than any platform's struct timex; zeroed, its `modes` ask to change nothing."""


class Clock:
    """Asks the kernel now and then; any thread may use it."""

    def __init__(self) -> None:
        self._quality: TimeQuality = "unknown"
        self._next_mono_s = 0.0

    @property
    def quality(self) -> TimeQuality:
        """The clock's quality, at most a few seconds old."""
        if time.monotonic() >= self._next_mono_s:
            self._quality, self._next_mono_s = read_quality(), time.monotonic() + _ASK_AGAIN_S
        return self._quality


def read_quality() -> TimeQuality:
    """Ask the kernel (adjtimex(2), reading only)."""
    try:
        state = ctypes.CDLL(None).adjtimex(ctypes.create_string_buffer(_STRUCT_TIMEX_BYTES))
    except (OSError, AttributeError):
        return "unknown"
    if state < 0:
        return "unknown"
    return "unsynchronised" if state == _TIME_ERROR else "synchronised"
