"""Sessions as an independent host and the wire see them."""

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest

from kizu_agent.records import EventKind
from kizu_agent.sparkplug.payload import decode
from kizu_contract.judging import Verdict

CONNECT, PUBLISH, SUBSCRIBE, DISCONNECT = 1, 3, 8, 14
GROUP, NODE = "acme:osaka:line2", "box1"
DEATH = f"spBv1.0/{GROUP}/NDEATH/{NODE}"


def value_of(message: dict[str, Any], name: str) -> Any:
    (metric,) = [metric for metric in message["metrics"] if metric["name"] == name]
    return metric["value"]


def bd_seqs(messages: list[dict[str, Any]]) -> list[int]:
    return [value_of(message, "bdSeq") for message in messages]


def sequence(host: Any) -> list[int]:
    """Sequence numbers of everything since the last NBIRTH."""
    start = max(i for i, message in enumerate(host.messages) if message["type"] == "NBIRTH")
    return [message["seq"] for message in host.messages[start:] if message["type"] != "NDEATH"]


def test_births_come_first_and_hold_everything(make_edge: Callable[..., Any], host: Any, tap: Any) -> None:
    """NBIRTH, then every DBIRTH, then data; every metric with name, type, timestamp and value or null."""
    edge = make_edge(tap.port).start()
    host.await_count("DBIRTH", 2)
    edge.result("top", Verdict.REJECT, 3.25)
    host.await_count("DDATA")
    assert host.order()[:4] == ["NBIRTH", "DBIRTH top", "DBIRTH side", "DDATA top"]
    assert tap.published(0)[:3] == ["NBIRTH", "DBIRTH", "DBIRTH"]
    birth = host.of("NBIRTH")[0]
    assert birth["topic"] == f"spBv1.0/{GROUP}/NBIRTH/{NODE}"
    assert (birth["qos"], birth["retain"], birth["seq"]) == (0, False, 0)
    assert value_of(birth, "Node Control/Rebirth") is False
    assert value_of(birth, "Agent/State") == "online"
    device = host.of("DBIRTH", "top")[0]
    assert device["topic"] == f"spBv1.0/{GROUP}/DBIRTH/{NODE}/top"
    nulls = {metric["name"] for metric in device["metrics"] if metric["isNull"]}
    assert {"Inspection/Score", "Inspection/Result_ID"} <= nulls
    assert "Inspection/Verdict" not in nulls
    assert host.values("Inspection/Verdict", "top") == ["unknown", "reject"]
    assert host.values("Inspection/Verdict_Code", "top") == [0, 3]
    assert host.values("Inspection/Score", "top") == [None, 3.25]
    assert host.violations == []


@pytest.mark.parametrize("protocol", ["5", "3.1.1"])
def test_connect_registers_the_death(make_edge: Callable[..., Any], host: Any, tap: Any, protocol: str) -> None:
    """Clean session without expiry, and a will of QoS 1, not retained, with bdSeq alone; commands at QoS 1."""
    make_edge(tap.port, {"protocol": protocol}).start()
    host.await_count("DBIRTH", 2)
    (connect,) = tap.connects()
    assert connect.version == (5 if protocol == "5" else 4)
    assert connect.is_clean
    assert connect.session_expiry_s == (0 if protocol == "5" else None)
    assert (connect.will_topic, connect.will_qos, connect.will_retain) == (DEATH, 1, False)
    will = decode(connect.will_payload)
    assert will.seq is None
    assert [(metric.name, metric.datatype, metric.value) for metric in will.metrics] == [("bdSeq", 4, 0)]
    assert bd_seqs(host.of("NBIRTH")) == [0]
    subscribed = tap.packets(SUBSCRIBE)[0].body
    for topic in (f"spBv1.0/{GROUP}/NCMD/{NODE}", f"spBv1.0/{GROUP}/DCMD/{NODE}/+"):
        assert topic.encode() + b"\x01" in subscribed
    kinds = [packet.kind for packet in tap.connections[0]]
    assert kinds.index(SUBSCRIBE) < kinds.index(PUBLISH)


def test_one_sequence_over_everything(make_edge: Callable[..., Any], host: Any) -> None:
    """The number rises by one over births, data and deaths of node and devices, and begins again after 255."""
    edge = make_edge().start()
    host.await_count("DBIRTH", 2)
    edge.state("side", condition="lost", cause="timeout")
    host.await_count("DDEATH")
    edge.status(state="degraded", reason="camera side lost")
    host.await_count("NDATA")
    for _ in range(270):
        edge.result("top")
    host.await_count("DDATA", 270, "top")
    found = sequence(host)
    assert found[:3] == [0, 1, 2]
    assert 255 in found
    assert all(later == (earlier + 1) % 256 for earlier, later in pairwise(found))
    assert host.violations == []


def test_only_what_changes_is_sent(make_edge: Callable[..., Any], host: Any) -> None:
    """A second result repeats no value that is as it was; a state that says nothing new is not sent."""
    edge = make_edge().start()
    host.await_count("DBIRTH", 2)
    edge.result("top", score=1.5)
    host.await_count("DDATA", 1, "top")
    edge.state("top", verdict=Verdict.OK, score=1.5, last_result_seq=1)
    edge.result("top", score=1.5)
    second = host.await_count("DDATA", 2, "top")[1]
    names = {metric["name"] for metric in second["metrics"]}
    assert {"Inspection/Result_ID", "Inspection/Sequence"} <= names
    assert not names & {"Inspection/Verdict", "Inspection/Score", "Model/Name", "Inspection/Warn_At"}
    assert host.violations == []


def test_a_lost_camera_is_a_dead_device(make_edge: Callable[..., Any], host: Any) -> None:
    """Its verdict becomes unknown, DDEATH follows, no data comes, and its return is a DBIRTH."""
    edge = make_edge().start()
    host.await_count("DBIRTH", 2)
    edge.result("top")
    host.await_count("DDATA", 1, "top")
    edge.state(
        "top", verdict=Verdict.UNKNOWN, reason="camera_lost", condition="lost", cause="frozen", last_result_seq=1
    )
    (dead,) = host.await_count("DDEATH", 1, "top")
    assert (dead["qos"], dead["retain"], dead["metrics"]) == (0, False, [])
    assert dead["topic"] == f"spBv1.0/{GROUP}/DDEATH/{NODE}/top"
    assert host.values("Inspection/Verdict", "top")[-1] == "unknown"
    edge.result("side")
    host.await_count("DDATA", 1, "side")
    told = len(host.of("DDATA", "top"))
    edge.state("top", verdict=Verdict.UNKNOWN, reason="starting", last_result_seq=1)
    again = host.await_count("DBIRTH", 2, "top")[1]
    assert value_of(again, "Inspection/Verdict") == "unknown"
    assert value_of(again, "Camera/Condition") == "running"
    assert len(host.of("DDATA", "top")) == told
    assert host.violations == []


def test_a_stale_verdict_is_unknown(make_edge: Callable[..., Any], host: Any) -> None:
    """Where no result comes any more the verdict goes to unknown, code 0, and never back to ok by itself."""
    edge = make_edge().start()
    host.await_count("DBIRTH", 2)
    edge.result("top")
    host.await_count("DDATA", 1, "top")
    edge.state("top", verdict=Verdict.UNKNOWN, reason="stale", last_result_seq=1)
    host.await_count("DDATA", 2, "top")
    assert host.values("Inspection/Verdict", "top") == ["unknown", "ok", "unknown"]
    assert host.values("Inspection/Verdict_Code", "top") == [0, 1, 0]
    assert host.values("Inspection/Reason", "top")[-1] == "stale"


def test_a_state_that_is_late_takes_nothing_back(make_edge: Callable[..., Any], host: Any) -> None:
    """A state from before a result that was told does not cover the result's verdict."""
    edge = make_edge().start()
    host.await_count("DBIRTH", 2)
    edge.result("top")
    host.await_count("DDATA", 1, "top")
    edge.node.sink.commit(edge.make("top", Verdict.REJECT, 9.0), None)
    edge.node.wake()
    host.await_count("DDATA", 2, "top")
    edge.state("top", verdict=Verdict.OK, score=1.5, last_result_seq=1, condition="idle")
    host.await_count("DDATA", 3, "top")
    assert host.values("Inspection/Verdict", "top") == ["unknown", "ok", "reject"]
    assert host.values("Camera/Condition", "top")[-1] == "idle"


def test_events_and_heatmaps_are_metrics(make_edge: Callable[..., Any], host: Any) -> None:
    """An event tells its kind and id; the heatmap comes as Bytes with its content type where asked for."""
    edge = make_edge(images=True).start()
    host.await_count("DBIRTH", 2)
    jpeg = b"\xff\xd8\xff" + bytes(5000)
    edge.result("top", Verdict.REJECT, 9.0, event=EventKind.OPEN, jpeg=jpeg)
    host.await_count("DDATA", 2, "top")
    assert host.values("Event/Kind", "top")[-1] == "open"
    assert host.values("Event/ID", "top")[-1] == "e1"
    assert host.values("Heatmap/Image", "top")[-1] == {"bytes": 5003, "head": "ffd8ff"}
    (image,) = [m for d in host.of("DDATA", "top") for m in d["metrics"] if m["name"] == "Heatmap/Image"]
    assert (image["type"], image["contentType"]) == ("Bytes", "image/jpeg")
    assert host.violations == []


def test_images_are_left_out_by_default(make_edge: Callable[..., Any], host: Any) -> None:
    """What is known of a heatmap is told, the picture itself is not."""
    edge = make_edge().start()
    host.await_count("DBIRTH", 2)
    edge.result("top", Verdict.REJECT, 9.0, jpeg=b"\xff\xd8\xff")
    host.await_count("DDATA", 1, "top")
    assert host.values("Heatmap/Size", "top")[-1] == 3
    assert host.values("Heatmap/Image", "top") == []


def test_types_can_be_left_out_of_data(make_edge: Callable[..., Any], host: Any) -> None:
    """As the specification would have it, data carry no datatype where that is configured; births always do."""
    edge = make_edge(include_datatype=False).start()
    host.await_count("DBIRTH", 2)
    edge.result("top")
    (data,) = host.await_count("DDATA", 1, "top")
    assert {metric["type"] for metric in data["metrics"]} == {None}
    assert None not in {metric["type"] for metric in host.of("DBIRTH", "top")[0]["metrics"]}


def test_rebirth_repeats_the_births(make_edge: Callable[..., Any], host: Any, tap: Any) -> None:
    """On request all births come again on the same connection, with the same bdSeq and the current values."""
    edge = make_edge(tap.port).start()
    host.await_count("DBIRTH", 2)
    edge.result("top", Verdict.WARN, 1.75)
    host.await_count("DDATA", 1, "top")
    host.do("rebirth")
    births = host.await_count("NBIRTH", 2)
    host.await_count("DBIRTH", 4)
    assert host.order()[-3:] == ["NBIRTH", "DBIRTH top", "DBIRTH side"]
    assert bd_seqs(births) == [0, 0]
    assert value_of(host.of("DBIRTH", "top")[1], "Inspection/Score") == 1.75
    assert value_of(host.of("DBIRTH", "top")[1], "Inspection/Verdict") == "warn"
    assert len(tap.connects()) == 1
    assert host.violations == []


def test_a_storm_of_rebirth_requests_is_answered_once(
    make_edge: Callable[..., Any], host: Any, wait: Callable[..., None]
) -> None:
    """Requests within the pause give one more rebirth at its end, not one each, and no data before it."""
    edge = make_edge(rebirth_pause_s=1.0).start()
    host.await_count("DBIRTH", 2)
    for _ in range(50):
        host.do("rebirth")
    wait(lambda: edge.commands.outcomes["done"] > 0)
    edge.result("top")
    host.await_count("NBIRTH", 2)
    host.await_count("DDATA", 1, "top")
    wait(lambda: edge.commands.outcomes["done"] == 50)
    assert len(host.of("NBIRTH")) <= 3
    assert host.order().index("DDATA top") > host.order().index("NBIRTH", 1)


@pytest.mark.parametrize("protocol", ["5", "3.1.1"])
def test_an_orderly_end_says_so(
    make_edge: Callable[..., Any], host: Any, tap: Any, protocol: str, wait: Callable[..., None]
) -> None:
    """NDEATH is published before DISCONNECT, which in MQTT 5 has the reason 0x04; results are sent before."""
    edge = make_edge(tap.port, {"protocol": protocol}).start()
    host.await_count("DBIRTH", 2)
    edge.result("top")
    edge.stop()
    deaths = host.await_count("NDEATH")
    assert bd_seqs(deaths) == [0] * len(deaths)
    assert host.of("DDATA", "top")
    # The host may have the certificate before the tap has read what the edge wrote after it.
    wait(lambda: tap.connections[0][-1].kind == DISCONNECT)
    last = [packet for packet in tap.connections[0] if packet.kind in (PUBLISH, DISCONNECT)][-2:]
    assert [packet.kind for packet in last] == [PUBLISH, DISCONNECT]
    assert DEATH.encode() in last[0].body
    assert last[0].flags >> 1 & 3 == 1
    assert last[1].body[:1] == (b"\x04" if protocol == "5" else b"")
    assert host.violations == []


def test_each_connect_has_the_next_number(make_edge: Callable[..., Any], host: Any, tap: Any) -> None:
    """After a broken connection the broker says NDEATH, and will and births have the next bdSeq, over restarts too."""
    edge = make_edge(tap.port).start()
    host.await_count("DBIRTH", 2)
    tap.cut()
    host.await_count("NDEATH")
    host.await_count("DBIRTH", 4)
    edge.stop()
    make_edge(tap.port).start()
    host.await_count("DBIRTH", 6)
    wills = [connect.bd_seq.value for connect in tap.connects()]
    assert wills == list(range(len(wills)))
    births, deaths = bd_seqs(host.of("NBIRTH")), bd_seqs(host.of("NDEATH"))
    assert births == sorted(set(births))
    assert set(deaths) <= set(births)
    assert births[0] in deaths
    assert host.violations == []


def test_the_number_begins_again_after_255(make_edge: Callable[..., Any]) -> None:
    """The disk gives numbers from 0 to 255."""
    edge = make_edge()
    numbers = [edge.node.store.next_bd_seq() for _ in range(258)]
    assert numbers == [*range(256), 0, 1]
