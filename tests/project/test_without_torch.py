"""The agent's packages are all the agent needs."""

import json
import pkgutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import cv2
import numpy as np
import pytest
from numpy.typing import NDArray

from kizu_contract.bundle import read_bundle
from kizu_contract.judging import score_frame

FORBIDDEN = ("torch", "onnx", "sklearn", "safetensors", "scipy", "amqtt", "kizu_train", "kizu_export")

# A finder put first in the line refuses what an edge box does not have; it runs before anything else is imported.
GUARD = f"""
import sys
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {FORBIDDEN!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}: an edge box does not have it", name=name)
sys.meta_path.insert(0, Absent())
"""


RUN_AGENT = "import runpy; sys.argv[0] = 'kizu-agent'; runpy.run_module('kizu_agent', run_name='__main__')"


def run_guarded(code: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run `code` in a fresh interpreter in which the forbidden packages are not there."""
    command = [sys.executable, "-W", "error", "-c", GUARD + code, *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)


def modules_of(package: str) -> list[str]:
    spec = find_spec(package)
    assert spec is not None
    found = pkgutil.walk_packages(spec.submodule_search_locations, f"{package}.")
    return [package, *(module.name for module in found)]


def test_the_guard_guards() -> None:
    """The hook of these tests really hides a package that is installed."""
    refused = run_guarded("import onnx")
    assert refused.returncode == 1
    assert "an edge box does not have it" in refused.stderr


def test_every_agent_module_imports_without_torch() -> None:
    """All modules of agent and contract import on a machine without torch, onnx, scikit-learn and safetensors."""
    names = [name for name in modules_of("kizu_agent") + modules_of("kizu_contract") if not name.endswith("__main__")]
    code = "import importlib, json\nfor name in json.loads(sys.argv[1]): importlib.import_module(name)\nprint('done')"
    result = run_guarded(code, json.dumps(names))
    assert (result.returncode, result.stdout) == (0, "done\n"), result.stderr


@pytest.mark.parametrize("command", [(), ("run",), ("check",), ("score",), ("demo",)])
def test_the_command_line_answers_help(command: tuple[str, ...]) -> None:
    """`kizu-agent … --help` works there, and the line is quick to answer."""
    result = run_guarded(RUN_AGENT, *command, "--help")
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith("usage: ")


def test_pictures_are_scored_without_torch(bundle_file: Path, tmp_path: Path) -> None:
    """`kizu-agent score` gives on such a box the score and verdict that the contract's arithmetic gives."""
    picture = np.random.default_rng(0).integers(0, 256, (9, 7), np.uint8)
    cv2.imwrite(str(tmp_path / "part.png"), picture)
    result = run_guarded(RUN_AGENT, "score", str(bundle_file), str(tmp_path / "part.png"), "--json", "-")
    assert result.returncode == 0, result.stderr
    manifest = read_bundle(bundle_file).manifest

    def mean_of_cells(tiles: NDArray[np.uint8]) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        cells = tiles.reshape(-1, 2, 2, 2, 2).mean((2, 4)).astype(np.float32)
        return cells.max((1, 2)), cells

    wanted = score_frame(picture[:, :, None], manifest.grid, manifest.reduction, mean_of_cells)
    scored = json.loads(result.stdout)
    assert scored["score"] == pytest.approx(wanted.score, rel=1e-5)
    assert scored["verdict"] == manifest.thresholds.scores().verdict(wanted.score).value
    assert (scored["width"], scored["height"]) == (7, 9)


def test_starting_imports_nothing_heavy() -> None:
    """The command line itself loads neither OpenCV nor onnxruntime: `--help` is immediate."""
    code = "import kizu_agent.__main__; print(sorted({'cv2', 'onnxruntime', 'numpy', 'pydantic'} & set(sys.modules)))"
    result = run_guarded(code)
    assert result.stdout == "[]\n", result.stderr


def test_no_module_is_left_unparsed_by_the_oldest_python() -> None:
    """Every source file parses with the grammar of Python 3.10."""
    import ast

    root = Path(__file__).parents[2]
    sources = [path for part in ("contract", "train", "export", "agent") for path in (root / part).rglob("*.py")]
    assert len(sources) > 20
    for path in sources:
        ast.parse(path.read_text(), str(path), feature_version=(3, 10))
