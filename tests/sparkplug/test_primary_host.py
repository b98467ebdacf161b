"""A primary host that is there, goes, comes back, and speaks out of turn."""

from collections.abc import Callable
from typing import Any

import pytest

SUBSCRIBE, DISCONNECT = 8, 14


def test_births_wait_for_the_host(make_edge: Callable[..., Any], host: Any, wait: Callable[..., None]) -> None:
    """Connected and subscribed, the node says nothing until its own host says that it is online."""
    edge = make_edge(primary_host="scada").start()
    wait(lambda: edge.node.is_connected)
    host.do("raw", topic="spBv1.0/STATE/another", hex=b'{"online": true, "timestamp": 5}'.hex(), retain=True)
    host.do("state", online=False, timestamp=10)
    host.do("state", text="ONLINE")  # as hosts before 3.0 say it
    host.do("state", text='{"online": 1, "timestamp": 11}')
    host.do("state", text='{"online": true, "timestamp": "12"}')
    host.do("state", text='{"online": true}')
    host.do("state", text="[" * 50_000)
    wait(lambda: edge.node._host._timestamp_ms == 10)
    edge.result("top")
    assert not edge.node.is_in_session
    assert host.messages == []
    host.do("state", online=True, timestamp=10)
    host.await_count("DBIRTH", 2)
    assert host.violations == []


def test_a_retained_state_is_enough(make_edge: Callable[..., Any], host: Any, tap: Any) -> None:
    """A host that was online before the node connected is found by its retained STATE, asked for at QoS 1."""
    host.do("online")
    make_edge(tap.port, primary_host="scada").start()
    host.await_count("DBIRTH", 2)
    assert b"spBv1.0/STATE/scada\x01" in tap.packets(SUBSCRIBE)[0].body


def test_the_session_ends_with_the_host(
    make_edge: Callable[..., Any], host: Any, tap: Any, wait: Callable[..., None]
) -> None:
    """Offline: NDEATH, disconnect, connect anew, wait; online again: births with the next bdSeq."""
    host.do("state", online=True, timestamp=100)
    edge = make_edge(tap.port, primary_host="scada").start()
    host.await_count("DBIRTH", 2)
    host.do("state", online=False, timestamp=100)
    host.await_count("NDEATH")
    wait(lambda: tap.connections[0][-1].kind == DISCONNECT)
    edge.result("top")
    assert len(host.of("NBIRTH")) == 1
    host.do("state", online=True, timestamp=101)
    births = host.await_count("NBIRTH", 2)
    assert [m["value"] for b in births for m in b["metrics"] if m["name"] == "bdSeq"] == [0, 1]
    host.await_count("DDATA", 1, "top")
    assert host.values("Inspection/Sequence", "top", is_historical=True) == [1]
    assert host.violations == []


def test_an_old_offline_changes_nothing(make_edge: Callable[..., Any], host: Any, tap: Any) -> None:
    """A death certificate from before the host's present birth comes late and is ignored."""
    host.do("state", online=True, timestamp=100)
    edge = make_edge(tap.port, primary_host="scada").start()
    host.await_count("DBIRTH", 2)
    host.do("state", online=False, timestamp=99)
    host.do("rebirth")
    host.await_count("NBIRTH", 2)
    assert edge.node.is_in_session
    assert host.of("NDEATH") == []
    assert len(tap.connects()) == 1


def test_an_old_online_is_not_believed(make_edge: Callable[..., Any], host: Any, wait: Callable[..., None]) -> None:
    """A birth certificate older than the last STATE does not bring the births."""
    edge = make_edge(primary_host="scada").start()
    wait(lambda: edge.node.is_connected)
    host.do("state", online=False, timestamp=200)
    host.do("state", online=True, timestamp=150)
    host.do("state", online=False, timestamp=201)
    wait(lambda: edge.node._host._timestamp_ms == 201)
    assert not edge.node.is_in_session
    assert host.messages == []


@pytest.mark.parametrize("group", ["a+b", "a/b", "a#", "", "STATE"])
def test_ids_that_no_topic_can_hold_are_refused(make_edge: Callable[..., Any], group: str) -> None:
    """Wildcards and slashes in group, node or host are errors of the configuration."""
    for option in ("group", "node", "primary_host"):
        if group != "STATE" or option == "group":
            with pytest.raises(ValueError, match=option):
                make_edge(**{option: group})
