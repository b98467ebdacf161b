"""A small scorer graph written by hand: one convolution, its square as the map, the map's maximum as the score."""

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from kizu_agent.engine import Engine
from kizu_agent.inspector import Inspector
from kizu_agent.settings import EngineConfig
from kizu_contract.bundle import Bundle, Golden, write_bundle
from kizu_contract.calibration import Calibration, Tail
from kizu_contract.judging import Reduction
from kizu_contract.manifest import BatchProfile, DefaultThresholds, Graph, Manifest, Provenance
from kizu_contract.tiles import TileGrid

TILE_PX, CELL_PX = 16, 4

MakeScorer = Callable[..., bytes]


def _make_scorer(
    *,
    channels: int = 1,
    divisor: float = 255.0,
    input_name: str = "tiles",
    cells: int = TILE_PX // CELL_PX,
    tail: str = "Identity",
    batch: int | str = "N",
    placed: bool = False,
) -> bytes:
    """`divisor` 0 makes every number NaN; `tail` is an operator put on the score; `placed` scores are positions."""
    draw = np.random.default_rng(5)
    stride = TILE_PX // cells
    constants = {
        "divisor": np.float32(divisor),
        "kernel": draw.normal(0, 0.2, (4, channels, stride, stride)).astype(np.float32),
    }
    nodes = [
        helper.make_node("Cast", [input_name], ["pixels"], to=TensorProto.FLOAT),
        helper.make_node("Sub", ["pixels", "divisor"], ["centred"])
        if divisor
        else helper.make_node("Div", ["pixels", "divisor"], ["broken"]),
        helper.make_node("Div", ["centred", "divisor"], ["scaled"])
        if divisor
        else helper.make_node("Sub", ["broken", "broken"], ["scaled"]),
        helper.make_node("Transpose", ["scaled"], ["planes"], perm=[0, 3, 1, 2]),
        helper.make_node("Conv", ["planes", "kernel"], ["features"], strides=[stride, stride]),
        helper.make_node("ReduceSumSquare", ["features"], ["map"], axes=[1], keepdims=0),
        helper.make_node("ReduceMax", ["map"], ["largest"], axes=[1, 2], keepdims=0),
        helper.make_node(tail, ["largest"], ["score"]),
    ]
    inputs = [(input_name, TensorProto.UINT8, [batch, TILE_PX, TILE_PX, channels])]
    if placed:
        nodes[-1] = helper.make_node("Cast", ["position"], ["score"], to=TensorProto.FLOAT)
        inputs.append(("position", TensorProto.INT64, [batch]))
    graph = helper.make_graph(
        nodes,
        "scorer",
        [helper.make_tensor_value_info(*value) for value in inputs],
        [
            helper.make_tensor_value_info("score", TensorProto.FLOAT, [batch]),
            helper.make_tensor_value_info("map", TensorProto.FLOAT, [batch, cells, cells]),
        ],
        [numpy_helper.from_array(np.asarray(value), name) for name, value in constants.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.checker.check_model(model)
    return bytes(model.SerializeToString())


@pytest.fixture
def make_scorer() -> MakeScorer:
    """Builds scorer graphs; keywords spoil one thing each."""
    return _make_scorer


@pytest.fixture
def graph() -> Graph:
    """What the manifest says of the hand-written graph."""
    return Graph(17, "fp32", ("tiles",), TILE_PX, 1, CELL_PX, BatchProfile(1, 64, 256))


@pytest.fixture
def engine(graph: Graph) -> Iterator[Engine]:
    """The hand-written graph, loaded."""
    with Engine(_make_scorer(), graph, EngineConfig(threads=1)) as loaded:
        yield loaded


@pytest.fixture
def bundle(graph: Graph, engine: Engine) -> Bundle:
    """A bundle around the hand-written graph, with its real golden answers."""
    tiles = np.random.default_rng(9).integers(0, 256, (5, TILE_PX, TILE_PX, 1), dtype=np.uint8)
    manifest = Manifest(
        schema=1,
        name="squares",
        version="1",
        created="2026-01-31T12:00:00.000Z",
        graph=graph,
        grid=TileGrid(TILE_PX, 6, 5),
        colour="grey",
        reduction=Reduction("max", 1.5),
        calibration=Calibration(10, ((0.5, 1.0), (0.9, 2.0)), Tail(2.0, 0.1, 0.0, 0.5)),
        thresholds=DefaultThresholds(3.0, 6.0, 0.01, 0.001),
        provenance=Provenance("squares", {}, 0, "0" * 64, 10, "0.1.0", {}),
    )
    return Bundle(manifest, _make_scorer(), Golden(tiles, *engine.run(tiles)), b"\x89PNG")


@pytest.fixture
def bundle_path(bundle: Bundle, tmp_path: Path) -> Path:
    """That bundle as a file."""
    path = tmp_path / "squares.kizu"
    write_bundle(bundle, path)
    return path


@pytest.fixture
def inspector(bundle: Bundle, engine: Engine) -> Inspector:
    """That bundle, ready to inspect."""
    return Inspector(bundle, engine)
