"""How long to wait between attempts, and how to say it once: used while something outside is away."""

import random
import time

import structlog

log = structlog.get_logger(__name__)


class Backoff:
    """Seconds to wait before the next attempt: doubling between two bounds, with jitter.

    The jitter keeps a hall full of agents from coming back at the same moment after the broker's restart.
    """

    def __init__(self, first_s: float, longest_s: float) -> None:
        self._first_s, self._longest_s = first_s, longest_s
        self._ceiling_s = first_s

    def next_s(self) -> float:
        """Give the wait before the next attempt, between `first_s` and `longest_s`."""
        self._ceiling_s = min(self._longest_s, self._ceiling_s * 2)
        return random.uniform(max(self._first_s, self._ceiling_s / 2), self._ceiling_s)

    def reset(self) -> None:
        """Begin again with the shortest wait."""
        self._ceiling_s = self._first_s


class OutageLog:
    """Logs a loss once, each further kind of trouble in it once, and the return once."""

    def __init__(self, subject: str) -> None:
        self._return = f"{subject} is back"
        self._since_mono_s: float | None = None
        self._told: set[str] = set()

    def trouble(self, kind: str, event: str, reason: str) -> None:
        """Log `event` with its reason when `kind` of trouble is new in this outage."""
        if self._since_mono_s is None:
            self._since_mono_s = time.monotonic()
        if kind not in self._told:
            self._told.add(kind)
            log.warning(event, reason=reason)

    def over(self) -> None:
        """Log the return when there was trouble."""
        if self._since_mono_s is not None:
            log.info(self._return, away_s=round(time.monotonic() - self._since_mono_s, 1))
            self._since_mono_s = None
            self._told.clear()
