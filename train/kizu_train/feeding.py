"""Batches made ahead of the steps that learn from them, by a thread or by processes, the same ones whatever makes them.

A batch depends on the seed and its step alone (cut, then prepared with a generator of its own), so that neither the
number of workers nor a resumed fit changes a number. One thread is enough to cut tiles: its work is numpy's, which lets
the step go on meanwhile. Planting defects takes longer than a small network's step on a GPU and holds Python's lock for
part of it: processes do that. Sources: concurrent.futures; the scheme is that of torch's DataLoader, which would fork a
process that already computes with several threads.
"""

import multiprocessing
import os
import signal
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kizu_train.detectors.base import TileSource
from kizu_train.errors import TrainError

Batch = tuple[NDArray[Any], ...]
Prepare = Callable[[NDArray[np.uint8], torch.Generator], Batch]
"""Good tiles uint8 [B, T, T, C] and a generator on the CPU → what a step learns from; picklable, for processes."""

_MOST_PROCESSES = 8
"""Where `auto` chooses: beyond it one process cannot unpack what the others made."""


@dataclass(frozen=True)
class Ahead:
    """How far ahead batches are made: `prefetch` of them, 0 for each when it is needed.

    `workers`: so many processes, 0 for a thread. -1: processes where a GPU computes and batches need preparing.
    """

    prefetch: int = 4
    workers: int = -1

    def __post_init__(self) -> None:
        if not (0 <= self.prefetch <= 64 and -1 <= self.workers <= 64):
            raise ValueError("prefetch must lie between 0 and 64, workers between -1 and 64")

    def processes(self, device: str, prepare: Prepare | None) -> int:
        """How many processes make batches for steps on `device`; 0: a thread does."""
        if self.workers >= 0:
            return self.workers
        needed = device != "cpu" and prepare is not None
        return max(1, min(_MOST_PROCESSES, len(os.sched_getaffinity(0)) - 1)) if needed else 0


@dataclass
class Waiting:
    """What steps took in seconds, and how much of it they waited for their batches."""

    waited_s: float = 0.0
    whole_s: float = 0.0
    steps: int = 0

    @property
    def share(self) -> float | None:
        """Share of the time that was spent waiting, 0–1; None where no step was taken."""
        return self.waited_s / self.whole_s if self.whole_s else None


@dataclass(frozen=True)
class Feeding:
    """How the steps of this fit are fed, and how long they waited."""

    ahead: Ahead = field(default_factory=Ahead)
    waiting: Waiting = field(default_factory=Waiting)


_current: ContextVar[Feeding | None] = ContextVar("feeding", default=None)


@contextmanager
def fed(ahead: Ahead) -> Iterator[Waiting]:
    """Feed all steps inside as `ahead` says, and count how long they wait."""
    feeding = Feeding(ahead)
    token = _current.set(feeding)
    try:
        yield feeding.waiting
    finally:
        _current.reset(token)


def current() -> Feeding:
    """How steps are fed here."""
    return _current.get() or Feeding()


@dataclass(frozen=True)
class Recipe:
    """How a step's batch is made: the team's `size` tiles of `tiles`, this process's `rows` of them, prepared.

    `number` gives the seed of a step's generator.
    """

    tiles: TileSource
    size: int
    rows: slice
    number: Callable[[int], int]
    prepare: Prepare | None

    def make(self, step: int) -> Batch:
        """The batch of `step`, always the same."""
        rows = self.tiles.batch(step, self.size)[self.rows]
        if self.prepare is None:
            return (rows,)
        return self.prepare(rows, torch.Generator().manual_seed(self.number(step)))


@contextmanager
def batches(recipe: Recipe, first: int, steps: int, device: torch.device) -> Iterator[Iterator[tuple[Tensor, ...]]]:
    """The batches of steps `first` to `steps` on `device`, in order; whoever makes them is through when this ends.

    Raises what making one raised, at its step; TrainError where a process that makes them was killed.
    """
    ahead = current().ahead
    if not ahead.prefetch:
        yield (_place(recipe.make(step), device) for step in range(first, steps))
        return
    with _workers(recipe, ahead.processes(device.type, recipe.prepare)) as (executor, make):
        yield _in_order(executor, make, range(first, steps), ahead.prefetch, device)


def timed(found: Iterator[tuple[Tensor, ...]]) -> Iterator[tuple[Tensor, ...]]:
    """The same batches; what is waited for them and what is done between them is counted."""
    waiting = current().waiting
    began = time.monotonic()
    while True:
        asked = time.monotonic()
        batch = next(found, None)
        waiting.waited_s += time.monotonic() - asked
        if batch is None:
            return
        try:
            yield batch
        finally:  # the last one is not asked to go on
            now = time.monotonic()
            waiting.steps, waiting.whole_s, began = waiting.steps + 1, waiting.whole_s + now - began, now


@contextmanager
def _workers(recipe: Recipe, processes: int) -> Iterator[tuple[Executor, Callable[[int], Batch]]]:
    """Who makes batches, and what is asked of it; no batch that nobody takes is begun once this ends."""
    executor: Executor
    if processes:
        context = multiprocessing.get_context("spawn")  # a fork of a process with threads may hang
        executor = ProcessPoolExecutor(processes, context, _begin_work, (recipe,))
    else:
        executor = ThreadPoolExecutor(1, "batches")
    try:
        yield executor, (_make if processes else recipe.make)
    except BrokenProcessPool as exc:
        raise TrainError("a process that makes batches was killed, perhaps for memory; lower data.workers") from exc
    finally:
        executor.shutdown(wait=True, cancel_futures=True)


def _in_order(
    executor: Executor, make: Callable[[int], Batch], steps: range, prefetch: int, device: torch.device
) -> Iterator[tuple[Tensor, ...]]:
    left, pending = iter(steps), deque[Future[Batch]]()
    while True:
        while len(pending) < prefetch and (step := next(left, None)) is not None:
            pending.append(executor.submit(make, step))
        if not pending:
            return
        yield _place(pending.popleft().result(), device)


def _place(batch: Batch, device: torch.device) -> tuple[Tensor, ...]:
    """A batch on `device`; towards a GPU it travels while the host goes on."""
    tensors = tuple(torch.from_numpy(np.ascontiguousarray(part)) for part in batch)
    if device.type != "cuda":
        return tensors
    return tuple(tensor.pin_memory().to(device, non_blocking=True) for tensor in tensors)


_recipe: Recipe | None = None
"""In a process that makes batches: how."""


def _begin_work(recipe: Recipe) -> None:
    global _recipe  # noqa: PLW0603 - what a process is started for, it keeps
    _recipe = recipe
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the terminal's Ctrl-C is for the process that trains
    cv2.setNumThreads(1)
    torch.set_num_threads(1)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """Stay behind for no one: a training that was killed cannot end its processes."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _make(step: int) -> Batch:
    assert _recipe is not None  # noqa: S101 - for the type checker: set before the first batch
    return _recipe.make(step)
