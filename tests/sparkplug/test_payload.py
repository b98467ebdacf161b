"""Payloads: what is compiled is the schema, what is written is read, by others too."""

import importlib.util
import json
import math
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
from google.protobuf import descriptor_pb2
from hypothesis import given
from hypothesis import strategies as st

from kizu_agent.config import Config
from kizu_agent.errors import AgentError
from kizu_agent.sparkplug import metrics, payload
from kizu_agent.sparkplug.ids import EdgeNode
from kizu_agent.sparkplug.payload import DataType, Metric, PayloadError, decode, encode

ROOT = Path(__file__).parents[2]
VALUES: dict[DataType, st.SearchStrategy[Any]] = {
    DataType.INT32: st.integers(-(2**31), 2**31 - 1),
    DataType.INT64: st.integers(-(2**63), 2**63 - 1),
    DataType.FLOAT: st.floats(width=32, allow_nan=False),
    DataType.DOUBLE: st.floats(allow_nan=False),
    DataType.BOOLEAN: st.booleans(),
    DataType.STRING: st.text(max_size=50),
    DataType.BYTES: st.binary(max_size=50),
}
METRICS = st.sampled_from(list(DataType)).flatmap(
    lambda datatype: st.builds(
        Metric,
        name=st.text(min_size=1, max_size=20),
        datatype=st.just(datatype),
        value=st.none() | VALUES[datatype],
        timestamp_ms=st.integers(0, 2**63),
        is_historical=st.booleans(),
        content_type=st.none() | st.just("image/jpeg"),
    )
)


def test_what_is_compiled_is_the_schema(tmp_path: Path) -> None:
    """The installed FileDescriptorSet is what the build makes of the .proto beside it."""
    spec = importlib.util.spec_from_file_location("hatch_build", ROOT / "hatch_build.py")
    assert spec is not None
    assert spec.loader is not None
    hook = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(hook)
    hook.compile_schema(ROOT / hook.PROTO, tmp_path / "now.binpb")
    now, installed = (descriptor_pb2.FileDescriptorSet() for _ in range(2))
    now.ParseFromString((tmp_path / "now.binpb").read_bytes())
    installed.ParseFromString(payload.SCHEMA.read_bytes())
    assert installed == now


def test_a_build_without_the_schema_says_what_to_do(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A checkout that was not installed is an error with its remedy."""
    monkeypatch.setattr(payload, "SCHEMA", tmp_path / "missing.binpb")
    with pytest.raises(AgentError, match="pip install"):
        payload.message_class.__wrapped__()


@given(st.lists(METRICS, max_size=5), st.none() | st.integers(0, 255), st.none() | st.integers(0, 2**63))
def test_what_is_written_is_read(found: list[Metric], seq: int | None, timestamp_ms: int | None) -> None:
    """Every value of every type that is used survives, null and absent included."""
    read = decode(encode(found, timestamp_ms, seq))
    assert (read.seq, read.timestamp_ms) == (seq, timestamp_ms)
    assert list(read.metrics) == found


@given(st.binary(max_size=300))
def test_noise_is_read_or_refused(data: bytes) -> None:
    """Whatever comes, it is a payload or a PayloadError."""
    try:
        decode(data)
    except PayloadError:
        return


def test_types_that_are_not_ours_are_read_past() -> None:
    """A DataSet, a Template and a PropertySet parse; their values are none that we take."""
    whole = payload.message_class()()
    whole.metrics.add(name="a", datatype=16).dataset_value.columns.append("x")
    whole.metrics.add(name="b", datatype=19).template_value.metrics.add(name="inner").long_value = 7
    third = whole.metrics.add(name="c", datatype=3, int_value=5)
    third.properties.keys.append("Quality")
    third.properties.values.add(type=3, int_value=192)
    assert [metric.value for metric in decode(whole.SerializeToString()).metrics] == [None, None, 5]


def test_another_decoder_reads_the_same(host_folder: Path) -> None:
    """The host's library, which is not ours, shows every value that kizu sends as it was written."""
    found = [
        Metric("a", DataType.INT32, -5, 1),
        Metric("b", DataType.INT64, 2**40, 1),
        Metric("c", DataType.DOUBLE, 0.1, 1),
        Metric("d", DataType.FLOAT, 0.5, 1),
        Metric("e", DataType.BOOLEAN, value=True, timestamp_ms=1),
        Metric("f", DataType.STRING, "傷", 1),
        Metric("g", DataType.STRING, None, 1),
    ]
    script = (
        "const s=require('sparkplug-payload').get('spBv1.0');"
        "const p=s.decodePayload(Buffer.from(process.argv[1],'hex'));"
        "console.log(JSON.stringify(p.metrics.map(m=>m.value&&m.value.low!==undefined?Number(m.value):m.value)))"
    )
    command = [shutil.which("node") or "node", "-e", script, encode(found, 5, 0).hex()]
    done = subprocess.run(command, cwd=host_folder, capture_output=True, text=True, check=True, timeout=20)
    assert json.loads(done.stdout) == [metric.value for metric in found]


def test_metric_names_are_safe_and_distinct() -> None:
    """Letters, digits, `_`, `-` and folders only; no two differ by case alone; no folder is a metric too."""
    for names in (list(metrics.node_blank()), list(metrics.device_blank(has_images=True))):
        assert all(
            set(name) <= set("ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789_-/") for name in names
        )
        assert len({name.lower() for name in names}) == len(names)
        assert not {name.rpartition("/")[0] for name in names} & set(names)


def test_nothing_is_known_at_first() -> None:
    """A device that was never inspected is `unknown`, code 0, and everything else is null."""
    blank = metrics.device_blank(has_images=False)
    known = {name: metric.value for name, metric in blank.items() if metric.value is not None}
    assert known == {"Inspection/Verdict": "unknown", "Inspection/Verdict_Code": 0}
    assert not any(isinstance(metric.value, float) and math.isnan(metric.value) for metric in blank.values())


@pytest.mark.parametrize(
    ("options", "descriptor"),
    [
        ({}, ("acme:osaka:line2", "box1")),
        ({"separator": "_"}, ("acme_osaka_line2", "box1")),
        ({"group": "Osaka Plant", "node": "press-2"}, ("Osaka Plant", "press-2")),
    ],
)
def test_ids_follow_from_the_plant(options: dict[str, str], descriptor: tuple[str, str], tmp_path: Path) -> None:
    """Group and node come from prefix and name where they are not given; topics have their form."""
    config = Config.model_validate(
        {
            "agent": {"name": "box1", "prefix": "acme/osaka/line2", "state_dir": tmp_path},
            "sparkplug": options,
            "cameras": [{"name": "top", "source": "sim:gears"}],
        }
    )
    node = EdgeNode.of(config)
    assert (node.group, node.node) == descriptor
    assert node.topic("NDATA") == f"spBv1.0/{descriptor[0]}/NDATA/{descriptor[1]}"
    assert node.device_topic("DCMD", "top") == f"spBv1.0/{descriptor[0]}/DCMD/{descriptor[1]}/top"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mqtt": {"json_topics": False}}, "nobody would hear"),
        ({"mqtt": {"json_topics": False, "home_assistant": True}, "sparkplug": {"enabled": True}}, "home_assistant"),
        ({"sparkplug": {"enabled": True}, "cameras": ["Top", "top"]}, "differ by case"),
    ],
)
def test_configurations_that_cannot_work_are_refused(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    """Neither protocol, or devices that hosts could not tell apart, are errors."""
    names = changes.pop("cameras", ["top"])
    base = {"agent": {"name": "box1", "prefix": "acme", "state_dir": tmp_path}, **changes}
    with pytest.raises(ValueError, match=message):
        Config.model_validate({**base, "cameras": [{"name": name, "source": "sim:gears"} for name in names]})
