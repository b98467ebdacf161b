"""How many commands are carried out: a token bucket for each command's name, and one for the refusals that are told."""

import threading
import time
from collections.abc import Mapping

REFUSALS_PER_S = 20.0
"""So many rate-limited commands a second are told so; beyond that they are counted only: a flood is not echoed."""


class TokenBucket:
    """Lets `per_s` things a second through in the long run, and `burst` at once; not thread-safe."""

    def __init__(self, per_s: float, burst: int) -> None:
        self._per_s, self._burst = per_s, float(burst)
        self._tokens, self._counted_mono_s = float(burst), time.monotonic()

    def take(self) -> bool:
        """Take one, where there is one."""
        now_mono_s = time.monotonic()
        self._tokens = min(self._burst, self._tokens + (now_mono_s - self._counted_mono_s) * self._per_s)
        self._counted_mono_s = now_mono_s
        if self._tokens < 1:
            return False
        self._tokens -= 1
        return True


class Gate:
    """One bucket for each known command, one for all names that are none; from any thread."""

    def __init__(self, buckets: Mapping[str, TokenBucket], unknown: TokenBucket) -> None:
        self._buckets, self._unknown = dict(buckets), unknown
        self._refusals = TokenBucket(REFUSALS_PER_S, round(REFUSALS_PER_S))
        self._lock = threading.Lock()

    def allows(self, command: str) -> bool:
        """Tell whether the command may be carried out now."""
        with self._lock:
            return self._buckets.get(command, self._unknown).take()

    def may_refuse(self) -> bool:
        """Tell whether one that may not shall be told."""
        with self._lock:
            return self._refusals.take()
