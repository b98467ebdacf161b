"""Payload bytes and topics."""

import itertools
import json
import math
from datetime import datetime, timezone

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kizu_agent import payloads
from kizu_agent.encoding import finite, to_bytes, utc_text
from kizu_agent.payloads import Payload, ThresholdsPart
from kizu_agent.topics import Topics


class _Anything(Payload):
    value: object


@given(st.floats())
def test_every_float_has_a_decimal_point_and_survives(number: float) -> None:
    """A float is written with a decimal point and reads back as the same number; NaN and infinities are null."""
    text = to_bytes(_Anything(value=number)).decode().removeprefix('{"value":').removesuffix("}")
    assert json.loads(text) == finite(number)
    assert text == "null" or "." in text


@pytest.mark.parametrize(
    ("number", "text"),
    [(1e-07, "1.0e-07"), (1.5e-07, "1.5e-07"), (1e16, "1.0e+16"), (70.0, "70.0"), (-0.0, "-0.0"), (math.nan, "null")],
)
def test_floats_that_python_writes_without_a_point_get_one(number: float, text: str) -> None:
    """Exponents without a fraction gain a `.0`; whole numbers keep theirs."""
    assert to_bytes(_Anything(value=number)) == f'{{"value":{text}}}'.encode()


def test_an_integer_in_a_float_field_is_written_as_a_float() -> None:
    """A threshold of 2 goes out as 2.0, so that no SCADA makes an integer tag of it."""
    assert to_bytes(ThresholdsPart(warn=1, reject=2)) == b'{"warn":1.0,"reject":2.0}'


JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
)


@given(JSON_VALUES)
def test_every_value_reads_back(value: object) -> None:
    """What is encoded is JSON and reads back as what it was, but for text that is no UTF-8."""
    decoded = json.loads(to_bytes(_Anything(value=value)))["value"]
    assert decoded == json.loads(json.dumps(value).encode("utf-8", "replace"))


def test_a_path_that_is_no_utf8_still_goes_out() -> None:
    """A file name with stray bytes becomes valid UTF-8 instead of an error."""
    assert to_bytes(_Anything(value="a\udcffb")).decode("utf-8") == '{"value":"a?b"}'


@given(st.integers(0, 4_000_000_000_000_000_000))
def test_times_are_utc_with_truncated_milliseconds(utc_ns: int) -> None:
    """A time reads back as the same millisecond."""
    moment = datetime.strptime(utc_text(utc_ns), "%Y-%m-%dT%H:%M:%S.%fZ").replace(tzinfo=timezone.utc)
    assert round(moment.timestamp() * 1000) == utc_ns // 1_000_000


def test_no_payload_topic_lies_under_another() -> None:
    """A leaf of a SCADA's tag tree never becomes a folder, and pictures lie outside the JSON tree."""
    topics = Topics("acme/line", "box1")
    every = [topics.status, topics.model, topics.product, topics.audit]
    every += [topics.command("ping"), topics.response("ping")]
    for camera in ("top", "side"):
        every += [topics.state(camera), topics.result(camera), topics.event(camera)]
        every += [topics.heatmap(camera), topics.snapshot(camera)]
    assert not any(longer.startswith(f"{shorter}/") for shorter, longer in itertools.permutations(every, 2))
    assert not topics.heatmap("top").startswith("acme/")


def test_no_key_holds_a_character_that_a_scada_refuses() -> None:
    """Keys of every payload are letters, digits and underscores."""
    models = [kind for kind in vars(payloads).values() if isinstance(kind, type) and issubclass(kind, Payload)]
    names = {field.alias or name for kind in models for name, field in kind.model_fields.items()}
    assert "schema" in names
    assert all(name.isidentifier() for name in names)
