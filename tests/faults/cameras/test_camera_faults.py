"""Each fault of a camera ends in a named state, `unknown`, a counted cause and two log lines, and is recovered from."""

import sys
from pathlib import Path

import pytest

if not sys.platform.startswith("linux"):
    pytest.skip("captures need Linux", allow_module_level=True)

from faults.cameras import camera_scenarios
from faults.cameras.camera_rig import CameraOutcome

pytestmark = pytest.mark.slow

CAUSES = {
    "unplugged": ("unreachable", "lost"),
    "frozen": ("frozen", "frozen"),
    "black": ("black", "black"),
    "white": ("white", "white"),
    "size_changed": ("size_changed", "size_changed"),
    "corrupt": ("unreadable", "unreadable"),
    "silent": ("lost", "lost"),
    "hanging": ("hang", "hang"),
    "crashed": ("crashed", "crashed"),
    "stopped": ("hang", "hang"),
    "slow_first_picture": ("crashed", "crashed"),
}
"""Scenario → cause that the state names in the end, cause under which the loss is counted."""
IN_TESTS = ("unplugged", "frozen", "black", "size_changed", "corrupt", "hanging", "crashed")
"""The others are tried by scripts/bench faults."""
REFUSED = ("frozen", "black", "white", "size_changed", "corrupt")
"""Scenarios in which pictures come and are dropped."""


def test_every_scenario_is_tried() -> None:
    """No scenario is left out of the table of causes but the one that is no loss."""
    assert camera_scenarios.SCENARIOS.keys() == CAUSES.keys() | {"trigger_idle"}


@pytest.mark.parametrize("name", IN_TESTS)
def test_fault_is_named_counted_logged_once_and_recovered_from(name: str, tmp_path: Path) -> None:
    """The loss is known and unknown is shown, with one line each way; good pictures are judged again by themselves."""
    outcome = camera_scenarios.SCENARIOS[name](tmp_path)
    cause, counted = CAUSES[name]
    # On a busy machine the state may still tell why it was lost, and not yet why it cannot be opened again.
    assert outcome.cause in (cause, counted)
    assert dict(outcome.losses) == {counted: 1}
    assert outcome.shown == ("unknown",)
    assert (outcome.logs_on_loss, outcome.logs_on_return) == (1, 1)
    dropped = {"corrupt": "unreadable"}.get(name, name)
    assert (outcome.drops.get(dropped, 0) > 0) == (name in REFUSED)
    # Half a minute is the longest pause between attempts; a busy machine may take its time to start a process.
    assert 0 < outcome.noticed_s < 20
    assert 0 < outcome.recovered_s < 45


def test_waiting_for_a_trigger_is_no_loss(tmp_path: Path) -> None:
    """A triggered camera without a trigger is idle and unknown: nothing is lost, dropped, logged or opened again."""
    outcome = camera_scenarios.trigger_idle(tmp_path)
    nothing: dict[str, int] = {}
    assert outcome == CameraOutcome(
        "idle", "no trigger", None, outcome.noticed_s, outcome.recovered_s, ("unknown",), nothing, nothing, 0, 0
    )
    assert outcome.recovered_s < 10


def test_killed_run_leaves_no_shared_memory(tmp_path: Path) -> None:
    """After SIGKILL of agent and capture there is no segment in /dev/shm, no process and no descriptor of it."""
    left = camera_scenarios.killed_run(tmp_path)
    assert left.before == 2  # seen in both while they lived
    assert (left.segments, left.processes, left.descriptors) == (0, 0, 0)
