"""Every model fault that we know, run once before a real agent and a real broker."""

from pathlib import Path

import pytest
from model_scenarios import SCENARIOS, Outcome, Scenario, many_swaps

SOON_S = 30.0
"""Noticed and recovered within this, on a machine that has other work too."""


@pytest.mark.timeout(240)
@pytest.mark.parametrize(
    "scenario", [found for found in SCENARIOS if found is not many_swaps], ids=lambda scenario: scenario.__name__
)
def test_the_line_comes_through(scenario: Scenario, tmp_path: Path) -> None:
    """The fault is noticed, the last good model serves again, and no result is lost."""
    outcome = scenario(tmp_path / "line", 1)
    assert isinstance(outcome, Outcome)
    assert 0 <= outcome.noticed_s < SOON_S
    assert 0 <= outcome.recovered_s < SOON_S


@pytest.mark.timeout(300)
def test_swaps_give_their_memory_back(tmp_path: Path) -> None:
    """Models of 8 MB, one after the other, do not stay in memory: the slope is far below one model a swap."""
    outcome = many_swaps(tmp_path / "line", 1, swaps=16)
    slope = float(outcome.outcome.partition("end: ")[2].partition(" ")[0])
    assert slope < 4, outcome
    assert outcome.noticed_s < SOON_S
