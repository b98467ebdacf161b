"""The fault scenarios of tests/faults on real processes and a real Mosquitto, one after the other, and their table.

What each came to is kept below --work with its commit, so that the table of a page can be gathered over several runs.
"""

import json
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path
from typing import NamedTuple

from harness import Row, command, commit, machine, parser, publish

ROOT = Path(__file__).parents[1]
sys.path[0] = str(ROOT / "tests")  # in the place of this folder, whose faults.py would hide the package there

from faults import disk  # noqa: E402
from faults.plant import Outcome  # noqa: E402
from faults.scenarios import SCENARIOS, Scenario  # noqa: E402

_MARK = "<!-- The table below is written by scripts/bench faults. -->"


class Kept(NamedTuple):
    """What a scenario came to, and at which commit."""

    number: int
    outcome: Outcome
    commit: str


def main() -> int:
    """Run, print, and write the table where asked."""
    options = parser("faults")
    options.add_argument("--only", metavar="A,B", help=f"of {', '.join(s.name for s in SCENARIOS)}")
    options.add_argument("--page", type=Path, metavar="FILE.md", help="put the table into this page, below its mark")
    options.add_argument("--work", type=Path, default=ROOT / "build" / "bench-faults", metavar="DIR", help="keeps them")
    options.add_argument("--only-kept", action="store_true", help="run nothing: write the page from what is kept")
    asked = options.parse_args()
    wanted = asked.only.split(",") if asked.only else [scenario.name for scenario in SCENARIOS]
    unknown = set(wanted) - {scenario.name for scenario in SCENARIOS}
    if unknown:
        options.error(f"no scenario {', '.join(sorted(unknown))}")
    folder = asked.work / ("quick" if asked.quick else "full")
    outcomes = []
    for number, scenario in enumerate(SCENARIOS, 1):
        if scenario.name in wanted and not asked.only_kept:
            outcomes.append((number, _run(scenario, quick=asked.quick)))
            _keep(folder / f"{scenario.name}.json", outcomes[-1][1])
    if asked.page:
        _write_page(asked.page, _kept(folder))
    rows = [row for number, outcome in outcomes for row in _rows(number, outcome)]
    return publish("faults", rows, asked.json)


def _run(scenario: Scenario, *, quick: bool) -> Outcome:
    began = time.monotonic()
    if scenario.needs_mounts and not disk.can_mount():
        outcome = Outcome(scenario.name, "not at all", failed="needs root and loop mounts")
    else:
        with tempfile.TemporaryDirectory(prefix="kizu-fault-") as folder:
            try:
                outcome = (scenario.quick if quick else scenario.full)(Path(folder) / "plant")
            except (OSError, TimeoutError, AssertionError) as exc:
                outcome = Outcome(scenario.name, "broken off", failed=f"{type(exc).__name__}: {exc}")
    sys.stderr.write(f"{scenario.name}: {outcome.failed or 'as promised'} ({time.monotonic() - began:.0f} s)\n")
    return outcome


def _keep(path: Path, outcome: Outcome) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"outcome": asdict(outcome), "commit": commit()}, indent=2), encoding="utf-8")


def _kept(folder: Path) -> list[Kept]:
    """What is kept of each scenario that there is."""
    found = []
    for number, scenario in enumerate(SCENARIOS, 1):
        path = folder / f"{scenario.name}.json"
        if path.is_file():
            raw = json.loads(path.read_text("utf-8"))
            found.append(Kept(number, Outcome(**raw["outcome"]), raw["commit"]))
    return found


def _rows(number: int, outcome: Outcome) -> list[Row]:
    name = f"{number}. {outcome.scenario}"
    rows = [Row(f"{name}: not as promised", float(bool(outcome.failed)), "", 0.0, at_most=True)]
    figures = (
        ("committed", outcome.committed, "results"),
        ("lost", outcome.lost, "results"),
        ("duplicated", outcome.duplicated, "results"),
        ("noticed after", outcome.noticed_s, "s"),
        ("recovered after", outcome.recovered_s, "s"),
    )
    return rows + [Row(f"{name}: {what}", float(value), unit) for what, value, unit in figures if value is not None]


def _write_page(page: Path, outcomes: list[Kept]) -> None:
    """Replace what lies below the mark."""
    head = page.read_text().partition(_MARK)[0]
    lines = [
        _MARK,
        "",
        f"`{command('faults')}` on {machine()}; {len(outcomes)} of {len(SCENARIOS)} scenarios:",
        "",
        "| | scenario | what was done | committed | lost | duplicated | in order | noticed, s | recovered, s | | at |",
        "|---:|---|---|---:|---:|---:|---|---:|---:|---|---|",
        *(_line(*kept) for kept in outcomes),
    ]
    page.write_text(head + "\n".join(lines) + "\n")


def _line(number: int, outcome: Outcome, at: str) -> str:
    order = {None: "", True: "yes", False: "no"}[outcome.in_order]
    verdict = f"**{outcome.failed}**" if outcome.failed else "as promised"
    cells = (
        number,
        outcome.scenario,
        outcome.done,
        *("" if value is None else value for value in (outcome.committed, outcome.lost, outcome.duplicated)),
        order,
        *("" if value is None else f"{value:.1f}" for value in (outcome.noticed_s, outcome.recovered_s)),
        "; ".join(filter(None, (verdict, outcome.note))),
        f"`{at}`",
    )
    return f"| {' | '.join(map(str, cells))} |"


if __name__ == "__main__":
    raise SystemExit(main())
