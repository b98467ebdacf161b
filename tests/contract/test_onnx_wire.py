"""External data is found wherever ONNX allows it."""

from pathlib import Path

import numpy as np
import onnx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from onnx import TensorProto, helper

from kizu_contract.onnx_wire import has_external_data


def external(name: str = "w") -> TensorProto:
    tensor = TensorProto(name=name, data_type=TensorProto.FLOAT, dims=[1])
    tensor.data_location = TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value="../../etc/passwd")
    return tensor


def graph_with(tensor: TensorProto) -> onnx.GraphProto:
    return helper.make_graph([], "inner", [], [], [tensor])


def sparse_with(tensor: TensorProto) -> onnx.SparseTensorProto:
    return onnx.SparseTensorProto(values=tensor, indices=helper.make_tensor("i", TensorProto.INT64, [1], [0]), dims=[4])


def varint(value: int) -> bytes:
    out = b""
    while value >= 0x80:
        out += bytes([value & 0x7F | 0x80])
        value >>= 7
    return out + bytes([value])


def message(number: int, body: bytes) -> bytes:
    return varint(number << 3 | 2) + varint(len(body)) + body


def test_an_ordinary_model_passes(model: onnx.ModelProto) -> None:
    """A model in one piece, as checked by onnx itself, keeps nothing outside."""
    onnx.checker.check_model(model, full_check=True)
    assert not has_external_data(model.SerializeToString())


def test_an_empty_graph_passes() -> None:
    """Even the smallest model is a model."""
    assert not has_external_data(helper.make_model(helper.make_graph([], "g", [], [])).SerializeToString())


def test_a_model_saved_with_external_data_is_found(model: onnx.ModelProto, tmp_path: Path) -> None:
    """What onnx itself writes as external data is seen, in initializers and in attributes."""
    big = helper.make_tensor("big", TensorProto.FLOAT, [1024], np.zeros(1024, np.float32).tobytes(), raw=True)
    model.graph.node.append(helper.make_node("Constant", [], ["unused"], value=big))
    onnx.save_model(model, tmp_path / "m.onnx", save_as_external_data=True, size_threshold=0, convert_attribute=True)
    assert len(list(tmp_path.iterdir())) > 1
    assert has_external_data((tmp_path / "m.onnx").read_bytes())


def test_external_data_is_found_in_every_place(model: onnx.ModelProto) -> None:
    """Initializers, sparse ones, attributes of all kinds, subgraphs, functions and training parts are searched."""
    node = onnx.NodeProto(op_type="If")
    places: dict[str, onnx.ModelProto] = {}

    def place(name: str) -> onnx.ModelProto:
        places[name] = onnx.ModelProto()
        places[name].CopyFrom(model)
        return places[name]

    place("initializer").graph.initializer.append(external())
    place("sparse values").graph.sparse_initializer.append(sparse_with(external()))
    with_indices = sparse_with(helper.make_tensor("v", TensorProto.FLOAT, [1], [0.0]))
    with_indices.indices.CopyFrom(external())
    place("sparse indices").graph.sparse_initializer.append(with_indices)
    for name, attribute in {
        "t": onnx.AttributeProto(name="a", t=external()),
        "g": onnx.AttributeProto(name="a", g=graph_with(external())),
        "tensors": onnx.AttributeProto(name="a", tensors=[external()]),
        "graphs": onnx.AttributeProto(name="a", graphs=[graph_with(external())]),
        "sparse_tensor": onnx.AttributeProto(name="a", sparse_tensor=sparse_with(external())),
        "sparse_tensors": onnx.AttributeProto(name="a", sparse_tensors=[sparse_with(external())]),
    }.items():
        holder = onnx.NodeProto()
        holder.CopyFrom(node)
        holder.attribute.append(attribute)
        place(f"attribute {name}").graph.node.append(holder)
        place(f"function node {name}").functions.append(onnx.FunctionProto(name="f", node=[holder]))
        place(f"function attribute {name}").functions.append(onnx.FunctionProto(name="f", attribute_proto=[attribute]))
    training = place("training initialization").training_info.add()
    training.initialization.CopyFrom(graph_with(external()))
    place("training algorithm").training_info.add().algorithm.CopyFrom(graph_with(external()))

    assert len(places) == 23
    missed = [name for name, found in places.items() if not has_external_data(found.SerializeToString())]
    assert missed == []


def test_half_a_reference_is_enough(model: onnx.ModelProto) -> None:
    """A location without data, and data without a location, are both refused."""
    data = model.SerializeToString()
    for tensor in (
        TensorProto(data_location=TensorProto.EXTERNAL),
        TensorProto(external_data=external().external_data),
    ):
        assert has_external_data(data + message(7, message(5, tensor.SerializeToString())))


@pytest.mark.parametrize("location", [1, 2**32 + 1, 2**63 + 1])
def test_a_location_that_parsers_cut_to_external_is_found(model: onnx.ModelProto, location: int) -> None:
    """Protobuf keeps 32 bits of an enum: larger numbers must not hide a 1."""
    tensor = varint(14 << 3) + varint(location)
    assert has_external_data(model.SerializeToString() + message(7, message(5, tensor)))


def test_a_tag_that_parsers_cut_is_refused(model: onnx.ModelProto) -> None:
    """A field number beyond 32 bits could be read as another field."""
    tensor = varint(2**32 | 14 << 3) + varint(1)
    assert has_external_data(model.SerializeToString() + message(7, message(5, tensor)))


def test_a_compiled_context_beside_the_model_is_found(model: onnx.ModelProto) -> None:
    """An EPContext node makes onnxruntime read another file."""
    model.graph.node.append(helper.make_node("EPContext", [], ["y"], domain="com.microsoft", embed_mode=0))
    assert has_external_data(model.SerializeToString())


def test_groups_and_mistyped_messages_are_refused(model: onnx.ModelProto) -> None:
    """Old wire types, and a number where a message belongs, are not walked past."""
    data = model.SerializeToString()
    for tail in (
        varint(7 << 3 | 3),
        varint(99 << 3 | 4),
        varint(7 << 3) + b"\x01",
        b"\x00\x01",
        varint(7 << 3 | 5) + b"1234",
    ):
        assert has_external_data(data + tail)


def test_endless_fields_are_given_up(model: onnx.ModelProto) -> None:
    """A file of millions of tiny fields is refused in bounded time."""
    assert has_external_data(model.SerializeToString() + b"\x08\x01" * 2_100_000)


def test_every_truncation_is_safe(model: onnx.ModelProto) -> None:
    """No prefix of a model raises."""
    data = model.SerializeToString()
    assert all(isinstance(has_external_data(data[:length]), bool) for length in range(len(data)))


@given(st.binary(max_size=300))
def test_garbage_counts_as_external(data: bytes) -> None:
    """Bytes never raise, and without a graph they are refused."""
    answer = has_external_data(data)
    try:
        parsed = onnx.ModelProto.FromString(data)
    except Exception:  # noqa: BLE001 - protobuf's error class differs between its two implementations
        assert answer
    else:
        assert answer or parsed.HasField("graph")
