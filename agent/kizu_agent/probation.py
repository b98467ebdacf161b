"""The first frames of a new model: is it worse than its calibration and the model before it allow? Pure: no threads.

A share is called too large only where chance makes it very improbable (one in a million): three bad parts in a row
right after a swap must not send a good model back, and a line that really has 5 % of bad parts must not either.
"""

import math
import time
from collections import Counter, deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Literal

from kizu_agent.inspection import REGION_OUTSIDE
from kizu_agent.records import Inspection
from kizu_agent.settings import ProbationConfig
from kizu_contract.calibration import Calibration
from kizu_contract.judging import Verdict

WINDOW_FRAMES = 1000
"""A camera's rates are those of its last so many frames."""
SCORING_FRAMES = 200
LEAST_FRAMES = 50
"""Rejects and latency are judged from so many frames of a camera on; `unknown` ones at once."""
SURVIVAL_FRAMES = 10
"""A model that judged so many frames has not crashed the process in its first ones."""
LOG_CHANCE = math.log(1e-6)
"""How improbable a share must be. It is looked at after each pass: over a probation that stays below one in 1,000."""
LOG_DOUBT = math.log(0.05)
MOST_REJECTS = 0.5
"""Where hardly anything is known of the line, a model may reject up to this share of its frames."""

Cause = Literal["unknown", "latency", "rejects", "crash", "command"]


@dataclass(frozen=True)
class Failing:
    """Why a model leaves service before its time: a stable word for counters, and the words."""

    cause: Cause
    reason: str


class Tally:
    """What one model did on one camera lately; written by one thread."""

    def __init__(self) -> None:
        self.frames = 0
        self.counts: Counter[Verdict] = Counter()
        self.scoring_ns: deque[int] = deque(maxlen=SCORING_FRAMES)
        self._recent: deque[Verdict] = deque()

    def add(self, inspection: Inspection) -> None:
        """Count one frame; one that the model never saw, for its region lies outside, says nothing of the model."""
        if inspection.reason == REGION_OUTSIDE:
            return
        self.frames += 1
        self._recent.append(inspection.verdict)
        self.counts[inspection.verdict] += 1
        if len(self._recent) > WINDOW_FRAMES:
            self.counts[self._recent.popleft()] -= 1
        if inspection.verdict is not Verdict.UNKNOWN:
            self.scoring_ns.append(inspection.scoring_ns)

    @property
    def known(self) -> int:
        """Frames of the window that were judged."""
        return len(self._recent) - self.counts[Verdict.UNKNOWN]

    def unknown(self) -> tuple[int, int]:
        """Frames that could not be judged, of how many."""
        return self.counts[Verdict.UNKNOWN], len(self._recent)

    def rejects(self) -> tuple[int, int]:
        """Frames rejected, of how many that were judged."""
        return self.counts[Verdict.REJECT], self.known

    def scoring_ms(self) -> float | None:
        """The median time a frame's scoring took, in ms; None before there are frames enough."""
        return median(self.scoring_ns) / 1e6 if len(self.scoring_ns) >= LEAST_FRAMES else None


Tallies = dict[str, Tally]
"""By camera."""


def count(tallies: Tallies, inspections: Sequence[Inspection]) -> None:
    """Add `inspections` to the tallies of their cameras."""
    for inspection in inspections:
        tallies.setdefault(inspection.frame.camera, Tally()).add(inspection)


class Probation:
    """Watches a new model's frames; its time begins with the first of them. `failing` stays once it is set.

    `before`: what the model before it did on the same cameras; empty where that is not known. Without `is_judged`
    (somebody asked for this model by name) only its survival counts.
    """

    def __init__(
        self, config: ProbationConfig, calibration: Calibration, before: Mapping[str, Tally], *, is_judged: bool = True
    ) -> None:
        self.failing: Failing | None = None
        self.has_survived = False
        self._config, self._calibration, self._before, self._is_judged = config, calibration, before, is_judged
        self._frames = 0
        self._began_mono_ns: int | None = None
        self._limits: dict[tuple[str, float], float] = {}

    def judge(self, tallies: Tallies, inspections: Sequence[Inspection]) -> None:
        """Look at the model's `tallies` after `inspections` were counted into them."""
        if self._began_mono_ns is None:
            self._began_mono_ns = time.monotonic_ns()
        self.has_survived = self.has_survived or sum(tally.frames for tally in tallies.values()) >= SURVIVAL_FRAMES
        self._frames = min((tally.frames for tally in tallies.values()), default=0)
        if not self._is_judged:
            return
        for inspection in {inspection.frame.camera: inspection for inspection in inspections}.values():
            if self.failing is None and (tally := tallies[inspection.frame.camera]).frames:
                self.failing = self._failing(inspection, tally)

    @property
    def is_over(self) -> bool:
        """Whether it has lasted long enough: frames of each camera and seconds, or the longest time."""
        if self._began_mono_ns is None:
            return False
        if not self._is_judged:
            return self.has_survived
        age_s = (time.monotonic_ns() - self._began_mono_ns) / 1e9
        is_enough = self._frames >= self._config.frames and age_s >= self._config.least_s
        return is_enough or age_s >= self._config.most_s

    def _failing(self, last: Inspection, tally: Tally) -> Failing | None:
        camera = last.frame.camera
        before = self._before.get(camera) or Tally()
        return (
            self._unknown(last, tally, before)
            or self._latency(camera, tally, before)
            or self._rejects(camera, tally, before, last.thresholds.reject)
        )

    def _unknown(self, last: Inspection, tally: Tally, before: Tally) -> Failing | None:
        (count, of), (count_before, of_before) = tally.unknown(), before.unknown()
        allowed = max(self._config.unknown_share, count_before / max(1, of_before))
        if log_chance(count, of, allowed) > LOG_CHANCE:
            return None
        why = f", the last: {last.reason}" if last.reason else ""
        return Failing("unknown", f"camera {last.frame.camera}: {count} of {of} frames could not be judged{why}")

    def _latency(self, camera: str, tally: Tally, before: Tally) -> Failing | None:
        took_ms, took_before_ms = tally.scoring_ms(), before.scoring_ms()
        if took_ms is None:
            return None
        text = f"camera {camera}: scoring takes {took_ms:.1f} ms a frame"
        if self._config.latency_ms is not None and took_ms > self._config.latency_ms:
            return Failing("latency", f"{text}; {self._config.latency_ms:g} ms are allowed")
        if took_before_ms is not None and took_ms > self._config.latency_factor * took_before_ms:
            return Failing(
                "latency", f"{text}; more than {self._config.latency_factor:g} times {took_before_ms:.1f} ms"
            )
        return None

    def _rejects(self, camera: str, tally: Tally, before: Tally, reject: float) -> Failing | None:
        count, of = tally.rejects()
        if of < LEAST_FRAMES:
            return None
        allowed = self._limits.get((camera, reject))
        if allowed is None:
            allowed = self._limits[(camera, reject)] = self._allowed_rejects(before, reject)
        if log_chance(count, of, allowed) > LOG_CHANCE:
            return None
        count_before, of_before = before.rejects()
        return Failing(
            "rejects",
            f"camera {camera}: {count} of {of} frames rejected; up to {allowed:.2g} of them could be explained by its "
            f"calibration and the model before it, which rejected {count_before} of {of_before}",
        )

    def _allowed_rejects(self, before: Tally, reject: float) -> float:
        """The largest share of rejects that speaks of the line and not of the model.

        Bad parts are there for either model, so the share of the model before it counts, taken at its upper limit as
        far as few frames tell; false alarms come as calibrated. Both times the factor, for neither stays the same.
        """
        count, of = before.rejects()
        expected = max(calibrated_rate(self._calibration, reject), upper_limit(count, of))
        return min(self._config.reject_factor * expected, max(MOST_REJECTS, count / max(1, of)))


def log_chance(count: int, of: int, share: float) -> float:
    """An upper bound of log P(at least `count` of `of`), each with probability `share`.

    Chernoff's bound with the Kullback-Leibler divergence: Hoeffding 1963, theorem 1.
    """
    return 0.0 if not of or count / of <= share else -of * _divergence(count / of, share)


def upper_limit(count: int, of: int) -> float:
    """The largest share that may well (1 in 20) have given only `count` of `of`; 1 where nothing was seen."""
    low, high = count / max(1, of), 1.0
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (middle, high) if -of * _divergence(count / max(1, of), middle) > LOG_DOUBT else (low, middle)
    return high


def calibrated_rate(calibration: Calibration, score: float) -> float:
    """The share of good frames above `score`, from the calibration that gives scores for shares (between 0 and 1)."""
    low, high = -40.0, 0.0  # log of the share; the score falls as it rises
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if _score_at(calibration, math.exp(middle)) > score else (low, middle)
    return math.exp(high)


def _score_at(calibration: Calibration, rate: float) -> float:
    try:
        return calibration.score_at(rate)
    except ValueError:  # so rare that no finite score belongs to it
        return math.inf


def _divergence(found: float, share: float) -> float:
    """The Kullback-Leibler divergence of two coins, in nats."""
    return _term(found, share) + _term(1 - found, 1 - share)


def _term(found: float, share: float) -> float:
    if found <= 0:
        return 0.0
    return found * math.log(found / share) if share > 0 else math.inf
