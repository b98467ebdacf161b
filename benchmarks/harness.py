"""What every family of measurements shares: rows with their aims, one table, one JSON file."""

import argparse
import json
import os
import platform
import subprocess
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table


@dataclass(frozen=True)
class Row:
    """One measured figure; `aim` bounds it where there is one, from below unless `at_most`; `met`: was it kept."""

    name: str
    value: float
    unit: str
    aim: float | None = None
    at_most: bool = False

    @property
    def met(self) -> bool | None:
        """Was the aim reached? None where there is none."""
        if self.aim is None:
            return None
        return self.value <= self.aim if self.at_most else self.value >= self.aim


def parser(family: str) -> argparse.ArgumentParser:
    """Options that every family takes."""
    options = argparse.ArgumentParser(prog=f"scripts/bench {family}")
    options.add_argument("--quick", action="store_true", help="under five minutes on 2 cores")
    options.add_argument("--json", type=Path, metavar="FILE", help="write the rows as JSON")
    return options


def publish(family: str, rows: list[Row], target: Path | None) -> int:
    """Print the table, write the JSON; 0 always: a missed aim is a finding, not a failure."""
    table = Table(title=f"bench {family}")
    for name in ("what", "value", "unit", "aim", "met"):
        table.add_column(name, justify="right" if name in ("value", "aim") else "left")
    for row in rows:
        aim = "" if row.aim is None else f"{'≤' if row.at_most else '≥'} {row.aim:g}"
        met = "" if row.met is None else ("[green]yes[/]" if row.met else "[red]no[/]")
        table.add_row(row.name, f"{row.value:.4g}", row.unit, aim, met)
    Console().print(table)
    if target is not None:
        report = {
            "bench": family,
            "commit": commit(),
            "machine": machine(),
            "command": command(family),
            "rows": [{**asdict(row), "met": row.met} for row in rows],
        }
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(json.dumps(report, indent=2) + "\n")
    return 0


def command(family: str) -> str:
    """How this run was started; where things lie on this machine is left out."""
    words = (Path(word).name if word.startswith("/") else word for word in sys.argv[1:])
    return " ".join(["scripts/bench", family, *words])


def machine() -> str:
    """What this machine is, in words."""
    return f"{platform.machine()}, {_cores()} cores, {_processor()}, Python {platform.python_version()}"


def commit() -> str:
    """The commit that is checked out, marked where files differ from it."""
    done = subprocess.run(["git", "describe", "--always", "--dirty"], capture_output=True, text=True, check=False)
    return done.stdout.strip() or "unknown"


def _cores() -> int:
    return len(os.sched_getaffinity(0))


def _processor() -> str:
    names = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    return names[0].partition(":")[2].strip() if names else platform.processor()
