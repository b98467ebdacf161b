"""Speed: each recipe on each provider, from the bare engine to the plant's subscriber, in ratios of neighbours.

scripts/bench speed [--quick] [--only engine,…] [--recipes A,B] [--providers cpu,…] [--json FILE] [--page FILE.md]
[--only-kept] [--work DIR]

Each family is a room beside this file. What a family came to is kept below --work with its commit and machine, so that
the table of a page can be gathered over several runs.
"""

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import NamedTuple

import speed_agent
import speed_cameras
import speed_engine
import speed_latency
import speed_score
import speed_stages
import speed_vae
from harness import Row, command, commit, machine, parser, publish
from speed_common import DEFAULT_RECIPES, Request
from speed_models import NEEDS_MORE, Models, all_recipes

from kizu_agent.providers import available_providers
from kizu_train.recipes import list_recipes

ROOT = Path(__file__).parents[1]
MARK = "<!-- The tables below are written by scripts/bench speed. -->"
FAMILIES: dict[str, tuple[str, Callable[[Request], list[Row]]]] = {
    "engine": ("Bare engine", speed_engine.measure),
    "score": ("kizu-agent score", speed_score.measure),
    "agent": ("Agent, folder to subscriber", speed_agent.measure),
    "stages": ("Stages and allocations of a frame", speed_stages.measure),
    "latency": ("Latency, start, memory", speed_latency.measure),
    "vae": ("Patch VAE against one window a call", speed_vae.measure),
    "cameras": ("Many cameras on one engine", speed_cameras.measure),
}
"""By name: the heading on the page, and what measures it."""


class Kept(NamedTuple):
    """What a family came to, at which commit, on which machine, with which command."""

    rows: list[Row]
    commit: str
    machine: str
    command: str


def main() -> int:
    """Measure what was asked for, keep it, print, write the page where asked."""
    asked = _options()
    folder = asked.work / ("quick" if asked.quick else "full")
    measured: list[Row] = []
    if not asked.only_kept:
        for family in asked.only:
            at = commit()  # now: files may change while it runs
            rows = _measure(family, asked)
            _keep(folder / f"{family}.json", Kept(rows, at, machine(), command("speed")))
            measured += rows
    if asked.page:
        write_page(asked.page, kept(folder))
    return publish("speed", measured or [row for each in kept(folder).values() for row in each.rows], asked.json)


def _options() -> argparse.Namespace:
    options = parser("speed")
    options.add_argument("--only", type=_list, metavar="A,B", help=f"of {', '.join(FAMILIES)}", default=[*FAMILIES])
    options.add_argument("--recipes", type=_list, metavar="A,B", help="default: quick the defaults, else all")
    options.add_argument("--providers", type=_list, metavar="A,B", default=["cpu"], help="default: cpu")
    options.add_argument("--page", type=Path, metavar="FILE.md", help="put the tables into this page, below its mark")
    options.add_argument("--work", type=Path, default=ROOT / "build" / "bench-speed", metavar="DIR", help="keeps them")
    options.add_argument("--only-kept", action="store_true", help="measure nothing: write the page from what is kept")
    asked = options.parse_args()
    if unknown := set(asked.only) - FAMILIES.keys():
        options.error(f"no family {', '.join(sorted(unknown))}; there are {', '.join(FAMILIES)}")
    asked.recipes = asked.recipes or (DEFAULT_RECIPES if asked.quick else all_recipes())
    if unknown := set(asked.recipes) - list_recipes().keys():
        options.error(f"no recipe {', '.join(sorted(unknown))}")
    return asked


def _list(text: str) -> list[str]:
    return [part for part in text.split(",") if part]


def _measure(family: str, asked: argparse.Namespace) -> list[Row]:
    began = time.monotonic()
    models = Models(asked.work / "models")
    recipes = tuple(name for name in _without_needs(asked.recipes) if models.try_path(name))
    with tempfile.TemporaryDirectory(prefix="kizu-bench-") as work:
        request = Request(asked.quick, recipes, _there(asked.providers), models, Path(work))
        rows = FAMILIES[family][1](request)
    print(f"{family}: {time.monotonic() - began:.0f} s", file=sys.stderr)
    return rows


def _without_needs(recipes: Sequence[str]) -> list[str]:
    for name in set(recipes) & set(NEEDS_MORE):
        print(f"{name}: left out: it needs weights or reference pictures", file=sys.stderr)
    return [name for name in recipes if name not in NEEDS_MORE]


def _there(providers: Sequence[str]) -> tuple[str, ...]:
    there = available_providers()
    for name in (name for name in providers if name not in there):
        print(f"{name}: left out: this onnxruntime has {', '.join(there)}", file=sys.stderr)
    return tuple(name for name in providers if name in there)


def _keep(path: Path, found: Kept) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    raw = found._asdict() | {"rows": [asdict(row) for row in found.rows]}
    path.write_text(json.dumps(raw, indent=2), encoding="utf-8")


def kept(folder: Path) -> dict[str, Kept]:
    """What is kept of each family that there is, in their order."""
    found = {}
    for family in FAMILIES:
        path = folder / f"{family}.json"
        if path.is_file():
            raw = json.loads(path.read_text("utf-8"))
            found[family] = Kept(**raw | {"rows": [Row(**row) for row in raw["rows"]]})
    return found


def write_page(page: Path, found: dict[str, Kept]) -> None:
    """Replace what lies below the mark."""
    head = page.read_text("utf-8").partition(MARK)[0]
    lines = [MARK, ""]
    for family, each in found.items():
        lines += [f"### {FAMILIES[family][0]}", "", f"`{each.command}` at `{each.commit}` on {each.machine}.", ""]
        lines += ["| | value | | aim | |", "|---|---:|---|---:|---|", *map(_line, each.rows), ""]
    page.write_text(head + "\n".join(lines), "utf-8")


def _line(row: Row) -> str:
    aim = "" if row.aim is None else f"{'≤' if row.at_most else '≥'} {row.aim:g}"
    met = {None: "", True: "met", False: "**missed**"}[row.met]
    return f"| {row.name} | {row.value:.4g} | {row.unit} | {aim} | {met} |"


if __name__ == "__main__":
    raise SystemExit(main())
