"""What became of commands, counted; and said in the log, but not once for each message of a flood."""

import threading
from collections import Counter
from collections.abc import Collection, Mapping
from typing import Literal

import structlog

from kizu_agent.rate_limit import TokenBucket

log = structlog.get_logger(__name__)

CommandOutcome = Literal["done", "refused", "repeated", "rate_limited", "expired", "retained", "oversized", "dropped"]
"""`done`: carried out; `refused`: with an error, nothing changed; `repeated`: its id was known, answered as before;
`rate_limited`; `expired`: past its `expires_at`; `retained`; `oversized`: not even read; `dropped`: too many waited."""
OTHER = "other"
"""What names that are no command are counted under: they may be anything, and any number."""
_LINES_PER_S, _LINES_AT_ONCE = 0.1, 5


class CommandCounts:
    """Counts by command and outcome; from any thread."""

    def __init__(self, known: Collection[str]) -> None:
        self._known = frozenset(known)
        self._counts: Counter[tuple[str, CommandOutcome]] = Counter()
        self._lines: dict[CommandOutcome, TokenBucket] = {}
        self._unsaid: Counter[CommandOutcome] = Counter()
        self._lock = threading.Lock()

    def note(self, command: str, outcome: CommandOutcome, reason: str | None = None) -> None:
        """Count one; log it where it was not carried out and few were lately."""
        with self._lock:
            self._counts[(command if command in self._known else OTHER, outcome)] += 1
            if outcome in ("done", "repeated"):
                return
            lines = self._lines.setdefault(outcome, TokenBucket(_LINES_PER_S, _LINES_AT_ONCE))
            if not lines.take():
                self._unsaid[outcome] += 1
                return
            unsaid = self._unsaid.pop(outcome, 0)
        log.warning("command not carried out", outcome=outcome, command=command[:64], reason=reason, unsaid=unsaid)

    def by_command(self) -> Mapping[tuple[str, CommandOutcome], int]:
        """Counts by command and outcome."""
        with self._lock:
            return dict(self._counts)

    def by_outcome(self) -> Counter[str]:
        """Counts by outcome alone."""
        sums: Counter[str] = Counter()
        for (_, outcome), count in self.by_command().items():
            sums[outcome] += count
        return sums
