"""How long training steps wait for their batches: made when they are needed, and made ahead, in one run.

A recipe's detector learns a few steps from the same generated pictures in each way, in turn, so that a machine that
slows down slows all; figures are medians, ratios those of neighbours.
"""

import argparse
import statistics
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch
from harness import Row, parser, publish

from kizu_agent.simulation import SimulatedLine, write_dataset
from kizu_train.data import open_data
from kizu_train.detectors.base import Extras
from kizu_train.feeding import Ahead, Waiting, fed
from kizu_train.fit import choose_device
from kizu_train.quiet_session import QuietSession
from kizu_train.recipes import Recipe, resolve_recipe
from kizu_train.runs import build_detector
from kizu_train.tile_pool import TilePool

FAMILIES = {
    "patch_vae": "train.steps={steps}",
    "synthetic_defects": "train.steps={steps}",
    "joint_fast": "members.synthetic_defects_fast.train.steps={steps}",
}
"""Recipes whose steps are measured, with the setting of how many: tiles alone, planted defects, windows of tiles."""
HOWS = {"when needed": Ahead(0), "by a thread": Ahead(4, 0), "by processes": Ahead(4, 2)}
_AIM = 0.1


def main() -> int:
    """Train throw-away detectors, print."""
    options = _options()
    torch.set_num_threads(options.threads)
    steps, rounds = (options.steps or (12 if options.quick else 100)), (1 if options.quick else 3)
    hows = {name: how for name, how in HOWS.items() if options.processes or how.workers <= 0}
    with tempfile.TemporaryDirectory(prefix="kizu-bench-") as folder:
        data = Path(folder) / "plates"
        write_dataset(data, SimulatedLine("plates", seed=5, width=384, height=384), good=12, test_good=1, defective=1)
        rows = [row for name in options.recipes for row in _family(name, data, steps, rounds, hows)]
    return publish("training", rows, options.json)


def _options() -> argparse.Namespace:
    options = parser("training")
    options.add_argument("--recipes", type=lambda text: tuple(text.split(",")), default=tuple(FAMILIES), metavar="A,B")
    options.add_argument("--steps", type=int, metavar="N", help="of each training (100; with --quick 12)")
    options.add_argument("--threads", type=int, default=1, metavar="N", help="that a step on a CPU computes with (1)")
    options.add_argument("--processes", action="store_true", help="let processes make batches too")
    found = options.parse_args()
    strangers = [name for name in found.recipes if name not in FAMILIES]
    if strangers:
        options.error(f"--recipes: {strangers[0]} is not measured; known are {', '.join(FAMILIES)}")
    return found


def _family(name: str, data: Path, steps: int, rounds: int, hows: dict[str, Ahead]) -> list[Row]:
    recipe = resolve_recipe(name, (FAMILIES[name].format(steps=steps),))
    found: dict[str, list[Waiting]] = {how: [] for how in hows}
    for _ in range(rounds):
        for how, ahead in hows.items():
            found[how].append(_train(recipe, data, ahead))
    rows = []
    for how, waits in found.items():
        aim = None if how == "when needed" else _AIM
        rows.append(Row(f"{name}: waiting, batches made {how}", _share(waits), "of step time", aim, at_most=True))
        rows.append(Row(f"{name}: steps, batches made {how}", _pace(waits), "steps/s"))
    plain = found["when needed"]
    for how, waits in found.items():
        if how != "when needed":
            ratios = [_pace([ahead]) / _pace([own]) for ahead, own in zip(waits, plain, strict=True)]
            rows.append(Row(f"{name}: pace {how} ÷ when needed", statistics.median(ratios), ""))
    return rows


def _train(recipe: Recipe, data: Path, ahead: Ahead) -> Waiting:
    """Learn from scratch; what the steps waited, the first one included: a process must start for it."""
    pictures = open_data(data, recipe.data.colour, with_tests=False)
    tiles = TilePool(pictures.train, recipe.grid, pictures.colour, 0, recipe.data.cache_mb)
    detector = build_detector(recipe, pictures.colour, 0)
    with fed(ahead) as waiting:
        detector.fit(tiles, QuietSession(0, choose_device("auto"), Extras()))
    return waiting


def _share(waits: Sequence[Waiting]) -> float:
    return statistics.median(wait.share or 0.0 for wait in waits)


def _pace(waits: Sequence[Waiting]) -> float:
    return statistics.median(wait.steps / wait.whole_s for wait in waits)


if __name__ == "__main__":
    raise SystemExit(main())
