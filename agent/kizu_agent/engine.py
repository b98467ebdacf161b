"""The scorer graph at work: batches, memory, I/O binding. Which provider runs it is chosen in `providers`."""

import ctypes
import math
import re
import threading
import time
from collections.abc import Callable, Mapping
from itertools import pairwise
from types import TracebackType
from typing import Any, NamedTuple

import numpy as np
import onnxruntime as ort
import structlog
from numpy.typing import NDArray

from kizu_agent.batch_sizes import candidates, choose, measure
from kizu_agent.errors import EngineError
from kizu_agent.providers import choose_batch, first_line, open_session
from kizu_agent.settings import EngineConfig
from kizu_agent.streams import Streams
from kizu_agent.threads import budget
from kizu_contract.manifest import BatchProfile, Graph

GROW_AFTER_S = 600.0
"""So long after the device had no memory for a batch, larger ones are tried again."""
# What CUDA, cuDNN, cuBLAS, TensorRT, onnxruntime's arena and the C++ library say; they share no error code.
_NO_MEMORY = re.compile(r"out ?of ?memory|failed to allocate|alloc_failed|bad_?alloc|bad allocation", re.IGNORECASE)

_Part = tuple[NDArray[np.uint8], NDArray[np.int64] | None, NDArray[np.float32], NDArray[np.float32]]

log = structlog.get_logger(__name__)


class Engine:
    """Scores tiles in batches. Used by one thread at a time; `close` frees the graph and its memory.

    On the CPU it runs as many batches side by side as it has streams, each in one thread: two threads inside every
    operator of a graph of this size wait for each other most of the time (docs/decisions/0028).

    `provider` is the one that really runs; `degraded_reason` says why it is not the one asked for, and is None where
    it is. `on_build` is called when the graph has to be compiled first, which takes minutes. Raises EngineError when
    the graph does not load, does not have the interface that `graph` promises, or the provider is missing and the
    configuration says fail.
    """

    def __init__(
        self, scorer: bytes, graph: Graph, config: EngineConfig, on_build: Callable[[], None] = lambda: None
    ) -> None:
        self.graph = graph
        self._session: ort.InferenceSession | None = None
        self._memory = _Memory(graph.batch)
        opened = open_session(scorer, config, graph, on_build)
        self.provider, self.degraded_reason = opened.provider, opened.degraded_reason
        _check_interface(opened.session, graph)
        self._streams = Streams(budget(self.provider, config.threads, config.streams).streams)
        self.batch = choose_batch(scorer, graph, config, self.provider)
        self._session = opened.session
        try:
            self._warm_up()
        except BaseException:
            self.close()
            raise
        for entry in opened.caches:
            entry.finish(config.cache_max_bytes)

    def __enter__(self) -> "Engine":  # noqa: PYI034 - typing.Self came with Python 3.11
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Free the graph; idempotent. A closed engine refuses to run."""
        self._session = None
        self._streams.close()

    def run(
        self, tiles: NDArray[np.uint8], position: NDArray[np.int64] | None = None
    ) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """Score `tiles` uint8 [N, T, T, C] (N >= 0): score float32 [N] and map float32 [N, T/m, T/m].

        `position` int64 [N], the index of each tile in its frame's grid, is needed by graphs that take it. Numbers
        that are not finite pass through: judging makes them `unknown`. Raises EngineError for tiles of another form
        and when the graph fails.
        """
        if self._session is None:
            raise EngineError("the engine is closed; open a new one")
        side = self.graph.tile_px // self.graph.map_cell_px
        tiles, position = self._checked(tiles, position)
        score = np.empty(len(tiles), np.float32)
        cells = np.empty((len(tiles), side, side), np.float32)
        self._memory.maybe_grow()
        self._run_split(self._session, tiles, position, score, cells)
        return score, cells

    def tune(self) -> None:
        """Measure which batch is best on this machine and keep it, unless one is set or known; takes about a second.

        A machine that is busy with something else tells nothing: nothing is kept then. Raises EngineError when the
        graph fails, OSError where it cannot be written.
        """
        if not self.batch.is_open or self._session is None:
            return
        seconds = measure(self._run_empty, candidates(self.graph))
        if seconds:
            self.batch.keep(choose(seconds, self.streams))

    @property
    def streams(self) -> int:
        """How many batches run side by side."""
        return self._streams.count

    @property
    def out_of_memory(self) -> int:
        """How often the device had no memory for a batch."""
        return self._memory.failures

    @property
    def memory_problem(self) -> str | None:
        """That batches are smaller than they should be, in words; None where they are not."""
        if self._memory.is_crowded:
            return f"{self.provider} is short of memory: batches of {self.graph.batch.min} tiles, one after the other"
        if self._memory.most >= self.graph.batch.opt:
            return None
        return f"{self.provider} is short of memory: batches of at most {self._memory.most} tiles"

    def _run_split(
        self,
        session: ort.InferenceSession,
        tiles: NDArray[np.uint8],
        position: NDArray[np.int64] | None,
        score: NDArray[np.float32],
        cells: NDArray[np.float32],
    ) -> None:
        """Run in batches that fit; one for which the device has no memory is run again in halves.

        The smallest is run again alone: what ran beside it had the memory. For a while nothing runs side by side then.
        """
        most, too_large, alone = self._memory.most, list[slice](), list[slice]()

        def part(batch: slice) -> _Part:
            places = None if position is None else position[batch]
            return tiles[batch], places, score[batch], cells[batch]

        def run(batch: slice) -> None:
            count = batch.stop - batch.start
            if count > self._memory.most:  # a batch before it did not fit
                too_large.append(batch)
                return
            try:
                self._run_batch(session, *part(batch))
            except _OutOfMemoryError:
                is_smaller = self._memory.shrink(count)
                (too_large if is_smaller else alone).append(batch)
                if not is_smaller and self.streams > 1:
                    self._memory.be_crowded()

        sizes = Sizes(self.graph.batch.min, min(self.batch.size, most), most)
        if self._memory.is_crowded:
            for batch in split_evenly(len(tiles), sizes):
                run(batch)
        else:
            self._streams.each(run, split_evenly(len(tiles), sizes, self.streams))
        for batch in too_large:
            self._run_split(session, *part(batch))
        for batch in alone:
            self._run_smallest(session, part(batch))

    def _run_smallest(self, session: ort.InferenceSession, part: _Part) -> None:
        try:
            self._run_batch(session, *part)
        except _OutOfMemoryError as exc:
            self._memory.shrink(len(part[0]))
            raise EngineError(f"{exc}; a smaller one is not possible") from exc

    def _checked(
        self, tiles: NDArray[np.uint8], position: NDArray[np.int64] | None
    ) -> tuple[NDArray[np.uint8], NDArray[np.int64] | None]:
        wanted = (self.graph.tile_px, self.graph.tile_px, self.graph.channels)
        if tiles.dtype != np.uint8 or tiles.shape[1:] != wanted:
            raise EngineError(
                f"tiles are {tiles.dtype} {list(tiles.shape)}; the graph takes uint8 [N, *{list(wanted)}]"
            )
        if "position" not in self.graph.inputs:
            return np.ascontiguousarray(tiles), None
        if position is None or position.dtype != np.int64 or position.shape != (len(tiles),):
            raise EngineError(f"the graph takes the position of each tile: int64 [{len(tiles)}]")
        return np.ascontiguousarray(tiles), np.ascontiguousarray(position)

    def _run_batch(
        self,
        session: ort.InferenceSession,
        tiles: NDArray[np.uint8],
        position: NDArray[np.int64] | None,
        score: NDArray[np.float32],
        cells: NDArray[np.float32],
    ) -> None:
        """Run one batch straight into `score` and `cells`; one below the profile's minimum is filled up first."""
        lacking = self.graph.batch.min - len(tiles)
        if lacking > 0:
            full = np.concatenate([tiles, np.repeat(tiles[-1:], lacking, axis=0)])
            places = None if position is None else np.concatenate([position, np.repeat(position[-1:], lacking)])
            wide_score, wide_cells = (
                np.empty(len(full), np.float32),
                np.empty((len(full), *cells.shape[1:]), np.float32),
            )
            self._run_batch(session, full, places, wide_score, wide_cells)
            score[:], cells[:] = wide_score[: len(tiles)], wide_cells[: len(tiles)]
            return
        inputs: dict[str, NDArray[Any]] = {"tiles": tiles}
        if position is not None:
            inputs["position"] = position
        try:
            run_bound(session, inputs, score, cells)
        except Exception as exc:  # onnxruntime's errors share no base but Exception
            kind = _OutOfMemoryError if is_out_of_memory(exc) else EngineError
            raise kind(f"the graph failed on a batch of {len(tiles)} tiles: {first_line(exc)}") from exc

    def _warm_up(self) -> None:
        """Run a usual batch in each stream: memory is laid out and kernels are chosen before the first frame."""
        try:
            self._run_empty(self.batch.size)
        except _OutOfMemoryError:
            self.run(*self._empty_tiles(self.batch.size * self.streams))

    def _empty_tiles(self, count: int) -> tuple[NDArray[np.uint8], NDArray[np.int64] | None]:
        shape = (count, self.graph.tile_px, self.graph.tile_px, self.graph.channels)
        return np.zeros(shape, np.uint8), np.zeros(count, np.int64) if "position" in self.graph.inputs else None

    def _run_empty(self, count: int) -> None:
        """Run a batch of tiles that mean nothing in each stream. Raises EngineError, where memory is short too."""
        session, side = self._session, self.graph.tile_px // self.graph.map_cell_px
        assert session is not None  # noqa: S101 - who calls this has looked
        inputs = self._empty_tiles(count)

        def run() -> None:
            outputs = np.empty(count, np.float32), np.empty((count, side, side), np.float32)
            self._run_batch(session, *inputs, *outputs)

        self._streams.together(run)


class _OutOfMemoryError(EngineError):
    """The device had no memory for a batch: a smaller one may fit."""


class _Memory:
    """How many tiles the device takes at once: halved when its memory does not do, doubled again after a while.

    It is crowded for as long where the smallest batches did not fit side by side.
    """

    def __init__(self, batch: BatchProfile) -> None:
        self.most, self.failures = batch.max, 0
        self._batch = batch
        self._lock = threading.Lock()
        self._grow_mono_ns = self._crowded_until_mono_ns = 0

    @property
    def is_crowded(self) -> bool:
        """Whether batches had better run one after the other."""
        return time.monotonic_ns() < self._crowded_until_mono_ns

    def be_crowded(self) -> None:
        """The smallest batch did not fit beside others. Called by every stream."""
        with self._lock:
            if not self.is_crowded:
                log.warning("out of memory on the device: batches run one after the other", tiles=self._batch.min)
            self._crowded_until_mono_ns = time.monotonic_ns() + round(GROW_AFTER_S * 1e9)

    def shrink(self, failed: int) -> bool:
        """Halve after a batch of `failed` tiles did not fit; False where it was the smallest already.

        Called by every stream: batches of one size that fail side by side halve it once.
        """
        with self._lock:
            self.failures += 1
            self._grow_mono_ns = time.monotonic_ns() + round(GROW_AFTER_S * 1e9)
            if failed <= self._batch.min:
                return False
            if failed <= self.most:
                self.most = max(self._batch.min, failed // 2)
                log.warning("out of memory on the device: smaller batches", most=self.most, instead_of=self._batch.max)
            return True

    def maybe_grow(self) -> None:
        """Allow twice as many tiles where nothing failed for a while: whoever took the memory may have gone."""
        if self.most < self._batch.max and time.monotonic_ns() >= self._grow_mono_ns:
            self.most *= 2
            self._grow_mono_ns = time.monotonic_ns() + round(GROW_AFTER_S * 1e9)
            if self.most >= self._batch.opt:
                self.most = self._batch.max
                log.info("batches are as large as they should be again")


def run_bound(
    session: ort.InferenceSession,
    inputs: Mapping[str, NDArray[Any]],
    score: NDArray[np.float32],
    cells: NDArray[np.float32],
) -> None:
    """Run a graph on contiguous `inputs`, straight into `score` and `cells`. Raises whatever onnxruntime does."""
    binding = session.io_binding()
    for name, given in inputs.items():
        binding.bind_cpu_input(name, given)  # copies to a GPU, which may have no room
    for name, out in (("score", score), ("map", cells)):
        binding.bind_output(name, "cpu", 0, np.float32, out.shape, address_of(out))
    session.run_with_iobinding(binding)


def address_of(array: NDArray[Any]) -> int:
    """Where a writable contiguous array of at least one element lies.

    `array.ctypes.data` would enter five names into CPython's table of interned strings each time and drop them again:
    the table fills with what was dropped, is laid out anew every few thousand frames, and leaves holes in the heap.
    """
    return ctypes.addressof(ctypes.c_char.from_buffer(array.data))


def is_out_of_memory(exc: Exception) -> bool:
    """Tell whether a graph failed for want of memory; onnxruntime has no error of its own for that."""
    return isinstance(exc, MemoryError) or _NO_MEMORY.search(str(exc)) is not None


class Sizes(NamedTuple):
    """Tiles a batch, at least, usually and at most."""

    least: int
    usual: int
    largest: int


def split_evenly(count: int, sizes: Sizes, streams: int = 1) -> list[slice]:
    """Cut `count` tiles into batches of about `sizes.usual` that differ by one at most.

    Even batches keep a last one of a tile or two from costing a whole run, and few sizes keep memory plans few. They
    are as many as all `streams` take in turns, unless that made them smaller than `sizes.least`.
    """
    if not count:
        return []
    batches = max(math.ceil(count / sizes.largest), round(count / sizes.usual), 1)
    in_turns = math.ceil(batches / streams) * streams
    batches = max(batches, min(in_turns, count // sizes.least))
    edges = [count * i // batches for i in range(batches + 1)]
    return [slice(start, stop) for start, stop in pairwise(edges)]


def _check_interface(session: ort.InferenceSession, graph: Graph) -> None:
    """Compare names, types and shapes with what the manifest says; the first dimension is the batch's."""
    side = graph.tile_px // graph.map_cell_px
    tiles = ("tensor(uint8)", [graph.tile_px, graph.tile_px, graph.channels])
    inputs = {"tiles": tiles, "position": ("tensor(int64)", [])}
    wanted = {name: inputs[name] for name in graph.inputs}
    outputs = {"score": ("tensor(float)", []), "map": ("tensor(float)", [side, side])}
    _compare("inputs", {arg.name: (arg.type, arg.shape) for arg in session.get_inputs()}, wanted)
    _compare("outputs", {arg.name: (arg.type, arg.shape) for arg in session.get_outputs()}, outputs)


def _compare(
    what: str,
    found: dict[str, tuple[str, list[int | str | None]]],
    wanted: dict[str, tuple[str, list[int]]],
) -> None:
    if found.keys() != wanted.keys():
        raise EngineError(f"the graph's {what} are {sorted(found)}; the manifest says {sorted(wanted)}")
    for name, (kind, inner) in wanted.items():
        has_kind, has_shape = found[name]
        if has_kind != kind or not has_shape or isinstance(has_shape[0], int) or has_shape[1:] != inner:
            raise EngineError(f"the graph's {name} is {has_kind} {has_shape}; the manifest says {kind} {['N', *inner]}")
