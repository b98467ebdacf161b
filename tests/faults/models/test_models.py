"""Every model fault that we know, run once before a real agent and a real broker."""

from pathlib import Path

import pytest
from scenarios import SCENARIOS, Outcome, Scenario

SOON_S = 30.0
"""Noticed and recovered within this, on a machine that has other work too."""


@pytest.mark.timeout(240)
@pytest.mark.parametrize("scenario", SCENARIOS, ids=lambda scenario: scenario.__name__)
def test_the_line_comes_through(scenario: Scenario, tmp_path: Path) -> None:
    """The fault is noticed, the last good model serves again, and no result is lost."""
    outcome = scenario(tmp_path / "line", 1)
    assert isinstance(outcome, Outcome)
    assert 0 <= outcome.noticed_s < SOON_S
    assert 0 <= outcome.recovered_s < SOON_S
