"""The engine: what it computes must not depend on batches; what does not fit is refused with words."""

from collections.abc import Callable

import numpy as np
import onnxruntime
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kizu_agent.engine import Engine, Sizes, split_evenly
from kizu_agent.errors import EngineError
from kizu_agent.providers import available_providers
from kizu_agent.settings import EngineConfig
from kizu_contract.manifest import BatchProfile, Graph


def random_tiles(count: int, channels: int = 1) -> np.ndarray:
    return np.random.default_rng(count).integers(0, 256, (count, 16, 16, channels), dtype=np.uint8)


@pytest.mark.parametrize("size", [1, 3, 64, 257])
def test_batches_do_not_change_results(engine: Engine, size: int) -> None:
    """Tiles score the same within 1e-5 whether they are given one by one or all at once."""
    tiles = random_tiles(600)
    score, cells = engine.run(tiles)
    parts = [engine.run(tiles[at : at + size]) for at in range(0, len(tiles), size)]
    np.testing.assert_allclose(np.concatenate([part for part, _ in parts]), score, rtol=1e-5)
    np.testing.assert_allclose(np.concatenate([part for _, part in parts]), cells, rtol=1e-5)


def test_results_are_onnxruntimes(engine: Engine, make_scorer: Callable[..., bytes]) -> None:
    """Scores and maps are what a plain onnxruntime session gives, in shape, type and number."""
    tiles = random_tiles(130)
    score, cells = engine.run(tiles)
    session = onnxruntime.InferenceSession(make_scorer(), providers=["CPUExecutionProvider"])
    wanted_score, wanted_cells = session.run(["score", "map"], {"tiles": tiles})
    assert (score.dtype, cells.dtype, cells.shape) == (np.float32, np.float32, (130, 4, 4))
    np.testing.assert_allclose(score, wanted_score, rtol=1e-5)
    np.testing.assert_allclose(cells, wanted_cells, rtol=1e-5)


def test_no_tiles_give_no_results(engine: Engine) -> None:
    """An empty batch is answered by empty arrays."""
    score, cells = engine.run(random_tiles(0))
    assert score.shape == (0,)
    assert cells.shape == (0, 4, 4)


def test_profile_minimum_is_filled_up(make_scorer: Callable[..., bytes], graph: Graph, engine: Engine) -> None:
    """Fewer tiles than the profile's minimum are scored as if they were more."""
    narrow = Graph(**{**vars(graph), "batch": BatchProfile(32, 64, 64)})
    tiles = random_tiles(3)
    with Engine(make_scorer(), narrow, EngineConfig(threads=1)) as filled:
        np.testing.assert_allclose(filled.run(tiles)[1], engine.run(tiles)[1], rtol=1e-5)


def test_tiles_that_lie_apart_in_memory_are_taken(engine: Engine) -> None:
    """A strided view of tiles scores like its copy."""
    tiles = random_tiles(40)
    np.testing.assert_array_equal(engine.run(tiles[::3])[0], engine.run(tiles[::3].copy())[0])


@pytest.mark.parametrize(
    "tiles",
    [random_tiles(2)[:, :8], random_tiles(2, channels=3), random_tiles(2).astype(np.float32), random_tiles(2)[0]],
    ids=["size", "channels", "type", "no batch"],
)
def test_tiles_of_another_form_are_refused(engine: Engine, tiles: np.ndarray) -> None:
    """Tiles that the graph does not take raise EngineError, not garbage."""
    with pytest.raises(EngineError, match=r"the graph takes uint8"):
        engine.run(tiles)


@pytest.mark.parametrize(
    ("spoilt", "words"),
    [
        ({"channels": 3}, "tiles is tensor"),
        ({"input_name": "x"}, "inputs are"),
        ({"cells": 2}, "map is tensor"),
        ({"batch": 4}, "tiles is tensor"),
    ],
)
def test_graph_that_differs_from_manifest_is_refused(
    make_scorer: Callable[..., bytes], graph: Graph, spoilt: dict[str, object], words: str
) -> None:
    """A graph whose interface is not what the manifest promises does not load."""
    with pytest.raises(EngineError, match=words):
        Engine(make_scorer(**spoilt), graph, EngineConfig())


def test_graph_that_is_none_is_refused(graph: Graph) -> None:
    """Bytes that are no ONNX model raise EngineError."""
    with pytest.raises(EngineError, match="does not load"):
        Engine(b"not a graph", graph, EngineConfig())


@pytest.mark.skipif("cuda" in available_providers(), reason="this machine has CUDA")
def test_missing_provider_fails_unless_told_otherwise(make_scorer: Callable[..., bytes], graph: Graph) -> None:
    """CUDA that is not there is an error by default; degraded, the engine says what runs and why."""
    with pytest.raises(EngineError, match="without cuda"):
        Engine(make_scorer(), graph, EngineConfig(provider="cuda"))
    with Engine(make_scorer(), graph, EngineConfig(provider="cuda", on_missing_provider="degrade")) as engine:
        assert engine.provider == "cpu"
        assert "cuda was asked for" in str(engine.degraded_reason)


def test_working_provider_is_named(engine: Engine) -> None:
    """The provider asked for is the one that runs, and nothing is degraded."""
    assert (engine.provider, engine.degraded_reason) == ("cpu", None)


def test_not_a_number_passes_through(make_scorer: Callable[..., bytes], graph: Graph) -> None:
    """A graph that gives NaN gives NaN: judging, not the engine, makes it unknown."""
    with Engine(make_scorer(divisor=0.0), graph, EngineConfig()) as engine:
        score, cells = engine.run(random_tiles(3))
    assert np.isnan(score).all()
    assert np.isnan(cells).all()


def test_closed_engine_refuses(engine: Engine) -> None:
    """Closing twice is well, running after it is an error."""
    engine.close()
    engine.close()
    with pytest.raises(EngineError, match="closed"):
        engine.run(random_tiles(1))


@given(st.integers(0, 5000), st.integers(1, 300), st.integers(1, 4), st.integers(1, 8))
def test_batches_are_even_and_bounded(count: int, usual: int, times: int, streams: int) -> None:
    """Every tile is in one batch, none is larger than allowed, and sizes differ by one at most."""
    batches = split_evenly(count, Sizes(1, usual, usual * times), streams)
    sizes = [part.stop - part.start for part in batches]
    assert [i for part in batches for i in range(part.start, part.stop)] == list(range(count))
    assert not sizes or (max(sizes) <= usual * times and max(sizes) - min(sizes) <= 1 and min(sizes) >= 1)
