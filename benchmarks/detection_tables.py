"""Cells summed up: mean and deviation over seeds, means over sets, the three named defaults."""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from detection_cells import Cell, Figures

PERCENT = ("reject_escape", "reject_overkill", "warn_escape", "warn_overkill")
ACCURACY = ("image_auroc", "au_pro_30")
"""Accuracy is the mean of these two."""


@dataclass(frozen=True)
class Spread:
    """Mean of a figure, and its deviation over seeds (None with one seed)."""

    mean: float
    deviation: float | None


@dataclass(frozen=True)
class Summary:
    """A method on one set, or over all sets: its figures by name, or why there are none."""

    method: str
    figures: dict[str, Spread]
    failed: str | None
    is_fixtured: bool


def summary_of(method: str, cells: Sequence[Cell]) -> Summary:
    """The method's cells of one set, over its seeds."""
    done = [cell.figures for cell in cells if cell.figures is not None]
    failed = next((cell.failed for cell in cells if cell.failed), None)
    if not done:
        return Summary(method, {}, failed or "was not measured", is_fixtured=False)
    figures = {name: spread for name in Figures.__dataclass_fields__ if (spread := _spread(name, done)) is not None}
    return Summary(method, figures, failed, is_fixtured=done[0].is_fixtured)


def mean_over_sets(method: str, cells: Sequence[Cell], sets: Sequence[str]) -> Summary:
    """The mean over sets for each seed, then mean and deviation over seeds; fails where a cell is missing."""
    by_seed: list[Figures] = []
    for seed in sorted({cell.seed for cell in cells}):
        own = [cell for cell in cells if cell.seed == seed]
        missing = [cell for cell in own if cell.figures is None]
        if missing or len(own) < len(sets):
            name = missing[0].set if missing else next(n for n in sets if n not in {cell.set for cell in own})
            return Summary(method, {}, f"no figures on {name}", is_fixtured=False)
        by_seed.append(_mean([cell.figures for cell in own if cell.figures is not None]))
    figures = {name: spread for name in Figures.__dataclass_fields__ if (spread := _spread(name, by_seed)) is not None}
    return Summary(method, figures, None, is_fixtured=bool(by_seed and by_seed[0].is_fixtured))


def accuracy(summary: Summary) -> float:
    """Mean of image AUROC and AU-PRO; below all others where there are none."""
    values = [summary.figures[name].mean for name in ACCURACY if name in summary.figures]
    return statistics.fmean(values) if len(values) == len(ACCURACY) else -math.inf


@dataclass(frozen=True)
class Defaults:
    """The three named defaults, each None where no method qualifies."""

    best: Summary | None
    fastest: Summary | None
    with_backbone: Summary | None


def choose_defaults(means: Sequence[Summary]) -> Defaults:
    """Most accurate without weights, fastest within two points of it, most accurate with a backbone.

    Those for fixtured parts only do not qualify.
    """
    able = [item for item in means if not item.failed and not item.is_fixtured and accuracy(item) > -math.inf]
    alone = [item for item in able if "+backbone" not in item.method]
    best = max(alone, key=accuracy, default=None)
    near = [item for item in alone if best and accuracy(item) >= accuracy(best) - 0.02]
    fastest = min(near, key=lambda item: item.figures["ms_256"].mean, default=None)
    backbone = max((item for item in able if "+backbone" in item.method), key=accuracy, default=None)
    return Defaults(best, fastest, backbone)


def _spread(name: str, done: Sequence[Figures]) -> Spread | None:
    values = [getattr(figures, name) for figures in done]
    if any(value is None for value in values):
        return None
    numbers = [float(value) for value in values]
    return Spread(statistics.fmean(numbers), statistics.stdev(numbers) if len(numbers) > 1 else None)


def _mean(parts: Sequence[Figures]) -> Figures:
    """Means of figures over sets; counts add up, the worst parity counts, `is_fixtured` is that of any."""
    values: dict[str, float | None] = {}
    for name in Figures.__dataclass_fields__:
        numbers = [getattr(part, name) for part in parts]
        values[name] = None if any(number is None for number in numbers) else statistics.fmean(numbers)
    values |= {name: sum(getattr(part, name) for part in parts) for name in ("good", "reject_false_alarms")}
    values |= {"parity": max(part.parity for part in parts), "is_fixtured": any(part.is_fixtured for part in parts)}
    return Figures(**values)  # type: ignore[arg-type]  # every field is there by name
