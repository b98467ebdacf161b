"""The checker itself: edges that are known to be wrong are caught by the very host that finds nothing with ours."""

import time
from collections.abc import Callable, Iterator
from typing import Any

import paho.mqtt.client as paho
import pytest
from paho.mqtt.enums import CallbackAPIVersion

from kizu_agent.sparkplug.payload import DataType, Metric, encode

GROUP, NODE = "acme:osaka:line2", "box1"


class FakeEdge:
    """The least that passes for an edge node; what is wrong with it is in its arguments."""

    def __init__(self, port: int, bd_seq: int, will_bd_seq: int | None = None, will_qos: int = 1) -> None:
        will = bd_seq if will_bd_seq is None else will_bd_seq
        self.client = paho.Client(CallbackAPIVersion.VERSION2, protocol=paho.MQTTv311)
        self.client.will_set(f"spBv1.0/{GROUP}/NDEATH/{NODE}", encode([self.bd_seq(will)], None, None), will_qos)
        self.client.connect("127.0.0.1", port, 5)
        self.client.loop_start()
        self.birth(bd_seq)

    def bd_seq(self, number: int) -> Metric:
        return Metric("bdSeq", DataType.INT64, number, time.time_ns() // 1_000_000)

    def birth(self, bd_seq: int) -> None:
        now = time.time_ns() // 1_000_000
        self.send("NBIRTH", 0, self.bd_seq(bd_seq), Metric("Node Control/Rebirth", DataType.BOOLEAN, False, now))  # noqa: FBT003

    def send(
        self, kind: str, seq: int | None, *found: Metric, device: str = "", qos: int = 0, retain: bool = False
    ) -> None:
        topic = f"spBv1.0/{GROUP}/{kind}/{NODE}" + (f"/{device}" if device else "")
        self.client.publish(topic, encode(found, time.time_ns() // 1_000_000, seq), qos, retain).wait_for_publish(5)

    def die(self) -> None:
        """Go without a word: the broker says the will."""
        self.client.loop_stop()
        self.client._sock_close()
        self.client._reset_sockets()


@pytest.fixture
def fake(broker: Any) -> Iterator[Callable[..., FakeEdge]]:
    """Give a maker of fake edges."""
    edges: list[FakeEdge] = []

    def make(**wrong: Any) -> FakeEdge:
        edges.append(FakeEdge(broker.port, **wrong))
        return edges[-1]

    yield make
    for edge in edges:
        edge.die()


def ids(host: Any) -> set[str]:
    return {violation["id"] for violation in list(host.violations)}


def test_a_right_fake_edge_passes(host: Any, fake: Callable[..., FakeEdge]) -> None:
    """Without anything wrong the fake gives no violation: what is found below is what is wrong there."""
    fake(bd_seq=0).die()
    host.await_count("NDEATH")
    fake(bd_seq=1).die()
    host.await_count("NDEATH", 2)
    assert host.violations == []


def test_a_will_of_qos_0_with_a_fixed_bdseq_is_caught(host: Any, fake: Callable[..., FakeEdge]) -> None:
    """As npm's sparkplug-client does: will at QoS 0, bdSeq 0 at every connection."""
    for count in (1, 2):
        edge = fake(bd_seq=0, will_qos=0)
        host.await_count("NBIRTH", count)
        edge.die()
        host.await_count("NDEATH", count)
    assert ids(host) == {"message-flow-edge-node-birth-publish-will-message-qos", "topics-nbirth-bdseq-increment"}


def test_another_bdseq_in_the_death_is_caught(host: Any, fake: Callable[..., FakeEdge]) -> None:
    """As pysparkplug does: the NDEATH carries another bdSeq than the NBIRTH before it."""
    fake(bd_seq=0, will_bd_seq=1).die()
    host.await_count("NDEATH")
    assert ids(host) == {"payloads-ndeath-bdseq"}


@pytest.mark.parametrize(
    ("message", "violation"),
    [
        (("NDATA", 2), "payloads-sequence-num-incrementing"),
        (("NDATA", None), "payloads-sequence-num-always-included"),
        (("DDATA", 1, "device"), "payloads-ddata-order"),
        (("DDEATH", 1, "device"), "operational-behavior-device-ddeath"),
        (("NDATA", 1, "qos"), "topics-ndata-mqtt"),
        (("NDATA", 1, "unborn"), "operational-behavior-data-publish-nbirth"),
        (("NDATA", 1, "timeless"), "payloads-name-birth-data-requirement"),
        (("NBIRTH", 0, "bare"), "topics-nbirth-rebirth-metric"),
        (("NBIRTH", 0, "bare"), "topics-nbirth-bdseq-included"),
        (("NBIRTH", 3, "bare"), "topics-nbirth-seq-num"),
        (("NDEATH", 3), "topics-ndeath-seq"),
    ],
    ids=str,
)
def test_each_breach_is_caught(
    host: Any, fake: Callable[..., FakeEdge], wait: Callable[..., None], message: tuple[Any, ...], violation: str
) -> None:
    """One thing wrong in a message is told under its id."""
    edge = fake(bd_seq=0)
    kind, seq, *how = message
    now = 0 if "timeless" in how else time.time_ns() // 1_000_000
    name = "Strange" if how and how[0] in ("unborn", "timeless") else "bdSeq"
    found = [] if how and how[0] in ("bare", "device") else [Metric(name, DataType.INT64, 0, now)]
    edge.send(kind, seq, *found, device="cam" if "device" in how else "", qos=1 if "qos" in how else 0)
    wait(lambda: violation in ids(host))
