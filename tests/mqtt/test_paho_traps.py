"""Traps of paho-mqtt, each measured on 2.2: what the publisher does where paho would lose, repeat or hang.

| trap | shown here, or in test_publisher.py |
|---|---|
| `publish` while away gives rc 4 and keeps the message all the same: sent again by us, it comes twice | here |
| a reconnect sends all that was in flight, past max_inflight (paho #492) | test_never_more_than_the_window_in_flight |
| an exception in a callback ends the network loop for good, `is_connected` stays true | here |
| a 3.1.1 broker acknowledges what its access rules refuse | here; MQTT 5: test_refused_by_access_rules_is_set_aside |
| a message over the broker's maximum is sent again for ever | test_too_large_message_does_not_loop |
| after 65,535 messages packet ids start again; as many outstanding ones are refused | here |
| QoS 0 is queued without bound behind a peer that stalls | here |
"""

import json
import time
from pathlib import Path
from typing import Any

import pytest

from kizu_agent.connection import WINDOW, Connection
from kizu_agent.outbox import Outbox
from kizu_agent.records import Message

BASE = "acme/line/agent"
RESULT = f"{BASE}/cam/result"


def result(number: int, topic: str = RESULT) -> Message:
    """A numbered result."""
    return Message(topic, json.dumps({"number": number, "replayed": False}).encode())


def numbers(messages: list[Any]) -> list[int]:
    """The numbers received, in order."""
    return [json.loads(message.payload)["number"] for message in messages]


def test_what_was_committed_while_the_broker_was_away_comes_once(
    make_broker: Any, make_publisher: Any, listen: Any, outbox: Outbox, wait_until: Any
) -> None:
    """Nothing is handed to paho before the broker takes it, so paho has nothing of its own to send."""
    broker = make_broker()
    listener = listen(broker.port, RESULT)
    publisher = make_publisher(broker.mqtt())
    wait_until(lambda: publisher.is_connected)
    broker.stop()
    wait_until(lambda: not publisher.is_connected)
    outbox.put([result(n) for n in range(100)])
    publisher.wake()
    time.sleep(0.5)
    assert publisher.counters.in_flight == 0
    listener.subscribed.clear()
    broker.start()
    assert listener.subscribed.wait(15)
    wait_until(lambda: outbox.depth() == 0)
    listener.wait_for(lambda m: len(m) >= 100)
    time.sleep(0.5)
    assert numbers(listener.messages) == list(range(100))


@pytest.mark.parametrize("callback", ["_on_publish", "_on_connect", "_on_subscribe"])
def test_an_exception_in_a_callback_ends_the_connection_and_no_more(
    make_broker: Any,
    make_publisher: Any,
    listen: Any,
    outbox: Outbox,
    wait_until: Any,
    monkeypatch: pytest.MonkeyPatch,
    callback: str,
) -> None:
    """A bug of ours in a callback costs one connection: the next one delivers everything."""
    broker = make_broker()
    listener = listen(broker.port, RESULT)
    sound, calls = getattr(Connection, callback), []

    def buggy(self: Connection, *arguments: Any) -> None:
        calls.append(callback)
        if len(calls) == 1:
            raise ZeroDivisionError
        sound(self, *arguments)

    monkeypatch.setattr(Connection, callback, buggy)
    outbox.put([result(n) for n in range(10)])
    publisher = make_publisher(broker.mqtt())
    wait_until(lambda: outbox.depth() == 0)
    listener.wait_for(lambda m: set(numbers(m)) == set(range(10)))
    assert len(calls) > 1
    assert publisher.failure is None


def test_a_3_1_1_broker_acknowledges_what_it_refuses(
    make_broker: Any, make_publisher: Any, listen: Any, outbox: Outbox, wait_until: Any, tmp_path: Path
) -> None:
    """The loss that docs/mqtt.md warns of: no protocol tells it. Where MQTT 5 can be had it is the default."""
    rules = tmp_path / "acl"
    rules.write_text(f"topic readwrite {BASE}/#\n")
    broker = make_broker(f"acl_file {rules}")
    listener = listen(broker.port, "#")
    publisher = make_publisher(broker.mqtt("3.1.1"))
    outbox.put([result(1), result(2, "secret/topic"), result(3)])
    wait_until(lambda: outbox.depth() == 0)
    listener.wait_for(lambda m: numbers([x for x in m if x.topic == RESULT]) == [1, 3])
    assert (publisher.counters.refused, publisher.counters.published) == (0, 3)
    assert broker.mqtt().protocol == "5"


def test_packet_ids_start_again_and_acknowledgements_still_fit(
    make_broker: Any, make_publisher: Any, listen: Any, outbox: Outbox, wait_until: Any
) -> None:
    """Past packet id 65,535 rows go on being matched with their acknowledgements."""
    broker = make_broker()
    listener = listen(broker.port, RESULT)
    publisher = make_publisher(broker.mqtt())
    wait_until(lambda: publisher.is_connected)
    publisher._connection._client._last_mid = 65_500
    outbox.put([result(n) for n in range(200)])
    publisher.wake()
    wait_until(lambda: outbox.depth() == 0)
    listener.wait_for(lambda m: len(m) >= 200)
    assert numbers(listener.messages) == list(range(200))
    assert publisher._connection._client._last_mid < 1000
    assert publisher.counters.published == 200


def test_a_peer_that_stalls_holds_up_qos_0_too(
    make_publisher: Any, outbox: Outbox, wait_until: Any, silent_broker: Any
) -> None:
    """Behind results that nobody acknowledges no pictures pile up in memory: they wait in the outbox."""
    outbox.put([result(n) for n in range(WINDOW)])
    outbox.put([Message("image/a", bytes(100_000), qos=0, content_type="image/jpeg") for _ in range(50)])
    publisher = make_publisher(silent_broker.mqtt())
    wait_until(lambda: publisher.counters.in_flight == WINDOW)
    time.sleep(0.7)
    assert publisher.counters.in_flight == WINDOW
    assert outbox.depth() == WINDOW + 50
