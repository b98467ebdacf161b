"""What a graph must be to run anywhere kizu runs: inside TensorRT's documented operators, static but for the batch.

The model is walked once. A tensor is *of pixels* when it depends on the values of `tiles` (or of `frame`), not only on
their shape: arithmetic on those must be floating point (or in eight bits, between QuantizeLinear and DequantizeLinear),
and their shapes may vary in the batch alone. The latter holds for tensors that depend on `position` too, which may stay
integers: they are indices.
"""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

import onnx
from onnx import TensorProto

from kizu_contract.onnx_wire import has_external_data
from kizu_export.errors import ExportError
from kizu_export.tensorrt import OPERATOR_TYPES, OPSETS, SOURCE

_TYPE_NAMES = {
    TensorProto.FLOAT: "FP32",
    TensorProto.FLOAT16: "FP16",
    TensorProto.INT32: "INT32",
    TensorProto.INT64: "INT64",
    TensorProto.INT8: "INT8",
    TensorProto.UINT8: "UINT8",
    TensorProto.BOOL: "BOOL",
    TensorProto.DOUBLE: "DOUBLE",
}
_REFUSED = {
    **dict.fromkeys(("If", "Loop", "Scan"), "is control flow"),
    **dict.fromkeys(("NonZero", "NonMaxSuppression"), "gives shapes that depend on pixels"),
    **dict.fromkeys(("RandomNormal", "RandomNormalLike", "RandomUniform", "RandomUniformLike"), "gives random numbers"),
}
_PIXELS = frozenset({"tiles", "frame"})
"""Inputs of pixels: a graph has one of them."""
_SHAPE_OPS = frozenset({"Shape", "Size"})
_INDEX_OPS = frozenset({"ArgMax", "ArgMin", "TopK"})
_EIGHT_BIT_OPS = frozenset({"QuantizeLinear", "DequantizeLinear"})
_INTEGERS = frozenset({"INT32", "INT64"})
_MAX_TOP_K = 3840
_SHOWN = 12


@dataclass(frozen=True)
class GraphFacts:
    """What `kizu-export inspect` tells of a graph: operators with their counts, opset, learned numbers, bytes."""

    opset: int
    operators: dict[str, int]
    parameters: int
    bytes: int


def check_graph(model: onnx.ModelProto) -> None:
    """Refuse a model (shapes inferred, see graph.finish_model) that some provider could not run.

    Raises ExportError that lists the first problems found.
    """
    problems = list(dict.fromkeys([*_model_problems(model), *_Walk(model).problems()]))
    if problems:
        more = len(problems) - _SHOWN
        shown = problems[:_SHOWN] + ([f"and {more} more that follow from these"] if more > 0 else [])
        lines = "".join(f"\n  - {problem}" for problem in shown)
        raise ExportError(f"the scorer's graph would not run everywhere ({SOURCE}):{lines}")


def graph_facts(scorer: bytes) -> GraphFacts:
    """Count what is in a serialised graph. Raises ExportError when it is not ONNX."""
    try:
        model = onnx.load_from_string(scorer)
    except Exception as exc:  # protobuf's DecodeError lies in a package that is only there by way of onnx
        raise ExportError(f"scorer.onnx is not an ONNX model: {exc}") from exc
    operators = Counter(node.op_type for node in model.graph.node)
    parameters = sum(_count(tensor) for tensor in model.graph.initializer)
    return GraphFacts(_opset(model), dict(sorted(operators.items())), parameters, len(scorer))


def _model_problems(model: onnx.ModelProto) -> Iterator[str]:
    if has_external_data(model.SerializeToString()):
        yield "it keeps tensors outside the file; save it in one piece"
    if model.functions or model.graph.sparse_initializer or model.training_info:
        yield "it holds functions, sparse tensors or training data; none of them belong in a scorer"
    if _opset(model) not in OPSETS:
        yield f"its opset is {_opset(model)}; {OPSETS.start} to {OPSETS.stop - 1} are documented"
    for tensor in model.graph.initializer:
        if _TYPE_NAMES.get(tensor.data_type, "other") not in {"FP32", "FP16", "INT8", "INT32", "INT64", "BOOL"}:
            yield f"its constant {tensor.name} is of type {TensorProto.DataType.Name(tensor.data_type)}"


class _Walk:
    """One pass over the nodes, in the order in which they run."""

    def __init__(self, model: onnx.ModelProto) -> None:
        self._graph = model.graph
        values = (*model.graph.input, *model.graph.value_info, *model.graph.output)
        self._types = {value.name: value.type.tensor_type for value in values}
        self._constants = {tensor.name: tensor for tensor in model.graph.initializer}
        for node in model.graph.node:
            if node.op_type == "Constant" and node.attribute and node.attribute[0].name == "value":
                self._constants[node.output[0]] = node.attribute[0].t
        self._of_pixels, self._of_places = {*_PIXELS}, {"position"}

    def problems(self) -> Iterator[str]:
        """Everything that is wrong, node by node."""
        for node in self._graph.node:
            where = f"{node.op_type} ({node.name or node.output[0]})"
            for problem in (*self._operator(node), *self._inputs(node), *self._restrictions(node)):
                yield f"{where} {problem}"
            if node.op_type not in _SHAPE_OPS and self._of_pixels.intersection(node.input):
                self._of_pixels.update(name for name in node.output if name)
                yield from (f"{where} {problem}" for problem in self._outputs(node))
            elif node.op_type not in _SHAPE_OPS and self._of_places.intersection(node.input):
                self._of_places.update(name for name in node.output if name)
                yield from (f"{where} {problem}" for name in node.output for problem in self._shape(name))

    def _operator(self, node: onnx.NodeProto) -> Iterator[str]:
        if node.domain not in ("", "ai.onnx") or node.op_type not in OPERATOR_TYPES:
            yield "is not among the documented operators"
        elif node.op_type in _REFUSED:
            yield _REFUSED[node.op_type]

    def _inputs(self, node: onnx.NodeProto) -> Iterator[str]:
        """The type of the first input must be documented for the operator; pixels must become floats at once."""
        allowed = OPERATOR_TYPES.get(node.op_type)
        kind = self._type(node.input[0]) if node.input else None
        if allowed is not None and kind is not None and kind not in allowed:
            yield f"works on {kind}; documented are {', '.join(sorted(allowed))}"
        if _PIXELS.intersection(node.input) and node.op_type != "Cast" and node.op_type not in _SHAPE_OPS:
            yield "takes the uint8 pixels; TensorRT wants a Cast to float first (torch: tiles.float() before all else)"

    def _outputs(self, node: onnx.NodeProto) -> Iterator[str]:
        """Types and shapes of a tensor of pixels."""
        for name in filter(None, node.output):
            kind = self._type(name)
            if kind == "INT8" and node.op_type == "QuantizeLinear":
                yield from self._shape(name)
                continue
            if kind in _INTEGERS and (node.op_type in _INDEX_OPS or self._moves_indices(node)):
                continue
            if kind not in ("FP32", "FP16", "BOOL"):
                yield f"computes on pixels in {kind or 'an unknown type'}; only floats and booleans are portable"
            yield from self._shape(name)

    def _shape(self, name: str) -> Iterator[str]:
        shape = self._types[name].shape.dim if name in self._types else None
        if shape is None or sum(not dim.HasField("dim_value") for dim in shape) > 1:
            yield "gives a tensor whose shape varies in more than the batch"

    def _moves_indices(self, node: onnx.NodeProto) -> bool:
        """Tell whether the pixels reach this node as indices that an index operator gave."""
        reached = [name for name in node.input if name in self._of_pixels]
        return all(self._type(name) in _INTEGERS for name in reached)

    def _restrictions(self, node: onnx.NodeProto) -> Iterator[str]:
        """Restrictions from the document's last column that a scorer might run into."""
        if node.op_type == "MaxPool" and len([name for name in node.output if name]) > 1:
            yield "gives indices, which are not documented"
        if node.op_type in _EIGHT_BIT_OPS and not self._is_symmetric(node):
            yield "has no constant zero point of int8 zeros, which TensorRT asks for"
        if node.op_type == "TopK":
            count = self._constants.get(node.input[1])
            if count is None or int(onnx.numpy_helper.to_array(count).reshape(-1)[0]) >= _MAX_TOP_K:
                yield f"needs a constant K below {_MAX_TOP_K}"

    def _is_symmetric(self, node: onnx.NodeProto) -> bool:
        zero = self._constants.get(node.input[2]) if len(node.input) > 2 else None
        return zero is not None and zero.data_type == TensorProto.INT8 and not onnx.numpy_helper.to_array(zero).any()

    def _type(self, name: str) -> str | None:
        if name in self._constants:
            return _TYPE_NAMES.get(self._constants[name].data_type, "other")
        return _TYPE_NAMES.get(self._types[name].elem_type, "other") if name in self._types else None


def _opset(model: onnx.ModelProto) -> int:
    return max((entry.version for entry in model.opset_import if entry.domain in ("", "ai.onnx")), default=0)


def _count(tensor: TensorProto) -> int:
    count = 1
    for length in tensor.dims:
        count *= length
    return count
