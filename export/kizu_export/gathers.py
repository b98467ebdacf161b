"""Mirrored borders and enlargements written as choices of rows and columns, channels last.

onnxruntime computes convolutions of eight bits with the channels last, and moves eight-bit values by Gather, Resize
and Transpose, but not by Pad: each Pad would turn its input to floats and back, and its channels to the front and back.
Rows and columns chosen by index say the same in operators that stay in eight bits; the transposes cancel out.
"""

from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import helper, numpy_helper

from kizu_export.layers import Wiring, attribute

_FIRST_SPATIAL = 2


def moves_as_gathers(model: onnx.ModelProto, chosen: set[str]) -> onnx.ModelProto:
    """`model` with the Pads and Resizes that give a tensor of `chosen` written as Gathers; shapes must be inferred."""
    new = onnx.ModelProto()
    new.CopyFrom(model)
    wiring = Wiring(new.graph)
    nodes: list[onnx.NodeProto] = []
    for node in new.graph.node:
        places = _places(node, wiring) if node.output[0] in chosen else None
        nodes += [node] if places is None else _gathers(new.graph, node, places)
    del new.graph.node[:]
    del new.graph.value_info[:]
    new.graph.node.extend(nodes)
    return onnx.shape_inference.infer_shapes(new, data_prop=True)


def _places(node: onnx.NodeProto, wiring: Wiring) -> list[NDArray[np.int64]] | None:
    """The row and the column of the input that each row and column of the output is; None where it is no such node."""
    shape = wiring.shapes.get(node.input[0], [])
    if (
        node.op_type not in ("Pad", "Resize")
        or not wiring.hands_on(node)
        or len(shape) != 4
        or 0 in shape[_FIRST_SPATIAL:]
    ):
        return None
    sides = shape[_FIRST_SPATIAL:]
    if node.op_type == "Pad":
        pads = wiring.constants[node.input[1]]
        mode = "reflect" if attribute(node, "mode", b"") == b"reflect" else "edge"
        if len(pads) != 8 or pads[[0, 1, 4, 5]].any():
            return None
        return [np.pad(np.arange(side), (pads[2 + i], pads[6 + i]), mode=mode) for i, side in enumerate(sides)]  # type: ignore[call-overload]
    scales = wiring.constants.get(node.input[2]) if len(node.input) > _FIRST_SPATIAL else None
    if scales is None or len(scales) != 4 or (scales[:2] != 1).any() or (scales % 1).any():
        return None
    return [np.repeat(np.arange(side), int(times)) for side, times in zip(sides, scales[2:], strict=True)]


def _gathers(graph: onnx.GraphProto, node: onnx.NodeProto, places: list[NDArray[np.int64]]) -> list[onnx.NodeProto]:
    base, last = node.output[0], node.output[0]
    for axis, index in zip("yx", places, strict=True):
        graph.initializer.append(numpy_helper.from_array(index.astype(np.int64), f"{base}_{axis}"))
    steps: list[tuple[str, list[str], str, dict[str, Any]]] = [
        ("Transpose", [node.input[0]], f"{base}_turned", {"perm": [0, 2, 3, 1]}),
        ("Gather", [f"{base}_turned", f"{base}_y"], f"{base}_rows", {"axis": 1}),
        ("Gather", [f"{base}_rows", f"{base}_x"], f"{base}_cells", {"axis": 2}),
        ("Transpose", [f"{base}_cells"], last, {"perm": [0, 3, 1, 2]}),
    ]
    return [helper.make_node(kind, inputs, [name], name=name, **options) for kind, inputs, name, options in steps]
