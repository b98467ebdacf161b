"""A device that runs out of memory: batches shrink, every tile is scored all the same, and it is told."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from kizu_agent import engine as engine_module
from kizu_agent.engine import Engine
from kizu_agent.errors import EngineError
from kizu_agent.settings import EngineConfig
from kizu_contract.manifest import BatchProfile, Graph

MESSAGES = [
    "[ONNXRuntimeError] : 6 : RUNTIME_EXCEPTION : CUDA failure 2: out of memory ; GPU=0 ; hostname=box",
    "[ONNXRuntimeError] : 1 : FAIL : Failed to allocate memory for requested buffer of size 1073741824",
    "CUDNN_STATUS_ALLOC_FAILED",
    "CUBLAS failure 3: CUBLAS_STATUS_ALLOC_FAILED",
    "std::bad_alloc",
]


class SmallDevice:
    """A session that has room for `room` tiles at a time, and runs the real graph on them."""

    def __init__(self, session: Any, room: int, message: str = MESSAGES[0]) -> None:
        self.session, self.room, self.message = session, room, message
        self.batches: list[int] = []

    def io_binding(self) -> Any:
        binding = self.session.io_binding()
        bind = binding.bind_cpu_input

        def note(name: str, tiles: np.ndarray) -> None:
            if name == "tiles":
                self.batches.append(len(tiles))
            bind(name, tiles)

        binding.bind_cpu_input = note
        return binding

    def run_with_iobinding(self, binding: Any) -> None:
        if self.batches[-1] > self.room:
            raise RuntimeError(self.message)
        self.session.run_with_iobinding(binding)


def tiles(count: int) -> np.ndarray:
    return np.random.default_rng(count).integers(0, 256, (count, 16, 16, 1), dtype=np.uint8)


def shrunken(engine: Engine, room: int, message: str = MESSAGES[0]) -> SmallDevice:
    engine._session = device = SmallDevice(engine._session, room, message)  # type: ignore[assignment]
    return device


@pytest.mark.parametrize("message", MESSAGES)
def test_batches_are_halved_until_they_fit(engine: Engine, message: str) -> None:
    """Where 64 tiles do not fit and 16 do, every tile gets its score, and smaller batches are remembered."""
    wanted = engine.run(tiles(300))
    device = shrunken(engine, 20, message)
    score, cells = engine.run(tiles(300))
    np.testing.assert_allclose(score, wanted[0], rtol=1e-5)
    np.testing.assert_allclose(cells, wanted[1], rtol=1e-5)
    assert engine.out_of_memory == 2
    assert "at most 15 tiles" in str(engine.memory_problem)
    device.batches.clear()
    engine.run(tiles(300))
    assert max(device.batches) <= 15
    assert engine.out_of_memory == 2


def test_one_tile_that_does_not_fit_is_an_error(engine: Engine) -> None:
    """There is an end to halving: a device without room for one tile raises, and all its tries are counted."""
    shrunken(engine, 0)
    with pytest.raises(EngineError, match="a smaller one is not possible"):
        engine.run(tiles(8))
    assert engine.out_of_memory == 6  # of 8, 4 and 2, twice of 1, and of 1 with nothing beside it


def test_the_profile_bounds_the_halving(make_scorer: Callable[..., bytes], graph: Graph) -> None:
    """A graph whose profile begins at 16 tiles is not run with fewer."""
    narrow = Graph(**{**vars(graph), "batch": BatchProfile(16, 64, 64)})
    with Engine(make_scorer(), narrow, EngineConfig(threads=1)) as engine:
        device = shrunken(engine, 15)
        with pytest.raises(EngineError, match="not possible"):
            engine.run(tiles(64))
        assert min(device.batches) == 16


def test_larger_batches_are_tried_again_after_a_while(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """When whoever took the memory has gone, batches grow back, and nothing is wrong any more."""
    monkeypatch.setattr(engine_module, "GROW_AFTER_S", 0.0)
    device = shrunken(engine, 20)
    engine.run(tiles(64))
    device.room = 1000
    for _ in range(4):
        engine.run(tiles(64))
    assert engine.memory_problem is None
    assert device.batches[-1] == 64


def test_other_failures_are_not_tried_again(engine: Engine) -> None:
    """A graph that fails for another reason fails at once: halving would only hide it."""
    device = shrunken(engine, 0, "Non-zero status code returned while running Conv node")
    with pytest.raises(EngineError, match="failed on a batch of 8 tiles"):
        engine.run(tiles(8))
    assert (engine.out_of_memory, device.batches) == (0, [8])


def test_a_session_never_falls_back_by_itself(engine: Engine) -> None:
    """After a failure onnxruntime must not change to the CPU without a word."""
    assert engine._session is not None
    assert engine._session._enable_fallback is False
