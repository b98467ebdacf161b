"""Small real bundles whose score is a picture's mean grey value times a factor, each with one thing wrong."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnx
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from onnx import TensorProto, helper, numpy_helper

from kizu_contract.bundle import Bundle, Golden, write_bundle
from kizu_contract.calibration import Calibration, Tail
from kizu_contract.judging import Reduction
from kizu_contract.manifest import BatchProfile, DefaultThresholds, Graph, Manifest, Provenance
from kizu_contract.tiles import TileGrid

TILE_PX, CELL_PX, OPSET = 8, 4, 17
WARN, REJECT = 200.0, 400.0
"""Pictures of the line have a mean of about 100: ok with a factor of 1, rejected with one of 5."""


def nan_below(level: float) -> list[onnx.NodeProto]:
    """Nodes whose `scale` is the factor for tiles brighter than `level` in the mean, and NaN for darker ones."""
    return [
        helper.make_node("Constant", [], ["limit"], value=helper.make_tensor("l", TensorProto.FLOAT, [], [level])),
        helper.make_node("ReduceMean", ["float"], ["mean"], keepdims=0),
        helper.make_node("Sub", ["mean", "limit"], ["above"]),
        helper.make_node("Sqrt", ["above"], ["root"]),
        helper.make_node("Div", ["root", "root"], ["one"]),
        helper.make_node("Mul", ["factor", "one"], ["scale"]),
    ]


def busy(side: int, products: int) -> list[onnx.NodeProto]:
    """Nodes whose `scale` is the factor, after so many products of matrices of `side` × `side` zeros."""
    shape = helper.make_tensor("s", TensorProto.INT64, [2], [side, side])
    nothing = helper.make_tensor("n", TensorProto.FLOAT, [], [0.0])
    return [
        helper.make_node("Constant", [], ["shape"], value=shape),
        helper.make_node("Constant", [], ["nothing"], value=nothing),
        helper.make_node("ReduceMax", ["float"], ["largest"], keepdims=0),  # of the input: else it is folded away
        helper.make_node("Mul", ["largest", "nothing"], ["zero"]),
        helper.make_node("Expand", ["zero", "shape"], ["wide0"]),
        *(helper.make_node("MatMul", [f"wide{i}", f"wide{i}"], [f"wide{i + 1}"]) for i in range(products)),
        helper.make_node("ReduceSum", [f"wide{products}"], ["sum"], keepdims=0),
        helper.make_node("Add", ["factor", "sum"], ["scale"]),
    ]


def heavy(megabytes: int, seed: int) -> list[onnx.NodeProto]:
    """Nodes whose `scale` is the factor, with so many megabytes of weights that no two seeds share."""
    weights = np.random.default_rng(seed).random(megabytes * 2**18, np.float32)
    nothing = helper.make_tensor("n", TensorProto.FLOAT, [], [0.0])
    return [
        helper.make_node("Constant", [], ["weights"], value=numpy_helper.from_array(weights, "w")),
        helper.make_node("Constant", [], ["nothing"], value=nothing),
        helper.make_node("ReduceMax", ["float"], ["largest"], keepdims=0),  # of the input: else it is folded away
        helper.make_node("Mul", ["weights", "largest"], ["scaled"]),
        helper.make_node("ReduceSum", ["scaled"], ["sum"], keepdims=0),
        helper.make_node("Mul", ["sum", "nothing"], ["zero"]),
        helper.make_node("Add", ["factor", "zero"], ["scale"]),
    ]


def write(
    path: Path,
    version: str,
    *,
    factor: float = 1.0,
    extra: Sequence[onnx.NodeProto] = (),
    is_colour: bool = False,
    golden_factor: float | None = None,
    key: Ed25519PrivateKey | None = None,
) -> Path:
    """Write a bundle; `extra` nodes make `scale`. `golden_factor`: what the golden scores claim, if not the truth."""
    channels = 3 if is_colour else 1
    scorer = _scorer(factor, list(extra), "scale" if extra else "factor", channels)
    golden = _golden(factor if golden_factor is None else golden_factor, channels)
    write_bundle(Bundle(_manifest(version, channels), scorer, golden, b"\x89PNG preview"), path, key)
    return path


def _scorer(factor: float, extra: list[onnx.NodeProto], scale: str, channels: int) -> bytes:
    nodes = [
        helper.make_node("Cast", ["tiles"], ["float"], to=TensorProto.FLOAT),
        helper.make_node("ReduceMean", ["float"], ["grey"], axes=[3], keepdims=1),
        helper.make_node("Transpose", ["grey"], ["planes"], perm=[0, 3, 1, 2]),
        helper.make_node("AveragePool", ["planes"], ["pooled"], kernel_shape=[4, 4], strides=[4, 4]),
        helper.make_node("Squeeze", ["pooled", "axis"], ["cells"]),
        *extra,
        helper.make_node("Mul", ["cells", scale], ["map"]),
        helper.make_node("ReduceMean", ["map"], ["score"], axes=[1, 2], keepdims=0),
    ]
    outputs = {"score": ["N"], "map": ["N", 2, 2]}
    graph = helper.make_graph(
        nodes,
        "scorer",
        [helper.make_tensor_value_info("tiles", TensorProto.UINT8, ["N", TILE_PX, TILE_PX, channels])],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in outputs.items()],
        [
            helper.make_tensor("axis", TensorProto.INT64, [1], [1]),
            helper.make_tensor("factor", TensorProto.FLOAT, [], [factor]),
        ],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=8)
    return bytes(model.SerializeToString())


def _golden(factor: float, channels: int) -> Golden:
    tiles = np.random.default_rng(7).integers(0, 256, (6, TILE_PX, TILE_PX, channels), np.uint8)
    grey = tiles.mean(axis=3, dtype=np.float64)
    cells = grey.reshape(6, 2, CELL_PX, 2, CELL_PX).mean(axis=(2, 4)) * factor
    return Golden(tiles, cells.mean(axis=(1, 2)).astype(np.float32), cells.astype(np.float32))


def _manifest(version: str, channels: int) -> Manifest:
    return Manifest(
        schema=1,
        name="gears",
        version=version,
        created="2026-01-31T12:00:00.000Z",
        graph=Graph(OPSET, "fp32", ("tiles",), TILE_PX, channels, CELL_PX, BatchProfile(1, 4, 64)),
        grid=TileGrid(TILE_PX, TILE_PX),
        colour="rgb" if channels == 3 else "grey",
        reduction=Reduction("max"),
        calibration=Calibration(200, ((0.5, 100.0), (0.99, WARN)), Tail(WARN, 0.01, 0.0, 87.0)),
        thresholds=DefaultThresholds(WARN, REJECT, 0.01, 0.001),
        provenance=Provenance("mean", {}, 0, "0" * 64, 200, "0.1.0", {}),
    )
