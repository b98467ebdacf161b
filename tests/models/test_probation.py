"""What a new model's first frames must show before it is taken for bad, and what must not be held against it."""

import math
import time
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kizu_agent.inspection import REGION_OUTSIDE
from kizu_agent.probation import Probation, Tally, calibrated_rate, count, log_chance, upper_limit
from kizu_agent.records import Frame, Inspection, ModelId
from kizu_agent.settings import ProbationConfig
from kizu_contract.calibration import Calibration, Tail
from kizu_contract.judging import Thresholds

LIMITS = Thresholds(1.0, 2.0)
CALIBRATION = Calibration(200, ((0.0, 0.0), (0.5, 0.5), (0.9, 0.9)), Tail(0.9, 0.1, 0.0, 0.24))  # 1 in 1,000 at 2
IMAGE = np.zeros((4, 4, 1), np.uint8)


def seen(score: float, camera: str = "cam", scoring_ms: float = 5.0, reason: str | None = None) -> Inspection:
    frame = Frame(camera, 0, IMAGE, None, time.time_ns(), time.monotonic_ns())
    spent, model = round(scoring_ms * 1e6), ModelId("gears", "1", "ab" * 32)
    return Inspection(frame, model, LIMITS, score, LIMITS.verdict(score), None, IMAGE, 4, 0, spent, reason)


def line(share: float, frames: int, seed: int = 1) -> list[Inspection]:
    """Frames of a line whose share of rejects is `share`."""
    bad = np.random.default_rng(seed).random(frames) < share
    return [seen(3.0 if is_bad else 0.5) for is_bad in bad]


def tallied(inspections: Sequence[Inspection]) -> dict[str, Tally]:
    tallies: dict[str, Tally] = {}
    count(tallies, inspections)
    return tallies


def put(inspections: Sequence[Inspection], before: Sequence[Inspection] = (), **options: float | None) -> Probation:
    """Give a new model these frames one by one, after `before` of the model before it."""
    probation = Probation(ProbationConfig(**options), CALIBRATION, tallied(before))
    tallies: dict[str, Tally] = {}
    for inspection in inspections:
        count(tallies, [inspection])
        probation.judge(tallies, [inspection])
    return probation


@pytest.mark.parametrize("seed", range(20))
def test_a_line_with_defects_does_not_send_a_good_model_back(seed: int) -> None:
    """One part in twenty is bad, under the old model and the new one: nothing happens, in any of 20 runs."""
    assert put(line(0.05, 1000, seed), before=line(0.05, 1000, seed + 100)).failing is None


@pytest.mark.parametrize("seed", range(20))
def test_more_defects_than_before_are_borne_up_to_the_factor(seed: int) -> None:
    """A bad hour of the line, with twice as many bad parts as before, is the line's and not the model's."""
    assert put(line(0.1, 1000, seed), before=line(0.05, 1000, seed + 100)).failing is None


@pytest.mark.parametrize("before", [0.0, 0.05])
def test_a_model_that_rejects_most_parts_goes(before: float) -> None:
    """Where the model before rejected few, one that rejects six in ten is noticed within 200 frames."""
    failing = put(line(0.6, 200), before=line(before, 1000)).failing
    assert failing is not None
    assert failing.cause == "rejects"
    assert "of 1000" in failing.reason


def test_nothing_known_of_the_line_leaves_only_the_worst() -> None:
    """After a restart, without figures of the model before, up to half is borne; what rejects all is noticed."""
    assert put(line(0.3, 1000)).failing is None
    failing = put(line(1.0, 60)).failing
    assert failing is not None
    assert failing.cause == "rejects"


def test_a_flaw_that_stays_in_view_is_no_bad_model() -> None:
    """Forty bad frames in a row, one second of a flaw under the camera, are too few to judge a model by."""
    assert put(line(1.0, 40), before=line(0.0, 1000)).failing is None


def test_a_line_that_was_worse_before_keeps_the_new_model() -> None:
    """Where the old model rejected eight in ten (why a new one was dropped), one that rejects six may stay."""
    assert put(line(0.6, 500), before=line(0.8, 1000)).failing is None


def test_frames_that_cannot_be_judged_are_noticed_at_once() -> None:
    """Five frames in a row that are no number are enough; the words say what the last one said."""
    failing = put([seen(math.nan, reason="the score is not a number")] * 5).failing
    assert failing is not None
    assert failing.cause == "unknown"
    assert "5 of 5" in failing.reason
    assert "not a number" in failing.reason
    assert put([seen(math.nan)] * 4).failing is None


def test_a_wrong_region_is_not_the_models_fault() -> None:
    """Frames of which the model saw nothing, for the configured region lies outside, count neither way."""
    probation = put([seen(math.nan, reason=REGION_OUTSIDE)] * 50)
    assert probation.failing is None
    assert not probation.has_survived


def test_what_was_unknown_before_stays_the_cameras() -> None:
    """A camera half of whose frames no model could judge does not send the next model back for the same."""
    half = [seen(math.nan if i % 2 else 0.5) for i in range(200)]
    assert put(half, before=half).failing is None
    assert put(half).failing is not None


def test_latency_is_judged_against_the_model_before_and_the_budget() -> None:
    """Six times slower than before is too slow, four times is not; an absolute budget holds by itself."""
    before = [seen(0.5, scoring_ms=5)] * 100
    assert put([seen(0.5, scoring_ms=20)] * 100, before).failing is None
    slow = put([seen(0.5, scoring_ms=30)] * 100, before).failing
    assert slow is not None
    assert slow.cause == "latency"
    budget = put([seen(0.5, scoring_ms=30)] * 100, latency_ms=25.0).failing
    assert budget is not None
    assert "25 ms" in budget.reason


def test_a_few_slow_frames_are_no_slow_model() -> None:
    """The median counts: one frame in three held up by something else does not."""
    uneven = [seen(0.5, scoring_ms=200 if i % 3 == 0 else 5) for i in range(150)]
    assert put(uneven, before=[seen(0.5, scoring_ms=5)] * 100).failing is None


def test_rates_are_those_of_late() -> None:
    """A bad hour long ago does not count as what the line does now."""
    tally = tallied([*line(1.0, 300), *line(0.0, 1000)])["cam"]
    assert (tally.rejects(), tally.unknown(), tally.frames) == ((0, 1000), (0, 1000), 1300)


def test_each_camera_is_judged_by_itself() -> None:
    """A model that is good for one camera and rejects all of the other's parts is found out."""
    mixed = [seen(0.5) if i % 2 else seen(3.0, camera="side") for i in range(200)]
    failing = put(mixed, before=[seen(0.5), seen(0.5, camera="side")] * 500).failing
    assert failing is not None
    assert "camera side" in failing.reason


def test_it_lasts_for_frames_and_seconds_or_the_longest_time() -> None:
    """Over only when every camera gave its frames and the time has passed, or the longest time has."""
    assert not put([]).is_over
    assert not put(line(0, 300), least_s=60.0).is_over
    assert not put(line(0, 300), frames=400, least_s=0.0).is_over
    assert put(line(0, 300), frames=300, least_s=0.0).is_over
    assert put(line(0, 3), least_s=0.0, most_s=1e-6).is_over
    one_of_two = [*line(0, 300), seen(0.5, camera="side")]
    assert not put(one_of_two, frames=300, least_s=0.0).is_over


@given(st.integers(0, 60), st.integers(1, 60), st.floats(0.001, 0.999))
def test_the_bound_is_never_below_the_chance(count: int, of: int, share: float) -> None:
    """Chernoff's bound lies above the exact binomial tail, so that nothing is called less likely than it is."""
    count = min(count, of)
    exact = sum(math.comb(of, k) * share**k * (1 - share) ** (of - k) for k in range(count, of + 1))
    assert log_chance(count, of, share) >= math.log(max(exact, 1e-300)) - 1e-9


def test_the_upper_limit_shrinks_with_what_was_seen() -> None:
    """Nothing seen allows anything; many frames without a reject allow next to nothing."""
    assert upper_limit(0, 0) == pytest.approx(1.0)
    assert 0.2 < upper_limit(0, 10) < 0.3
    assert 0.002 < upper_limit(0, 1000) < 0.004
    assert 0.05 < upper_limit(50, 1000) < 0.08


@given(st.floats(1e-6, 0.9))
def test_the_calibrated_rate_undoes_the_threshold(rate: float) -> None:
    """The share that a threshold was asked for is found again from its score."""
    assert calibrated_rate(CALIBRATION, CALIBRATION.score_at(rate)) == pytest.approx(rate, rel=0.02)
