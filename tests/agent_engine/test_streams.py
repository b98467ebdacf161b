"""Batches side by side: what runs beside what, what an error leaves, and that results do not depend on it."""

import gc
import threading
import time
import weakref
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kizu_agent.engine import Engine, Sizes, split_evenly
from kizu_agent.errors import EngineError
from kizu_agent.settings import EngineConfig
from kizu_agent.streams import Streams
from kizu_contract.manifest import BatchProfile, Graph

PATIENCE_S = 10.0


@pytest.mark.parametrize("count", [1, 2, 3, 8])
@pytest.mark.parametrize("parts", [0, 1, 2, 7, 100])
def test_each_part_is_worked_on_once(count: int, parts: int) -> None:
    """Whatever the number of streams and parts; in use again afterwards."""
    streams, done = Streams(count), list[int]()
    for _ in range(2):
        done.clear()
        streams.each(done.append, range(parts))
        assert sorted(done) == list(range(parts))
    streams.close()
    streams.close()


def test_streams_work_side_by_side() -> None:
    """Three parts meet, each in a thread of its own, the caller's among them: one after the other they never would."""
    streams, meeting, threads = Streams(3), threading.Barrier(3, timeout=PATIENCE_S), set[int]()

    def work(_: int) -> None:
        meeting.wait()
        threads.add(threading.get_ident())

    streams.each(work, range(3))
    streams.close()
    assert len(threads) == 3
    assert threading.get_ident() in threads


def test_a_single_part_stays_in_its_thread() -> None:
    """One part wakes no other thread, and starts none."""
    streams, threads, before = Streams(4), list[int](), threading.active_count()
    streams.each(lambda _: threads.append(threading.get_ident()), [0])
    assert threads == [threading.get_ident()]
    assert threading.active_count() == before


@pytest.mark.parametrize("fails", [0, 1])
def test_an_error_comes_once_all_have_stopped(fails: int) -> None:
    """Whichever stream it befalls: the other ends its part, and no further part is begun."""
    streams, meeting, ended = Streams(2), threading.Barrier(2, timeout=PATIENCE_S), list[int]()
    caller = threading.get_ident()

    def work(part: int) -> None:
        if part < 2:
            meeting.wait()
        if (threading.get_ident() == caller) == (fails == 0):
            raise EngineError("no")
        threading.Event().wait(0.05)
        ended.append(part)

    with pytest.raises(EngineError, match="no"):
        streams.each(work, range(100))
    assert len(ended) == 1
    streams.close()


def test_threads_end_with_the_engine(make_scorer: Callable[..., bytes], graph: Graph) -> None:
    """Closed, or let go of: no thread of a model that is out of service stays."""
    before = threading.active_count()
    for close in (True, False):
        engine = Engine(make_scorer(), graph, EngineConfig(threads=3))
        assert threading.active_count() == before + 2
        helpers = [thread for thread in threading.enumerate() if thread.name.startswith("stream")]
        if close:
            engine.close()
        del engine
        for helper in helpers:
            helper.join(PATIENCE_S)
        assert threading.active_count() == before


def test_streams_do_not_change_results(make_scorer: Callable[..., bytes], graph: Graph) -> None:
    """One, two or five batches side by side: the same numbers, each at its tile's place."""
    tiles = np.random.default_rng(1).integers(0, 256, (523, 16, 16, 1), dtype=np.uint8)
    found = []
    for streams in (1, 2, 5):
        with Engine(make_scorer(), graph, EngineConfig(threads=5, streams=streams, batch=7)) as engine:
            assert engine.streams == streams
            found.append(engine.run(tiles))
    for score, cells in found[1:]:
        np.testing.assert_allclose(score, found[0][0], rtol=1e-6)
        np.testing.assert_allclose(cells, found[0][1], rtol=1e-6)


class NoRoom:
    """A session without room for more than `room` tiles: runs of too many meet before they fail."""

    def __init__(self, session: Any, room: int, streams: int) -> None:
        self._session, self._room = session, room
        self._meeting = threading.Barrier(streams, timeout=PATIENCE_S)
        self.met = 0
        self.forgives = False
        """Whether there is room once runs have met."""

    def io_binding(self) -> Any:
        binding = self._session.io_binding()
        bind = binding.bind_cpu_input

        def check(name: str, tiles: np.ndarray) -> None:
            has_met = self.met >= self._meeting.parties
            if len(tiles) > self._room and not has_met:
                self.met += 1
                self._meeting.wait()
            if len(tiles) > self._room and not (has_met and self.forgives):
                raise RuntimeError("out of memory")
            bind(name, tiles)

        binding.bind_cpu_input = check
        return binding

    def run_with_iobinding(self, binding: Any) -> None:
        self._session.run_with_iobinding(binding)


def test_memory_that_fails_in_all_streams_halves_once(make_scorer: Callable[..., bytes], graph: Graph) -> None:
    """Two batches of 32 that fail side by side make batches of 16, not of 8, and every tile has its score."""
    tiles = np.random.default_rng(2).integers(0, 256, (64, 16, 16, 1), dtype=np.uint8)
    with Engine(make_scorer(), graph, EngineConfig(threads=2, batch=32)) as engine:
        wanted = engine.run(tiles)[0]
        engine._session = NoRoom(engine._session, 16, 2)  # type: ignore[assignment]
        np.testing.assert_allclose(engine.run(tiles)[0], wanted, rtol=1e-6)
        assert engine.out_of_memory == 2
        assert "at most 16 tiles" in str(engine.memory_problem)


def test_a_batch_of_one_that_does_not_fit_beside_others_runs_alone(
    make_scorer: Callable[..., bytes], graph: Graph
) -> None:
    """Two batches of the smallest size without room for both: one after the other they have it."""
    smallest = replace(graph, batch=BatchProfile(1, 1, 1))
    tiles = np.random.default_rng(4).integers(0, 256, (9, 16, 16, 1), dtype=np.uint8)
    with Engine(make_scorer(), smallest, EngineConfig(threads=2)) as engine:
        wanted = engine.run(tiles)[0]
        engine._session = NoRoom(engine._session, 0, 2)  # type: ignore[assignment]
        engine._session.forgives = True  # type: ignore[attr-defined]
        np.testing.assert_allclose(engine.run(tiles)[0], wanted, rtol=1e-6)
        assert engine.out_of_memory == 2
        assert "one after the other" in str(engine.memory_problem)
        np.testing.assert_allclose(engine.run(tiles)[0], wanted, rtol=1e-6)
        assert engine.out_of_memory == 2


@pytest.mark.parametrize("fails", ["caller", "helper"])
def test_a_failure_keeps_nothing_alive(fails: str) -> None:
    """Wherever it befell: what was at work is freed with its last reference, not when cycles are looked for."""

    class Load:
        def work(self, _: int) -> None:
            meeting.wait()
            if (threading.get_ident() == caller) == (fails == "caller"):
                raise EngineError("no")

    streams, meeting, caller = Streams(2), threading.Barrier(2, timeout=PATIENCE_S), threading.get_ident()
    load = Load()
    freed = weakref.ref(load)
    gc.collect()
    gc.disable()
    try:
        with pytest.raises(EngineError, match="no"):
            streams.each(load.work, range(2))
        del load
        deadline = time.monotonic() + PATIENCE_S  # the helper lets go of it a moment after it was waited for
        while freed() is not None and time.monotonic() < deadline:
            time.sleep(0.01)
        assert freed() is None
    finally:
        gc.enable()
        streams.close()


def test_a_thread_that_cannot_start_is_an_error_of_the_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    """The system gives no more threads: said as such, and nobody works on once it has been said."""
    streams, done = Streams(2), list[int]()

    def refuse(_: object) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", refuse)
    with pytest.raises(EngineError, match="can't start new thread"):
        streams.each(done.append, range(9))
    monkeypatch.undo()
    assert done == []
    streams.close()


@given(st.integers(1, 2000), st.integers(1, 64), st.integers(1, 64), st.integers(1, 8))
def test_batches_keep_all_streams_at_work(count: int, least: int, usual: int, streams: int) -> None:
    """Batches come in whole turns of all streams, unless that made them smaller than the graph takes."""
    usual = max(least, usual)
    batches = split_evenly(count, Sizes(least, usual, 4 * usual), streams)
    smallest = min(part.stop - part.start for part in batches)
    assert len(batches) % streams == 0 or (len(batches) + 1) * least > count
    assert smallest >= least or len(batches) == len(split_evenly(count, Sizes(least, usual, 4 * usual)))
