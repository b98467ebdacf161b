"""Several processes train one model: what they exchange, how they stop, and that the model is as good."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
import pytest

from kizu_train import distributed
from kizu_train.data import open_data
from kizu_train.evaluation.evaluate import evaluate
from kizu_train.fit import FitRequest, fit
from kizu_train.recipes import resolve_recipe
from kizu_train.runs import open_run
from kizu_train.scoring import frame_scorer

TORCHRUN = (sys.executable, "-W", "ignore", "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port")
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}


def _port() -> str:
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


def _launch(*arguments: str | Path) -> subprocess.Popen[str]:
    command = [*TORCHRUN, _port(), *map(str, arguments)]
    return subprocess.Popen(command, stdout=-1, stderr=-1, text=True, env=ENVIRONMENT)


def _image_auroc(run: Path, data: Path) -> float:
    opened = open_run(run)
    score = frame_scorer(opened.scorer, opened.grid, opened.reduction)
    found = evaluate(open_data(data, opened.colour), score, opened.thresholds, colour=opened.colour)
    return float(found.headline()["image_auroc"])


@pytest.fixture
def product(tmp_path: Path, draw_pictures: Callable[..., list[Path]]) -> Path:
    """Striped pictures in MVTec layout; every other defect is a faint spot."""
    data = tmp_path / "stripes"
    draw_pictures(data / "train/good", 16)
    draw_pictures(data / "test/good", 12, seed=1)
    for index, path in enumerate(draw_pictures(data / "test/spot", 12, seed=2)):
        picture = cv2.imread(str(path), cv2.IMREAD_GRAYSCALE)
        picture[12:20, 20:28] = np.clip(picture[12:20, 20:28].astype(int) - (110 if index % 2 else 60), 0, 255)
        cv2.imwrite(str(path), picture)
    return data


@pytest.mark.slow
def test_two_processes_learn_what_one_learns(product: Path, tmp_path: Path, quick: tuple[str, ...]) -> None:
    """2 gloo processes give a run that opens and ranks pictures as a single process's does, within noise."""
    sets = (*quick, "train.steps=150", "reduction.smooth_sigma_px=2.0")
    shared = [f"--set={item}" for item in sets]
    with _launch(
        "-m", "kizu_train", "fit", "patch_vae", "--data", product, "--out", tmp_path / "two", "--device", "cpu", *shared
    ) as team:
        output, errors = team.communicate(timeout=60)
    assert team.returncode == 0, errors
    assert output.count("trained ") == 1
    assert errors.count("training 150/150") == 1
    assert not list((tmp_path / "two").glob("checkpoint*"))
    fit(FitRequest(resolve_recipe("patch_vae", sets), product, tmp_path / "one", "cpu"))
    one, two = (_image_auroc(tmp_path / name, product) for name in ("one", "two"))
    assert one > 0.8
    assert two == pytest.approx(one, abs=0.12)
    losses = [json.loads((tmp_path / name / "log.jsonl").read_text().splitlines()[-1])["M"] for name in ("one", "two")]
    assert losses[1] == pytest.approx(losses[0], rel=0.5)


EXCHANGE = """
import torch
from torch import nn
from kizu_train import distributed
from kizu_train.errors import UsageError
def refuse():
    raise UsageError("the first one says no")
with distributed.joined("cpu"):
    rank = distributed.rank()
    net = nn.Sequential(nn.Linear(2, 1, bias=False), nn.BatchNorm1d(1))
    for weight in net.parameters():
        weight.grad = torch.full_like(weight, 1.0 + 4 * rank)
    net[1].running_mean.fill_(4.0 * rank)
    distributed.average_step(net, 0.75 if rank == 0 else 0.25)
    assert net[0].weight.grad.tolist() == [[2.0, 2.0]] and net[1].running_mean.item() == 1.0
    assert distributed.agree(flag=rank == 1) and not distributed.agree(flag=False)
    assert distributed.from_first(lambda: {"from": rank}) == {"from": 0}
    assert list(range(5))[distributed.my_rows(5)] == ([0, 2, 4], [1, 3])[rank]
    try:
        distributed.from_first(refuse)
    except UsageError as exc:
        assert "says no" in str(exc)
    else:
        raise SystemExit("not refused")
    if rank == 1:
        raise SystemExit(1)
    distributed.agree(flag=False)
"""


@pytest.mark.slow
def test_what_is_exchanged_and_one_that_dies(tmp_path: Path) -> None:
    """Gradients and statistics are weighted sums, decisions are shared; when one process dies, the others end soon."""
    script = tmp_path / "exchange.py"
    script.write_text(EXCHANGE)
    began = time.monotonic()
    with _launch(script) as team:
        _, errors = team.communicate(timeout=60)
    assert team.returncode != 0
    assert "AssertionError" not in errors
    assert "not refused" not in errors
    assert "exitcode  : 1" in errors
    assert time.monotonic() - began < 50


@pytest.mark.slow
def test_interrupted_team_leaves_a_usable_run(product: Path, tmp_path: Path, quick: tuple[str, ...]) -> None:
    """SIGINT to torchrun stops all processes after the same step, and the run opens."""
    out = tmp_path / "run"
    sets = [f"--set={item}" for item in (*quick, "train.steps=100000")]
    arguments = ("fit", "patch_vae", "--data", product, "--out", out, "--device", "cpu", *sets)
    with _launch("-m", "kizu_train", *arguments) as team:
        deadline = time.monotonic() + 60
        while not ((out / "log.jsonl").exists() and (out / "log.jsonl").read_text().count("\n") >= 2):
            assert team.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.05)
        team.send_signal(signal.SIGINT)
        team.communicate(timeout=60)
    assert open_run(out).stopped_early
    assert (out / "checkpoint.json").exists()


def test_a_single_process_is_a_team_of_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """Outside torchrun nothing is exchanged, and a batch for a larger team is refused with what to set."""
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    with distributed.joined("cpu"):
        assert (distributed.rank(), distributed.world()) == (0, 1)
        assert distributed.from_first(lambda: 7) == 7
        assert distributed.agree(flag=True)
        assert list(range(4))[distributed.my_rows(4)] == [0, 1, 2, 3]
    with pytest.raises(distributed.TrainError, match=r"train\.batch=2"):
        distributed.my_rows(1)
