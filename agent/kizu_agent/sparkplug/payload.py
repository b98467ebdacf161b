"""Metrics to bytes and back: the only protobuf import.

The message classes are made at run time from a FileDescriptorSet that the build compiles: generated modules refuse
every protobuf older than the compiler's, and onnxruntime decides which protobuf is there (docs/decisions/0018).
"""

from collections.abc import Iterable
from dataclasses import dataclass
from enum import IntEnum
from functools import cache
from pathlib import Path
from typing import Any

from google.protobuf import descriptor_pb2, descriptor_pool, message_factory
from google.protobuf.message import DecodeError

from kizu_agent.errors import AgentError

SCHEMA = Path(__file__).with_name("sparkplug_b.binpb")

Value = bool | int | float | str | bytes | None


class PayloadError(AgentError):
    """Bytes that are no Sparkplug B payload."""


class DataType(IntEnum):
    """The data types that every known host reads as they were written; others are never sent (docs/sparkplug.md)."""

    INT32 = 3
    INT64 = 4
    FLOAT = 9
    DOUBLE = 10
    BOOLEAN = 11
    STRING = 12
    BYTES = 17


_FIELDS = {
    DataType.INT32: "int_value",
    DataType.INT64: "long_value",
    DataType.FLOAT: "float_value",
    DataType.DOUBLE: "double_value",
    DataType.BOOLEAN: "boolean_value",
    DataType.STRING: "string_value",
    DataType.BYTES: "bytes_value",
}
_BITS = {DataType.INT32: 32, DataType.INT64: 64}
"""Signed numbers travel in unsigned fields, as two's complement."""


@dataclass(frozen=True)
class Metric:
    """One value of a metric: `value` None is null. `timestamp_ms` since the epoch, UTC: when it was acquired.

    `datatype` is None for received metrics whose sender leaves it out, as it should. `content_type` is of Bytes.
    """

    name: str
    datatype: DataType | None
    value: Value
    timestamp_ms: int
    is_historical: bool = False
    content_type: str | None = None


@dataclass(frozen=True)
class Payload:
    """A payload as received; metrics of types that are never used here have the value None."""

    metrics: tuple[Metric, ...]
    timestamp_ms: int | None
    seq: int | None


@cache
def message_class() -> Any:
    """The class of the whole message. Raises AgentError where the build has not compiled the schema."""
    try:
        files = descriptor_pb2.FileDescriptorSet.FromString(SCHEMA.read_bytes())
    except OSError as exc:
        raise AgentError(
            f"{SCHEMA}: is missing; the build makes it: pip install --editable . ({exc.strerror})"
        ) from exc
    pool = descriptor_pool.DescriptorPool()
    for file in files.file:
        pool.Add(file)
    return message_factory.GetMessageClass(pool.FindMessageTypeByName("kizu.sparkplug.Payload"))


def encode(metrics: Iterable[Metric], timestamp_ms: int | None, seq: int | None, has_datatypes: bool = True) -> bytes:
    """Encode `metrics`; without `has_datatypes` as the specification would have data messages (SHOULD NOT)."""
    payload = message_class()()
    if timestamp_ms is not None:
        payload.timestamp = timestamp_ms
    if seq is not None:
        payload.seq = seq
    for metric in metrics:
        _fill(payload.metrics.add(), metric, has_datatypes)
    return bytes(payload.SerializeToString())


def decode(data: bytes) -> Payload:
    """Read a payload. Raises PayloadError for bytes that are none."""
    try:
        payload = message_class().FromString(data)
    except DecodeError as exc:
        raise PayloadError(f"not a Sparkplug B payload: {exc}") from exc
    metrics = tuple(_read(metric) for metric in payload.metrics)
    timestamp_ms = payload.timestamp if payload.HasField("timestamp") else None
    return Payload(metrics, timestamp_ms, payload.seq if payload.HasField("seq") else None)


def _fill(target: Any, metric: Metric, has_datatype: bool) -> None:
    target.name, target.timestamp = metric.name, metric.timestamp_ms
    datatype = metric.datatype
    if datatype is None:
        raise ValueError(f"{metric.name}: a metric is written with its type")
    if has_datatype:
        target.datatype = datatype
    if metric.is_historical:
        target.is_historical = True
    if metric.content_type is not None:
        target.metadata.content_type = metric.content_type
    if metric.value is None:
        target.is_null = True
    elif datatype in _BITS:
        setattr(target, _FIELDS[datatype], int(metric.value) & ((1 << _BITS[datatype]) - 1))
    else:
        setattr(target, _FIELDS[datatype], metric.value)


def _read(metric: Any) -> Metric:
    known = metric.datatype in DataType.__members__.values()
    datatype = DataType(metric.datatype) if known else None
    content_type = metric.metadata.content_type if metric.metadata.HasField("content_type") else None
    return Metric(metric.name, datatype, _value(metric, datatype), metric.timestamp, metric.is_historical, content_type)


def _value(metric: Any, datatype: DataType | None) -> Value:
    field = metric.WhichOneof("value")
    if metric.is_null or field not in _FIELDS.values():
        return None
    value: Value = getattr(metric, field)
    bits = _BITS.get(datatype) if datatype is not None else None
    if bits is not None and isinstance(value, int) and value >= 1 << (bits - 1):
        return value - (1 << bits)
    return value
