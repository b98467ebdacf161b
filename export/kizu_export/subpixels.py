"""Transposed convolutions written as convolutions whose outputs are the sub-pixels, and norms folded into weights.

No processor's eight-bit kernels know a transposed convolution. The sub-pixels of one phase are a convolution of their
own, so all phases together are one with s² as many outputs, which are then moved to their places. The same sums, in
another order. Source: Shi et al., "Is the deconvolution layer the same as a convolutional layer?", 2016.
"""

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import helper, numpy_helper

from kizu_export.layers import Wiring, attribute

_PRODUCTS = ("Conv", "ConvTranspose", "Gemm", "MatMul")


def as_convolutions(model: onnx.ModelProto) -> onnx.ModelProto:
    """`model` (fp32, shapes inferred) with batch norms folded and transposed convolutions written as plain ones."""
    return _rewritten(fold_norms(model), _spell_out)


def fold_norms(model: onnx.ModelProto) -> onnx.ModelProto:
    """`model` (fp32, shapes inferred) with batch norms folded into the products that they alone read."""
    return _rewritten(model, _fold)


def _rewritten(
    model: onnx.ModelProto, rewrite: Callable[[onnx.NodeProto, Wiring], Iterator[onnx.NodeProto]]
) -> onnx.ModelProto:
    new = onnx.ModelProto()
    new.CopyFrom(model)
    wiring = Wiring(new.graph)
    nodes = [made for node in list(new.graph.node) for made in rewrite(node, wiring)]
    used = {name for node in nodes for name in node.input}
    kept = [numpy_helper.from_array(value, name) for name, value in wiring.constants.items() if name in used]
    for field, content in (("node", nodes), ("initializer", kept), ("value_info", [])):
        new.graph.ClearField(field)
        getattr(new.graph, field).extend(content)
    return onnx.shape_inference.infer_shapes(new, data_prop=True)


def _fold(node: onnx.NodeProto, wiring: Wiring) -> Iterator[onnx.NodeProto]:
    """A batch norm goes into the weights and the bias of the product that it alone reads."""
    if f"{node.output[0]}_folded" in wiring.constants:
        return  # into the product before it
    norm = _normed(node, wiring)
    if norm is None:
        yield node
        return
    gain, shift, mean, variance = (wiring.constants[name].astype(np.float64) for name in norm.input[1:5])
    times = gain / np.sqrt(variance + float(attribute(norm, "epsilon", 1e-5)))
    weights = wiring.constants[node.input[1]]
    bias = wiring.constants[node.input[2]] if len(node.input) > 2 else np.zeros(len(times))
    name, output = f"{norm.output[0]}_folded", norm.output[0]
    wiring.constants[name] = (weights * _along(times, node, weights.ndim)).astype(np.float32)
    wiring.constants[f"{name}_bias"] = (shift + (bias - mean) * times).astype(np.float32)
    if node.op_type == "MatMul":
        yield helper.make_node("Gemm", [node.input[0], name, f"{name}_bias"], [output], name=output)
        return
    node.input[:] = [node.input[0], name, f"{name}_bias"]
    node.output[0] = output
    yield node


def _normed(node: onnx.NodeProto | None, wiring: Wiring) -> onnx.NodeProto | None:
    """The batch norm that alone reads product `node`; None where that is not so or cannot be folded."""
    if node is None or node.op_type not in _PRODUCTS or any(name not in wiring.constants for name in node.input[1:]):
        return None
    readers = wiring.readers[node.output[0]]
    if len(readers) != 1 or readers[0].op_type != "BatchNormalization" or node.output[0] in wiring.outputs:
        return None
    is_flat = node.op_type in ("Gemm", "MatMul")
    is_stacked = is_flat and len(wiring.shapes.get(node.input[0], [])) != 2
    return None if is_stacked or attribute(node, "group", 1) != 1 else readers[0]


def _along(times: NDArray[np.float64], node: onnx.NodeProto, rank: int) -> NDArray[np.float64]:
    """`times` shaped to multiply the outputs of a product's weights."""
    if rank == 2:
        return times[:, None] if node.op_type == "Gemm" and attribute(node, "transB", 0) else times[None, :]
    return times[None, :, None, None] if node.op_type == "ConvTranspose" else times[:, None, None, None]


def _spell_out(node: onnx.NodeProto, wiring: Wiring) -> Iterator[onnx.NodeProto]:
    """A transposed convolution as a convolution and a move of its outputs to their places; its ReLU before the move."""
    if node.op_type == "Relu" and f"{node.input[0]}_phases" in wiring.constants and wiring.relu_after(node.input[0]):
        return
    shape = wiring.shapes.get(node.input[0], []) if node.op_type == "ConvTranspose" else []
    stride, taps = _taps(node, wiring, shape)
    if taps is None:
        yield node
        return
    weights, output = wiring.constants[node.input[1]], node.output[0]  # [C, O, k, k]
    bias = wiring.constants[node.input[2]] if len(node.input) > 2 else np.zeros(weights.shape[1], np.float32)
    wiring.constants[f"{output}_phases"] = _phases(weights, taps)
    wiring.constants[f"{output}_bias"] = np.tile(bias.astype(np.float32), stride**2)
    high, wide = (side - taps.shape[1] + 1 for side in shape[2:])
    count = weights.shape[1]
    wiring.constants[f"{output}_apart"] = np.array([-1, high, wide, stride, stride, count], np.int64)
    wiring.constants[f"{output}_whole"] = np.array([-1, high * stride, wide * stride, count], np.int64)
    relu = wiring.relu_after(output)
    steps: tuple[tuple[str, list[str], dict[str, Any]], ...] = (
        ("Conv", [node.input[0], f"{output}_phases", f"{output}_bias"], {}),
        *([("Relu", [], {})] if relu else []),
        ("Transpose", [], {"perm": [0, 2, 3, 1]}),
        ("Reshape", [f"{output}_apart"], {}),
        ("Transpose", [], {"perm": [0, 1, 3, 2, 4, 5]}),
        ("Reshape", [f"{output}_whole"], {}),
        ("Transpose", [], {"perm": [0, 3, 1, 2]}),
    )
    last = ""
    for number, (kind, inputs, options) in enumerate(steps):
        name = (relu or output) if number == len(steps) - 1 else f"{output}_{number}"
        yield helper.make_node(kind, [last, *inputs] if last else inputs, [name], name=name, **options)
        last = name


def _taps(node: onnx.NodeProto, wiring: Wiring, shape: list[int]) -> tuple[int, NDArray[np.int64] | None]:
    """Stride s, and [s, K]: which row of the kernel output phase a takes at tap j, -1 for none.

    None where it is no transposed convolution of square form that reads nothing from beyond its input.
    """
    if len(shape) != 4 or not 0 < shape[2] == shape[3] or not is_square(node, wiring):
        return 0, None
    kernel, side = wiring.constants[node.input[1]].shape[2], shape[2]
    stride, cut = attribute(node, "strides", [1])[0], attribute(node, "pads", [0])[0]
    # Output s·m + a is the sum of x[m - d] · w[s·d + a + cut] over all d for which that row of the kernel is there.
    least, most = -((stride - 1 + cut) // stride), (kernel - 1 - cut) // stride
    places, left = divmod(stride * (side - 1) + kernel - 2 * cut, stride)
    if most != 0 or left or places - least != side:
        return 0, None
    offsets = np.arange(most, least - 1, -1)
    rows = stride * offsets[None, :] + np.arange(stride)[:, None] + cut
    return stride, np.where((rows >= 0) & (rows < kernel), rows, -1)


def is_square(node: onnx.NodeProto, wiring: Wiring) -> bool:
    """Whether rows and columns of a transposed convolution are treated alike, and nothing else is unusual."""
    weights = wiring.constants.get(node.input[1])
    lists = [attribute(node, name, [default]) for name, default in (("pads", 0), ("strides", 1), ("dilations", 1))]
    plain = attribute(node, "group", 1) == 1 and not any(attribute(node, "output_padding", []))
    alike = all(len(set(values)) == 1 for values in lists) and lists[2][0] == 1
    return plain and alike and weights is not None and weights.shape[2] == weights.shape[3]


def _phases(weights: NDArray[np.float32], taps: NDArray[np.int64]) -> NDArray[np.float32]:
    """Weights [C, O, k, k] of a transposed convolution → [s·s·O, C, K, K] of the plain one, phase by phase."""
    # A row of zeros for the taps that a phase does not take.
    filled = np.pad(weights, ((0, 0), (0, 0), (0, 1), (0, 1)))
    parts = [filled[:, :, rows[:, None], columns[None, :]].transpose(1, 0, 2, 3) for rows in taps for columns in taps]
    return np.ascontiguousarray(np.concatenate(parts), np.float32)
