"""Calibration against distributions whose tails are known."""

import numpy as np
import pytest
from scipy import stats

from kizu_train.calibrate import calibrate, fit_tail, odd_ones

LAWS = {
    "exponential": stats.expon(10, 2),
    "normal": stats.norm(100, 5),
    "lognormal": stats.lognorm(0.5, 0, 20),
    "gumbel": stats.gumbel_r(50, 4),
    "uniform": stats.uniform(5, 3),
}


@pytest.mark.parametrize("law", LAWS)
@pytest.mark.parametrize("count", [7, 30, 150])
@pytest.mark.parametrize("rate", [0.01, 0.001])
def test_false_alarms_are_about_as_asked(law: str, count: int, rate: float) -> None:
    """On average over many calibrations, good frames exceed the threshold at most 2.5 times as often as asked."""
    found = []
    for seed in range(300):
        scores = LAWS[law].rvs(count, random_state=seed)
        found.append(LAWS[law].sf(calibrate(scores.tolist()).score_at(rate)))
    assert np.mean(found) < 2.5 * rate


@pytest.mark.parametrize("law", LAWS)
def test_many_frames_find_the_true_threshold(law: str) -> None:
    """From 150 frames the 1 in 100 threshold lies within half a standard deviation or so of the true one, typically."""
    wanted, spread = LAWS[law].isf(0.01), LAWS[law].std()
    found = [calibrate(LAWS[law].rvs(150, random_state=seed).tolist()).score_at(0.01) for seed in range(100)]
    assert abs(np.median(found) - wanted) < 0.6 * spread


def test_few_frames_are_met_with_caution() -> None:
    """The threshold from 7 frames lies farther out than that from 150 of the same law."""

    def typical(count: int) -> float:
        found = [
            calibrate(LAWS["normal"].rvs(count, random_state=seed).tolist()).score_at(0.001) for seed in range(100)
        ]
        return float(np.median(found))

    assert typical(7) > typical(150) > LAWS["normal"].isf(0.001)


def test_thresholds_rise_as_rates_fall() -> None:
    """A rarer false alarm never has a lower threshold, over the quantiles and through the tail."""
    found = calibrate(LAWS["lognormal"].rvs(150, random_state=4).tolist())
    scores = [found.score_at(rate) for rate in np.geomspace(0.9, 1e-5, 200)]
    assert scores == sorted(scores)


@pytest.mark.parametrize("scores", [[3.0], [3.0, 3.0], [2.0, 3.0], [5.0] * 20, [0.0, 0.0, 1e-9]])
def test_degenerate_scores_still_give_thresholds(scores: list[float]) -> None:
    """One frame, or frames that score all alike, still give thresholds above every score seen."""
    limits = calibrate(scores).thresholds(0.01, 0.001)
    assert max(scores) < limits.warn < limits.reject


@pytest.mark.parametrize("scores", [[], [1.0, float("nan")], [1.0, float("inf")]])
def test_unusable_scores_are_refused(scores: list[float]) -> None:
    """No frame, or a score that is not finite, cannot calibrate."""
    with pytest.raises(ValueError, match="at least one frame"):
        calibrate(scores)


def test_scale_and_shift_carry_over() -> None:
    """Thresholds scale and shift with the scores: the unit of a score does not matter."""
    values = np.sort(LAWS["gumbel"].rvs(40, random_state=1))
    near, far = fit_tail(values), fit_tail(1000 * values + 5)
    assert far.score_at(0.001) == pytest.approx(1000 * near.score_at(0.001) + 5)


def test_a_picture_far_above_the_others_is_named() -> None:
    """One odd score among seven is found; an even spread, a heavy tail of many and a handful give nothing."""
    assert odd_ones([0.82, 3.33, 0.84, 0.94, 1.2, 1.21, 1.29]) == [1]
    assert odd_ones(list(np.linspace(1, 2, 50))) == []
    assert odd_ones([1.0, 1.0, 9.0]) == []
    assert odd_ones([1.0] * 6 + [1.000001]) == []
