"""The best batch size: found by measurement within a second, kept for this machine, used from the next start on."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kizu_agent import engine as engine_module
from kizu_agent.batch_sizes import FILE, MAX_KEPT, BatchSizes, Clocks, Tuned, candidates, choose, measure, tuning_key
from kizu_agent.engine import Engine
from kizu_agent.errors import EngineError
from kizu_agent.settings import EngineConfig
from kizu_contract.manifest import BatchProfile, Graph


class Machine:
    """A clock that goes on by what each run costs: seconds for a batch, and how long it waits for a core."""

    def __init__(self, cost: Callable[[int], float], waits: Callable[[int], float] = lambda _: 0.0) -> None:
        self.cost, self.waits = cost, waits
        self.now_s = self.waited_s = 0.0
        self.runs: list[int] = []

    def run(self, size: int) -> None:
        self.runs.append(size)
        self.now_s += self.cost(size) + self.waits(size)
        self.waited_s += self.waits(size)

    def clocks(self) -> Clocks:
        return Clocks(lambda: self.now_s, lambda: self.waited_s)

    def measure(self, sizes: list[int]) -> dict[int, float]:
        return measure(self.run, sizes, 1.0, self.clocks())


def test_the_smallest_that_is_nearly_best_is_chosen() -> None:
    """2 % fewer tiles a second are worth a shorter wait, 4 % are not."""
    assert choose({1: 0.2, 8: 8 / 100, 16: 16 / 102, 64: 64 / 101}) == Tuned(8, pytest.approx(100))
    assert choose({1: 0.2, 8: 8 / 98, 16: 16 / 102, 64: 64 / 101}).batch == 16


def test_each_size_is_measured_several_times() -> None:
    """A cheap graph is measured at every size, round by round, and the first run of each does not count."""
    machine = Machine(lambda size: 0.001 + 0.0001 * size)
    sizes = [1, 2, 4, 8]
    seconds = machine.measure(sizes)
    assert seconds == pytest.approx({size: 0.001 + 0.0001 * size for size in sizes})
    assert machine.runs[:4] == [1, 1, 2, 2]
    assert all(machine.runs.count(size) >= 5 for size in sizes)


@given(st.floats(1e-5, 3.0), st.floats(0.0, 1.0), st.lists(st.integers(1, 512), min_size=1, unique=True))
def test_the_measurement_is_bounded(per_tile: float, fixed: float, sizes: list[int]) -> None:
    """Beyond its second it takes no more than the two runs of the smallest, which it cannot know before."""
    machine = Machine(lambda size: fixed + per_tile * size)
    seconds = machine.measure(sorted(sizes))
    smallest = fixed + per_tile * min(sizes)
    assert min(sizes) in seconds
    assert machine.now_s <= max(1.0 + 1e-6, 2 * smallest + 1e-6) + 2 * fixed


def test_a_machine_that_is_busy_tells_nothing() -> None:
    """Where long runs wait for cores and short ones slip through, small batches would win by that alone."""
    calm = Machine(lambda size: 0.002 + 0.0001 * size)
    busy = Machine(lambda size: 0.002 + 0.0001 * size, lambda size: 0.05 if size > 4 else 0.0)
    sizes = [1, 2, 4, 8, 16]
    assert choose(calm.measure(sizes)).batch == 16
    assert busy.measure(sizes) == {}


def test_one_disturbance_is_forgotten() -> None:
    """A run that had to wait once does not spoil the others of its size."""
    left = [0.5]
    machine = Machine(lambda size: 0.001 * size, lambda size: left.pop() if size == 4 and left else 0.0)
    assert machine.measure([1, 2, 4])[4] == pytest.approx(0.004)


def test_sizes_without_memory_are_left_out() -> None:
    """What the device has no room for cannot be best; one that has no room for the smallest is an error."""
    machine = Machine(lambda _: 0.01)

    def run(size: int) -> None:
        machine.run(size)
        if size > 4:
            raise EngineError("out of memory")

    assert set(measure(run, [1, 4, 8], 1.0, machine.clocks())) == {1, 4}
    with pytest.raises(EngineError):
        measure(run, [8, 16], 1.0, machine.clocks())


def test_candidates_lie_in_the_profile(graph: Graph) -> None:
    """Powers of two, the usual size and both ends; none that would fill the memory with tiles alone."""
    assert candidates(replace(graph, batch=BatchProfile(3, 20, 50))) == [3, 4, 8, 16, 20, 32, 50]
    huge = replace(graph, tile_px=2048, map_cell_px=8, channels=3, batch=BatchProfile(1, 64, 65536))
    assert candidates(huge) == [1, 2, 4, 5]
    assert candidates(replace(huge, batch=BatchProfile(64, 64, 64))) == [64]


def test_what_was_measured_is_found_again(tmp_path: Path) -> None:
    """By its key alone, from another object, and not where the profile does not allow it."""
    BatchSizes(tmp_path / "new").keep("key", Tuned(32, 1234.5), "cpu")
    found = BatchSizes(tmp_path / "new")
    assert found.find("key", BatchProfile(1, 64, 256)) == Tuned(32, 1234.5)
    assert found.find("other", BatchProfile(1, 64, 256)) is None
    assert found.find("key", BatchProfile(1, 8, 16)) is None


@pytest.mark.parametrize(
    "content", [b"", b"{", b"[]", b'{"key": 3}', b'{"key": {"batch": "x", "tiles_per_s": 1}}', b'{"key": {"batch": 4}}']
)
def test_a_damaged_file_counts_as_empty(tmp_path: Path, content: bytes) -> None:
    """It costs a measurement, not a start, and is written anew."""
    (tmp_path / FILE).write_bytes(content)
    sizes = BatchSizes(tmp_path)
    assert sizes.find("key", BatchProfile(1, 64, 256)) is None
    sizes.keep("key", Tuned(8, 1.0), "cpu")
    assert sizes.find("key", BatchProfile(1, 64, 256)) == Tuned(8, 1.0)


def test_the_file_is_bounded(tmp_path: Path) -> None:
    """The oldest of too many go."""
    sizes = BatchSizes(tmp_path)
    entry = {"batch": 4, "tiles_per_s": 1.0}
    (tmp_path / FILE).write_text(json.dumps({f"k{number}": entry for number in range(MAX_KEPT)}))
    sizes.keep("new", Tuned(8, 1.0), "cpu")
    kept = json.loads((tmp_path / FILE).read_bytes())
    assert len(kept) == MAX_KEPT
    assert ("new" in kept, "k0" in kept, "k1" in kept) == (True, False, True)


def test_the_key_is_graph_profile_and_machine(graph: Graph) -> None:
    """Each of them makes another measurement."""
    other = replace(graph, batch=BatchProfile(1, 64, 128))
    keys = {tuning_key(b"a", graph, "m"), tuning_key(b"b", graph, "m"), tuning_key(b"a", other, "m")}
    assert len(keys | {tuning_key(b"a", graph, "n")}) == 4


def batches_of(engine: Engine, count: int, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Sizes of the batches in which the engine runs `count` tiles."""
    sizes: list[int] = []
    run = engine._run_batch

    def note(session: Any, tiles: Any, *others: Any) -> None:
        sizes.append(len(tiles))
        run(session, tiles, *others)

    monkeypatch.setattr(engine, "_run_batch", note)
    engine.run(np.zeros((count, 16, 16, 1), np.uint8))
    return sizes


def test_a_measured_batch_is_used_from_the_next_start_on(
    make_scorer: Callable[..., bytes], graph: Graph, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first engine runs the bundle's own and measures; the second reads that and does not measure again."""
    machine = Machine(lambda size: 0.001 * max(size, 16))
    config = EngineConfig(threads=1, cache_dir=tmp_path)
    monkeypatch.setattr(engine_module, "measure", lambda _, sizes: machine.measure(sizes))
    with Engine(make_scorer(), graph, config) as first:
        assert (first.batch.size, first.batch.is_open, first.batch.why) == (64, True, "the bundle's own")
        first.tune()
        assert (first.batch.size, first.batch.is_open) == (16, False)
    with Engine(make_scorer(), graph, config) as second:
        assert (second.batch.size, second.batch.is_open) == (16, False)
        assert second.batch.why == "measured here: 1000 tiles/s"
        assert batches_of(second, 64, monkeypatch) == [16] * 4
        runs = len(machine.runs)
        second.tune()
        assert len(machine.runs) == runs
    with Engine(make_scorer(), graph, config.model_copy(update={"threads": 2})) as other:
        assert other.batch.is_open  # another number of threads is another machine


def test_a_busy_machine_keeps_the_bundles_own(
    make_scorer: Callable[..., bytes], graph: Graph, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing is written, and the question stays open."""
    monkeypatch.setattr(engine_module, "measure", lambda *_: {})
    with Engine(make_scorer(), graph, EngineConfig(threads=1, cache_dir=tmp_path)) as engine:
        engine.tune()
        assert (engine.batch.size, engine.batch.is_open) == (64, True)
    assert not (tmp_path / FILE).exists()


def test_the_engine_itself_can_be_measured(make_scorer: Callable[..., bytes], graph: Graph) -> None:
    """Every candidate runs on the real graph, with the clocks of this machine."""
    sizes = candidates(replace(graph, batch=BatchProfile(1, 8, 8)))
    with Engine(make_scorer(), graph, EngineConfig(threads=1)) as engine:
        seconds = measure(engine._run_empty, sizes, 0.2, replace(Clocks(), waited=lambda: 0.0))
    assert set(seconds) == set(sizes)
    assert all(0 < took < 5 for took in seconds.values())


@pytest.mark.parametrize(("wanted", "size", "why"), [(32, 32, "as configured"), (1000, 256, "the bundle's bound")])
def test_a_configured_batch_holds(
    make_scorer: Callable[..., bytes],
    graph: Graph,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    wanted: int,
    size: int,
    why: str,
) -> None:
    """`engine.batch = N` is what runs, within the bundle's bounds, whatever was measured; nothing is measured then."""
    with Engine(make_scorer(), graph, EngineConfig(threads=1, batch=wanted, cache_dir=tmp_path)) as engine:
        assert engine.batch.why.startswith(why)
        assert batches_of(engine, 512, monkeypatch) == [size] * (512 // size)
        engine.tune()
    assert not (tmp_path / FILE).exists()
