"""The fit: repeatable, resumable after a kill to the bit, and usable after Ctrl-C."""

import hashlib
import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType

import pytest
import torch
from safetensors.torch import load_file

from kizu_train.detectors.base import DETECTORS, Extras, find_detector
from kizu_train.errors import UsageError
from kizu_train.fit import FitRequest, fit
from kizu_train.recipes import resolve_recipe
from kizu_train.runs import open_run

Command = Callable[..., list[str]]


@pytest.fixture
def command(good_folder: Path, quick: tuple[str, ...]) -> Command:
    """A function that gives a `kizu-train fit` command line with quick settings."""

    def build(out: Path, steps: int, *more: str) -> list[str]:
        sets = [f"--set={item}" for item in (*quick, f"train.steps={steps}")]
        start = [sys.executable, "-m", "kizu_train", "fit", "patch_vae", "--data", str(good_folder), "--out", str(out)]
        return [*start, *sets, "--device", "cpu", *more]

    return build


def _request(folder: Path, out: Path, quick: tuple[str, ...], seed: int = 0, *, resume: bool = False) -> FitRequest:
    recipe = resolve_recipe("patch_vae", quick)
    return FitRequest(recipe, folder, out, "cpu", seed, resume)


def _weights(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "weights.safetensors")


def _same(first: Path, second: Path) -> bool:
    left, right = _weights(first), _weights(second)
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


def test_same_seed_same_weights(good_folder: Path, tmp_path: Path, quick: tuple[str, ...]) -> None:
    """The same seed gives the same weights, calibration and golden tiles to the bit; another seed others."""
    records = [
        fit(_request(good_folder, tmp_path / name, quick, seed)) for name, seed in (("a", 5), ("b", 5), ("c", 6))
    ]
    assert _same(tmp_path / "a", tmp_path / "b")
    assert records[0].calibrations == records[1].calibrations
    for name in ("golden.npy", "preview.png"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    assert not _same(tmp_path / "a", tmp_path / "c")


def test_a_fit_learns(good_folder: Path, tmp_path: Path, quick: tuple[str, ...]) -> None:
    """The log shows every term and a falling loss; what was learned and held out share no picture."""
    record = fit(_request(good_folder, tmp_path / "run", (*quick, "train.steps=60")))
    lines = [json.loads(line) for line in (tmp_path / "run/log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [10, 20, 30, 40, 50, 60]
    assert lines[-1]["loss"] < lines[0]["loss"]
    assert lines[-1]["loss"] == pytest.approx(lines[-1]["D"] + lines[-1]["A"] + lines[-1]["M"], rel=1e-5)
    assert (record.train_pictures, len(record.held_out)) == (7, 5)
    assert not list((tmp_path / "run").glob("checkpoint*"))


def test_killed_and_resumed_gives_the_same_bits(good_folder: Path, tmp_path: Path, quick: tuple[str, ...]) -> None:
    """1. A fit is killed by SIGKILL after a checkpoint. 2. It is resumed. 3. The run equals an uninterrupted one."""
    script = (
        "import sys; from pathlib import Path; from kizu_train.fit import *; from kizu_train.recipes import *;"
        "torch.set_num_threads(1);"
        "fit(FitRequest(resolve_recipe('patch_vae', sys.argv[3:]), Path(sys.argv[1]), Path(sys.argv[2]), 'cpu', 3,"
        "checkpoint_every_s=0.0))"
    )
    sets = (*quick, "train.steps=150")
    out = tmp_path / "killed"
    with subprocess.Popen([sys.executable, "-c", script, str(good_folder), str(out), *sets], stderr=-3) as process:
        _wait_for(lambda: (out / "log.jsonl").exists() and (out / "log.jsonl").read_text().count("\n") >= 3, process)
        process.kill()
    assert json.loads((out / "checkpoint.json").read_text())["step"] < 150
    assert not (out / "run.json").exists()
    fit(_request(good_folder, out, sets, seed=3, resume=True))
    fit(_request(good_folder, tmp_path / "whole", sets, seed=3))
    assert _same(out, tmp_path / "whole")
    steps = [json.loads(line)["step"] for line in (out / "log.jsonl").read_text().splitlines()]
    assert steps == list(range(10, 151, 10))


def test_interrupted_fit_is_usable_and_goes_on(tmp_path: Path, command: Command) -> None:
    """1. SIGINT ends a long fit early with exit code 0. 2. The run opens. 3. --resume goes on from there."""
    out = tmp_path / "run"
    with subprocess.Popen(command(out, 100_000), stdout=-1, stderr=-3, text=True) as process:
        _wait_for(lambda: (out / "log.jsonl").exists() and (out / "log.jsonl").read_text().count("\n") >= 2, process)
        process.send_signal(signal.SIGINT)
        output, _ = process.communicate(timeout=60)
    assert process.returncode == 0
    assert "early" in output
    run = open_run(out)
    assert run.stopped_early
    assert run.thresholds.warn > 0
    stopped_at = json.loads((out / "checkpoint.json").read_text())["step"]
    with subprocess.Popen(command(out, 100_000, "--resume"), stdout=-3, stderr=-3) as process:
        _wait_for(
            lambda: json.loads((out / "log.jsonl").read_text().splitlines()[-1])["step"] > stopped_at + 20, process
        )
        process.kill()


def _wait_for(condition: Callable[[], bool], process: subprocess.Popen[str] | subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + 60
    while True:
        assert process.poll() is None, "the fit ended before its time"
        assert time.monotonic() < deadline, "the fit made no progress"
        try:
            if condition():
                return
        except (ValueError, IndexError):
            pass  # a line that is being written
        time.sleep(0.02)


@pytest.mark.parametrize("change", ["seed", "recipe", "pictures"])
def test_resuming_with_other_settings_is_refused(
    good_folder: Path, tmp_path: Path, quick: tuple[str, ...], change: str
) -> None:
    """A checkpoint of another seed, recipe or set of pictures is not gone on with, and the refusal says which."""
    out = tmp_path / "run"
    fit(_request(good_folder, out, quick, seed=1))
    (out / "run.json").unlink()
    _leave_checkpoint(good_folder, out, quick)
    if change == "pictures":
        (good_folder / "000.png").unlink()
    sets = (*quick, "train.batch=8") if change == "recipe" else quick
    with pytest.raises(UsageError, match=f"begun with other {change};"):
        fit(_request(good_folder, out, sets, seed=2 if change == "seed" else 1, resume=True))


@pytest.fixture
def takes_backbone(monkeypatch: pytest.MonkeyPatch) -> None:
    """`patch_vae` for once makes use of a backbone."""
    kind = find_detector("patch_vae")
    monkeypatch.setitem(DETECTORS, "patch_vae", replace(kind, uses=frozenset({"backbone"})))


def test_an_extra_without_use_is_refused(good_folder: Path, tmp_path: Path, quick: tuple[str, ...]) -> None:
    """What a detector makes no use of is refused, not ignored."""
    request = replace(_request(good_folder, tmp_path / "run", quick), extras=Extras(defects=good_folder))
    with pytest.raises(UsageError, match="--defects: patch_vae has no use for it; leave it out"):
        fit(request)
    assert not (tmp_path / "run").exists()


@pytest.mark.usefixtures("takes_backbone")
def test_an_extra_that_is_missing(good_folder: Path, tmp_path: Path, quick: tuple[str, ...]) -> None:
    """A path that does not exist is named, before anything is written."""
    request = replace(_request(good_folder, tmp_path / "run", quick), extras=Extras(backbone=tmp_path / "no.pth"))
    with pytest.raises(UsageError, match=r"--backbone .*no\.pth: is not there"):
        fit(request)
    assert not (tmp_path / "run").exists()


@pytest.mark.usefixtures("takes_backbone")
def test_extras_are_remembered(good_folder: Path, tmp_path: Path, quick: tuple[str, ...]) -> None:
    """The run names each extra by its SHA-256; a checkpoint made with another one, or none, is not gone on with."""
    file, out = tmp_path / "weights.pth", tmp_path / "run"
    file.write_bytes(b"first")
    request = replace(_request(good_folder, out, quick, 1), extras=Extras(backbone=file))
    assert fit(request).extras == {"backbone": hashlib.sha256(b"first").hexdigest()}
    assert open_run(out).provenance.recipe["extras"]["backbone"] == hashlib.sha256(b"first").hexdigest()
    (out / "run.json").unlink()
    _leave_checkpoint(good_folder, out, quick, {"backbone": hashlib.sha256(b"first").hexdigest()})
    file.write_bytes(b"second")
    for other in (request.extras, Extras()):
        with pytest.raises(UsageError, match="begun with other backbone;"):
            fit(replace(request, resume=True, extras=other))


def test_learning_ends_when_its_time_is_up(good_folder: Path, tmp_path: Path, quick: tuple[str, ...]) -> None:
    """`stop_after_s` ends a fit as Ctrl-C does: early and usable; further figures stand in its record."""
    request = _request(good_folder, tmp_path / "run", (*quick, "train.steps=100000"))
    record = fit(replace(request, stop_after_s=0.5, metrics={"asked": 1.0}))
    assert record.stopped_early
    assert record.metrics["asked"] == 1.0
    assert record.metrics["training_s"] < 5
    assert open_run(tmp_path / "run").thresholds.warn > 0


def _leave_checkpoint(
    folder: Path, out: Path, quick: tuple[str, ...], extras: Mapping[str, str] = MappingProxyType({})
) -> None:
    """Leave the checkpoint that a fit killed near its end leaves."""
    from kizu_train.checkpoint import Checkpoint, save_checkpoint
    from kizu_train.data import open_data

    recipe = resolve_recipe("patch_vae", quick).to_dict()
    fingerprints = {"pictures": open_data(folder).fingerprint, **extras}
    save_checkpoint(out, Checkpoint(20, 1.0, 1, 1, recipe, fingerprints, "", ""), {"module.x": torch.zeros(1)})


def test_resuming_a_finished_run_changes_nothing(good_folder: Path, tmp_path: Path, quick: tuple[str, ...]) -> None:
    """--resume on a run that is through returns its record and leaves its files as they are."""
    first = fit(_request(good_folder, tmp_path / "run", quick))
    before = (tmp_path / "run/run.json").read_bytes()
    assert fit(_request(good_folder, tmp_path / "run", quick, resume=True)).finished == first.finished
    assert (tmp_path / "run/run.json").read_bytes() == before


def test_a_folder_in_use_is_not_overwritten(good_folder: Path, tmp_path: Path, quick: tuple[str, ...]) -> None:
    """An --out that holds something, or is a file, is refused."""
    with pytest.raises(UsageError, match="not empty"):
        fit(_request(good_folder, good_folder, quick))
    (tmp_path / "file").touch()
    with pytest.raises(UsageError, match="is a file"):
        fit(_request(good_folder, tmp_path / "file", quick))
