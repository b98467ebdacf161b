"""The published small experiments, each through the product's own path: fit, bundle, the agent's engine.

scripts/bench small --data DIR [--only A,B] [--seeds N] [--effort E] [--work DIR] [--plots DIR] [--quick] [--json FILE]

DIR holds `mnist` and `fashion_mnist` (the idx files, packed or not) and `cifar10_deer_horse/deer_horse.npz`. An aim is
the figure that was published; where none was, there is none. `--effort` is the share of the published training steps
that is taken.
"""

import argparse
import statistics
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from harness import Row, parser, publish
from numpy.typing import NDArray
from small_data import SAMPLES, Sample
from small_scores import best_split, draw_histogram

from kizu_agent.settings import EngineConfig
from kizu_export.build import build_bundle
from kizu_export.errors import ExportError
from kizu_export.evaluate import evaluate_bundle
from kizu_train.data import open_data
from kizu_train.detectors.anogan import AnoganScorer
from kizu_train.detectors.base import Extras
from kizu_train.evaluation.evaluate import evaluate
from kizu_train.evaluation.metrics import image_auroc
from kizu_train.evaluation.records import Evaluation
from kizu_train.fit import FitRequest, fit
from kizu_train.nets.gan_search import Search, search_scores
from kizu_train.recipes import resolve_recipe
from kizu_train.runs import Run, open_run
from kizu_train.scoring import frame_scorer

Scores = NDArray[np.float64]
WHOLE_28 = (
    "grid.tile_px=28",
    "grid.stride_px=28",
    "grid.margin_px=0",
    "reduction.kind=tile_max",
    "reduction.smooth_sigma_px=0.0",
)
WHOLE_32 = ("grid.tile_px=32", "grid.stride_px=32", *WHOLE_28[2:])
AS_PUBLISHED = ("data.held_out_share=0.05", "calibration.level_borders=false")
"""Published experiments learn from all good pictures, of which a product must keep some to calibrate on; and judge
centred things on empty ground, whose borders are no surface."""
WORST_PATCH = ("reduction.kind=tile_max",)
"""A picture is bad if any patch is: the rule of the paper. The maximum over pixels, or over a smoothed map, turns the
order of M and L round: boots are larger and more patterned than sneakers, which A sees wherever patches are summed."""
_QUICK_EFFORT, _QUICK_PICTURES, _SEARCHED = 0.02, 100, 50


@dataclass(frozen=True)
class Experiment:
    """A recipe on a sample: `published` gives the kinds of score and the image AUROC of each, None where unknown.

    `steps` are the settings that count training steps, as published. `accuracy` is the published accuracy at the best
    threshold, where that is what was published.
    """

    title: str
    sample: str
    recipe: str
    published: Mapping[str, float | None]
    steps: Mapping[str, int]
    sets: tuple[str, ...] = ()
    accuracy: float | None = None
    searched: bool = False
    uses_references: bool = False


_MNIST, _FASHION, _CIFAR = "MNIST 1 / 9", "Fashion-MNIST sneaker / boot", "CIFAR-10 deer / horse"
_VAE_STEPS = {"train.steps": 7810}
_DOC_STEPS, _METRIC_STEPS = {"train.steps": 313}, {"train.steps": 703}
"""In batches of 128: 5 epochs of 8,000 references, 10 epochs of all 9,000 pictures."""
_EMBEDDED = ("train.batch=128", "train.learning_rate=1e-3")


def _embedding(title: str, sample: str, recipe: str, published: float | None) -> Experiment:
    steps = _DOC_STEPS if recipe == "doc" else _METRIC_STEPS
    sets = (*(WHOLE_32 if sample == "cifar" else WHOLE_28), *_EMBEDDED)
    return Experiment(title, sample, recipe, {"lof": published}, steps, sets, uses_references=True)


EXPERIMENTS = {
    "vae_mnist": Experiment(_MNIST, "mnist", "patch_vae_28px", {"m": None, "l": None}, _VAE_STEPS, WORST_PATCH),
    "vae_fashion": Experiment(_FASHION, "fashion", "patch_vae_28px", {"m": 0.67, "l": 0.58}, _VAE_STEPS, WORST_PATCH),
    "ae_mnist": Experiment(
        # 16 epochs of 6,742 pictures in batches of 128.
        _MNIST,
        "mnist",
        "ae_dense",
        {"l2": None},
        {"train.steps": 843},
        (*WHOLE_28, "train.batch=128"),
    ),
    "anogan_mnist": Experiment(
        _MNIST,
        "mnist",
        "anogan_28px",
        {"izi_f": None, "izi": None},
        {"train.steps": 21069, "encode.steps": 8000},
        accuracy=0.97,
        searched=True,
    ),
    "doc_fashion": _embedding(_FASHION, "fashion_references", "doc", 0.90),
    # Published as about 0.05 above DOC, in the median of ten runs.
    "l2_softmax_fashion": _embedding(_FASHION, "fashion_references", "metric_l2_softmax", 0.95),
    "arcface_fashion": _embedding(_FASHION, "fashion_references", "metric_arcface", 0.95),
    "doc_cifar": _embedding(_CIFAR, "cifar", "doc", None),
    "l2_softmax_cifar": _embedding(_CIFAR, "cifar", "metric_l2_softmax", None),
    "arcface_cifar": _embedding(_CIFAR, "cifar", "metric_arcface", None),
}


@dataclass(frozen=True)
class Extent:
    """How much is done: share of the published steps, most pictures of each sort (None: all), seeds."""

    effort: float
    pictures: int | None
    seeds: int


@dataclass
class Figures:
    """Measured figures by name, each once for a seed, with unit and published value."""

    values: dict[str, list[float]] = field(default_factory=dict)
    about: dict[str, tuple[str, float | None]] = field(default_factory=dict)

    def add(self, name: str, value: float, unit: str, published: float | None = None) -> None:
        """Take one figure."""
        self.values.setdefault(name, []).append(value)
        self.about[name] = (unit, published)

    def rows(self) -> Iterator[Row]:
        """Means over seeds, each with its deviation where there are several."""
        for name, values in self.values.items():
            unit, published = self.about[name]
            yield Row(name, statistics.fmean(values), unit, published)
            if len(values) > 1:
                yield Row(f"{name}, ± over {len(values)} seeds", statistics.stdev(values), unit)


def main() -> int:
    """Run the experiments that were asked for and whose pictures are there, print, write."""
    options = _options()
    quick: bool = options.quick
    extent = Extent(options.effort, _QUICK_PICTURES if quick else None, options.seeds)
    plots: Path | None = options.plots or (options.json.parent if options.json else None)
    figures = Figures()
    with tempfile.TemporaryDirectory(prefix="kizu-bench-") as folder:
        work = (options.work or Path(folder)) / f"effort-{extent.effort:g}-pictures-{extent.pictures or 'all'}"
        for name in options.only:
            try:
                sample = SAMPLES[EXPERIMENTS[name].sample](options.data)
            except FileNotFoundError as exc:
                print(f"{name}: left out: {exc.filename} is not there", file=sys.stderr)
                continue
            _run(name, sample.thinned(extent.pictures) if extent.pictures else sample, work, extent, plots, figures)
    if not figures.values:
        print(f"nothing measured: {_WANTED}", file=sys.stderr)
        return 2
    rows = [*figures.rows(), Row("share of the published training steps", extent.effort, "")]
    return publish("small", rows, options.json)


_WANTED = (
    "--data DIR names a folder that holds mnist and fashion_mnist, each with the four idx files (such as"
    " train-images-idx3-ubyte, or .gz), and cifar10_deer_horse/deer_horse.npz; any of them will do"
)


def _options() -> argparse.Namespace:
    options = parser("small")
    options.add_argument("--data", type=Path, metavar="DIR", help="where mnist, fashion_mnist, cifar10_deer_horse lie")
    options.add_argument("--only", type=_names, default=tuple(EXPERIMENTS), metavar="A,B", help=", ".join(EXPERIMENTS))
    options.add_argument("--seeds", type=int, default=1, metavar="N", help="0 to N - 1 (1)")
    options.add_argument("--effort", type=float, metavar="E", help="share of the published training steps (1)")
    options.add_argument("--work", type=Path, metavar="DIR", help="keep runs here, and go on with them (a throw-away)")
    options.add_argument("--plots", type=Path, metavar="DIR", help="score histograms, PNG (beside --json)")
    found = options.parse_args()
    if found.data is None:
        options.error(f"the pictures are missing: {_WANTED}")
    if found.effort is None:
        found.effort = _QUICK_EFFORT if found.quick else 1.0
    if found.seeds < 1 or not 0 < found.effort <= 1:
        options.error("--seeds must be at least 1, --effort above 0 and at most 1")
    return found


def _names(text: str) -> tuple[str, ...]:
    names = tuple(text.split(","))
    unknown = [name for name in names if name not in EXPERIMENTS]
    if unknown:
        raise argparse.ArgumentTypeError(f"{unknown[0]} is not known; known are {', '.join(EXPERIMENTS)}")
    return names


def _run(name: str, sample: Sample, work: Path, extent: Extent, plots: Path | None, figures: Figures) -> None:
    experiment = EXPERIMENTS[name]
    folder = work / experiment.sample
    sample.write(folder)
    for seed in range(extent.seeds):
        out = _train(experiment, folder, work / f"{name}-seed{seed}", extent.effort, seed)
        about = f"{experiment.title}, {experiment.recipe}"
        figures.add(f"{about}, training", open_run(out).provenance.metrics["training_s"], "s")
        for kind, published in experiment.published.items():
            found, where = _evaluate(open_run(out, kind), folder / "data")
            good, bad = _scores(found)
            label = f"{about}@{kind}{where}"
            figures.add(f"{label}, image AUROC", found.image.auroc or 0.0, "", published)
            plot = plots / f"{name}-{kind}-seed{seed}.png" if plots and experiment.accuracy else None
            _split(label, experiment, good, bad, plot, figures)
        if experiment.searched:
            few = max(10, round(300 * extent.effort)) if extent.pictures else 300
            good, bad = _search(open_run(out), sample, Search(steps=few), seed)
            label = f"{about}, latent search on {len(good) + len(bad)} pictures"
            figures.add(f"{label}, image AUROC", image_auroc(bad, good) or 0.0, "")
            _split(label, experiment, good, bad, plots / f"{name}-search-seed{seed}.png" if plots else None, figures)


def _train(experiment: Experiment, folder: Path, out: Path, effort: float, seed: int) -> Path:
    steps = [f"{key}={max(2, round(count * effort))}" for key, count in experiment.steps.items()]
    recipe = resolve_recipe(experiment.recipe, (*AS_PUBLISHED, *experiment.sets, *steps))
    extras = Extras(references=folder / "references") if experiment.uses_references else Extras()
    fit(FitRequest(recipe, folder / "data", out, "auto", seed, resume=True, extras=extras))
    return out


def _evaluate(run: Run, data: Path) -> tuple[Evaluation, str]:
    """The run as a bundle, on the agent's engine; where its export is refused in torch, and words that say so."""
    try:
        return evaluate_bundle(build_bundle(run).bundle, data, EngineConfig(threads=1)), ""
    except ExportError as exc:
        print(f"{run.name}: export refused, measured in torch: {exc}", file=sys.stderr)
    score = frame_scorer(run.scorer, run.grid, run.reduction)
    return evaluate(open_data(data, run.colour), score, run.thresholds, colour=run.colour), " (in torch)"


def _scores(found: Evaluation) -> tuple[Scores, Scores]:
    """Frame scores of good and of bad pictures."""
    good = [picture.score for picture in found.pictures if picture.is_good]
    bad = [picture.score for picture in found.pictures if not picture.is_good]
    return np.array(good), np.array(bad)


def _split(label: str, experiment: Experiment, good: Scores, bad: Scores, plot: Path | None, figures: Figures) -> None:
    """Best accuracy over thresholds and the histogram, where that is what was published."""
    if experiment.accuracy is None:
        return
    split = best_split(good, bad)
    figures.add(f"{label}, best accuracy over thresholds", split.accuracy, "", experiment.accuracy)
    if plot is not None:
        draw_histogram(plot, good, bad, split.threshold, label)


def _search(run: Run, sample: Sample, search: Search, seed: int) -> tuple[Scores, Scores]:
    """AnoGAN's own scores of the first pictures of each sort: the latent search, which no bundle can hold."""
    scorer = run.scorer
    assert isinstance(scorer, AnoganScorer)
    heaps: Sequence[NDArray[np.uint8]] = (sample.good[:_SEARCHED], sample.bad[:_SEARCHED])
    tiles = torch.from_numpy(np.concatenate(heaps))
    scores = search_scores(scorer.gan, tiles, search, seed).double().numpy()
    return scores[: len(heaps[0])], scores[len(heaps[0]) :]


if __name__ == "__main__":
    raise SystemExit(main())
