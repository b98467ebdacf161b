"""The detection bench: every recipe on every set, trained, exported, and measured as a bundle on the agent's engine.

Cells are kept below --work and used again where recipe, seed, pictures and code are the same, so that a bench that was
stopped goes on. A page is written from them: docs/detection.md, or with --quick a file below --work.
"""

import argparse
import statistics
import sys
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

from detection_cells import ROOT, Bench, Cell, Method, folder_fingerprint, thinned
from detection_page import write_page
from detection_tables import Defaults, Summary, choose_defaults, mean_over_sets, summary_of
from harness import Row, command, machine, parser, publish

from kizu_agent.simulation import SimulatedLine, write_dataset
from kizu_train.detectors.joint import uses_of
from kizu_train.errors import UsageError
from kizu_train.recipes import list_recipes, resolve_recipe

SETS = ("magnetic_tile", "deeppcb_tiles", "cookies")
NOT_BY_DEFAULT = ("anogan_28px", "patch_vae_28px")
"""Recipes of the published 28 × 28 experiments: scripts/bench small measures them on their own pictures."""
ONLY_WITH_BACKBONE = ("joint_backbone",)
"""Recipes that are not measured without."""
JOINT_CHILD = Path(__file__).with_name("joint_child.py")
"""Measures joint recipes: their members, where they are the same, learn once for all of them."""
QUICK = (
    Method("patch_vae", overrides=("train.steps=300",)),
    Method("patch_vae", "l", overrides=("train.steps=300",)),
    Method("synthetic_defects", overrides=("train.steps=150",)),
)
MISSING = " A method that a table lacks has not been measured there yet."
LEADS = {"image_auroc": 0.842, "au_pro_30": 0.841}
"""What quick measurements with a pretrained MobileNetV1 gave as means over the three default sets."""


def main() -> int:
    """Measure all cells, write the page, print the aims."""
    options = _options()
    bench = Bench(
        options.work,
        options.threads,
        options.limit_s,
        options.keep,
        options.retry,
        options.only_kept,
        retime=options.retime,
    )
    sets = _quick_sets(options.work) if options.quick else [_set(name, options.data_root) for name in options.sets]
    if options.most_tests:
        sets = [thinned(folder, options.most_tests, options.work / "thinned") for folder in sets]
    methods = list(QUICK) if options.quick else _methods(options.recipes, options.backbone)
    cells = _measure(bench, sets, methods, options.seeds, options.jobs)
    measured = {cell.method for cell in cells}
    methods = [method for method in methods if method.name in measured]
    names = [folder.name for folder in sets]
    places = {(cell.method, cell.set) for cell in cells}
    per_set = {
        name: [_summary(cells, method, name) for method in methods if (method.name, name) in places] for name in names
    }
    everywhere = [method for method in methods if all((method.name, name) in places for name in names)]
    means = [mean_over_sets(method.name, _of(cells, method), names) for method in everywhere]
    defaults = choose_defaults(means)
    asked = {f"{cell.figures.overkill_asked:g}" for cell in cells if cell.figures}
    facts = {
        "command": command("detection"),
        "commits": _commits(cells),
        "machine": machine(),
        "seeds": _seeds(cells),
        "threads": f"{options.threads} thread{'s' if options.threads > 1 else ''}",
        "missing": "" if len(everywhere) == len(methods) else MISSING,
        "asked": " or ".join(sorted(asked)) or "no",
    }
    page = options.page or (options.work / "detection.md" if options.quick else ROOT / "docs" / "detection.md")
    small = options.work / "small.json"
    write_page(page, facts=facts, per_set=per_set, means=means, defaults=defaults, small=small)
    print(f"page      {page}")
    return publish("detection", _aims(cells, per_set, means, defaults, names), options.json)


def _options() -> argparse.Namespace:
    options = parser("detection")
    options.add_argument("--sets", type=_names, default=SETS, metavar="A,B", help=f"folders ({','.join(SETS)})")
    options.add_argument("--data-root", type=Path, metavar="DIR", help="where sets given by name lie")
    options.add_argument("--recipes", type=_names, metavar="A,B@SCORE", help="names or .toml files (all)")
    options.add_argument("--seeds", type=int, default=3, metavar="N", help="0 to N - 1 (3)")
    options.add_argument("--backbone", type=Path, metavar="FILE", help="pretrained weights, for a second row each")
    options.add_argument("--threads", type=int, default=1, metavar="N", help="for training and evaluation (1)")
    options.add_argument("--jobs", type=int, default=1, metavar="N", help="cells measured at a time (1)")
    options.add_argument(
        "--most-tests", type=int, metavar="N", help="at most N good and N defective test pictures of a set (all)"
    )
    options.add_argument("--limit-s", type=float, default=3600.0, metavar="S", help="for one cell (3600)")
    options.add_argument("--work", type=Path, default=ROOT / "build" / "bench-detection", metavar="DIR")
    options.add_argument("--page", type=Path, metavar="FILE.md", help="the page to write (docs/detection.md)")
    options.add_argument("--keep", action="store_true", help="use kept cells also of other code")
    options.add_argument("--retry", action="store_true", help="measure kept cells again that failed")
    options.add_argument("--only-kept", action="store_true", help="measure nothing: write the page of what is kept")
    options.add_argument("--retime", action="store_true", help="time the bundles of kept cells again, all in this run")
    found = options.parse_args()
    if found.quick:
        found.seeds = 1
    if min(found.seeds, found.threads, found.jobs) < 1 or (found.most_tests is not None and found.most_tests < 1):
        options.error("--seeds, --threads, --jobs and --most-tests must be at least 1")
    return found


def _names(text: str) -> tuple[str, ...]:
    return tuple(name for name in text.split(",") if name)


def _set(name: str, root: Path | None) -> Path:
    for folder in (Path(name), *([root / name] if root else [])):
        if (folder / "train").is_dir():
            return folder.resolve()
    where = f"{root / name} and {name}" if root else f"{name}; name their folder with --data-root"
    sys.exit(f"scripts/bench detection: no train folder in {where}")


def _methods(wanted: Sequence[str] | None, backbone: Path | None) -> list[Method]:
    """Rows in order; a recipe that takes a backbone has one without and, where one was given, one with it."""
    if backbone is not None and not backbone.is_file():
        sys.exit(f"scripts/bench detection: --backbone {backbone}: is not there")
    names = list(wanted) if wanted else _all()
    found: list[Method] = []
    for text in names:
        recipe, _, score = text.partition("@")
        try:
            uses = uses_of(resolve_recipe(recipe))
        except UsageError as exc:
            sys.exit(f"scripts/bench detection: {exc}")
        method = Method(recipe, score or None)
        found += [] if recipe in ONLY_WITH_BACKBONE else [method]
        found += [replace(method, backbone=backbone)] if backbone and "backbone" in uses else []
    return found


def _all() -> list[str]:
    names = [name for name in list_recipes() if name not in NOT_BY_DEFAULT]
    return [text for name in names for text in ([name, f"{name}@l"] if name == "patch_vae" else [name])]


def _quick_sets(work: Path) -> list[Path]:
    """Two generated products, drawn once."""
    folders = []
    for part in ("plates", "screws"):
        folder = work / "generated" / part
        if not (folder / "ground_truth").is_dir():
            line = SimulatedLine(part, seed=5, width=192, height=192)
            write_dataset(folder, line, good=30, test_good=12, defective=16)
        folders.append(folder)
    return folders


def _measure(bench: Bench, sets: Sequence[Path], methods: Sequence[Method], seeds: int, jobs: int) -> list[Cell]:
    """All cells, first seeds first: a bench that is stopped early has something of everything.

    Rows that share a training are measured one after the other, others `jobs` at a time.
    """
    hashes = {folder: folder_fingerprint(folder) for folder in sets}
    groups: dict[tuple[int, Path, str], list[Method]] = {}
    for seed in range(seeds):
        for folder in sets:
            for method in methods:
                # What joins the same members comes one after the other: the second finds what the first learned.
                training = "joint" if _is_joint(method) else method.training
                groups.setdefault((seed, folder, training), []).append(method)
    total = seeds * len(sets) * len(methods)
    cells: list[Cell] = []

    def measure(group: tuple[tuple[int, Path, str], list[Method]]) -> None:
        (seed, folder, _), members = group
        for method in members:
            by = replace(bench, child=JOINT_CHILD) if _is_joint(method) else bench
            cell = by.cell(method, folder, hashes[folder], seed)
            if cell is not None:
                cells.append(cell)
                _tell(cell, len(cells), total)

    with ThreadPoolExecutor(jobs) as pool:
        for _ in pool.map(measure, groups.items()):
            pass
    return cells


def _is_joint(method: Method) -> bool:
    return resolve_recipe(method.recipe).detector == "joint"


def _tell(cell: Cell, number: int, total: int) -> None:
    found = cell.figures
    shown = f"failed: {cell.failed}"
    if found is not None:
        figures = (("AUROC", found.image_auroc), ("AU-PRO", found.au_pro_30))
        shown = "  ".join(f"{name} {value:.3f}" for name, value in figures if value is not None)
    print(f"[{number}/{total}] {cell.set}  {cell.method}  seed {cell.seed}  {shown}", flush=True)


def _commits(cells: Sequence[Cell]) -> str:
    """`commit a`, or with --keep `commits a (12 cells), b (3 cells)`."""
    counts = Counter(cell.commit for cell in cells)
    if len(counts) == 1:
        return f"commit `{cells[0].commit}`"
    return "commits " + ", ".join(f"`{name}` ({count} cells)" for name, count in counts.most_common())


def _seeds(cells: Sequence[Cell]) -> str:
    """How many seeds were measured on each set, of each method where they differ."""
    seeds: dict[str, Counter[str]] = {}
    for cell in cells:
        seeds.setdefault(cell.method, Counter())[cell.set] += 1
    methods: dict[int, list[str]] = {}
    for method, found in seeds.items():
        methods.setdefault(min(found.values()), []).append(method)
    words = {count: f"{count} seeds" if count > 1 else "one seed" for count in methods}
    if len(methods) < 2:
        return "".join(words.values()) or "nothing measured"
    *most, rest = sorted(methods, key=lambda count: len(methods[count]))
    return "; ".join(
        [*(f"{words[count]} of {', '.join(methods[count])}" for count in most), f"{words[rest]} of others"]
    )


def _of(cells: Sequence[Cell], method: Method) -> list[Cell]:
    return [cell for cell in cells if cell.method == method.name]


def _summary(cells: Sequence[Cell], method: Method, name: str) -> Summary:
    return summary_of(method.name, [cell for cell in _of(cells, method) if cell.set == name])


def _aims(
    cells: Sequence[Cell],
    per_set: dict[str, list[Summary]],
    means: Sequence[Summary],
    defaults: Defaults,
    sets: Sequence[str],
) -> list[Row]:
    """The aims as rows; those that need a method which was not measured are left out."""
    rows = _accuracy_aims(means, defaults, sets) if defaults.best else []
    rows += _best_rows(cells, defaults.best.method) if defaults.best else []
    rows += [row for name, found in per_set.items() for row in _m_against_l(name, found)]
    done = [cell.figures for cell in cells if cell.figures]
    if done:
        rows.append(Row("parity with torch, worst", max(item.parity for item in done), "relative", 1e-4, at_most=True))
    return [*rows, Row("cells that failed", len(cells) - len(done), "", 0, at_most=True)]


def _accuracy_aims(means: Sequence[Summary], defaults: Defaults, sets: Sequence[str]) -> list[Row]:
    """The best method without weights against every other one, and against the leads on the sets they are of."""
    assert defaults.best is not None
    best, rows = defaults.best, []
    for name, title in (("image_auroc", "image AUROC"), ("au_pro_30", "AU-PRO@0.3")):
        others = [item.figures[name].mean for item in means if item is not best and name in item.figures]
        others += [LEADS[name]] if set(sets) == set(SETS) else []
        value = best.figures[name].mean
        rows.append(Row(f"{best.method}: {title}, mean of sets", value, "", max(others, default=None)))
    for what, item in (("fastest default", defaults.fastest), ("backbone default", defaults.with_backbone)):
        if item:
            rows.append(Row(f"{what} {item.method}: image AUROC, mean", item.figures["image_auroc"].mean, ""))
            rows.append(Row(f"{what} {item.method}: a picture", item.figures["ms_256"].mean, "ms"))
    return rows


def _best_rows(cells: Sequence[Cell], method: str) -> list[Row]:
    """Training time and overkill of the best method."""
    done = [cell.figures for cell in cells if cell.method == method and cell.figures]
    good, alarms = sum(item.good for item in done), sum(item.reject_false_alarms for item in done)
    asked = statistics.fmean(item.overkill_asked for item in done)
    slowest = max(item.training_s for item in done)
    rows = [Row(f"{method}: training, slowest set", slowest, "s", 600, at_most=True)]
    if good:
        overkill = alarms / good / asked
        rows.append(Row(f"{method}: overkill ÷ asked rate, at reject", overkill, "", 2, at_most=True))
    return rows


def _m_against_l(name: str, found: Sequence[Summary]) -> list[Row]:
    by_name = {item.method: item.figures for item in found}
    m, el = by_name.get("patch_vae", {}), by_name.get("patch_vae@l", {})
    titles = (("au_pro_30", "AU-PRO@0.3"), ("image_auroc", "image AUROC"))
    return [
        Row(f"patch_vae, {name}: {title}, M minus L", m[figure].mean - el[figure].mean, "", 0.0)
        for figure, title in titles
        if figure in m and figure in el
    ]


if __name__ == "__main__":
    raise SystemExit(main())
