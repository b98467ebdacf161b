"""Thresholds as false alarm rates: quantiles of good frames' scores and a fitted tail beyond them."""

import math
from dataclasses import dataclass

from kizu_contract.judging import Thresholds

_EXPONENTIAL = 1e-12
"""A smaller shape changes no digit of a score; the quotient would lose all of them."""


@dataclass(frozen=True)
class Tail:
    """A generalised Pareto tail: P(score > s) = fraction · (1 + shape · (s - start) / scale)^(-1 / shape).

    `start` is the score above which it holds, `fraction` the share of good frames above it. shape = 0 is the
    exponential tail. Source: Pickands 1975; Coles 2001, chapter 4.
    """

    start: float
    fraction: float
    shape: float
    scale: float

    def __post_init__(self) -> None:
        if not (math.isfinite(self.start) and math.isfinite(self.shape) and math.isfinite(self.scale)):
            raise ValueError("a tail must be of finite numbers")
        if not (0 < self.fraction <= 1 and self.scale > 0 and -1 <= self.shape <= 1):
            raise ValueError("a tail needs 0 < fraction <= 1, scale > 0 and -1 <= shape <= 1")

    def score_at(self, rate: float) -> float:
        """The score that a share `rate` (0 < rate <= fraction) of good frames exceeds. Raises ValueError."""
        depth = math.log(self.fraction) - math.log(rate)
        try:
            beyond = depth if abs(self.shape) < _EXPONENTIAL else math.expm1(self.shape * depth) / self.shape
            score = self.start + self.scale * beyond
        except OverflowError:
            score = math.inf
        if not math.isfinite(score):
            raise ValueError(f"no finite score belongs to a false alarm rate of {rate}; ask for a larger one")
        return score


@dataclass(frozen=True)
class Calibration:
    """Scores of `frames` held-out good frames: `quantiles` as (probability, score) pairs, rising, and the tail."""

    frames: int
    quantiles: tuple[tuple[float, float], ...]
    tail: Tail

    def __post_init__(self) -> None:
        if self.frames < 1 or not self.quantiles:
            raise ValueError("a calibration needs at least one frame and one quantile")
        if any(not (0 <= p <= 1 and math.isfinite(score)) for p, score in self.quantiles):
            raise ValueError("quantiles need probabilities between 0 and 1 and finite scores")
        if list(self.quantiles) != sorted(self.quantiles) or any(
            later[1] < earlier[1] for earlier, later in zip(self.quantiles, self.quantiles[1:], strict=False)
        ):
            raise ValueError("quantiles must rise")

    def score_at(self, rate: float) -> float:
        """The score that a share `rate` of good frames exceeds (0 < rate < 1): the tail, or between quantiles.

        Never falls as the rate does. Raises ValueError for any other rate.
        """
        if not 0 < rate < 1:
            raise ValueError(f"a false alarm rate of {rate}; it must lie between 0 and 1")
        if rate <= self.tail.fraction:
            return self.tail.score_at(rate)
        # The tail's start may lie a rounding below the quantiles around it; scores must not fall with the rate.
        return min(self._between_quantiles(1 - rate), self.tail.start)

    def _between_quantiles(self, probability: float) -> float:
        low = self.quantiles[0]
        for high in self.quantiles:
            if high[0] >= probability:
                share = 0.0 if high[0] == low[0] else (probability - low[0]) / (high[0] - low[0])
                return low[1] + share * (high[1] - low[1])
            low = high
        return low[1]

    def can_tell(self, rate: float) -> bool:
        """Tell whether there are frames enough to say much of `rate`; with fewer, thresholds stand far out.

        The bound, one frame in twenty of those that would show one exceedance, is a rule of thumb.
        """
        return self.frames * rate >= 0.05

    def thresholds(self, warn_rate: float, reject_rate: float) -> Thresholds:
        """Thresholds for these false alarm rates (reject_rate <= warn_rate). Raises ValueError."""
        if reject_rate > warn_rate:
            raise ValueError(f"reject rate {reject_rate} is above warn rate {warn_rate}; it must be at most that")
        return Thresholds(self.score_at(warn_rate), self.score_at(reject_rate))
