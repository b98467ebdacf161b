"""All fault scenarios by number, with what a full run and a quick one ask of them."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from faults import delivery, disk, hostile, orders, process
from faults.cameras import camera_scenarios, rtsp_scenarios
from faults.cameras.camera_rig import CameraOutcome
from faults.models import model_scenarios
from faults.plant import Outcome

Run = Callable[[Path], Outcome]


@dataclass(frozen=True)
class Scenario:
    """One scenario: `full` for scripts/bench faults, `quick` for its --quick and, where `in_tests`, for the tests."""

    name: str
    full: Run
    quick: Run
    in_tests: bool = True
    needs_mounts: bool = False


def _same(name: str, run: Run, **more: Any) -> Scenario:
    return Scenario(name, run, run, **more)


_MODELS_IN_TESTS = (
    model_scenarios.crash_in_first_frames,
    model_scenarios.power_cut,
    model_scenarios.not_a_number,
    model_scenarios.too_many_rejects,
    model_scenarios.drop_while_loading,
)


def _model(run: model_scenarios.ModelScenario) -> Scenario:
    name = f"model-{run.__name__.replace('_', '-')}"
    return _same(name, partial(run, seed=1), in_tests=run in _MODELS_IN_TESTS)


def _camera(name: str, run: Callable[[Path], CameraOutcome]) -> Scenario:
    def in_folder(folder: Path) -> Outcome:
        folder.mkdir(parents=True, exist_ok=True)
        return run(folder).row()

    # Their tests ask for more than the table holds: tests/faults/cameras.
    return _same(f"camera-{name.replace('_', '-')}", in_folder, in_tests=False)


def _soak(folder: Path, frames: int) -> Outcome:
    return process.soak(folder, frames)[0]


SCENARIOS = (
    Scenario(
        "kills",
        delivery.kills,
        # What each fault may repeat at most, a window of 20: on a busy machine acknowledgements come late.
        partial(delivery.kills, agent_kills=8, broker_kills=3, results=1500, most_duplicates=11 * 20 / 1500),
    ),
    Scenario("outage", delivery.outage, partial(delivery.outage, backlog=1000)),
    Scenario("power-cuts", disk.power_cuts, partial(disk.power_cuts, cuts=8), needs_mounts=True),
    Scenario("sync-cost", disk.sync_cost, partial(disk.sync_cost, seconds=1.0), in_tests=False),
    Scenario("full-disk", disk.full_disk, partial(disk.full_disk, held_s=3.0), needs_mounts=True),
    Scenario("mutated-bundles", hostile.mutated_bundles, partial(hostile.mutated_bundles, count=600)),
    Scenario("mutated-drops", hostile.mutated_drops, partial(hostile.mutated_drops, count=12), in_tests=False),
    _same("stopped-capture", process.stopped_capture),
    _same("stopped-broker", process.stopped_broker),
    _same("stopped-agent", process.stopped_agent),
    _same("clock-steps", process.clock_steps),
    _same("held-delivery", partial(process.held_thread, thread="delivery", limit_s=30), in_tests=False),
    _same("held-inspection", partial(process.held_thread, thread="inspection", limit_s=60), in_tests=False),
    _same("held-publisher", partial(process.held_thread, thread="publisher", limit_s=90), in_tests=False),
    *(_camera(name, run) for name, run in camera_scenarios.SCENARIOS.items()),
    *(_camera(name, run) for name, run in rtsp_scenarios.SCENARIOS.items()),
    *(_model(run) for run in model_scenarios.SCENARIOS),
    Scenario("product-changes", orders.product_changes, partial(orders.product_changes, changes=60)),
    Scenario("hostile-commands", orders.hostile_commands, partial(orders.hostile_commands, count=1000)),
    Scenario("soak", partial(_soak, frames=500_000), partial(_soak, frames=10_000), in_tests=False),
)
"""Number 1 is the first."""
