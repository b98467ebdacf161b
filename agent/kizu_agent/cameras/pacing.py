"""When the next picture is due, at a rate that does not drift."""

import time

from kizu_agent.cameras.base import WAIT_S


class Limiter:
    """Lets at most `rate` pictures a second through, evenly; what does not fit is not owed later. 0: everything."""

    def __init__(self, rate: float) -> None:
        self._every_s = 1 / rate if rate > 0 else 0.0
        self._next_mono_s = 0.0

    @property
    def wait_s(self) -> float:
        """Seconds until one may go, 0 now."""
        return max(0.0, self._next_mono_s - time.monotonic())

    def count(self) -> None:
        """One goes now."""
        # From the time it was due, as long as that is near: a camera's jitter must not lower the rate.
        self._next_mono_s = max(self._next_mono_s, time.monotonic() - self._every_s / 2) + self._every_s


class Pacer:
    """Picture k is due k ÷ rate seconds after the start, however long the pictures before it took; rate 0: at once."""

    def __init__(self, rate: float) -> None:
        self._rate = rate
        self._began_mono_s = time.monotonic()
        self._given = 0

    def is_due(self) -> bool:
        """Wait for the next picture's time, at most WAIT_S; tell whether it has come."""
        if self._rate > 0:
            wait_s = self._began_mono_s + self._given / self._rate - time.monotonic()
            if wait_s > WAIT_S:
                time.sleep(WAIT_S)
                return False
            if wait_s > 0:
                time.sleep(wait_s)
        self._given += 1
        return True
