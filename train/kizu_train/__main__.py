"""The command line of training: recipes, fit, evaluate."""

import argparse
import logging
import os
import sys
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

from rich.console import Console
from rich.logging import RichHandler

from kizu_contract.errors import KizuError
from kizu_train.errors import UsageError

_DONE, _FAILED, _USAGE = 0, 1, 2
_PUBLISHED = ("_28px", "_paper")
_MINUTES = 10.0


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; 0 done, 1 failed, 2 wrong usage."""
    options = _parser().parse_args(arguments)
    # Threads of torch that spin while they wait cost ten times the work's own time on a busy machine.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    handler = RichHandler(console=Console(stderr=True), show_time=False, show_path=False)
    logging.basicConfig(level=logging.INFO, format="%(message)s", handlers=[handler])
    try:
        return int(options.command(options))
    except UsageError as exc:
        sys.stderr.write(f"kizu-train: {exc}\n")
        return _USAGE
    except (KizuError, OSError) as exc:
        sys.stderr.write(f"kizu-train: {exc}\n")
        return _FAILED
    except KeyboardInterrupt:
        sys.stderr.write("kizu-train: given up\n")
        return _FAILED


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("kizu-train", description="Train detectors on pictures of good products.")
    parser.add_argument("--version", action="version", version=f"%(prog)s {version('kizu')}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    recipes = commands.add_parser("recipes", help="list the recipes")
    recipes.set_defaults(command=_recipes)

    fit = commands.add_parser("fit", help="train on a folder of pictures")
    fit.add_argument("recipe", metavar="RECIPE", help="a recipe's name, a .toml file, or auto: the best of a few")
    fit.add_argument("--data", type=Path, required=True, metavar="DIR", help="MVTec layout, or good pictures only")
    fit.add_argument("--out", type=Path, required=True, metavar="RUN", help="folder for the run")
    fit.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="such as train.steps=500")
    fit.add_argument(
        "--device", choices=("auto", "cpu", "cuda"), default="auto", help="auto takes a GPU where there is one"
    )
    fit.add_argument("--seed", type=_seed, default=0, metavar="N", help="same seed, same weights (default: 0)")
    fit.add_argument("--minutes", type=float, metavar="M", help="for auto: how long it may take (default: 10)")
    fit.add_argument("--resume", action="store_true", help="go on with the run in RUN")
    fit.add_argument(
        "--folds", type=int, default=0, metavar="K",
        help="train K more detectors, each without its share, to set thresholds by all pictures: for few of them",
    )  # fmt: skip
    fit.add_argument("--backbone", type=Path, metavar="FILE", help="pretrained weights, for recipes that take them")
    fit.add_argument("--defects", type=Path, metavar="DIR", help="known defects, for recipes that learn from them")
    fit.add_argument("--references", type=Path, metavar="DIR", help="other things, a sub-folder each, to tell apart")
    fit.set_defaults(command=_fit)

    evaluate = commands.add_parser("evaluate", help="measure a run on test pictures")
    evaluate.add_argument("run", type=Path, metavar="RUN")
    evaluate.add_argument("--data", type=Path, required=True, metavar="DIR", help="MVTec layout with test pictures")
    evaluate.add_argument("--json", type=Path, metavar="FILE", help="write the figures there")
    evaluate.add_argument("--report", type=Path, metavar="FILE.html", help="write a report with pictures there")
    evaluate.add_argument("--score", metavar="KIND", help="a kind of score the run offers; by default the recipe's")
    evaluate.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="as for fit")
    evaluate.set_defaults(command=_evaluate)
    return parser


def _seed(text: str) -> int:
    seed = int(text)
    if not 0 <= seed < 2**32:
        raise argparse.ArgumentTypeError(f"{seed} must lie between 0 and 2^32 - 1")
    return seed


def _recipes(_options: argparse.Namespace) -> int:
    """One line each; `auto` and the defaults, then those made for what users have, then those of publications."""
    from kizu_train.recipes import DEFAULTS, list_recipes

    found = list_recipes()
    later = [name for name in found if name.endswith(_PUBLISHED)]
    lines = {"auto": "Tries a few of these on your pictures and trains the best one, in the time of --minutes"}
    whys = (
        "Most accurate without weights",
        "Fastest within about two points of it",
        "Most accurate with --backbone FILE",
    )
    lines |= {name: f"{why}: {recipe}" for why, (name, recipe) in zip(whys, DEFAULTS.items(), strict=True)}
    lines |= {name: about for name, about in found.items() if name not in later} | {name: found[name] for name in later}
    width = max(map(len, lines))
    for name, about in lines.items():
        print(f"{name:<{width}}  {about}")
    return _DONE


def _fit(options: argparse.Namespace) -> int:
    if options.recipe == "auto":
        return _fit_auto(options)
    if options.minutes is not None:
        raise UsageError("--minutes: is for fit auto; a recipe's time is set by its steps, as in --set train.steps=500")
    from kizu_train import distributed
    from kizu_train.detectors.base import Extras
    from kizu_train.fit import FitRequest, choose_device, fit
    from kizu_train.recipes import resolve_recipe

    if distributed.is_launched() and int(os.environ["RANK"]) > 0:
        logging.getLogger().setLevel(logging.ERROR)
    recipe = resolve_recipe(options.recipe, options.set)
    extras = Extras(options.backbone, options.defects, options.references)
    request = FitRequest(
        recipe, options.data, options.out, options.device, options.seed, options.resume, extras=extras,
        folds=options.folds,
    )  # fmt: skip
    with distributed.joined(choose_device(options.device)):
        fit(request)
        if distributed.is_first():
            _tell(options.out)
    return _DONE


def _fit_auto(options: argparse.Namespace) -> int:
    from kizu_train.auto import AutoRequest, Choice, fit_auto
    from kizu_train.detectors.base import Extras

    def tell(choice: Choice) -> None:
        print(f"{'tried':<20}{'image AUROC':>12}{'AU-PRO':>8}{'mean':>8}{'seconds':>9}   on planted flaws")
        for trial in choice.trials:
            name, seconds = trial.recipe.name, f"{trial.seconds:>9.0f}"
            figures = f"{trial.image_auroc:>12.3f}{trial.au_pro:>8.3f}{trial.figure:>8.3f}{seconds}"
            print(f"{name:<20}{figures if trial.failed is None else f'   {trial.failed}'}", flush=True)
        print(f"chosen    {choice.trials[0].recipe.name}", flush=True)

    if options.folds:
        raise UsageError("--folds: name the recipe that fit auto chose before, and give --folds with that")
    if options.resume:
        raise UsageError("--resume: fit auto begins anew; leave it out and choose another --out")
    extras = Extras(options.backbone, options.defects, options.references)
    minutes = _MINUTES if options.minutes is None else options.minutes
    request = AutoRequest(
        options.data, options.out, minutes, tuple(options.set), options.device, options.seed, extras=extras
    )
    fit_auto(request, tell)
    _tell(options.out)
    return _DONE


def _tell(out: Path) -> None:
    """Say what was learned, what its limits mean, and what to do next."""
    from kizu_train.runs import open_run

    run = open_run(out)
    limits, metrics = run.thresholds, run.provenance.metrics
    print(f"trained   {metrics['training_s']:.0f} s, calibrated in {metrics['calibration_s']:.0f} s")
    if run.stopped_early:
        print("stopped   early, and usable; --resume goes on")
    folds = int(metrics.get("folds", 0))
    others = f"all {run.calibration.frames} in {folds} folds" if folds else f"{run.calibration.frames} others"
    print(f"learnt    {run.provenance.train_pictures} good pictures, calibrated on {others}")
    print(f"warn      {limits.warn:.4g}   for a false alarm in {1 / run.warn_rate:.0f} good frames")
    print(f"reject    {limits.reject:.4g}   for a false alarm in {1 / run.reject_rate:.0f} good frames")
    if not run.calibration.can_tell(run.reject_rate):
        print(f"note      {run.calibration.frames} pictures say little about 1 in {1 / run.reject_rate:.0f}:")
        print("          the limits stand far out. Add good pictures, or ask for more false alarms:")
        print("          --set calibration.reject_rate=0.02")
        if not folds:
            print("          Or set them by all pictures, for six times the time: --folds 5")
    print(f"run       {out}")
    print(f"next      kizu-export {out} --out {run.name}.kizu")


def _evaluate(options: argparse.Namespace) -> int:
    from kizu_train.data import open_data
    from kizu_train.evaluation.evaluate import evaluate
    from kizu_train.evaluation.report import write_report
    from kizu_train.evaluation.table import print_evaluation
    from kizu_train.fit import choose_device
    from kizu_train.runs import open_run
    from kizu_train.scoring import frame_scorer

    run = open_run(options.run, options.score)
    pictures = open_data(options.data, run.colour)
    score = frame_scorer(run.scorer, run.grid, run.reduction, choose_device(options.device))
    evaluation = evaluate(pictures, score, run.thresholds, colour=run.colour, show_progress=True)
    print_evaluation(evaluation, Console())
    if options.json:
        options.json.write_bytes(evaluation.to_json())
    if options.report:
        facts = {"run": str(options.run), "recipe": run.recipe["name"], "score": run.score, "data": str(options.data)}
        origin = {
            "trained": run.finished,
            "seed": str(run.provenance.seed),
            "pictures": run.provenance.data_fingerprint,
        }
        write_report(options.report, evaluation, title=run.name, facts=facts, provenance=origin)
    return _DONE


if __name__ == "__main__":
    sys.exit(main())
