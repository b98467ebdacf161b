"""What no provider needs, or computes slowly: constants computed at run time, a late cast, one operator."""

import hashlib
from collections.abc import Mapping

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator

_MOST_FOLDED = 2**16
"""Numbers in a result."""
_ONE = "softplus_one"


def fold_constants(model: onnx.ModelProto) -> None:
    """Compute every node whose inputs are all constants, such as the paddings that torch traces; in place."""
    graph = model.graph
    known = {tensor.name: tensor for tensor in graph.initializer}
    outputs = {value.name for value in graph.output}
    kept: list[onnx.NodeProto] = []
    for node in graph.node:
        folded = None if outputs.intersection(node.output) else _fold(node, known, model)
        known.update({tensor.name: tensor for tensor in folded or []})
        if folded is None:
            kept.append(node)
    _replace(graph, kept, known)


def fold_shapes(model: onnx.ModelProto) -> bool:
    """Turn the shapes of tensors whose sizes are all known into constants; in place. Whether there were any."""
    graph = model.graph
    types = {value.name: value.type.tensor_type for value in (*graph.input, *graph.value_info)}
    kept, found = [], []
    for node in graph.node:
        dims = types[node.input[0]].shape.dim if node.op_type == "Shape" and node.input[0] in types else ()
        if node.op_type == "Shape" and not node.attribute and dims and all(dim.HasField("dim_value") for dim in dims):
            found.append(numpy_helper.from_array(np.array([dim.dim_value for dim in dims], np.int64), node.output[0]))
        else:
            kept.append(node)
    _replace(graph, kept, {tensor.name: tensor for tensor in (*graph.initializer, *found)})
    return bool(found)


def cast_first(graph: onnx.GraphProto) -> None:
    """Let `tiles` be cast to float before they are transposed, not after; in place, where the graph begins so.

    TensorRT takes uint8 as an input that is cast at once, and computes nothing in it.
    """
    readers = [node for node in graph.node if "tiles" in node.input]
    if len(readers) != 1 or readers[0].op_type != "Transpose":
        return
    turn = readers[0]
    casts = [node for node in graph.node if turn.output[0] in node.input]
    if not casts or any(node.op_type != "Cast" or node.attribute[0].i != TensorProto.FLOAT for node in casts):
        return
    first = helper.make_node("Cast", ["tiles"], ["tiles_float"], name="tiles_float", to=TensorProto.FLOAT)
    turn.input[0] = "tiles_float"
    same = {node.output[0]: turn.output[0] for node in casts}
    kept = [first, *(node for node in graph.node if node not in casts)]
    for node in kept:
        node.input[:] = [same.get(name, name) for name in node.input]
    _replace(graph, kept, {tensor.name: tensor for tensor in graph.initializer})


def spell_out_softplus(graph: onnx.GraphProto) -> None:
    """Write log(1 + eˣ) as max(x, 0) + log(1 + e⁻ˡˣˡ); in place. The same to rounding, and nothing overflows.

    onnxruntime's Softplus computes both sides of a choice, two exponentials and two logarithms a number.
    """
    kept: list[onnx.NodeProto] = []
    for node in graph.node:
        kept += _spelt_out(node) if node.op_type == "Softplus" else [node]
    one = numpy_helper.from_array(np.ones(1, np.float32), _ONE)
    _replace(graph, kept, {tensor.name: tensor for tensor in (one, *graph.initializer)})


def _spelt_out(softplus: onnx.NodeProto) -> list[onnx.NodeProto]:
    x, y = softplus.input[0], softplus.output[0]
    steps = (
        ("Abs", [x], f"{y}_size"),
        ("Neg", [f"{y}_size"], f"{y}_minus"),
        ("Exp", [f"{y}_minus"], f"{y}_power"),
        ("Add", [f"{y}_power", _ONE], f"{y}_sum"),
        ("Log", [f"{y}_sum"], f"{y}_log"),
        ("Relu", [x], f"{y}_rise"),
        ("Add", [f"{y}_rise", f"{y}_log"], y),
    )
    return [helper.make_node(kind, inputs, [output], name=output) for kind, inputs, output in steps]


def choose_rows(graph: onnx.GraphProto) -> None:
    """Take the rows that hold a maximum as rows, not number by number; in place.

    torch writes `x.gather(1, x.amax(2).argmax(1, keepdim=True)[:, :, None].expand(-1, 1, g)).reshape(…)` of x [V, G, g]
    with as many indices as numbers; GatherND copies a row for each index.
    """
    constants = {
        tensor.name: numpy_helper.to_array(tensor).tolist() for tensor in graph.initializer if len(tensor.dims) == 1
    }
    makers = {name: node for node in graph.node for name in node.output}
    readers: dict[str, list[onnx.NodeProto]] = {}
    for node in graph.node:
        for name in node.input:
            readers.setdefault(name, []).append(node)

    def is_flattened(name: str) -> bool:
        """Whether the rows [V, 1, g] are only given another shape, whatever their middle axis."""
        found = readers.get(name, [])
        shapes = [constants.get(node.input[1], [0]) for node in found if node.op_type == "Reshape"]
        return bool(shapes) and len(shapes) == len(found) and not any(0 in shape for shape in shapes)

    outputs = {value.name for value in graph.output}
    rows: dict[str, onnx.NodeProto] = {}
    for node in graph.node:
        index, output = _row_index(node, makers, constants), node.output[0]
        if index is not None and output not in outputs and is_flattened(output):
            rows[output] = helper.make_node("GatherND", [node.input[0], index], [output], name=output, batch_dims=1)
    if rows:
        nodes = [rows.get(node.output[0], node) for node in graph.node]
        _replace(graph, _needed(nodes, graph), {tensor.name: tensor for tensor in graph.initializer})


def _row_index(
    node: onnx.NodeProto, makers: Mapping[str, onnx.NodeProto], constants: Mapping[str, list[int]]
) -> str | None:
    """The indices [V, 1] of the rows of x [V, G, g] that `node` gathers whole; None where it is no such node."""

    def maker(name: str, kind: str, **wanted: object) -> onnx.NodeProto | None:
        found = makers.get(name)
        if found is None or found.op_type != kind:
            return None
        given = {each.name: helper.get_attribute_value(each) for each in found.attribute}
        return found if all(given.get(key) == value for key, value in wanted.items()) else None

    if node.op_type != "GatherElements" or [helper.get_attribute_value(each) for each in node.attribute] != [1]:
        return None
    expand = maker(node.input[1], "Expand")
    turned = expand and maker(expand.input[0], "Unsqueeze")
    largest = turned and maker(turned.input[0], "ArgMax", axis=1, keepdims=1)
    maximum = largest and maker(largest.input[0], "ReduceMax", axes=[2], keepdims=0)
    if expand is None or turned is None or maximum is None or maximum.input[0] != node.input[0]:
        return None
    grouped = maker(node.input[0], "Reshape")
    group = constants.get(grouped.input[1], [0])[-1] if grouped else 0
    is_whole = group > 0 and constants.get(expand.input[1], [])[-2:] == [1, group]
    return str(turned.input[0]) if is_whole else None


def _needed(nodes: list[onnx.NodeProto], graph: onnx.GraphProto) -> list[onnx.NodeProto]:
    """Those of `nodes`, in their order, that an output depends on: onnxruntime runs the others all the same.

    The graphs have no branches or loops of their own (`checks` refuses them), whose bodies would read tensors too.
    """
    read = {value.name for value in graph.output}
    kept = []
    for node in reversed(nodes):
        if read.intersection(node.output):
            read.update(node.input)
            kept.append(node)
    return kept[::-1]


def merge_constants(graph: onnx.GraphProto) -> None:
    """Keep constants of the same type, shape and values once; in place. Tracing copies what it rewrites at each use."""
    first: dict[tuple[int, tuple[int, ...], bytes], str] = {}
    same: dict[str, str] = {}
    for tensor in graph.initializer:
        content = hashlib.sha256(numpy_helper.to_array(tensor).tobytes()).digest()
        same[tensor.name] = first.setdefault((tensor.data_type, tuple(tensor.dims), content), tensor.name)
    for node in graph.node:
        node.input[:] = [same.get(name, name) for name in node.input]
    _replace(graph, list(graph.node), {tensor.name: tensor for tensor in graph.initializer})


def _fold(node: onnx.NodeProto, known: dict[str, TensorProto], model: onnx.ModelProto) -> list[TensorProto] | None:
    """The results of `node` as named constants, None where it is not one to fold."""
    if node.op_type == "DequantizeLinear":
        return None  # the small weights are what it is there for
    has_graph = any(attribute.HasField("g") or attribute.graphs for attribute in node.attribute)
    if has_graph or any(name and name not in known for name in node.input):
        return None
    values = {name: numpy_helper.to_array(known[name]) for name in node.input if name}
    opsets = {entry.domain: entry.version for entry in model.opset_import}
    found = [np.asarray(value) for value in ReferenceEvaluator(node, opsets=opsets).run(None, values)]
    # Constants and their copies are in the file anyway; an expanded weight would only bloat it.
    if node.op_type not in ("Constant", "Identity") and sum(value.size for value in found) > _MOST_FOLDED:
        return None
    pairs = zip(node.output, found, strict=True)
    return [numpy_helper.from_array(value, name) for name, value in pairs if name]


def _replace(graph: onnx.GraphProto, nodes: list[onnx.NodeProto], constants: dict[str, TensorProto]) -> None:
    """Put `nodes` in the graph, with those `constants` that they read."""
    used = {name for node in nodes for name in node.input}
    tensors = [tensor for name, tensor in constants.items() if name in used]
    del graph.node[:]
    del graph.initializer[:]
    graph.node.extend(nodes)
    graph.initializer.extend(tensors)
