"""Graphs that would not run everywhere are refused by name; the document's rules are data."""

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor, nn

from kizu_contract.manifest import BatchProfile, Graph
from kizu_export.checks import check_graph, graph_facts
from kizu_export.errors import ExportError
from kizu_export.graph import export_graph, finish_model, to_bytes
from kizu_export.simplify import spell_out_softplus
from kizu_export.tensorrt import OPERATOR_TYPES

GRAPH = Graph(17, "fp32", ("tiles",), 4, 1, 1, BatchProfile(1, 8, 8))


def make_model(middle: list[onnx.NodeProto], constants: dict[str, np.ndarray] | None = None) -> onnx.ModelProto:
    """Tiles are cast to `pixels`; `middle` must make `map` [N, 4, 4] of them."""
    nodes = [
        helper.make_node("Cast", ["tiles"], ["cast"], to=TensorProto.FLOAT),
        helper.make_node("Reshape", ["cast", "to_map"], ["pixels"]),
        *middle,
        helper.make_node("ReduceMax", ["map"], ["score"], axes=[1, 2], keepdims=0),
    ]
    tensors = {"to_map": np.array([-1, 4, 4], np.int64), **(constants or {})}
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("tiles", TensorProto.UINT8, ["N", 4, 4, 1])],
        [
            helper.make_tensor_value_info("score", TensorProto.FLOAT, ["N"]),
            helper.make_tensor_value_info("map", TensorProto.FLOAT, ["N", 4, 4]),
        ],
        [numpy_helper.from_array(value, name) for name, value in tensors.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def check(model: onnx.ModelProto) -> None:
    check_graph(finish_model(model, GRAPH))


def branch(name: str) -> onnx.GraphProto:
    node = helper.make_node("Identity", ["pixels"], [name])
    return helper.make_graph([node], name, [], [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["N", 4, 4])])


def test_plain_graph_passes() -> None:
    """A graph of documented operators on floats is well."""
    check(make_model([helper.make_node("Abs", ["pixels"], ["map"])]))


def test_control_flow_is_refused() -> None:
    """An If is refused even though the document lists it."""
    node = helper.make_node("If", ["always"], ["map"], then_branch=branch("a"), else_branch=branch("b"))
    with pytest.raises(ExportError, match=r"If .* is control flow"):
        check(make_model([node], {"always": np.ones((), np.bool_)}))


def test_shapes_that_depend_on_pixels_are_refused() -> None:
    """A NonZero is refused, and so is what follows from its shape."""
    middle = [
        helper.make_node("NonZero", ["pixels"], ["places"]),
        helper.make_node("Cast", ["places"], ["floats"], to=TensorProto.FLOAT),
        helper.make_node("ReduceSum", ["floats"], ["sum"], keepdims=0),
        helper.make_node("Add", ["pixels", "sum"], ["map"]),
    ]
    with pytest.raises(ExportError, match=r"NonZero .* shapes that depend on pixels"):
        check(make_model(middle))


def test_undocumented_operator_is_refused() -> None:
    """An operator outside the document is refused by name."""
    middle = [
        helper.make_node("Det", ["pixels"], ["det"]),
        helper.make_node("Reshape", ["det", "wide"], ["column"]),
        helper.make_node("Add", ["pixels", "column"], ["map"]),
    ]
    with pytest.raises(ExportError, match=r"Det .* is not among the documented operators"):
        check(make_model(middle, {"wide": np.array([-1, 1, 1], np.int64)}))


def test_integer_arithmetic_on_pixels_is_refused() -> None:
    """Pixels may not be computed with in integers."""
    middle = [
        helper.make_node("Cast", ["pixels"], ["ints"], to=TensorProto.INT64),
        helper.make_node("Add", ["ints", "ints"], ["twice"]),
        helper.make_node("Cast", ["twice"], ["map"], to=TensorProto.FLOAT),
    ]
    with pytest.raises(ExportError, match="computes on pixels in INT64"):
        check(make_model(middle))


def test_double_precision_is_refused() -> None:
    """TensorRT has no doubles."""
    middle = [
        helper.make_node("Cast", ["pixels"], ["wide"], to=TensorProto.DOUBLE),
        helper.make_node("Cast", ["wide"], ["map"], to=TensorProto.FLOAT),
    ]
    with pytest.raises(ExportError, match="DOUBLE"):
        check(make_model(middle))


def test_indices_of_pixels_are_allowed() -> None:
    """Integers that an ArgMax gave and a Gather reads are indices, not arithmetic."""
    middle = [
        helper.make_node("ArgMax", ["pixels"], ["best"], axis=2, keepdims=1),
        helper.make_node("GatherElements", ["pixels", "best"], ["value"], axis=2),
        helper.make_node("Sub", ["pixels", "value"], ["map"]),
    ]
    check(make_model(middle))


def test_uint8_beyond_the_input_is_refused() -> None:
    """Arithmetic on uint8 tiles before the cast is refused, with what to do."""
    model = make_model([helper.make_node("Abs", ["pixels"], ["map"])])
    model.graph.node[0].CopyFrom(helper.make_node("Max", ["tiles"], ["bytes"]))
    model.graph.node.insert(1, helper.make_node("Cast", ["bytes"], ["cast"], to=TensorProto.FLOAT))
    with pytest.raises(ExportError, match="Cast to float first"):
        check(model)


def test_data_outside_the_file_is_refused() -> None:
    """A tensor in another file is refused before anything opens it."""
    model = finish_model(make_model([helper.make_node("Abs", ["pixels"], ["map"])]), GRAPH)
    tensor = model.graph.initializer[0]
    tensor.data_location = TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value="/etc/passwd")
    with pytest.raises(ExportError, match="outside the file"):
        check_graph(model)


def test_shape_that_contradicts_the_interface_is_refused() -> None:
    """A map of another size than the manifest's is refused when it is written."""
    with pytest.raises(ExportError, match="contradicts"):
        finish_model(
            make_model([helper.make_node("Abs", ["pixels"], ["map"])]), Graph(**{**vars(GRAPH), "map_cell_px": 2})
        )


class Listing(nn.Module):
    """Counts bright cells by listing them, as torch code easily does."""

    def forward(self, tiles: Tensor) -> tuple[Tensor, Tensor]:
        cells = tiles.float().reshape(-1, 4, 4)
        places = torch.nonzero(cells > 3).float().sum()
        return cells.amax(dim=(1, 2)) + places, cells


def test_torch_module_with_nonzero_is_refused() -> None:
    """The refusal holds for what torch itself writes."""
    with pytest.raises(ExportError, match="NonZero"):
        check_graph(export_graph(Listing(), GRAPH))


class Neighbours(nn.Module):
    """Scores a tile by its neighbours in the batch, which would make scores depend on how tiles are batched."""

    def forward(self, tiles: Tensor) -> tuple[Tensor, Tensor]:
        cells = tiles.float().reshape(-1, 4, 4)
        flat = cells.reshape(-1, 16)
        return (flat @ flat.T).amax(dim=1), cells


def test_tiles_that_meet_in_a_batch_are_refused() -> None:
    """A tensor of N × N varies in more than the batch."""
    with pytest.raises(ExportError, match="varies in more than the batch"):
        check_graph(export_graph(Neighbours(), GRAPH))


def test_softplus_is_spelt_out_and_stays_itself() -> None:
    """Large and small numbers neither overflow nor lose what their like would keep."""
    nodes = [helper.make_node("Softplus", ["x"], ["y"]), helper.make_node("Softplus", ["y"], ["z"])]
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["N"]) for name in "xz"]
    graph = helper.make_graph(nodes, "twice", ends[:1], ends[1:])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    x = np.concatenate([np.linspace(-200, 200, 4001), [-1e30, 1e30, 0.0]]).astype(np.float32)
    wanted = np.logaddexp(0, np.logaddexp(0, x.astype(np.float64)))
    spell_out_softplus(model.graph)
    assert "Softplus" not in {node.op_type for node in model.graph.node}
    session = ort.InferenceSession(to_bytes(model), providers=["CPUExecutionProvider"])
    np.testing.assert_allclose(session.run(None, {"x": x})[0], wanted, rtol=1e-6)


def test_document_lists_what_we_rely_on() -> None:
    """The transcript holds the operators of a convolutional scorer, and none that the document denies."""
    assert {"Conv", "ConvTranspose", "Gemm", "Softplus", "Pad", "Cast"} <= OPERATOR_TYPES.keys()
    assert not {"Det", "Unique", "QLinearConv", "Bernoulli"} & OPERATOR_TYPES.keys()


def test_facts_count_operators(scorer: nn.Module, graph: Graph) -> None:
    """What inspect shows is what is in the graph."""
    data = to_bytes(export_graph(scorer, graph))
    facts = graph_facts(data)
    assert (facts.opset, facts.bytes) == (17, len(data))
    assert (facts.operators["Conv"], facts.operators["ConvTranspose"]) == (1, 1)
    with pytest.raises(ExportError, match="not an ONNX model"):
        graph_facts(b"\xff\xff")
