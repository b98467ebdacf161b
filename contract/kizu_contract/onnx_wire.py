"""A look into an ONNX file without the onnx package: whether it keeps anything outside the file.

onnxruntime would follow such a reference to any path on the box, so the agent refuses it before loading. Field numbers
are those of onnx.proto3: ModelProto, GraphProto, NodeProto, AttributeProto, TensorProto, FunctionProto. Where parsers
could read the bytes in two ways, the answer is the cautious one.
"""

from collections.abc import Iterator

_VARINT, _FIXED64, _LENGTH_DELIMITED, _FIXED32 = 0, 1, 2, 5
_MAX_FIELDS = 2_000_000
"""More fields than any real graph has; walking them takes about two seconds."""

# message → {field number: message inside it}
_INSIDE = {
    "model": {7: "graph", 20: "training", 25: "function"},
    "training": {1: "graph", 2: "graph"},
    "function": {7: "node", 11: "attribute"},
    "graph": {1: "node", 5: "tensor", 15: "sparse"},
    "sparse": {1: "tensor", 2: "tensor"},
    "node": {5: "attribute"},
    "attribute": {5: "tensor", 6: "graph", 10: "tensor", 11: "graph", 22: "sparse", 23: "sparse"},
    "tensor": {},
}
_MODEL_GRAPH = 7
_NODE_OP_TYPE = 4
_TENSOR_EXTERNAL_DATA, _TENSOR_DATA_LOCATION = 13, 14
_EP_CONTEXT = b"EPContext"
"""onnxruntime's node for a compiled graph; it may name a file beside the model."""

ACTIVATION_ZERO = "activation_zero_point"
"""Name of the one zero point that all activations of an int8 graph share: an int8 of 0, as TensorRT asks for."""
_TYPE_INT8, _TYPE_UINT8 = 3, 2

_Field = tuple[int, int, "int | memoryview"]


def has_external_data(model: bytes) -> bool:
    """Tell whether any part of the ONNX `model` lies outside it; True as well when the bytes are not a model."""
    try:
        return _is_external(memoryview(model))
    except (IndexError, ValueError):
        return True


def as_unsigned(model: bytes) -> bytes:
    """An int8 graph with its activations counted from 0 to 255 instead of −128 to 127; any other as it is.

    The same numbers: each step and the zero point move by 128. onnxruntime's kernels for x86 processors multiply
    unsigned activations with signed weights, and are several times slower the other way.
    """
    signed, unsigned = (_zero_point(*pair) for pair in ((_TYPE_INT8, 0), (_TYPE_UINT8, 128)))
    return model.replace(signed, unsigned) if model.count(signed) == 1 else model


def _zero_point(kind: int, value: int) -> bytes:
    """The fields of a TensorProto that is a scalar of one byte: data_type, name and raw_data, in protobuf's order."""
    name = ACTIVATION_ZERO.encode()
    return bytes([2 << 3, kind, 8 << 3 | 2, len(name)]) + name + bytes([9 << 3 | 2, 1, value])


def _is_external(model: memoryview) -> bool:
    todo = [(model, "model")]
    walked, has_graph = 0, False
    while todo:
        data, kind = todo.pop()
        for number, wire, value in _fields(data):
            walked += 1
            if walked > _MAX_FIELDS:
                raise ValueError("too many fields")
            if _points_outside(kind, number, value):
                return True
            has_graph |= kind == "model" and number == _MODEL_GRAPH
            inside = _INSIDE[kind].get(number)
            if inside is not None:
                if wire != _LENGTH_DELIMITED or not isinstance(value, memoryview):
                    raise ValueError("not a message")
                todo.append((value, inside))
    return not has_graph


def _points_outside(kind: str, number: int, value: int | memoryview) -> bool:
    if kind == "tensor":
        # Any location but 0 (inside): parsers cut the number to 32 bits, so 2**32 + 1 would be "external" to them.
        return number == _TENSOR_EXTERNAL_DATA or (number == _TENSOR_DATA_LOCATION and value != 0)
    is_op_type = kind == "node" and number == _NODE_OP_TYPE
    return is_op_type and isinstance(value, memoryview) and value.tobytes() == _EP_CONTEXT


def _fields(data: memoryview) -> Iterator[_Field]:
    """Walk a protobuf message: (field number, wire type, integer or bytes). Raises ValueError, IndexError."""
    at = 0
    while at < len(data):
        tag, at = _varint(data, at)
        number, wire = tag >> 3, tag & 7
        if number == 0 or tag >= 2**32:
            raise ValueError(f"field number {number}")
        if wire == _VARINT:
            value, at = _varint(data, at)
            yield number, wire, value
            continue
        if wire == _LENGTH_DELIMITED:
            length, at = _varint(data, at)
        elif wire in (_FIXED64, _FIXED32):
            length = 8 if wire == _FIXED64 else 4
        else:
            raise ValueError(f"wire type {wire}")
        if at + length > len(data):
            raise ValueError("cut short")
        yield number, wire, data[at : at + length]
        at += length


def _varint(data: memoryview, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = data[at]
        value |= (byte & 0x7F) << shift
        at += 1
        if byte < 0x80:
            return value, at
        shift += 7
        if shift > 63:
            raise ValueError("varint too long")
