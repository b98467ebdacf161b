"""The sweep of the default detectors: accuracy against CPU time, point by point, and where the front has its knee.

Every point is trained, exported and measured as a bundle on the agent's engine, as by the detection bench, whose cells
it uses: kept below --work, so that a sweep that was stopped goes on. Members learn once for all points that share them.
"""

import argparse
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path

from detection_cells import ROOT, Bench, Cell, folder_fingerprint, thinned
from front_points import BASES, TODAY, Place, Point, fastest_equal, front, full, knee, point, star
from harness import Row, command, commit, machine, parser, publish

from kizu_agent.simulation import SimulatedLine, write_dataset

AIMS_MS = {"joint_fast": 5.0, "joint": 20.0}
_GENERATED = ("plates", "screws")
_QUICK_UNETS, _QUICK_MEMORIES = ("u12", "u16slim"), ("m1000", "m500c8")
_STEPS = "members.{member}.train.steps={steps}"
_HEAD = """# The front of accuracy and time

<!-- Written by scripts/bench front; the words stand in benchmarks/front.py. Do not edit by hand. -->

The two defaults with other U-Nets and memories. Accuracy is the mean of image AUROC and AU-PRO@0.3 over the sets, time
the CPU milliseconds of the whole process for a picture of 256 × 256 on one thread: of the exported bundle on the
agent's engine. Made with

    {command}

at commit `{commit}` on {machine}, on {sets}; {seeds}. What each name changes stands in `benchmarks/front_points.py`.
**Front**: nothing else is both faster and more accurate. **Knee**: farthest above the line from its fastest to its most
accurate point. **Equal**: the fastest within a point of today's recipe.
"""


def main() -> int:
    """Measure all points, write the page, print the fronts."""
    options = _options()
    bench = Bench(
        options.work,
        1,
        options.limit_s,
        options.keep,
        options.retry,
        options.only_kept,
        Path(__file__).with_name("joint_child.py"),
        options.retime,
    )
    drawn = [] if options.only_sets else _generated(options.work, quick=options.quick)
    sets = [*drawn, *(folder.resolve() for folder in options.sets)]
    if options.most_tests:
        sets = [thinned(folder, options.most_tests, options.work / "thinned") for folder in sets]
    found = {base: _places(bench, _points(base, options), sets, options.seeds) for base in options.recipes}
    facts = {
        "command": command("front"),
        "commit": commit(),
        "machine": machine(),
        "sets": ", ".join(folder.name for folder in sets),
        "seeds": f"{options.seeds} seeds" if options.seeds > 1 else "one seed",
    }
    page = options.page or (options.work / "front.md" if options.quick else ROOT / "docs" / "front.md")
    page.write_text(_HEAD.format(**facts) + "".join(_table(base, places) for base, places in found.items()))
    print(f"page      {page}")
    return publish("front", [row for base, places in found.items() for row in _rows(base, places)], options.json)


def _options() -> argparse.Namespace:
    options = parser("front")
    options.add_argument("--recipes", type=_names, default=tuple(BASES), metavar="A,B", help="which defaults (both)")
    options.add_argument("--sets", type=Path, nargs="+", default=[], metavar="DIR", help="beside the generated sets")
    options.add_argument("--only-sets", action="store_true", help="leave the generated sets out")
    options.add_argument("--full", action="store_true", help="every U-Net with every memory, not a star around today's")
    options.add_argument("--points", type=_names, metavar="U+M,…", help="these alone, such as u16slim+m500c8")
    options.add_argument("--seeds", type=int, default=1, metavar="N", help="0 to N - 1 (1)")
    options.add_argument("--steps", type=int, metavar="N", help="of the U-Nets' trainings (as in the recipes)")
    options.add_argument("--most-tests", type=int, metavar="N", help="at most N good and N defective pictures of a set")
    options.add_argument("--limit-s", type=float, default=3600.0, metavar="S", help="for one cell (3600)")
    options.add_argument("--work", type=Path, default=ROOT / "build" / "bench-front", metavar="DIR")
    options.add_argument("--page", type=Path, metavar="FILE.md", help="the page to write (docs/front.md)")
    options.add_argument("--keep", action="store_true", help="use kept cells also of other code")
    options.add_argument("--retry", action="store_true", help="measure kept cells again that failed")
    options.add_argument("--only-kept", action="store_true", help="measure nothing: write the page of what is kept")
    options.add_argument("--retime", action="store_true", help="time the bundles of kept cells again, all in this run")
    found = options.parse_args()
    if found.quick:
        found.seeds, found.steps = 1, found.steps or 30
    for name in found.recipes:
        if name not in BASES:
            options.error(f"--recipes: {name} is not swept; {' and '.join(BASES)} are")
    if found.only_sets and not found.sets:
        options.error("--only-sets: name some by --sets")
    for folder in found.sets:
        if not (folder / "train").is_dir():
            options.error(f"--sets: {folder} has no folder train")
    try:
        _ = [_points(base, found) for base in found.recipes]
    except (KeyError, ValueError) as exc:
        options.error(f"--points: {exc} is not known; see benchmarks/front_points.py")
    return found


def _names(text: str) -> tuple[str, ...]:
    return tuple(name for name in text.split(",") if name)


def _points(base: str, options: argparse.Namespace) -> list[Point]:
    more = () if options.steps is None else (_STEPS.format(member=BASES[base], steps=options.steps),)
    if options.points:
        pairs = [text.split("+") for text in options.points]
        return [point(base, *TODAY[base], more), *(point(base, unet, memory, more) for unet, memory in pairs)]
    if options.quick:
        return [point(base, unet, memory, more) for unet in _QUICK_UNETS for memory in _QUICK_MEMORIES]
    return full(base, more) if options.full else star(base, more)


def _generated(work: Path, *, quick: bool) -> list[Path]:
    """Generated products, drawn once; one small one where it is to be quick."""
    side, good, defective = (256, 12, 6) if quick else (384, 60, 48)
    folders = []
    for part in _GENERATED[: 1 if quick else None]:
        folder = work / "generated" / f"{part}{side}"
        if not (folder / "ground_truth").is_dir():
            line = SimulatedLine(part, seed=5, width=side, height=side)
            write_dataset(folder, line, good=good, test_good=defective, defective=defective)
        folders.append(folder)
    return folders


def _places(bench: Bench, points: Sequence[Point], sets: Sequence[Path], seeds: int) -> list[Place]:
    """Where the points lie that were measured on every set, in every seed; failures are told."""
    hashes = {folder: folder_fingerprint(folder) for folder in sets}
    total, done = len(points) * len(sets) * seeds, 0
    cells: dict[str, list[Cell]] = {}
    for seed in range(seeds):
        for one in points:
            for folder in sets:
                cell = bench.cell(one, folder, hashes[folder], seed)
                done += 1
                if cell is not None:
                    cells.setdefault(one.name, []).append(cell)
                    print(f"[{done}/{total}] {folder.name}  {one.name}  {_told(cell)}", flush=True)
    wanted = len(sets) * seeds
    return [_place(name, found) for name, found in cells.items() if sum(_is_whole(cell) for cell in found) == wanted]


def _is_whole(cell: Cell) -> bool:
    found = cell.figures
    return found is not None and None not in (found.image_auroc, found.au_pro_30, found.cpu_ms_256)


def _told(cell: Cell) -> str:
    if cell.figures is None:
        return f"failed: {cell.failed}"
    found = cell.figures
    return f"AUROC {found.image_auroc}  AU-PRO {found.au_pro_30}  CPU ms {found.cpu_ms_256}"


def _place(name: str, cells: Sequence[Cell]) -> Place:
    figures = [cell.figures for cell in cells if cell.figures]

    def mean(field: str) -> float:
        return statistics.mean(getattr(found, field) for found in figures)

    # Time does not depend on what was learned: the least is the one least disturbed.
    return Place(name, mean("image_auroc"), mean("au_pro_30"), min(found.cpu_ms_256 or 0.0 for found in figures))


def _today(base: str, places: Sequence[Place]) -> Place | None:
    name = point(base, *TODAY[base]).name
    return next((place for place in places if place.name == name), None)


def _marks(base: str, places: Sequence[Place]) -> dict[str, list[str]]:
    """Which of today, front, knee and equal each point is."""
    marks: dict[str, list[str]] = {place.name: [] for place in places}
    if not places:
        return marks
    best, today = front(places), _today(base, places)
    for place in best:
        marks[place.name].append("front")
    marks[knee(best).name].append("knee")
    if today is not None:
        marks[today.name].append("today")
        marks[fastest_equal(best, today).name].append("equal")
    return marks


def _table(base: str, places: Sequence[Place]) -> str:
    lines = [f"\n## {base}\n\n| point | image AUROC | AU-PRO@0.3 | CPU ms | |\n|---|---:|---:|---:|---|\n"]
    marks = _marks(base, places)
    for place in sorted(places, key=lambda found: found.cpu_ms):
        name = place.name.partition(".")[2]
        words = ", ".join(marks[place.name])
        lines.append(f"| {name} | {place.image_auroc:.3f} | {place.au_pro:.3f} | {place.cpu_ms:.1f} | {words} |\n")
    return "".join(lines)


def _rows(base: str, places: Sequence[Place]) -> list[Row]:
    rows = [Row(f"{base}: points measured on all sets", len(places), "")]
    for name, words in _marks(base, places).items():
        place = next(found for found in places if found.name == name)
        for word in (word for word in words if word != "front"):
            label = f"{base}, {word}: {name.partition('.')[2]}"
            rows.append(Row(f"{label}, CPU for 256 × 256", place.cpu_ms, "ms", AIMS_MS[base], at_most=True))
            rows.append(Row(f"{label}, accuracy", place.accuracy, ""))
    return rows


if __name__ == "__main__":
    sys.exit(main())
