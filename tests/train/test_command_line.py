"""The command line as people and scripts use it."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
import pytest

from kizu_train.__main__ import main
from kizu_train.recipes import DEFAULTS, list_recipes


def _run(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "kizu_train", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=100, check=False)


def test_recipes(capsys: pytest.CaptureFixture[str]) -> None:
    """`recipes` lists auto, the defaults and each recipe, a line each; those of publications come last."""
    assert main(["recipes"]) == 0
    lines = capsys.readouterr().out.splitlines()
    names = [line.split()[0] for line in lines]
    assert names[:4] == ["auto", *DEFAULTS]
    assert sorted(names[4:]) == sorted(list_recipes())
    assert all(len(line.split(maxsplit=1)[1]) > 20 for line in lines)
    assert {"patch_vae_28px", "patch_vae_paper"} <= set(names[names.index("synthetic_defects") :])


def test_fit_then_evaluate(tmp_path: Path, draw_pictures: Callable[..., list[Path]], quick: tuple[str, ...]) -> None:
    """`fit` prints thresholds, the run and the next command; `evaluate` writes figures and a report."""
    data, run = tmp_path / "parts", tmp_path / "run"
    draw_pictures(data / "train/good", 10)
    draw_pictures(data / "test/good", 3, seed=1)
    for path in draw_pictures(data / "test/spot", 3, seed=2):
        picture = cv2.imread(str(path), cv2.IMREAD_GRAYSCALE)
        picture[10:22, 20:32] = 0
        cv2.imwrite(str(path), picture)
        mask = np.zeros_like(picture)
        mask[10:22, 20:32] = 255
        (data / "ground_truth/spot").mkdir(parents=True, exist_ok=True)
        cv2.imwrite(str(data / f"ground_truth/spot/{path.stem}_mask.png"), mask)
    sets = [f"--set={item}" for item in (*quick, "train.steps=400", "train.learning_rate=0.003")]
    done = _run("fit", "patch_vae", "--data", data, "--out", run, *sets, "--device", "cpu")
    assert done.returncode == 0, done.stderr
    assert "reject" in done.stdout
    assert f"kizu-export {run} --out parts.kizu" in done.stdout
    assert "training 400/400" in done.stderr
    wanted = ("--json", str(tmp_path / "q.json"), "--report", str(tmp_path / "q.html"))
    assert main(["evaluate", str(run), "--data", str(data), *wanted]) == 0
    assert json.loads((tmp_path / "q.json").read_text())["image"]["auroc"] == 1.0
    assert "<html" in (tmp_path / "q.html").read_text()


@pytest.mark.parametrize(
    ("arguments", "code", "why"),
    [
        (("fit", "nope", "--data", ".", "--out", "r"), 2, "known are "),
        (("fit", "patch_vae", "--out", "r"), 2, "--data"),
        (("fit", "patch_vae", "--data", ".", "--out", "r", "--set", "train.stepz=3"), 2, "train.steps"),
        (("fit", "patch_vae", "--data", ".", "--out", "r", "--seed", "-1"), 2, "seed"),
        (("fit", "patch_vae", "--data", "/nowhere", "--out", "/nowhere/r"), 1, "/nowhere: is not a folder"),
        (("evaluate", "/nowhere", "--data", "."), 1, "is not a run"),
    ],
)
def test_exit_codes(arguments: tuple[str, ...], code: int, why: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Wrong usage ends with 2, a failure with 1, both with one line that says why."""
    try:
        found = main(arguments)
    except SystemExit as exc:  # how argparse ends
        found = int(exc.code or 0)
    output = capsys.readouterr()
    assert (found, output.out) == (code, "")
    assert why in output.err
