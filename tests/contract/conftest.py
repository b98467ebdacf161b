"""A small whole bundle, made with the onnx package: graph, golden tiles, manifest."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from kizu_contract.bundle import Bundle, Golden, write_bundle
from kizu_contract.calibration import Calibration, Tail
from kizu_contract.judging import Reduction
from kizu_contract.manifest import BatchProfile, DefaultThresholds, Graph, Manifest, Provenance
from kizu_contract.tiles import TileGrid


@pytest.fixture
def manifest() -> Manifest:
    calibration = Calibration(
        frames=200,
        quantiles=((0.0, 0.1), (0.5, 0.5), (0.9, 1.0), (1.0, 2.0)),
        tail=Tail(start=1.0, fraction=0.1, shape=0.1, scale=0.3),
    )
    limits = calibration.thresholds(0.01, 0.001)
    return Manifest(
        schema=1,
        name="plates",
        version="1.0.0",
        created="2026-01-31T12:00:00.000Z",
        graph=Graph(17, "fp32", ("tiles",), tile_px=4, channels=1, map_cell_px=2, batch=BatchProfile(1, 8, 64)),
        grid=TileGrid(4, 2, 1),
        colour="grey",
        reduction=Reduction("max", 1.5),
        calibration=calibration,
        thresholds=DefaultThresholds(limits.warn, limits.reject, 0.01, 0.001),
        provenance=Provenance(
            detector="patch_vae",
            recipe={"widths": [32, 64], "nested": {"beta": 1.0, "note": "傷", "off": None, "on": True}},
            seed=7,
            data_fingerprint="ab" * 32,
            train_pictures=100,
            kizu_version="0.1.0",
            metrics={"image_auroc": 0.97},
        ),
    )


@pytest.fixture
def model() -> onnx.ModelProto:
    """A graph of the right interface with one initializer: the mean brightness of each 2 × 2 cell, times one."""
    weight = helper.make_tensor("gain", TensorProto.FLOAT, [1], [1.0])
    nodes = [
        helper.make_node("Cast", ["tiles"], ["pixels"], to=TensorProto.FLOAT),
        helper.make_node("Transpose", ["pixels"], ["planes"], perm=[0, 3, 1, 2]),
        helper.make_node("AveragePool", ["planes"], ["cells"], kernel_shape=[2, 2], strides=[2, 2]),
        helper.make_node("Mul", ["cells", "gain"], ["gained"]),
        helper.make_node("Squeeze", ["gained", "channel"], ["map"]),
        helper.make_node("ReduceMax", ["map"], ["score"], axes=[1, 2], keepdims=0),
    ]
    channel = helper.make_tensor("channel", TensorProto.INT64, [1], [1])
    graph = helper.make_graph(
        nodes,
        "scorer",
        [helper.make_tensor_value_info("tiles", TensorProto.UINT8, ["N", 4, 4, 1])],
        [
            helper.make_tensor_value_info("score", TensorProto.FLOAT, ["N"]),
            helper.make_tensor_value_info("map", TensorProto.FLOAT, ["N", 2, 2]),
        ],
        [weight, channel],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)])


@pytest.fixture
def bundle(manifest: Manifest, model: onnx.ModelProto) -> Bundle:
    tiles = np.random.default_rng(1).integers(0, 256, (3, 4, 4, 1), np.uint8)
    cells = tiles.reshape(3, 2, 2, 2, 2).mean((2, 4)).astype(np.float32)
    golden = Golden(tiles, cells.max((1, 2)), cells)
    return Bundle(replace(manifest), model.SerializeToString(), golden, b"\x89PNG\r\n\x1a\n")


@pytest.fixture
def bundle_file(bundle: Bundle, tmp_path: Path) -> Path:
    path = tmp_path / "plates.kizu"
    write_bundle(bundle, path)
    return path
