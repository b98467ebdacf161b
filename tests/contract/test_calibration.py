"""Thresholds by false alarm rate."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kizu_contract.calibration import Calibration, Tail

rates = st.floats(1e-12, 1, exclude_max=True)


@st.composite
def tails(draw: st.DrawFn) -> Tail:
    return Tail(draw(st.floats(0, 100)), draw(st.floats(0.001, 1)), draw(st.floats(-1, 1)), draw(st.floats(1e-3, 100)))


@st.composite
def calibrations(draw: st.DrawFn) -> Calibration:
    count = draw(st.integers(1, 8))
    probabilities = sorted(draw(st.lists(st.floats(0, 1), min_size=count, max_size=count)))
    scores = sorted(draw(st.lists(st.floats(0, 100), min_size=count, max_size=count)))
    return Calibration(50, tuple(zip(probabilities, scores, strict=True)), draw(tails()))


@given(tails(), rates)
def test_the_tail_inverts_its_own_formula(tail: Tail, share: float) -> None:
    """P(score > score_at(rate)) is the rate again, by the formula of the docstring."""
    rate = share * tail.fraction
    beyond = (tail.score_at(rate) - tail.start) / tail.scale
    # The docstring's power, written so that it keeps its digits near shape 0.
    inside = max(tail.shape * beyond, -1 + 1e-15)
    survival = math.exp(-beyond if abs(tail.shape) < 1e-12 else -math.log1p(inside) / tail.shape)
    # The score carries the rounding of `start` with it, which a tail that ends early enlarges without bound.
    if tail.shape > -0.2:
        assert survival == pytest.approx(share, rel=1e-6 + 1e-12 * tail.start / tail.scale, abs=1e-9)


@given(tails(), rates, rates)
def test_a_rarer_score_in_the_tail_is_no_lower(tail: Tail, one: float, other: float) -> None:
    """The tail rises as the rate falls, from its start on."""
    low, high = sorted((one * tail.fraction, other * tail.fraction))
    assert tail.score_at(low) >= tail.score_at(high) - 1e-9 * (1 + abs(tail.score_at(high)))
    assert tail.score_at(high) >= tail.start - 1e-9


@given(calibrations(), rates, rates)
def test_thresholds_never_fall_as_the_rate_does(calibration: Calibration, one: float, other: float) -> None:
    """Asking for fewer false alarms gives no lower a score, across the seam between quantiles and tail too."""
    low, high = sorted((one, other))
    slack = 1e-9 * (1 + abs(calibration.score_at(low)))
    assert calibration.score_at(low) >= calibration.score_at(high) - slack


def test_the_seam_between_quantiles_and_tail_has_no_step() -> None:
    """Where the tail starts at its quantile, scores on both sides of it meet."""
    calibration = Calibration(100, ((0.0, 0.0), (0.9, 9.0), (1.0, 12.0)), Tail(9.0, 0.1, 0.2, 1.0))
    assert calibration.score_at(0.1) == pytest.approx(9.0)
    assert calibration.score_at(0.1 + 1e-9) == pytest.approx(9.0)
    assert calibration.score_at(0.55) == pytest.approx(4.5)
    assert calibration.score_at(0.999) == pytest.approx(0.01)


def test_an_exponential_sample_gets_its_known_thresholds() -> None:
    """Of an exponential distribution 1 in 1,000 lies above ln 1000, whether asked of the tail or counted."""
    sample = np.random.default_rng(0).exponential(size=200_000)
    probabilities = np.linspace(0, 0.9, 91)
    pairs = tuple(zip(probabilities.tolist(), np.quantile(sample, probabilities).tolist(), strict=True))
    calibration = Calibration(len(sample), pairs, Tail(float(np.quantile(sample, 0.9)), 0.1, 0.0, 1.0))
    limits = calibration.thresholds(0.01, 0.001)
    assert limits.reject == pytest.approx(math.log(1000), rel=0.02)
    assert np.mean(sample > limits.warn) == pytest.approx(0.01, rel=0.1)
    assert calibration.score_at(0.5) == pytest.approx(math.log(2), rel=0.02)


def test_a_shape_near_zero_joins_the_exponential_tail() -> None:
    """No digits are lost between shape 0 and shapes beside it."""
    scores = [Tail(1.0, 0.1, shape, 1.0).score_at(1e-6) for shape in (-1e-10, 0.0, 1e-10, 1e-8)]
    assert scores == pytest.approx([scores[1]] * 4, rel=1e-6)


@pytest.mark.parametrize("rate", [0.0, 1.0, -0.1, 1.5, math.nan])
def test_a_rate_outside_zero_to_one_is_refused(rate: float) -> None:
    """Only rates between 0 and 1 have a score."""
    with pytest.raises(ValueError, match="between 0 and 1"):
        Calibration(1, ((0.5, 1.0),), Tail(1.0, 0.5, 0.0, 1.0)).score_at(rate)


def test_a_rate_beyond_every_finite_score_is_refused() -> None:
    """An absurdly small rate on a heavy tail raises ValueError and not OverflowError."""
    with pytest.raises(ValueError, match="ask for a larger one"):
        Tail(1.0, 0.5, 1.0, 1e300).score_at(1e-300)
    with pytest.raises(ValueError, match="ask for a larger one"):
        Tail(1.0, 1.0, 1.0, 1.0).score_at(5e-324)


def test_a_reject_rate_above_the_warn_rate_is_refused() -> None:
    """Reject is the rarer of the two."""
    with pytest.raises(ValueError, match="reject rate"):
        Calibration(1, ((0.5, 1.0),), Tail(1.0, 0.5, 0.0, 1.0)).thresholds(0.001, 0.01)


@pytest.mark.parametrize(
    "tail",
    [(math.nan, 0.1, 0.0, 1.0), (1.0, 0.0, 0.0, 1.0), (1.0, 1.1, 0.0, 1.0), (1.0, 0.1, 2.0, 1.0), (1.0, 0.1, 0.0, 0.0)],
)
def test_an_impossible_tail_is_refused(tail: tuple[float, float, float, float]) -> None:
    """A tail of numbers out of range raises ValueError."""
    with pytest.raises(ValueError, match="a tail"):
        Tail(*tail)


@pytest.mark.parametrize(
    "quantiles",
    [(), ((0.5, math.nan),), ((1.5, 1.0),), ((0.5, 2.0), (0.9, 1.0)), ((0.9, 1.0), (0.5, 2.0))],
)
def test_impossible_quantiles_are_refused(quantiles: tuple[tuple[float, float], ...]) -> None:
    """Quantiles must be there, finite, of probabilities, and rise."""
    with pytest.raises(ValueError, match="quantile"):
        Calibration(10, quantiles, Tail(1.0, 0.1, 0.0, 1.0))


def test_few_frames_cannot_tell_small_rates() -> None:
    """Seven frames say something of 1 in 100 and nothing of 1 in 1,000; 157 say something of both."""
    tail = Tail(1.0, 0.5, 0.0, 1.0)
    few, many = Calibration(7, ((0.5, 1.0),), tail), Calibration(157, ((0.5, 1.0),), tail)
    assert (few.can_tell(0.01), few.can_tell(0.001)) == (True, False)
    assert (many.can_tell(0.01), many.can_tell(0.001)) == (True, True)
