"""Half precision where it pays and cannot hurt: matrix products in fp16, everything about likelihoods in fp32.

Convolutions and matrix products take and give fp16; what merely passes their results on stays with them. All else
(normalisation of pixels, variances, divisions, sums over tiles) stays in fp32: a squared error over a small variance
overflows fp16 at 65,504. The interface stays float32.
"""

from collections.abc import Iterator

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

_PRODUCTS = frozenset({"Conv", "ConvTranspose", "Gemm", "MatMul"})
_FOLLOWERS = frozenset(
    {"AveragePool", "Flatten", "Identity", "LeakyRelu", "MaxPool", "Pad", "Relu", "Reshape", "Transpose"}
)


def to_half(model: onnx.ModelProto) -> onnx.ModelProto:
    """Rewrite a fp32 `model` to mixed precision; shapes and types must be inferred anew."""
    half = onnx.ModelProto()
    half.CopyFrom(model)
    _Rewrite(half.graph).run()
    return half


def halved_layers(model: onnx.ModelProto) -> int:
    """How many products `to_half` computes in fp16."""
    return sum(node.op_type in _PRODUCTS for node in model.graph.node)


class _Rewrite:
    """One pass over the nodes; remembers which tensors are fp16 now and which casts exist."""

    def __init__(self, graph: onnx.GraphProto) -> None:
        self._graph = graph
        self._weights = {tensor.name: tensor for tensor in graph.initializer}
        self._half: set[str] = set()
        self._casts: dict[tuple[str, int], str] = {}

    def run(self) -> None:
        """Rewrite the graph in place; fp32 weights that nobody reads any more are dropped."""
        outputs = {value.name for value in self._graph.output}
        nodes = [new for node in self._graph.node for new in self._rewritten(node, outputs)]
        used = {name for node in nodes for name in node.input}
        kept = [tensor for name, tensor in self._weights.items() if name in used]
        for field, content in (("node", nodes), ("initializer", kept)):
            self._graph.ClearField(field)
            getattr(self._graph, field).extend(content)
        self._graph.ClearField("value_info")

    def _rewritten(self, node: onnx.NodeProto, outputs: set[str]) -> Iterator[onnx.NodeProto]:
        follows = node.op_type in _FOLLOWERS and node.input[0] in self._half
        to_half = (node.op_type in _PRODUCTS or follows) and not outputs.intersection(node.output)
        # What a follower takes besides its data is of integers, except for the value that Pad fills in.
        relevant = 1 if follows and node.op_type != "Pad" else len(node.input)
        for i, name in enumerate(node.input[:relevant]):
            if not name or self._is_integer(name):
                continue
            if to_half and name not in self._half:
                yield from self._cast(node, i, TensorProto.FLOAT16)
            elif not to_half and name in self._half:
                yield from self._cast(node, i, TensorProto.FLOAT)
        if to_half:
            self._half.update(node.output)
        yield node

    def _is_integer(self, name: str) -> bool:
        return name in self._weights and self._weights[name].data_type not in (TensorProto.FLOAT, TensorProto.FLOAT16)

    def _cast(self, node: onnx.NodeProto, i: int, kind: int) -> Iterator[onnx.NodeProto]:
        """Make input `i` of `node` of type `kind`: weights are rewritten, tensors cast once."""
        name = node.input[i]
        known = self._casts.get((name, kind))
        if known is None:
            known = f"{name}_{'fp16' if kind == TensorProto.FLOAT16 else 'fp32'}"
            self._casts[name, kind] = known
            if name in self._weights:
                values = numpy_helper.to_array(self._weights[name]).astype(np.float16)
                self._weights[known] = numpy_helper.from_array(values, known)
                self._half.add(known)
            else:
                yield helper.make_node("Cast", [name], [known], name=f"cast_{known}", to=kind)
        node.input[i] = known
