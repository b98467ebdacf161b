"""What is rewritten for the engines: fewer and larger steps, the same numbers."""

from collections import Counter

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper
from onnx.reference import ReferenceEvaluator
from torch import Tensor, nn

from kizu_contract.manifest import BatchProfile, Graph
from kizu_export.graph import export_graph
from kizu_export.simplify import choose_rows
from kizu_train.nets.layers import to_pixels
from kizu_train.nets.pyramid import PatchMemory, Pyramid

TILE_PX = 32


class Memory(nn.Module):
    """A pyramid's memory as a scorer: distances of patches at half size."""

    def __init__(self) -> None:
        super().__init__()
        random = torch.Generator().manual_seed(4)
        self.pyramid = Pyramid((1,), 3)
        self.memory = PatchMemory(TILE_PX // 2, 2, 2, 3, 12, 60)
        self.memory.learn_basis(torch.rand((200, 12), generator=random))
        self.memory.remember(torch.randn((60, 12), generator=random))

    def forward(self, tiles: Tensor) -> tuple[Tensor, Tensor]:
        """Score `tiles`."""
        cells = self.memory(self.pyramid(to_pixels(tiles))[0])
        return cells.amax((1, 2)), cells


@pytest.fixture
def exported() -> onnx.ModelProto:
    return export_graph(Memory().eval(), Graph(17, "fp32", ("tiles",), TILE_PX, 3, 4, BatchProfile(1, 4, 16)))


def run(model: onnx.ModelProto, inputs: dict[str, np.ndarray]) -> list[np.ndarray]:
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return list(session.run(None, inputs))


def kinds(model: onnx.ModelProto) -> Counter[str]:
    return Counter(node.op_type for node in model.graph.node)


def test_the_words_of_a_group_are_taken_as_a_row(exported: onnx.ModelProto) -> None:
    """One index for each row, no node that nobody needs, and the distances are torch's for any number of tiles."""
    found = kinds(exported)
    assert found["GatherND"] == 1
    assert not found["GatherElements"] + found["Expand"]
    for count in (1, 5):
        tiles = np.random.default_rng(count).integers(0, 256, (count, TILE_PX, TILE_PX, 3), np.uint8)
        wanted = Memory()(torch.from_numpy(tiles))[1].numpy()
        np.testing.assert_allclose(run(exported, {"tiles": tiles})[1], wanted, rtol=1e-4, atol=1e-5)


def test_convolutions_have_constant_weights(exported: onnx.ModelProto) -> None:
    """Onnxruntime lays weights out for its fast convolutions only where they are constants."""
    constants = {tensor.name for tensor in exported.graph.initializer}
    convolutions = [node for node in exported.graph.node if node.op_type == "Conv"]
    assert len(convolutions) == 3
    assert all(node.input[1] in constants for node in convolutions)


@pytest.mark.parametrize("change", [None, "reader", "axis", "maximum", "part", "copied shape", "output"])
def test_only_whole_rows_are_taken(change: str | None) -> None:
    """Left alone are rows that are read as [V, 1, g], parts of rows, other axes, and indices of something else."""
    source = "other" if change == "maximum" else "x"
    nodes = [
        helper.make_node("Reshape", ["flat_x", "grouped"], ["x"]),
        helper.make_node("ReduceMax", [source], ["largest"], axes=[2], keepdims=0),
        helper.make_node("ArgMax", ["largest"], ["index"], axis=1, keepdims=1),
        helper.make_node("Unsqueeze", ["index", "two"], ["deep"]),
        helper.make_node("Expand", ["deep", "part" if change == "part" else "whole"], ["wide"]),
        helper.make_node("GatherElements", ["x", "wide"], ["rows"], axis=2 if change == "axis" else 1),
        helper.make_node("Relu", ["rows"], ["y"])
        if change == "reader"
        else helper.make_node("Reshape", ["rows", "copied" if change == "copied shape" else "flat"], ["y"]),
    ]
    constants = {
        "two": [2],
        "grouped": [-1, 5, 3],
        "whole": [1, 1, 3],
        "part": [4, 1, 2],
        "flat": [-1],
        "copied": [0, 3],
    }
    given = {"flat_x": [20, 3], "other": [4, 5, 3]}
    graph = helper.make_graph(
        nodes,
        "rows",
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in given.items()],
        [
            helper.make_tensor_value_info(name, TensorProto.FLOAT, None)
            for name in (("y", "rows") if change == "output" else ("y",))
        ],
        [helper.make_tensor(name, TensorProto.INT64, [len(values)], values) for name, values in constants.items()],
    )
    before = [node.op_type for node in graph.node]
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)])
    tensors = {name: np.random.default_rng(3).random(shape, np.float32) for name, shape in given.items()}
    unchanged = ReferenceEvaluator(model)
    choose_rows(model.graph)
    after = [node.op_type for node in model.graph.node]
    if change is None:
        assert after == ["Reshape", "ReduceMax", "ArgMax", "GatherND", "Reshape"]
        np.testing.assert_array_equal(
            ReferenceEvaluator(model).run(["y"], tensors)[0], unchanged.run(["y"], tensors)[0]
        )
    else:
        assert after == before
