"""FLOPs and bytes of a scorer graph, counted from the ONNX file itself.

A multiplication with its addition counts as two FLOPs. Counted are the operators that do nearly all of them: Conv,
ConvTranspose, Gemm and MatMul (and their integer forms); *not* counted are the FLOPs of everything else: activations,
normalisation, pooling, resizing, reductions, distances written elementwise. Bytes: each node reads each of its inputs
and writes each of its outputs once, weights included, as if nothing were fused and nothing stayed in a cache; views
(Reshape, Squeeze …) and Constants move nothing. So bytes are an upper bound, and a runtime that fuses moves fewer.
"""

from collections.abc import Callable, Mapping, Sequence
from math import prod
from typing import NamedTuple

import onnx
from onnx import TensorProto, helper

_VIEWS = frozenset({"Constant", "Flatten", "Identity", "Reshape", "Shape", "Squeeze", "Unsqueeze"})
Shape = tuple[int, ...]


class Node(NamedTuple):
    """What one operator costs."""

    operator: str
    flops: int
    moved: int


class Cost(NamedTuple):
    """What a graph costs for a batch: by node, and tensors whose shape nobody knows (their bytes are not counted)."""

    nodes: tuple[Node, ...]
    unknown: int

    @property
    def flops(self) -> int:
        """All FLOPs."""
        return sum(node.flops for node in self.nodes)

    @property
    def moved(self) -> int:
        """All bytes read and written."""
        return sum(node.moved for node in self.nodes)

    def seconds(self, flops_per_s: float, bytes_per_s: float) -> float:
        """The operator-wise roofline: each node takes as long as the slower of its FLOPs and its bytes."""
        return sum(max(node.flops / flops_per_s, node.moved / bytes_per_s) for node in self.nodes)


def count(scorer: bytes, batch: int) -> Cost:
    """Count the graph `scorer` for a batch of so many tiles."""
    model = onnx.load_from_string(scorer)
    for value in (*model.graph.input, *model.graph.output):
        value.type.tensor_type.shape.dim[0].dim_value = batch
    del model.graph.value_info[:]
    model = onnx.shape_inference.infer_shapes(model, data_prop=True)
    sizes = _Sizes(model)
    nodes = tuple(_node(node, sizes) for node in model.graph.node)
    return Cost(nodes, len(sizes.unknown))


class _Sizes:
    """Shapes and bytes of the tensors of a graph."""

    def __init__(self, model: onnx.ModelProto) -> None:
        graph = model.graph
        self.unknown: set[str] = set()
        self._shapes: dict[str, Shape] = {}
        self._widths: dict[str, int] = {}
        for value in (*graph.input, *graph.value_info, *graph.output):
            dims = value.type.tensor_type.shape.dim
            if value.type.tensor_type.HasField("shape") and all(dim.HasField("dim_value") for dim in dims):
                self._note(value.name, tuple(dim.dim_value for dim in dims), value.type.tensor_type.elem_type)
        for tensor in graph.initializer:
            self._note(tensor.name, tuple(tensor.dims), tensor.data_type)
        for node in graph.node:
            if node.op_type == "Constant" and node.attribute[0].name == "value":
                self._note(node.output[0], tuple(node.attribute[0].t.dims), node.attribute[0].t.data_type)

    def shape(self, name: str) -> Shape | None:
        """The shape of the tensor, None where nobody knows it."""
        return self._shapes.get(name)

    def moved(self, names: Sequence[str]) -> int:
        """Bytes of the tensors together."""
        total = 0
        for name in filter(None, names):
            if name in self._shapes:
                total += prod(self._shapes[name]) * self._widths[name]
            else:
                self.unknown.add(name)
        return total

    def _note(self, name: str, shape: Shape, kind: int) -> None:
        self._shapes[name] = shape
        self._widths[name] = 1 if kind == TensorProto.BOOL else helper.tensor_dtype_to_np_dtype(kind).itemsize


def _node(node: onnx.NodeProto, sizes: _Sizes) -> Node:
    flops = _FLOPS.get(node.op_type, _none)(node, sizes)
    moved = 0 if node.op_type in _VIEWS else sizes.moved([*node.input, *node.output])
    return Node(node.op_type, flops, moved)


def _none(_node: onnx.NodeProto, _sizes: _Sizes) -> int:
    return 0


def _conv(node: onnx.NodeProto, sizes: _Sizes) -> int:
    """Each number of the output takes one product for each weight of its filter: [M, C/group, k, k]."""
    out, weight = _shapes(sizes, node.output[0], node.input[1])
    return 2 * prod(out) * prod(weight[1:])


def _quantised_conv(node: onnx.NodeProto, sizes: _Sizes) -> int:
    """QLinearConv: x, its scale and zero, then the weights."""
    out, weight = _shapes(sizes, node.output[0], node.input[3])
    return 2 * prod(out) * prod(weight[1:])


def _transposed(node: onnx.NodeProto, sizes: _Sizes) -> int:
    """Each number of the input is spread by each weight of its filter: [C, M/group, k, k]."""
    given, weight = _shapes(sizes, node.input[0], node.input[1])
    return 2 * prod(given) * prod(weight[1:])


def _product(node: onnx.NodeProto, sizes: _Sizes) -> int:
    """Each number of the output is a sum over the inner axis."""
    first, out = _shapes(sizes, node.input[0], node.output[0])
    turned = {each.name: helper.get_attribute_value(each) for each in node.attribute}.get("transA", 0)
    return 2 * prod(out) * (first[-2] if turned else first[-1])


def _shapes(sizes: _Sizes, *names: str) -> list[Shape]:
    found = [sizes.shape(name) for name in names]
    if None in found:
        raise ValueError(f"the shapes of {names} are not known: FLOPs would be too few")
    return [shape for shape in found if shape is not None]


_FLOPS: Mapping[str, Callable[[onnx.NodeProto, _Sizes], int]] = {
    "Conv": _conv,
    "ConvInteger": _conv,
    "QLinearConv": _quantised_conv,
    "ConvTranspose": _transposed,
    "Gemm": _product,
    "MatMul": _product,
    "MatMulInteger": _product,
}
