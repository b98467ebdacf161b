"""Batches made ahead: the same ones whoever makes them, errors at their step, nobody left behind."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file

from kizu_contract.tiles import TileGrid, TileLayout
from kizu_train.errors import DataError, TrainError
from kizu_train.feeding import Ahead, Batch, Recipe, batches, current, fed, timed
from kizu_train.fit import FitRequest, fit
from kizu_train.recipes import resolve_recipe
from kizu_train.tile_pool import TilePool

CPU = torch.device("cpu")
HOWS = {"when needed": Ahead(0), "thread": Ahead(3, 0), "processes": Ahead(5, 2)}


@dataclass(frozen=True)
class Numbers:
    """Tiles that hold their step's number; making one fails at `bad`, ends its process at `deadly`, lasts `lasts_s`."""

    bad: int = -1
    deadly: int = -1
    lasts_s: float = 0.0
    count: int = 4

    def batch(self, step: int, size: int) -> NDArray[np.uint8]:
        """`size` tiles of 4 px."""
        if step == self.bad:
            raise DataError(f"step {step} has no picture")
        if step == self.deadly:
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(self.lasts_s)
        return np.full((size, 4, 4, 1), step, np.uint8)

    def sweep(self) -> Iterator[NDArray[np.uint8]]:
        """Not asked for."""
        raise NotImplementedError

    def frame_layout(self) -> TileLayout:
        """Not asked for."""
        raise NotImplementedError


@dataclass(frozen=True)
class Noise:
    """Adds noise that depends on the generator."""

    def __call__(self, tiles: NDArray[np.uint8], generator: torch.Generator) -> Batch:
        """Tiles and noise for each."""
        return tiles, torch.rand(len(tiles), generator=generator).numpy()


@dataclass(frozen=True)
class Number:
    """Seeds of steps."""

    def __call__(self, step: int) -> int:
        """The seed of `step`."""
        return 7 + step


def _recipe(tiles: Any, *, noise: bool = True, size: int = 6) -> Recipe:
    return Recipe(tiles, size, slice(1, None, 2), Number(), Noise() if noise else None)


@pytest.fixture(scope="module")
def reference() -> list[tuple[torch.Tensor, ...]]:
    """What steps 2 to 9 must be fed."""
    with fed(HOWS["when needed"]), batches(_recipe(Numbers()), 2, 10, CPU) as made:
        return list(made)


@pytest.mark.parametrize("how", ["thread", "processes"])
def test_batches_are_the_same_whoever_makes_them(reference: list[tuple[torch.Tensor, ...]], how: str) -> None:
    """A thread and processes give, in order, the rows and the noise that are made step by step."""
    with fed(HOWS[how]), batches(_recipe(Numbers()), 2, 10, CPU) as made:
        found = list(made)
    assert [int(batch[0][0, 0, 0, 0]) for batch in found] == list(range(2, 10))
    assert all(len(batch[0]) == 3 for batch in found)
    assert len({float(batch[1][0]) for batch in found}) == 8
    for batch, wanted in zip(found, reference, strict=True):
        assert all(torch.equal(part, own) for part, own in zip(batch, wanted, strict=True))


@pytest.mark.parametrize("how", HOWS)
def test_an_error_comes_at_its_step(how: str) -> None:
    """What cannot be made is raised when its step is reached; those before it are still given."""
    seen: list[Any] = []
    with pytest.raises(DataError, match="step 3 has no picture"):
        _take(Numbers(bad=3), HOWS[how], seen)
    assert len(seen) == 3


def _take(tiles: Numbers, how: Ahead, seen: list[Any]) -> None:
    with fed(how), batches(_recipe(tiles), 0, 9, CPU) as made:
        seen.extend(made)


def test_a_killed_process_is_named() -> None:
    """A process that dies ends the training with what to do, and does not hang it."""
    with pytest.raises(TrainError, match=r"lower data\.workers"):
        _take(Numbers(deadly=1), HOWS["processes"], [])


@pytest.mark.parametrize("ahead", [0, 3])
def test_the_bound_and_the_end(ahead: int) -> None:
    """Batches wait in bounded number; leaving early ends the thread at once, with the batch it is at."""
    asked: list[int] = []

    class Counting(Numbers):
        def batch(self, step: int, size: int) -> NDArray[np.uint8]:
            asked.append(step)
            return super().batch(step, size)

    with fed(Ahead(ahead, 0)), batches(_recipe(Counting()), 0, 10_000, CPU) as made:
        next(made)
        deadline = time.monotonic() + 5
        while len(asked) < ahead and time.monotonic() < deadline:
            time.sleep(0.01)
        time.sleep(0.05)
        assert len(asked) == max(1, ahead)
    assert not any(thread.name.startswith("batches") for thread in threading.enumerate())


def test_waiting_is_counted() -> None:
    """A step that only waits has a share near 1; one that works while batches are made ahead waits little."""
    shares = {}
    for how in ("when needed", "thread"):
        with fed(HOWS[how]) as waiting, batches(_recipe(Numbers(lasts_s=0.02)), 0, 12, CPU) as made:
            for _ in timed(made):
                time.sleep(0.04)
        assert waiting.steps == 12
        shares[how] = waiting.share
    assert shares["when needed"] is not None
    assert shares["thread"] is not None
    assert 0.2 < shares["when needed"] < 0.6
    assert shares["thread"] < 0.6 * shares["when needed"]
    assert current().waiting.share is None


def test_processes_are_chosen_for_gpus_alone() -> None:
    """`auto` starts processes where a GPU waits for batches that must be prepared, and a thread elsewhere."""
    auto = Ahead()
    assert auto.processes("cpu", Noise()) == auto.processes("cuda", None) == 0
    assert 1 <= auto.processes("cuda", Noise()) <= 8
    assert Ahead(4, 3).processes("cpu", None) == 3
    with pytest.raises(ValueError, match="prefetch"):
        Ahead(-1)


@pytest.mark.parametrize("recipe", ["patch_vae", "synthetic_defects"])
def test_prefetching_learns_the_same(good_folder: Path, tmp_path: Path, quick: tuple[str, ...], recipe: str) -> None:
    """Weights are the same to the bit with batches made when needed, by a thread and by processes; the share is told.

    A run begun in one way goes on in another.
    """
    small = ("grid.tile_px=32", "grid.stride_px=16", "network.widths=[8,8]", "train.batch=4", "train.steps=12")
    sets = quick if recipe == "patch_vae" else small
    weights = []
    for name, ahead in (("none", Ahead(0)), ("thread", Ahead(3, 0)), ("processes", Ahead(3, 1))):
        chosen = resolve_recipe(recipe, (*sets, f"data.prefetch={ahead.prefetch}", f"data.workers={ahead.workers}"))
        record = fit(FitRequest(chosen, good_folder, tmp_path / name, "cpu", 3))
        assert 0 < record.metrics["waiting_share"] < 1
        lines = (tmp_path / name / "log.jsonl").read_text().splitlines()
        assert 0 < json.loads(lines[-1])["waiting_share"] < 1
        weights.append(load_file(tmp_path / name / "weights.safetensors"))
    for other in weights[1:]:
        assert all(torch.equal(weights[0][name], other[name]) for name in weights[0])


def test_a_run_goes_on_with_another_prefetch(good_folder: Path, tmp_path: Path, quick: tuple[str, ...]) -> None:
    """A checkpoint of another `data.prefetch` is gone on with, to the same bits."""
    half = resolve_recipe("patch_vae", (*quick, "train.steps=150", "data.prefetch=0"))
    request = FitRequest(half, good_folder, tmp_path / "cut", "cpu", 3)
    assert fit(replace(request, stop_after_s=0.05)).stopped_early
    whole = resolve_recipe("patch_vae", (*quick, "train.steps=150", "data.prefetch=5"))
    fit(replace(request, recipe=whole, resume=True))
    fit(replace(request, recipe=whole, out=tmp_path / "whole"))
    first, second = (load_file(tmp_path / name / "weights.safetensors") for name in ("cut", "whole"))
    assert all(torch.equal(first[name], second[name]) for name in first)


ORPHAN = """
import os, sys, time, torch
sys.path.insert(0, sys.argv[1])
from test_feeding import Numbers, _recipe
from kizu_train.feeding import Ahead, batches, fed
if __name__ == "__main__":
    with fed(Ahead(2, 1)), batches(_recipe(Numbers()), 0, 9, torch.device("cpu")) as made:
        next(made)
        children = open(f"/proc/self/task/{os.getpid()}/children").read()
        print(children, flush=True)
        time.sleep(60)
"""


def test_processes_end_with_a_killed_training(tmp_path: Path) -> None:
    """SIGKILL to the training leaves none of the processes that made its batches."""
    script = tmp_path / "orphan.py"
    script.write_text(ORPHAN)
    with subprocess.Popen([sys.executable, script, str(Path(__file__).parent)], stdout=-1, text=True) as process:
        assert process.stdout is not None
        children = [int(text) for text in process.stdout.readline().split()]
        process.kill()
    assert children
    deadline = time.monotonic() + 20
    while any(_is_alive(child) for child in children):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def _is_alive(number: int) -> bool:
    try:
        return "\nState:\tZ" not in Path(f"/proc/{number}/status").read_text()
    except FileNotFoundError:
        return False


def test_a_pool_travels_without_its_pictures(tmp_path: Path, draw_pictures: Callable[..., list[Path]]) -> None:
    """A pool that another process takes up gives the same tiles, and its pickle does not hold the pictures."""
    import pickle

    pool = TilePool(draw_pictures(tmp_path, 5), TileGrid(16, 8), "grey", seed=2, cache_mb=1)
    wanted = pool.batch(3, 8)
    data = pickle.dumps(pool)
    assert len(data) < 10_000
    assert np.array_equal(pickle.loads(data).batch(3, 8), wanted)  # noqa: S301
