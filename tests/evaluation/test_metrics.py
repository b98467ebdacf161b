import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import average_precision_score, f1_score, roc_auc_score
from sklearn.metrics import roc_curve as sklearn_roc_curve

from kizu_train.evaluation.metrics import (
    auroc,
    average_precision,
    f1,
    image_ap,
    image_auroc,
    rank,
    roc_curve,
    wilson_interval,
)

# Few distinct values, so that ties within and across classes are the rule.
scores = st.lists(st.integers(-4, 4).map(lambda number: number / 4), min_size=1, max_size=40)


def test_auroc_by_hand():
    """Of 2 × 3 pairs, four are in order and one is a tie: 4.5 / 6."""
    assert image_auroc(np.array([3.0, 1.0]), np.array([2.0, 1.0, 0.0])) == pytest.approx(4.5 / 6)


def test_average_precision_by_hand():
    """Falling scores good, bad, bad, good give ½ · ½ + ½ · ⅔."""
    assert image_ap(np.array([3.0, 2.0]), np.array([4.0, 1.0])) == pytest.approx(0.5 * 0.5 + 0.5 * 2 / 3)


def test_perfect_and_inverted_order():
    """AUROC is 1 where every defect outranks every good one, 0 where none does, ½ where all are equal."""
    low, high = np.arange(5.0), np.arange(5.0) + 10
    assert (image_auroc(high, low), image_auroc(low, high), image_auroc(low * 0, low * 0)) == (1.0, 0.0, 0.5)


@settings(deadline=None, max_examples=100)
@given(scores, scores)
def test_like_scikit_learn(positive: list[float], negative: list[float]):
    """AUROC, AP and the ROC curve are those of scikit-learn, ties included."""
    truth = np.array([1] * len(positive) + [0] * len(negative))
    everything = np.array(positive + negative)
    ranking = rank(np.array(positive), np.array(negative))
    assert auroc(ranking) == pytest.approx(roc_auc_score(truth, everything), abs=1e-12)
    assert average_precision(ranking) == pytest.approx(average_precision_score(truth, everything), abs=1e-12)
    rates = np.linspace(0, 1, 50)
    theirs = sklearn_roc_curve(truth, everything)
    # Between their points a rise may be vertical, where interpolation is free to choose either end.
    inside = ~np.isin(rates, theirs[0])
    ours = np.interp(rates, *roc_curve(ranking))
    assert ours[inside] == pytest.approx(np.interp(rates, *theirs[:2])[inside], abs=1e-12)


def test_no_figure_where_a_class_is_missing():
    """Without defective or without good pictures there is no figure, rather than a made-up one."""
    some, none = np.array([1.0, 2.0]), np.array([])
    assert [image_auroc(some, none), image_auroc(none, some), image_ap(some, none), image_ap(none, some)] == [None] * 4


@settings(deadline=None, max_examples=100)
@given(st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1))
def test_f1_like_scikit_learn(pairs: list[tuple[bool, bool]]):
    """F1 of defective pictures is scikit-learn's wherever there is one to find."""
    truth, found = zip(*pairs, strict=True)
    hits = sum(t and f for t, f in pairs)
    misses, alarms = sum(truth) - hits, sum(found) - hits
    expected = f1_score(truth, found) if any(truth) else None
    assert f1(hits, misses, alarms) == (None if expected is None else pytest.approx(expected))


def test_wilson_interval_of_known_cases():
    """The interval of 0 of 9 and of 8 of 10 is the published one; nothing of nothing has none."""
    assert wilson_interval(0, 9) == pytest.approx((0.0, 0.2991), abs=1e-4)
    assert wilson_interval(8, 10) == pytest.approx((0.4902, 0.9433), abs=1e-4)
    assert wilson_interval(0, 0) is None
