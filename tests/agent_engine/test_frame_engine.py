"""A bundle with a graph of whole frames: what goes whole scores as in tiles, all else goes in tiles as before."""

import json
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import onnx
import pytest
import structlog
from onnx import TensorProto, helper, numpy_helper

from kizu_agent import frame_engine as module
from kizu_agent.engine import Engine
from kizu_agent.errors import EngineError, ModelError
from kizu_agent.frame_engine import FrameEngine
from kizu_agent.inspector import Inspector, load_inspector, self_test
from kizu_agent.score import score_command
from kizu_agent.settings import EngineConfig
from kizu_contract.bundle import Bundle, Golden, write_bundle
from kizu_contract.judging import Reduction
from kizu_contract.manifest import FrameGraph
from kizu_contract.tiles import TileGrid

ONE_THREAD = EngineConfig(threads=1)
HEIGHT, WIDTH = 32, 48
SHAPES = {"frame": [HEIGHT, WIDTH, 1], "score": [6], "map": [8, 12]}


def frame_graph(scorer: bytes, gain: float = 1.0) -> bytes:
    """The whole-frame form of conftest's hand-written scorer, over 2 × 3 tiles that do not overlap."""
    kernel = next(t for t in onnx.ModelProto.FromString(scorer).graph.initializer if t.name == "kernel")
    constants = {
        "kernel": numpy_helper.to_array(kernel) * np.float32(gain),
        "divisor": np.float32(255),
        "planes_shape": np.array([1, 1, HEIGHT, WIDTH], np.int64),
        "map_shape": np.array([8, 12], np.int64),
        "score_shape": np.array([6], np.int64),
    }
    nodes = [
        helper.make_node("Cast", ["frame"], ["pixels"], to=TensorProto.FLOAT),
        helper.make_node("Sub", ["pixels", "divisor"], ["centred"]),
        helper.make_node("Div", ["centred", "divisor"], ["scaled"]),
        helper.make_node("Reshape", ["scaled", "planes_shape"], ["planes"]),
        helper.make_node("Conv", ["planes", "kernel"], ["features"], strides=[4, 4]),
        helper.make_node("ReduceSumSquare", ["features"], ["squares"], axes=[1], keepdims=1),
        helper.make_node("MaxPool", ["squares"], ["largest"], kernel_shape=[4, 4], strides=[4, 4]),
        helper.make_node("Reshape", ["squares", "map_shape"], ["map"]),
        helper.make_node("Reshape", ["largest", "score_shape"], ["score"]),
    ]
    kinds = {"frame": TensorProto.UINT8, "score": TensorProto.FLOAT, "map": TensorProto.FLOAT}
    values = {name: helper.make_tensor_value_info(name, kinds[name], shape) for name, shape in SHAPES.items()}
    graph = helper.make_graph(
        nodes,
        "frame",
        [values["frame"]],
        [values["score"], values["map"]],
        [numpy_helper.from_array(np.asarray(value), name) for name, value in constants.items()],
    )
    return bytes(
        helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8).SerializeToString()
    )


@pytest.fixture
def whole(bundle: Bundle) -> Bundle:
    """The hand-written bundle on tiles that do not overlap, with a graph for frames of 32 × 48."""
    record = FrameGraph(HEIGHT, WIDTH, "tiles", 1.5)
    manifest = replace(bundle.manifest, grid=TileGrid(16, 16), frame_graph=record)
    return replace(bundle, manifest=manifest, frame_graph=frame_graph(bundle.scorer))


@pytest.fixture
def frame_engine(whole: Bundle) -> Iterator[FrameEngine]:
    with FrameEngine(whole, ONE_THREAD) as loaded:
        yield loaded


def picture(height: int = HEIGHT, width: int = WIDTH, seed: int = 0, channels: int = 1) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, channels), dtype=np.uint8)


def without_tiled_graph(bundle: Bundle) -> Bundle:
    """Whoever opens the tiled graph of this one fails."""
    return replace(bundle, scorer=b"not a graph")


@pytest.mark.parametrize("reduction", [Reduction("max", 1.5), Reduction("mean"), Reduction("tile_max")])
@pytest.mark.parametrize("channels", [1, 3])
def test_a_whole_frame_scores_as_its_tiles(whole: Bundle, reduction: Reduction, channels: int) -> None:
    """Score and map are those of the tiled graph, for every reduction, and the tiled graph is not even loaded."""
    bundle = replace(whole, manifest=replace(whole.manifest, reduction=reduction))
    with Engine(bundle.scorer, bundle.manifest.graph, ONE_THREAD) as tiles:
        wanted = Inspector(bundle, tiles).inspect([picture(channels=channels)])[0]
    inspector = load_inspector(without_tiled_graph(bundle), ONE_THREAD)
    found = inspector.inspect([picture(channels=channels)])[0]
    inspector.close()
    assert found.score == pytest.approx(wanted.score, rel=1e-5)
    np.testing.assert_allclose(found.map, wanted.map, rtol=1e-5)


def test_frames_of_other_sizes_go_in_tiles(whole: Bundle) -> None:
    """Sizes in one pass may be mixed: each picture gets its own score, in order, and the log tells once of the load."""
    sizes = [(40, 50), (HEIGHT, WIDTH), (5, 7), (HEIGHT, WIDTH), (WIDTH, HEIGHT), (31, 48)]
    pictures = [picture(*size, seed=seed) for seed, size in enumerate(sizes)]
    with Engine(whole.scorer, whole.manifest.graph, ONE_THREAD) as tiles:
        wanted = [Inspector(whole, tiles).inspect([each])[0] for each in pictures]
    inspector = load_inspector(whole, ONE_THREAD)
    with structlog.testing.capture_logs() as logs:
        found = inspector.inspect(pictures) + inspector.inspect(pictures)
    inspector.close()
    for one, other in zip(found, wanted * 2, strict=True):
        assert one.score == pytest.approx(other.score, rel=1e-5)
        assert one.map.shape == other.map.shape
    assert [entry["event"] for entry in logs] == ["the tiled graph is loaded too"]


def test_self_test_covers_both_graphs(whole: Bundle, frame_engine: FrameEngine) -> None:
    """A bundle passes where its two graphs agree; a frame graph that computes something else is refused by name."""
    assert self_test(whole, frame_engine, 1e-5) < 1e-5
    other = replace(whole, frame_graph=frame_graph(whole.scorer, gain=1.01))
    with FrameEngine(other, ONE_THREAD) as spoilt, pytest.raises(ModelError, match=r"frame graph deviates by 0\.02"):
        self_test(other, spoilt, 1e-3)


def test_self_test_covers_the_golden_tiles(whole: Bundle, frame_engine: FrameEngine) -> None:
    """That both graphs agree is not enough: the tiles' own answers count too."""
    golden = whole.golden
    other = replace(whole, golden=Golden(golden.tiles, golden.score * 1.01, golden.map))
    with pytest.raises(ModelError, match="golden tiles' scores deviate"):
        self_test(other, frame_engine, 1e-3)


@pytest.mark.parametrize("what", ["frame size", "tiles", "another graph"])
def test_an_interface_that_differs_is_refused(whole: Bundle, what: str) -> None:
    """A frame graph whose names or sizes are not those of the manifest does not load."""
    manifest, graph = whole.manifest, whole.frame_graph
    if what == "frame size":
        manifest = replace(manifest, frame_graph=FrameGraph(HEIGHT, WIDTH - 16, "tiles", 1.5))
    elif what == "tiles":
        manifest = replace(manifest, grid=TileGrid(16, 8))
    else:
        graph = whole.scorer
    with pytest.raises(EngineError, match=r"frame graph's interface is"):
        FrameEngine(replace(whole, manifest=manifest, frame_graph=graph), ONE_THREAD)


class FullDevice:
    """A session without memory for a whole frame."""

    def __init__(self, session: Any, message: str) -> None:
        self.session, self.message = session, message

    def io_binding(self) -> Any:
        return self.session.io_binding()

    def run_with_iobinding(self, _binding: Any) -> None:
        raise RuntimeError(self.message)


def test_without_memory_for_a_frame_its_tiles_are_scored(
    whole: Bundle, frame_engine: FrameEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A device without room for whole frames scores them in tiles: counted, told, and tried again after a while."""
    inspector = Inspector(whole, frame_engine)
    wanted = inspector.inspect([picture()])[0]
    session = frame_engine._session
    frame_engine._session = FullDevice(session, "CUDA failure 2: out of memory ; GPU=0")
    for _ in range(3):
        assert inspector.inspect([picture()])[0].score == pytest.approx(wanted.score, rel=1e-5)
    assert frame_engine.out_of_memory == 1
    assert "tile by tile" in str(frame_engine.memory_problem)
    frame_engine._session = session
    monkeypatch.setattr(module.time, "monotonic_ns", lambda: time.perf_counter_ns() + 10**18)
    inspector.inspect([picture()])
    assert (frame_engine.out_of_memory, frame_engine.memory_problem) == (1, None)


def test_other_failures_are_errors(frame_engine: FrameEngine) -> None:
    """A frame graph that fails for another reason is not hidden behind the tiled one."""
    frame_engine._session = FullDevice(frame_engine._session, "Non-zero status code returned while running Conv node")
    with pytest.raises(EngineError, match="frame graph failed"):
        frame_engine.run_frame(picture())
    assert frame_engine.out_of_memory == 0


def test_closed_engine_refuses(frame_engine: FrameEngine) -> None:
    """Closing twice is well; neither graph runs after it."""
    frame_engine.run(np.zeros((2, 16, 16, 1), np.uint8))
    frame_engine.close()
    frame_engine.close()
    with pytest.raises(EngineError, match="closed"):
        frame_engine.run_frame(picture())
    with pytest.raises(EngineError, match="closed"):
        frame_engine.run(np.zeros((2, 16, 16, 1), np.uint8))


def test_kizu_agent_score_takes_frames_whole(
    whole: Bundle, make_scorer: Callable[..., bytes], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A picture of the size is scored although the tiled graph of this bundle does not load; one of another is not."""
    path = tmp_path / "m.kizu"
    write_bundle(replace(whole, scorer=make_scorer(input_name="x")), path)
    for name, width in (("a", WIDTH), ("b", WIDTH + 1)):
        cv2.imwrite(str(tmp_path / f"{name}.png"), picture(width=width))
    with Engine(whole.scorer, whole.manifest.graph, ONE_THREAD) as tiles:
        wanted = Inspector(whole, tiles).inspect([picture()])[0]
    assert score_command(path, [tmp_path / "a.png"], "-", None) == 0
    assert json.loads(capsys.readouterr().out)["score"] == pytest.approx(wanted.score, rel=1e-5)
    assert score_command(path, [tmp_path / "b.png"], "-", None) == 1
    assert "inputs are" in capsys.readouterr().err
