"""`fit auto`: try a few recipes on the user's own pictures within a time budget, and train the best one.

Each candidate has its share of about half the budget (`trials`). Its figure is the mean of image AUROC and AU-PRO@0.3
on planted flaws. The winner is trained anew for the time that is left, so that its learning rate falls to its end.
"""

import dataclasses
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from kizu_contract.pictures import read_picture
from kizu_train import distributed
from kizu_train.detectors.base import Extras
from kizu_train.detectors.joint import JointSettings
from kizu_train.errors import TrainError, UsageError
from kizu_train.fit import DeviceChoice, FitRequest, choose_device, fit
from kizu_train.recipes import resolve_recipe
from kizu_train.runs import RunRecord
from kizu_train.tile_size import fit_tiles
from kizu_train.trials import LEAST_TRIAL_S, Trial, TrialBench, scaled, steps_of, try_all

CANDIDATES = ("raw_gaussian", "pyramid_memory", "synthetic_defects", "patch_vae", "joint")
"""Recipes that are tried in this order; a small budget tries fewer. The first two take seconds; the members of the last
one have been trained by then, and are only joined."""
WITH_BACKBONE = ("gaussian_features", "patch_memory")
"""Tried first where the user gave a backbone."""
JOINED_WITH_BACKBONE = ("joint_backbone",)
"""Tried last then, for its members have been trained."""
_JOINED = ("joint", *JOINED_WITH_BACKBONE)
TRIAL_SHARE = 0.5
"""Of the budget that goes into trials."""
_TIE = 0.08
"""Smaller differences of figures are noise: the standard error of an AUROC of 0.65 from 24 pieces against 24 (Hanley &
McNeil 1982)."""
_MOST_SHARE = 2.0
"""Of a recipe's own steps; more would cost patience for little."""
_LEAST_FINAL_S = 2.0


@dataclass(frozen=True)
class AutoRequest:
    """What to train, for at most about `minutes`; `overrides` as for `fit` apply to every candidate."""

    data: Path
    out: Path
    minutes: float
    overrides: tuple[str, ...] = ()
    device: DeviceChoice = "auto"
    seed: int = 0
    extras: Extras = dataclasses.field(default_factory=Extras)
    candidates: tuple[str, ...] | None = None


@dataclass(frozen=True)
class Choice:
    """All trials, the chosen one first, and why it was chosen."""

    trials: tuple[Trial, ...]
    why: str


def fit_auto(request: AutoRequest, tell: Callable[[Choice], None]) -> RunRecord:
    """Choose a recipe and train it; `tell` hears of the choice before the final training.

    The run is an ordinary one: its recipe says in `about` why it was chosen, its metrics hold every trial's figures.
    Raises DataError for too few pictures, UsageError where the budget does not do for a single candidate.
    """
    began = time.monotonic()
    if distributed.is_launched():
        raise UsageError("fit auto runs in one process; choose with it, then train the recipe under torchrun")
    _check_out(request.out)
    names = _names(request)
    recipes = [resolve_recipe(name, request.overrides) for name in names]
    bench = TrialBench(request.data, recipes[0], request.seed, choose_device(request.device), request.extras)
    end = began + request.minutes * 60 * TRIAL_SHARE
    trials = try_all(bench, [fit_tiles(recipe, bench.pictures) for recipe in recipes], end)
    choice = _choose(trials, request.minutes)
    tell(choice)
    return _train(request, bench, choice, began)


def _check_out(out: Path) -> None:
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UsageError(f"{out}: is in use; choose another --out (fit auto begins anew and cannot be resumed)")


def _names(request: AutoRequest) -> tuple[str, ...]:
    """The candidates that the budget does for."""
    ours = (*WITH_BACKBONE, *CANDIDATES, *JOINED_WITH_BACKBONE) if request.extras.backbone else CANDIDATES
    names = request.candidates or ours
    room = int(request.minutes * 60 * TRIAL_SHARE / LEAST_TRIAL_S)
    if room < 1:
        raise UsageError(
            f"--minutes {request.minutes:g}: does not do for even one candidate; "
            f"give at least {LEAST_TRIAL_S / TRIAL_SHARE / 60:.1f}, better 5"
        )
    # Joining detectors that were tried is free.
    return tuple(name for index, name in enumerate(names) if index < room or name in _JOINED)


def _choose(trials: Sequence[Trial], minutes: float) -> Choice:
    """The chosen one first, then by figure. Raises TrainError where none could be tried to the end.

    A joint recipe within `_TIE` of the best is preferred: planted flaws resemble what one of its members learned from,
    and what real ones look like, the other members may know.
    """

    def rank(trial: Trial) -> float:
        is_joint = isinstance(trial.recipe.settings, JointSettings) and not trial.failed
        return trial.figure + _TIE * is_joint

    ranked = tuple(sorted(trials, key=rank, reverse=True))
    best = ranked[0]
    if best.failed:
        reasons = "; ".join(f"{trial.recipe.name}: {trial.failed}" for trial in ranked)
        raise TrainError(f"no candidate could be tried in {minutes:g} minutes: {reasons}")
    others = ", ".join(f"{trial.recipe.name} {trial.figure:.3f}" for trial in ranked[1:] if not trial.failed)
    why = f"chosen by fit auto: {best.image_auroc:.3f} image AUROC and {best.au_pro:.3f} AU-PRO on planted flaws"
    tie = f"; joint recipes are preferred within {_TIE:g}" if best.figure < max(t.figure for t in ranked) else ""
    return Choice(ranked, f"{why}, mean {best.figure:.3f}{f' against {others}' if others else ''}{tie}")


def _train(request: AutoRequest, bench: TrialBench, choice: Choice, began: float) -> RunRecord:
    """Train the winner for the rest of the budget."""
    best = choice.trials[0]
    left = request.minutes * 60 - (time.monotonic() - began) - _calibration_s(bench, best)
    left = max(left, _LEAST_FINAL_S)
    steps = steps_of(best.recipe)
    share = min(_MOST_SHARE, max(best.share, best.pace.steps_in(left) / steps)) if steps else 1.0
    recipe = scaled(best.recipe, share)
    recipe = dataclasses.replace(recipe, about=choice.why)
    metrics = {
        f"auto_{trial.recipe.name}_{name}": round(value, 4)
        for trial in choice.trials
        if not trial.failed
        for name, value in (("image_auroc", trial.image_auroc), ("au_pro", trial.au_pro), ("trial_s", trial.seconds))
    }
    return fit(
        FitRequest(
            recipe,
            request.data,
            request.out,
            request.device,
            request.seed,
            extras=bench.extras(recipe),
            stop_after_s=1.2 * left,
            metrics=metrics,
        )
    )


def _calibration_s(bench: TrialBench, best: Trial) -> float:
    """How long the held-out pictures will take to score by every kind, and a little for the rest."""
    first = read_picture(bench.split.held_out[0], bench.pictures.colour)
    pixels = len(bench.split.held_out) * first.shape[0] * first.shape[1]
    return 2.0 + 1.3 * float(pixels) * best.pixel_ns * 1e-9
