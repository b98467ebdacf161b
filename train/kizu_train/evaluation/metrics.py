"""Figures of merit from ranked scores, exact with ties: AUROC, average precision, AU-PRO, rates at a threshold.

Positive means defective (a picture, or a pixel inside a ground-truth region), negative means good. V is the number of
distinct scores among the positives: between two of them every curve here is straight, so V points say all.
"""

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, eq=False)
class Ranking:
    """What lies at and above each distinct score of the positives, scores falling; all arrays are [V].

    `hits` int64 are the positives with that score, `gain` float64 the share of region coverage they add (sums to 1;
    zeros where there are no regions), `above` and `level` int64 the negatives with a higher and with the same score.
    """

    hits: NDArray[np.int64]
    gain: NDArray[np.float64]
    above: NDArray[np.int64]
    level: NDArray[np.int64]
    negatives: int


def rank(positive: NDArray[np.floating], negative: NDArray[np.floating]) -> Ranking:
    """Rank the finite scores of `positive` [P] and `negative` [N]."""
    values, hits = np.unique(positive, return_counts=True)
    left, right = count_below(np.sort(negative), values)
    falling = slice(None, None, -1)
    return Ranking(
        hits[falling].astype(np.int64),
        np.zeros(len(values)),
        (len(negative) - right)[falling],
        (right - left)[falling],
        len(negative),
    )


def count_below(ordered: NDArray[np.floating], values: NDArray[np.floating]) -> tuple[NDArray[np.int64], ...]:
    """How many of `ordered` (rising) lie below each of `values`, and how many at or below it: two int64 arrays."""
    below = np.searchsorted(ordered, values, "left")
    upto = below.copy()
    if len(ordered):
        # Ties are rare in maps of real numbers, and a search is what takes the time.
        tied = ordered[np.minimum(below, len(ordered) - 1)] == values
        upto[tied] = np.searchsorted(ordered, values[tied], "right")
    return below, upto


def auroc(ranking: Ranking) -> float | None:
    """Area under the ROC curve, 0 to 1: the chance that a positive outranks a negative, ties counting one half.

    None where positives or negatives are missing.
    """
    positives = int(ranking.hits.sum())
    if positives == 0 or ranking.negatives == 0:
        return None
    lost = np.dot(ranking.hits.astype(np.float64), ranking.above + 0.5 * ranking.level)
    return float(1 - lost / positives / ranking.negatives)


def average_precision(ranking: Ranking) -> float | None:
    """Average precision, 0 to 1: Σ (recall gained) · precision over falling scores, as scikit-learn defines it.

    None where positives or negatives are missing: all positives would give 1 whatever the scores.
    """
    found = np.cumsum(ranking.hits)
    if len(found) == 0 or found[-1] == 0 or ranking.negatives == 0:
        return None
    alarms = ranking.above + ranking.level
    precision = found / np.maximum(found + alarms, 1)
    return float(np.dot(ranking.hits / found[-1], precision))


def au_pro(ranking: Ranking, limit: float) -> float | None:
    """Area under region coverage against false positive rate up to `limit` (0 to 1), divided by `limit`.

    Coverage PRO(t) is the mean over ground-truth regions of their share at or above t. Points are joined by straight
    lines, also at the limit. None where there is no region or no negative. Source: Bergmann et al. 2021.
    """
    if not 0 < limit <= 1:
        raise ValueError(f"the limit of AU-PRO is {limit}; it must lie above 0 and at most at 1")
    if ranking.negatives == 0 or not ranking.gain.any():
        return None
    after = np.cumsum(ranking.gain)
    # Two points for each score: before its pixels are added and after, joined by a slope where it is a tie.
    rates = np.column_stack([ranking.above, ranking.above + ranking.level]).ravel() / ranking.negatives
    cover = np.column_stack([after - ranking.gain, after]).ravel()
    rates, cover = np.append(rates, 1.0), np.append(cover, after[-1])
    return _area(rates, cover, limit) / limit


def _area(x: NDArray[np.float64], y: NDArray[np.float64], limit: float) -> float:
    """Area up to `limit` under the lines from (0, 0) through the points (x rising to 1, y)."""
    inside = int(np.searchsorted(x, limit, "right"))
    x_in, y_in = np.append(0.0, x[:inside]), np.append(0.0, y[:inside])
    if inside < len(x):
        share = (limit - x_in[-1]) / (x[inside] - x_in[-1])
        x_in, y_in = np.append(x_in, limit), np.append(y_in, y_in[-1] + share * (y[inside] - y_in[-1]))
    return float(np.dot(np.diff(x_in), (y_in[1:] + y_in[:-1]) / 2))


def roc_curve(ranking: Ranking) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """False and true positive rates from (0, 0) to (1, 1), the points where the ROC curve bends.

    Needs positives and negatives.
    """
    found = np.cumsum(ranking.hits)
    false = np.column_stack([ranking.above, ranking.above + ranking.level]).ravel() / ranking.negatives
    true = np.column_stack([found - ranking.hits, found]).ravel() / found[-1]
    return np.concatenate([[0.0], false, [1.0]]), np.concatenate([[0.0], true, [1.0]])


def image_auroc(defective: NDArray[np.floating], good: NDArray[np.floating]) -> float | None:
    """AUROC of frame scores of `defective` against `good` pictures; None where either is empty."""
    return auroc(rank(defective, good))


def image_ap(defective: NDArray[np.floating], good: NDArray[np.floating]) -> float | None:
    """Average precision of frame scores, defective pictures being the positives; None where either is empty."""
    return average_precision(rank(defective, good))


def f1(hits: int, misses: int, false_alarms: int) -> float | None:
    """F1, 0 to 1, of defective pictures found; None without defective pictures."""
    if hits + misses == 0:
        return None
    return 2 * hits / (2 * hits + misses + false_alarms)


def wilson_interval(count: int, of: int) -> tuple[float, float] | None:
    """The 95 % confidence interval of a share observed as `count` of `of`; None where `of` is 0.

    Source: Wilson 1927.
    """
    if of == 0:
        return None
    z = 1.959964
    share, z2 = count / of, z * z
    centre = share + z2 / (2 * of)
    spread = z * math.sqrt(share * (1 - share) / of + z2 / (4 * of * of))
    return max(0.0, (centre - spread) / (1 + z2 / of)), min(1.0, (centre + spread) / (1 + z2 / of))
