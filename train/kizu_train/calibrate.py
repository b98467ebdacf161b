"""From the scores of held-out good frames to quantiles and a tail, honest about how few frames there are.

The tail is a generalised Pareto fitted to the excesses over a high order statistic. Its shape is the estimate by
probability-weighted moments (Hosking & Wallis 1987), drawn towards 0 while excesses are few, plus 1/k: if excesses are
exponential and their scale is known from k of them only, the next one follows exactly a generalised Pareto of shape
1/k (the predictive distribution under Jeffreys' prior). So thresholds from 7 frames stand far out, and come in as
frames are added. A rate of 1 in 1,000 asked of 7 frames is an extrapolation all the same: recalibrate on the line.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from kizu_contract.calibration import Calibration, Tail

_PROBABILITIES = (0.0, 0.01, 0.05, 0.1, 0.25, 0.5, 0.75, 0.9, 0.95, 0.99, 1.0)
_SHAPE_PRIOR = 30
"""How many excesses weigh as much as the prior belief that the tail is exponential."""
_SHAPES = (-0.25, 0.5)
_LEAST_FOR_ODD, _LEAST_ODD = 5, 0.1
_LEAST_SCALE = 0.01
"""Of the tail's start: frames that score all alike still get thresholds a little above."""


def calibrate(scores: Sequence[float]) -> Calibration:
    """Quantiles and tail of the frame scores of good frames (at least one, all finite). Raises ValueError."""
    values = np.sort(np.asarray(scores, np.float64))
    if not len(values) or not np.isfinite(values).all():
        raise ValueError("calibration needs at least one frame score, and finite ones only")
    heights = np.maximum.accumulate(np.quantile(values, _PROBABILITIES))
    quantiles = tuple(zip(_PROBABILITIES, heights.tolist(), strict=True))
    return Calibration(len(values), quantiles, fit_tail(values))


def odd_ones(scores: Sequence[float]) -> list[int]:
    """Indices of scores that lie far above the others: over the upper quartile by three interquartile ranges.

    Such a good picture may be a defective one; whatever it is, it alone sets thresholds learned from few pictures.
    Source: Tukey 1977, outer fences. None below five scores.
    """
    if len(scores) < _LEAST_FOR_ODD:
        return []
    low, high = np.quantile(np.asarray(scores, np.float64), (0.25, 0.75))
    fence = high + max(3 * (high - low), _LEAST_ODD * abs(high))
    return [index for index, score in enumerate(scores) if score > fence]


def fit_tail(values: NDArray[np.float64]) -> Tail:
    """Fit a generalised Pareto tail to the highest of rising `values`.

    k = about 1.5 √n excesses (at least 4, where there are so many frames) lie over the tail's start, an order
    statistic whose expected exceedance is (k + 1) / (n + 1).
    """
    count = len(values)
    k = min(count - 1, max(4, round(1.5 * count**0.5)))
    start = float(values[count - 1 - k])
    fraction = (k + 1) / (count + 1)
    least = max(_LEAST_SCALE * abs(start), 1e-9)
    if k == 0:
        return Tail(start, fraction, _SHAPES[1], max(0.1 * abs(start), least))
    excesses = values[count - k :] - start
    mean = max(float(excesses.mean()), least)
    shape = float(np.clip(_shape(excesses) * k / (k + _SHAPE_PRIOR), *_SHAPES))
    # The mean of a generalised Pareto is scale / (1 - shape); 1/k is added after, for what k excesses cannot know.
    return Tail(start, fraction, float(np.clip(shape + 1 / k, *_SHAPES)), mean * (1 - shape))


def _shape(excesses: NDArray[np.float64]) -> float:
    """Shape by probability-weighted moments of rising `excesses`: 2 - a0 / (a0 - 2 a1)."""
    count = len(excesses)
    first = float(excesses.mean())
    weights = 1 - (np.arange(1, count + 1) - 0.35) / count
    second = float((weights * excesses).mean())
    spread = first - 2 * second
    return 2 - first / spread if spread > 1e-12 * max(first, 1e-300) else _SHAPES[0]
