"""A graph as its readers need it: who makes a tensor, who reads it, which are constants, what can be quantised."""

from collections import defaultdict
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import helper, numpy_helper

PASSING = frozenset(
    {"Concat", "Flatten", "Gather", "MaxPool", "Pad", "Reshape", "Resize", "Squeeze", "Transpose", "Unsqueeze"}
)
"""Operators that hand values on as they are, if their attributes say so (see `Wiring.hands_on`)."""
_LEAST_CHANNELS = 4
"""A convolution of fewer reads pixels: so little to compute that the eight bits only get in the way."""


class Wiring:
    """Who makes and who reads each tensor of `graph`; made anew after a change."""

    def __init__(self, graph: onnx.GraphProto) -> None:
        self.graph = graph
        self.constants = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}
        self.maker = {name: node for node in graph.node for name in node.output}
        self.readers: dict[str, list[onnx.NodeProto]] = defaultdict(list)
        for node in graph.node:
            for name in node.input:
                self.readers[name].append(node)
        self.outputs = {value.name for value in graph.output}
        values = (*graph.input, *graph.value_info, *graph.output)
        self.shapes = {value.name: [dim.dim_value for dim in value.type.tensor_type.shape.dim] for value in values}

    def relu_after(self, name: str) -> str | None:
        """The output of the ReLU that alone reads tensor `name`; None where something else reads it."""
        readers = self.readers[name]
        alone = len(readers) == 1 and readers[0].op_type == "Relu" and name not in self.outputs
        return readers[0].output[0] if alone else None

    def is_product(self, node: onnx.NodeProto) -> bool:
        """Whether `node` multiplies what it takes with constant weights: its result can be shifted by its bias."""
        if node.op_type not in ("Conv", "Gemm", "MatMul") or any(name not in self.constants for name in node.input[1:]):
            return False
        if node.op_type == "Gemm":
            is_plain = attribute(node, "alpha", 1.0) == 1.0 == attribute(node, "beta", 1.0)
            return bool(is_plain and not attribute(node, "transA", 0))
        # A product of stacks of matrices spreads what was scored over a map: floats, and little to compute.
        rank = 4 if node.op_type == "Conv" else 2
        return self.constants[node.input[1]].ndim == rank == len(self.shapes.get(node.input[0], []))

    def is_layer(self, node: onnx.NodeProto) -> bool:
        """Whether `node` is a product that can be computed in eight bits.

        Convolutions that fill borders with zeros are not: their zero is no zero any more once values are shifted.
        """
        if not self.is_product(node) or node.op_type != "Conv":
            return self.is_product(node)
        is_padded = any(attribute(node, "pads", [])) or attribute(node, "auto_pad", b"NOTSET") != b"NOTSET"
        return self.constants[node.input[1]].shape[1] >= _LEAST_CHANNELS and not is_padded

    def hands_on(self, node: onnx.NodeProto) -> bool:
        """Whether `node` only moves values: what it gives has the range of what it takes."""
        if node.op_type not in PASSING:
            return False
        if node.op_type == "Pad":
            return bool(attribute(node, "mode", b"constant") in (b"reflect", b"edge"))
        if node.op_type == "Resize":
            return bool(attribute(node, "mode", b"nearest") == b"nearest")
        if node.op_type == "MaxPool":
            return len(node.output) == 1
        return node.op_type == "Concat" or all(name in self.constants for name in node.input[1:] if name)

    def data_inputs(self, node: onnx.NodeProto) -> list[str]:
        """What of a moving node's inputs holds values, not places."""
        return list(node.input) if node.op_type == "Concat" else [node.input[0]]

    def weights(self, node: onnx.NodeProto) -> NDArray[np.float32]:
        """A layer's weights with what they are summed over behind the outputs: [O, …]."""
        found = self.constants[node.input[1]]
        is_turned = node.op_type == "MatMul" or (node.op_type == "Gemm" and not attribute(node, "transB", 0))
        return np.ascontiguousarray(found.T if is_turned else found, np.float32)


def attribute(node: onnx.NodeProto, name: str, default: Any) -> Any:
    """An attribute of `node`, or the `default` that the operator has."""
    return next((helper.get_attribute_value(item) for item in node.attribute if item.name == name), default)


def layers_of(model: onnx.ModelProto) -> list[str]:
    """Names of the layers that can be quantised (their output tensors), in the order in which they run."""
    wiring = Wiring(model.graph)
    return [node.output[0] for node in model.graph.node if wiring.is_layer(node)]
