"""The quick form of the fault scenarios, on real processes and a real broker; scripts/bench faults runs all in full."""

import json
from pathlib import Path

import pytest
from faults import disk, process
from faults.plant import Heard, account
from faults.scenarios import SCENARIOS, Scenario


@pytest.mark.slow
@pytest.mark.parametrize("scenario", [s for s in SCENARIOS if s.in_tests], ids=lambda s: s.name)
def test_scenario(scenario: Scenario, tmp_path: Path) -> None:
    """What the scenario promises holds."""
    if scenario.needs_mounts and not disk.can_mount():
        pytest.skip("needs root and loop mounts")
    outcome = scenario.quick(tmp_path / "plant")
    assert not outcome.failed, outcome


def test_accounting_finds_losses_duplicates_and_disorder() -> None:
    """The judge itself: a missing number, a repeated one, an order that is broken, an id that changed."""

    def heard(seq: int, *, replayed: bool = False, verdict: str = "ok", id_: str | None = None) -> Heard:
        name = id_ or f"id{seq}"
        result = {"camera": "c", "seq": seq, "id": name, "verdict": verdict, "replayed": replayed}
        return Heard(0.0, 0.0, "a/result", json.dumps(result).encode(), retained=False)

    assert account([heard(1), heard(2), heard(3)], {"c": 3, "c/event": 9}) == (3, 0, 0, "")
    assert account([heard(1), heard(3), heard(3)], {"c": 3})[:3] == (3, 1, 1)
    assert account([heard(2), heard(1)], {"c": 2})[3]
    assert not account([heard(2), heard(1, replayed=True)], {"c": 2})[3]
    assert not account([heard(2, verdict="reject"), heard(1)], {"c": 2})[3]
    assert account([heard(1), heard(1, id_="other")], {"c": 1})[3]


def test_a_slope_is_told_from_noise() -> None:
    """A leak is found, noise is none."""
    times = [float(second) for second in range(600)]
    noise = [1000.0 + (17 * second) % 23 for second in range(600)]
    leak = [value + 0.5 * second for value, second in zip(noise, times, strict=True)]
    assert process.slope_of(times, noise).is_flat
    found = process.slope_of(times, leak)
    assert not found.is_flat
    assert abs(found.per_hour - 1800) < 3 * found.half_width + 20
