"""Rules of the project that no linter knows."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SHELLS = [*(ROOT / "scripts").iterdir(), ROOT / ".ci" / "run"]


def cases_of(path: Path) -> list[ast.FunctionDef]:
    nodes = ast.walk(ast.parse(path.read_text()))
    return [node for node in nodes if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")]


def test_every_test_says_what_it_shows() -> None:
    """Each test's docstring is one sentence of behaviour."""
    silent = [
        f"{path.relative_to(ROOT)}:{test.lineno} {test.name}"
        for path in sorted((ROOT / "tests").rglob("test_*.py"))
        for test in cases_of(path)
        if not (ast.get_docstring(test) or "").endswith(".")
    ]
    assert silent == []


def test_import_rules_hold() -> None:
    """The layers of the design are kept: import-linter finds no forbidden import."""
    command = [str(Path(sys.executable).with_name("lint-imports")), "--no-cache"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=100, check=False)
    assert result.returncode == 0, result.stdout + result.stderr


def test_the_version_stands_in_one_place() -> None:
    """Only pyproject.toml says the version; code asks the installed distribution."""
    version = re.search(r'^version = "(.+)"$', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    assert version is not None
    again = [
        path.relative_to(ROOT).as_posix()
        for part in ("contract", "train", "export", "agent")
        for path in (ROOT / part).rglob("*.py")
        if re.search(rf'["\']{re.escape(version[1])}["\']|__version__ *=', path.read_text())
    ]
    assert again == []


def test_decisions_are_short_and_numbered() -> None:
    """ADRs count on from 0001, have a status-free title and at most forty lines."""
    decisions = sorted((ROOT / "docs" / "decisions").glob("[0-9]*.md"))
    assert len(decisions) >= 6
    assert [int(path.name[:4]) for path in decisions] == list(range(1, len(decisions) + 1))
    for path in decisions:
        lines = path.read_text().splitlines()
        assert len(lines) <= 40, path.name
        assert lines[0].startswith(f"# {path.name[:4]} "), path.name
        assert {"## Context", "## Decision", "## Consequences"} <= set(lines), path.name


@pytest.mark.parametrize("script", SHELLS, ids=lambda path: path.name)
def test_shell_scripts_parse(script: Path) -> None:
    """Every script is valid bash, and those that are run are executable."""
    subprocess.run(["bash", "-n", str(script)], check=True, timeout=30)
    assert script.name.startswith("_") or script.stat().st_mode & 0o111


@pytest.mark.parametrize("arguments", [(), ("nonsense",)])
def test_bench_names_its_families_on_wrong_usage(arguments: tuple[str, ...]) -> None:
    """A wrong family ends with exit code 2 and the list of right ones, before anything is installed."""
    command = [str(ROOT / "scripts" / "bench"), *arguments]
    result = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
    assert result.returncode == 2
    assert "usage: scripts/bench" in result.stderr
