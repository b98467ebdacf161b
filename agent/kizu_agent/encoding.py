"""Bytes of payloads, times and numbers as they go over MQTT."""

import math
import time
from datetime import datetime, timezone
from json.encoder import encode_basestring
from typing import Any

from pydantic import BaseModel


def to_bytes(payload: BaseModel) -> bytes:
    """Encode as compact UTF-8 JSON; NaN and infinities become null, every float has a decimal point."""
    # A path may hold bytes that are no UTF-8; MQTT would refuse them.
    return _encode(payload.model_dump(by_alias=True)).encode("utf-8", "replace")


def utc_text(utc_ns: int) -> str:
    """Write nanoseconds since the epoch as RFC 3339 UTC with milliseconds."""
    seconds, milliseconds = divmod(utc_ns // 1_000_000, 1000)
    moment = datetime.fromtimestamp(seconds, timezone.utc)
    return f"{moment:%Y-%m-%dT%H:%M:%S}.{milliseconds:03d}Z"


def utc_now() -> str:
    """Write the present moment as RFC 3339 UTC with milliseconds."""
    return utc_text(time.time_ns())


def finite(number: float) -> float | None:
    """`number`, or None where it is no finite number."""
    return float(number) if math.isfinite(number) else None


def _encode(value: Any) -> str:  # noqa: PLR0911 - one return a JSON type reads as a table
    if isinstance(value, str):  # before int: Verdict and EventKind are str as well as Enum
        return encode_basestring(getattr(value, "value", value))
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, float):
        return _encode_float(value)
    if isinstance(value, dict):
        return "{" + ",".join([f"{encode_basestring(key)}:{_encode(item)}" for key, item in value.items()]) + "}"
    if isinstance(value, list | tuple):
        return "[" + ",".join([_encode(item) for item in value]) + "]"
    return str(int(value))


def _encode_float(number: float) -> str:
    if not math.isfinite(number):
        return "null"
    text = repr(float(number))
    if "." in text:
        return text
    digits, _, exponent = text.partition("e")  # 1e-07: the only form of a float without a point
    return f"{digits}.0e{exponent}"
