"""Tiles per second of int8 and fp16 against fp32, and what each loses: one training a recipe, three bundles, in turn.

The engines run in turn (fp32, fp16, int8, fp32, …) on the same tiles, so that a machine that slows down slows all; each
ratio is of neighbours, by the time of the process, and on one core of a CPU. What is lost is what the export measured
on test pictures with drawn defects; its limits are lifted here, so that a loss that would not ship is shown too.
"""

import statistics
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from harness import Row
from numpy.typing import NDArray

from kizu_agent.engine import Engine
from kizu_agent.providers import available_providers
from kizu_agent.settings import EngineConfig
from kizu_agent.simulation import SimulatedLine, write_dataset
from kizu_contract.manifest import Manifest, PrecisionLoss
from kizu_contract.pictures import list_pictures, read_picture
from kizu_export.build import build_bundle
from kizu_export.evidence import gather_evidence
from kizu_export.lower import Limits, Precision
from kizu_train.fit import FitRequest, fit
from kizu_train.recipes import resolve_recipe
from kizu_train.runs import open_run
from kizu_train.trials import scaled

RECIPES = ("joint_fast", "synthetic_defects", "patch_vae", "ae_conv")
FASTER, LOST_POINTS = 1.8, 0.5
_LOWER: tuple[Precision, ...] = ("fp16", "int8")
_ALL = Limits(100, 1e9)


@dataclass(frozen=True)
class Effort:
    """How long to train (a share of the recipe's steps) on how many pictures, how many to judge, how often to time."""

    share: float
    good: int
    judged: int
    turns: int
    seconds: float


QUICK, FULL = Effort(0.02, 40, 24, 5, 0.3), Effort(0.3, 80, 100, 15, 1.0)


@dataclass(frozen=True, eq=False)
class _Exported:
    manifest: Manifest
    scorer: bytes

    @property
    def loss(self) -> PrecisionLoss:
        """What its precision lost."""
        assert self.manifest.precision is not None
        return self.manifest.precision


def measure(work: Path, recipes: Sequence[str] = RECIPES, effort: Effort = QUICK) -> list[Row]:
    """Rows of all `recipes`, none of which may need weights; `work` is an empty folder for data and runs."""
    line = SimulatedLine("plates", seed=5)
    write_dataset(work / "line", line, good=effort.good, test_good=effort.judged // 2, defective=effort.judged // 2)
    rows = []
    for name in recipes:
        bundles = _export(work, name, effort)
        tiles = _tiles(work / "line", bundles["fp32"].manifest)
        for provider in [name for name in ("cpu", "cuda") if name in available_providers()]:
            rows += _faster(name, provider, bundles, tiles, effort)
        rows += _lost(name, bundles)
    return rows


def has_vnni() -> bool:
    """Whether this processor multiplies eight bits four at a time."""
    return "vnni" in Path("/proc/cpuinfo").read_text()


def _export(work: Path, name: str, effort: Effort) -> dict[Precision, _Exported]:
    out = work / f"run_{name}"
    fit(FitRequest(scaled(resolve_recipe(name), effort.share), work / "line", out))
    run = open_run(out)
    evidence = gather_evidence(run, work / "line")
    found: dict[Precision, _Exported] = {}
    for precision in ("fp32", *_LOWER):
        bundle = build_bundle(run, precision=precision, evidence=evidence, limits=_ALL).bundle
        found[precision] = _Exported(bundle.manifest, bundle.scorer)
    return found


def _tiles(data: Path, manifest: Manifest) -> NDArray[np.uint8]:
    """About the profile's usual batch, from good pictures."""
    pictures = [read_picture(path, manifest.colour) for path in list_pictures(data / "test" / "good")]
    cut = np.concatenate([manifest.grid.layout(*picture.shape[:2]).cut(picture) for picture in pictures])
    return np.ascontiguousarray(np.resize(cut, (manifest.graph.batch.opt, *cut.shape[1:])))


def _faster(
    name: str, provider: str, bundles: dict[Precision, _Exported], tiles: NDArray[np.uint8], effort: Effort
) -> list[Row]:
    """How many times faster the lower precisions are, by neighbours in turn."""
    places = np.zeros(len(tiles), np.int64)
    with ExitStack() as stack:
        engines = {
            precision: stack.enter_context(
                Engine(one.scorer, one.manifest.graph, EngineConfig(provider=provider, threads=1))  # type: ignore[arg-type]
            )
            for precision, one in bundles.items()
        }
        turns = [
            {key: _seconds(engine, tiles, places, effort.seconds) for key, engine in engines.items()}
            for _ in range(effort.turns)
        ]
    rate = len(tiles) / statistics.median(turn["fp32"] for turn in turns)
    rows = [Row(f"{name}, {provider}: fp32", rate, "tiles/s")]
    for precision in _LOWER:
        is_aim = (provider == "cpu" and precision == "int8" and has_vnni()) or (
            provider != "cpu" and precision == "fp16"
        )
        ratio = statistics.median(turn["fp32"] / turn[precision] for turn in turns)
        rows.append(Row(f"{name}, {provider}: {precision} ÷ fp32, tiles/s", ratio, "", FASTER if is_aim else None))
    return rows


def _seconds(engine: Engine, tiles: NDArray[np.uint8], places: NDArray[np.int64], budget_s: float) -> float:
    """Seconds for one pass over `tiles`: of this process on the CPU, by the clock elsewhere."""
    clock = time.process_time if engine.provider == "cpu" else time.perf_counter
    began, passes = clock(), 0
    while passes == 0 or clock() - began < budget_s / 3:
        engine.run(tiles, places)
        passes += 1
    return (clock() - began) / passes


def _lost(name: str, bundles: dict[Precision, _Exported]) -> list[Row]:
    before = bundles["int8"].loss
    rows = [Row(f"{name}: image AUROC of fp32, {before.defective_pictures} defective", before.image_auroc_before, "")]
    for precision in _LOWER:
        loss = bundles[precision].loss
        rows.append(Row(f"{name}: image AUROC of {precision}", loss.image_auroc_after, ""))
        rows.append(Row(f"{name}: lost by {precision}", loss.lost_points, "points", LOST_POINTS, at_most=True))
        rows.append(Row(f"{name}: good scores moved by {precision}", loss.most_shift, "of reject"))
    kept = bundles["int8"].loss
    rows.append(Row(f"{name}: layers in int8, of {kept.layers + kept.layers_kept}", kept.layers, "layers"))
    return rows
