"""A look into an ONNX file without the onnx package: does it keep tensors outside the file?

onnxruntime would follow such a reference to any path on the box, so the agent refuses it before loading. Field numbers
are those of onnx.proto3: ModelProto, GraphProto, NodeProto, AttributeProto, TensorProto, FunctionProto.
"""

from collections.abc import Iterator

_EXTERNAL = 1
_LENGTH_DELIMITED = 2
_MAX_DEPTH = 32

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
_TENSOR_EXTERNAL_DATA, _TENSOR_DATA_LOCATION = 13, 14


def has_external_data(model: bytes) -> bool:
    """Tell whether any tensor of the ONNX `model` lies outside it; True as well when the bytes are not a model."""
    try:
        fields = {number for number, _, _ in _fields(memoryview(model))}
        return 7 not in fields or _external(memoryview(model), "model", 0)
    except (IndexError, ValueError):
        return True


def _external(data: memoryview, kind: str, depth: int) -> bool:
    if depth > _MAX_DEPTH:
        raise ValueError("nested too deep")
    for number, wire, value in _fields(data):
        if kind == "tensor" and (
            number == _TENSOR_EXTERNAL_DATA or (number == _TENSOR_DATA_LOCATION and value == _EXTERNAL)
        ):
            return True
        inside = _INSIDE[kind].get(number)
        if inside is not None:
            if wire != _LENGTH_DELIMITED or not isinstance(value, memoryview):
                raise ValueError("not a message")
            if _external(value, inside, depth + 1):
                return True
    return False


def _fields(data: memoryview) -> Iterator[tuple[int, int, int | memoryview]]:
    """Walk a protobuf message: (field number, wire type, integer or bytes)."""
    at = 0
    while at < len(data):
        tag, at = _varint(data, at)
        number, wire = tag >> 3, tag & 7
        if wire == 0:
            value, at = _varint(data, at)
            yield number, wire, value
            continue
        if wire == _LENGTH_DELIMITED:
            length, at = _varint(data, at)
        elif wire in (1, 5):
            length = 8 if wire == 1 else 4
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
