"""The publisher against a real Mosquitto: delivery, outages, refusals, commands, the end."""

import itertools
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import paho.mqtt.client as paho
import pytest
from paho.mqtt.enums import CallbackAPIVersion
from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.properties import Properties
from structlog.testing import capture_logs

from kizu_agent.connection import try_broker
from kizu_agent.errors import AgentError
from kizu_agent.outage import Backoff
from kizu_agent.outbox import Outbox
from kizu_agent.publisher import Publisher
from kizu_agent.records import CommandAnswer, CommandRequest, Message, Priority
from kizu_agent.settings import OutboxConfig

BASE = "acme/line/agent"
RESULT = f"{BASE}/cam/result"
STATUS = f"{BASE}/status"
ONLINE = b'{"status": "online"}'

both_protocols = pytest.mark.parametrize("protocol", ["5", "3.1.1"])


def result(number: int, size: int = 0, topic: str = RESULT, priority: int = Priority.OK) -> Message:
    """A result as small or large as a test needs."""
    payload = json.dumps({"number": number, "replayed": False, "pad": "x" * size}).encode()
    return Message(topic, payload, priority=priority)


def numbers(messages: list[paho.MQTTMessage], topic: str = RESULT) -> list[int]:
    """The numbers of the results received, in order of arrival."""
    return [json.loads(m.payload)["number"] for m in messages if m.topic == topic]


def arrived_in_order(messages: list[paho.MQTTMessage]) -> list[int]:
    """The numbers of the results, rising, after a check: live ones came in order, and so did late ones.

    Of what came twice the first counts.
    """
    first: dict[int, bool] = {}
    for message in messages:
        if message.topic == RESULT:
            body = json.loads(message.payload)
            first.setdefault(body["number"], body["replayed"])
    for is_late in (False, True):
        lane = [number for number, replayed in first.items() if replayed is is_late]
        assert lane == sorted(lane)
    return sorted(first)


def figure(text: str) -> None:
    """Print a measured figure (seen with pytest -s)."""
    sys.stdout.write(text + "\n")


@both_protocols
def test_delivers_in_order_and_empties_the_outbox(
    make_broker: Any, make_publisher: Any, listen: Any, outbox: Outbox, wait_until: Any, protocol: str
) -> None:
    """What is committed arrives once, in order, unmarked when it is fresh, and leaves the outbox."""
    broker = make_broker()
    listener = listen(broker.port, f"{BASE}/#")
    publisher = make_publisher(broker.mqtt(protocol))
    wait_until(lambda: publisher.is_connected)
    outbox.put([result(n) for n in range(100)])
    publisher.wake()
    listener.wait_for(lambda m: len(numbers(m)) >= 100)
    wait_until(lambda: outbox.depth() == 0)
    assert numbers(listener.messages) == list(range(100))
    assert not any(json.loads(m.payload)["replayed"] for m in listener.messages)
    assert publisher.counters.published == 100


@both_protocols
def test_starts_without_a_broker(
    make_broker: Any, make_publisher: Any, listen: Any, outbox: Outbox, wait_until: Any, protocol: str
) -> None:
    """With the broker absent results are kept; when it comes they arrive, marked as replayed."""
    broker = make_broker(is_running=False)
    with capture_logs() as logs:
        publisher = make_publisher(broker.mqtt(protocol))
        publisher.publish_retained(STATUS, b'{"status": "starting"}')
        publisher.publish_retained(STATUS, ONLINE)
        outbox.put([result(n) for n in range(30)])
        time.sleep(1.5)
        assert not publisher.is_connected
        assert time.monotonic_ns() - publisher.progress_mono_ns < 2e9
        broker.start()
        listener = listen(broker.port, f"{BASE}/#")
        wait_until(lambda: outbox.depth() == 0)
    listener.wait_for(lambda m: ONLINE in [x.payload for x in m])
    assert [entry["event"] for entry in logs] == ["broker cannot be reached", "broker is back"]
    outbox.put([result(99)])
    publisher.wake()
    listener.wait_for(lambda m: 99 in numbers(m))
    marks = {
        json.loads(m.payload)["number"]: json.loads(m.payload)["replayed"]
        for m in listener.messages
        if m.topic == RESULT
    }
    assert marks.pop(99) is False
    assert all(marks.values())
    assert b"starting" not in b"".join(m.payload for m in listener.messages)


@both_protocols
def test_broker_killed_in_mid_stream(
    make_broker: Any, make_publisher: Any, listen: Any, outbox: Outbox, wait_until: Any, protocol: str
) -> None:
    """Kills of the broker in mid-stream lose nothing and keep the order; repeats carry the same id."""
    broker = make_broker()
    # QoS 0: Mosquitto writes the listener's copy before it acknowledges, and nothing that the listener sent lies
    # unread at the kill, for which the kernel would reset the connection and throw the copies away.
    listener = listen(broker.port, f"{BASE}/#", qos=0)
    publisher = make_publisher(broker.mqtt(protocol))
    publisher._backoff = Backoff(1.5, 2.0)  # the listener must be there first: the broker keeps nothing for it
    publisher.publish_retained(STATUS, ONLINE)
    total, stop = 1500, threading.Event()

    def produce() -> None:
        for number in range(total):
            outbox.put([result(number, 200)])
            publisher.wake()
            if stop.wait(0.002):
                return

    producer = threading.Thread(target=produce)
    producer.start()
    for _ in range(3):
        time.sleep(0.5)
        broker.kill()
        listener.subscribed.clear()
        time.sleep(0.2)
        broker.start()
        assert listener.subscribed.wait(15)
        wait_until(lambda: publisher.is_connected)
    producer.join(60)
    stop.set()
    wait_until(lambda: outbox.depth() == 0, "outbox empties")
    assert publisher.counters.published >= total
    assert publisher.counters.refused == 0
    assert outbox.losses() == {}
    listener.wait_for(lambda m: set(numbers(m)) == set(range(total)))
    received = numbers(listener.messages)
    assert arrived_in_order(listener.messages) == list(range(total))
    figure(f"MQTT {protocol}: {total} results, 3 kills: {len(received) - len(set(received))} duplicates seen")


def test_stopped_broker_is_noticed_and_nothing_is_lost(
    make_broker: Any, make_publisher: Any, listen: Any, outbox: Outbox, wait_until: Any
) -> None:
    """A broker frozen by SIGSTOP is found by keepalive while the publisher goes on making progress; all arrives."""
    broker = make_broker()
    listener = listen(broker.port, RESULT)
    publisher = make_publisher(broker.mqtt(keepalive_s=5))
    wait_until(lambda: publisher.is_connected)
    os.kill(broker.process.pid, signal.SIGSTOP)
    outbox.put([result(n) for n in range(50)])
    publisher.wake()
    stopped = time.monotonic()
    wait_until(lambda: not publisher.is_connected, "loss noticed")
    noticed_s = time.monotonic() - stopped
    assert publisher.counters.in_flight == 0
    assert time.monotonic_ns() - publisher.progress_mono_ns < 2e9
    os.kill(broker.process.pid, signal.SIGCONT)
    wait_until(lambda: outbox.depth() == 0)
    listener.wait_for(lambda m: set(numbers(m)) >= set(range(50)))
    assert arrived_in_order(listener.messages) == list(range(50))
    figure(f"frozen broker noticed after {noticed_s:.1f} s with keepalive 5 s")


def test_never_more_than_the_window_in_flight(
    make_publisher: Any, outbox: Outbox, wait_until: Any, silent_broker: Any
) -> None:
    """A peer that never acknowledges gets 20 messages, and after a reconnect again no more (paho #492)."""
    outbox.put([result(n) for n in range(100)])
    publisher = make_publisher(silent_broker.mqtt())
    wait_until(lambda: len(silent_broker.publishes) == 20)
    time.sleep(0.7)
    assert len(silent_broker.publishes) == 20
    silent_broker.publishes.clear()
    silent_broker.hang_up()
    wait_until(lambda: publisher.counters.reconnects == 1)
    wait_until(lambda: silent_broker.publishes)
    time.sleep(0.7)
    assert len(silent_broker.publishes) == 1  # careful after a loss: one at a time until it is acknowledged
    assert outbox.depth() == 100


def test_refused_by_access_rules_is_set_aside(
    make_broker: Any, make_publisher: Any, listen: Any, outbox: Outbox, wait_until: Any, tmp_path: Path
) -> None:
    """Under MQTT 5 a message that the broker's access rules refuse is set aside with the reason, the rest arrives."""
    rules = tmp_path / "acl"
    rules.write_text(f"topic readwrite {BASE}/#\n")
    broker = make_broker(f"acl_file {rules}")
    listener = listen(broker.port, f"{BASE}/#")
    publisher = make_publisher(broker.mqtt())
    outbox.put([result(1), result(2, topic="secret/topic"), result(3)])
    wait_until(lambda: outbox.depth() == 0)
    listener.wait_for(lambda m: numbers(m) == [1, 3])
    assert outbox.refused() == [("secret/topic", "Not authorized")]
    assert (publisher.counters.refused, publisher.counters.published) == (1, 2)
    assert outbox.losses() == {("refused", "ok"): 1}


@both_protocols
@pytest.mark.parametrize("limit", ["max_packet_size 20000", "message_size_limit 20000"])
def test_too_large_message_does_not_loop(
    make_broker: Any, make_publisher: Any, listen: Any, outbox: Outbox, wait_until: Any, protocol: str, limit: str
) -> None:
    """A message over the broker's limit is set aside after few attempts and what waits behind it arrives."""
    broker = make_broker(limit)
    listener = listen(broker.port, f"{BASE}/#")
    publisher = make_publisher(broker.mqtt(protocol))
    publisher.publish_retained(STATUS, ONLINE)
    outbox.put([result(1), result(2), result(3, 30_000), result(4), result(5)])
    listener.wait_for(lambda m: set(numbers(m)) >= {1, 2, 4, 5}, 40)
    wait_until(lambda: outbox.depth() == 0)
    assert arrived_in_order(listener.messages) == [1, 2, 4, 5]
    if (protocol, limit.split(maxsplit=1)[0]) == ("3.1.1", "message_size_limit"):
        return  # acknowledged and thrown away by the broker: 3.1.1 has no word for a refusal
    assert [topic for topic, _ in outbox.refused()] == [RESULT]
    # Lost among others up to three times while the window grows from one again, then three times alone.
    assert publisher.counters.reconnects <= 6


def test_a_topic_that_mqtt_cannot_carry_is_set_aside(
    make_publisher: Any, broker: Any, outbox: Outbox, wait_until: Any
) -> None:
    """A topic with a wildcard is refused by paho itself: the message is set aside and the next one goes out."""
    publisher = make_publisher(broker.mqtt())
    outbox.put([result(1, topic="a/#"), result(2)])
    wait_until(lambda: outbox.depth() == 0)
    assert [topic for topic, _ in outbox.refused()] == ["a/#"]
    assert publisher.counters.published == 1


@both_protocols
def test_rejected_login_is_said_once_and_tried_again(
    make_broker: Any, make_publisher: Any, outbox: Outbox, wait_until: Any, tmp_path: Path, protocol: str
) -> None:
    """A wrong password is logged once, attempts go on, and a corrected broker is joined without a restart."""
    passwords = tmp_path / "passwords"
    subprocess.run(["mosquitto_passwd", "-c", "-b", passwords, "agent", "other"], check=True, capture_output=True)
    broker = make_broker(f"password_file {passwords}", "allow_anonymous false")
    with capture_logs() as logs:
        publisher = make_publisher(broker.mqtt(protocol, username="agent", password="right"))  # noqa: S106 - of this test
        time.sleep(1.5)
        assert not publisher.is_connected
        assert [entry["event"] for entry in logs] == ["broker rejects the connection"]
        subprocess.run(["mosquitto_passwd", "-b", passwords, "agent", "right"], check=True, capture_output=True)
        os.kill(broker.process.pid, signal.SIGHUP)
        wait_until(lambda: publisher.is_connected)
    assert [entry["event"] for entry in logs] == ["broker rejects the connection", "broker is back"]
    outbox.put([result(1)])
    wait_until(lambda: outbox.depth() == 0)


def test_properties_of_mqtt_5(make_publisher: Any, broker: Any, listen: Any, outbox: Outbox, wait_until: Any) -> None:
    """Content type and what is left of the expiry go along; binary payloads pass unchanged; QoS 0 leaves the outbox."""
    listener = listen(broker.port, "image/#")
    publisher = make_publisher(broker.mqtt())
    picture = bytes(range(256))
    outbox.put([Message("image/a", picture, qos=0, content_type="image/jpeg", expiry_s=100, priority=4)])
    publisher.wake()
    listener.wait_for(len)
    (message,) = listener.messages
    assert message.payload == picture
    assert message.properties.ContentType == "image/jpeg"
    assert 90 <= message.properties.MessageExpiryInterval <= 100
    wait_until(lambda: outbox.depth() == 0)


@both_protocols
def test_clean_stop_says_offline_and_drains(
    make_broker: Any, make_publisher: Any, listen: Any, outbox: Outbox, wait_until: Any, protocol: str
) -> None:
    """Stopping sends the backlog and the last states, then the retained offline status, and disconnects cleanly."""
    broker = make_broker()
    listener = listen(broker.port, f"{BASE}/#")
    publisher = make_publisher(broker.mqtt(protocol))
    publisher.publish_retained(STATUS, ONLINE)
    wait_until(lambda: publisher.is_connected)
    outbox.put([result(n) for n in range(300)])
    publisher.publish_retained(f"{BASE}/cam/state", b'{"verdict": "unknown"}')
    publisher.stop(10)
    publisher.stop(10)
    assert outbox.depth() == 0
    listener.wait_for(lambda m: m[-1].payload == b'{"status": "offline"}')
    assert len(numbers(listener.messages)) == 300
    late = listen(broker.port, f"{BASE}/#")
    late.wait_for(lambda m: len(m) == 2)
    assert {m.payload for m in late.messages} == {b'{"status": "offline"}', b'{"verdict": "unknown"}'}
    # The broker's own word for an end without DISCONNECT, after which it would have published the will.
    assert "Client agent closed its connection" not in broker.log_path.read_text()


def test_stop_keeps_its_deadline_and_what_is_left(
    make_publisher: Any, outbox: Outbox, wait_until: Any, silent_broker: Any
) -> None:
    """With a broker that acknowledges nothing the stop is over by its deadline and every row is still there."""
    outbox.put([result(n) for n in range(30)])
    publisher = make_publisher(silent_broker.mqtt())
    wait_until(lambda: publisher.counters.in_flight == 20)
    started = time.monotonic()
    publisher.stop(2.0)
    assert time.monotonic() - started < 2.5
    assert outbox.depth() == 30


AGENT = """
import sys, time
from pathlib import Path
from kizu_agent.settings import MqttConfig, OutboxConfig
from kizu_agent.outbox import Outbox
from kizu_agent.publisher import Publisher
from kizu_agent.records import CommandAnswer, Message

path, port, protocol = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
outbox = Outbox(path, OutboxConfig())
will = Message("acme/line/agent/status", b'{"status": "offline"}', retain=True)
publisher = Publisher(MqttConfig(port=port, protocol=protocol), "agent", "acme/line/agent", will, outbox,
                      lambda request: CommandAnswer(b""))
publisher.publish_retained("acme/line/agent/status", b'{"status": "online"}')
publisher.start()
while True:
    with outbox.transaction() as transaction:
        seq = transaction.next_seq("cam")
        text = '{"number": %d, "replayed": false}' % seq
        transaction.put([Message("acme/line/agent/cam/result", text.encode())])
    publisher.wake()
    print(seq, flush=True)
    time.sleep(0.001)
"""


@both_protocols
def test_killed_agent_loses_nothing_and_its_will_is_delivered(
    make_broker: Any, listen: Any, outbox_path: Path, wait_until: Any, protocol: str
) -> None:
    """SIGKILL of the agent: the broker says offline, and the next agents deliver every committed number in order."""
    broker = make_broker()
    listener = listen(broker.port, f"{BASE}/#")
    last = 0
    for kills in range(1, 4):
        process = subprocess.Popen(
            [sys.executable, "-c", AGENT, outbox_path, str(broker.port), protocol], stdout=subprocess.PIPE, text=True
        )
        assert process.stdout is not None
        lines = list(itertools.islice(process.stdout, 300))
        process.kill()
        lines += process.stdout.readlines()
        process.stdout.close()
        process.wait(10)
        last = int(lines[-1])
        listener.wait_for(lambda m, k=kills: [x.payload for x in m].count(b'{"status": "offline"}') == k)
    box = Outbox(outbox_path, OutboxConfig())
    try:
        will = Message(STATUS, b'{"status": "offline"}', retain=True)
        publisher = Publisher(broker.mqtt(protocol), "agent", BASE, will, box, lambda _: CommandAnswer(b""))
        publisher.start()
        wait_until(lambda: box.depth() == 0)
        publisher.stop(5)
    finally:
        box.close()
    listener.wait_for(lambda m: last in numbers(m))
    received = numbers(listener.messages)
    assert arrived_in_order(listener.messages) == list(range(1, max(received) + 1))
    assert max(received) >= last
    figure(f"MQTT {protocol}: {max(received)} results, 3 SIGKILLs: {len(received) - max(received)} duplicates, 0 lost")


class Requester:
    """Sends commands as a SCADA would."""

    def __init__(self, port: int, protocol: int = paho.MQTTv5) -> None:
        self.client = paho.Client(CallbackAPIVersion.VERSION2, protocol=protocol)
        self.client.connect("127.0.0.1", port)
        self.client.loop_start()

    def send(self, name: str, payload: bytes, *, retain: bool = False, **properties: Any) -> None:
        """Publish a command and wait until the broker has it."""
        packed = Properties(PacketTypes.PUBLISH) if properties else None
        for key, value in properties.items():
            setattr(packed, key, value)
        self.client.publish(f"{BASE}/cmd/{name}", payload, 1, retain, packed).wait_for_publish(10)

    def close(self) -> None:
        """End it."""
        self.client.disconnect()
        self.client.loop_stop()
        self.client._reset_sockets()


@pytest.fixture
def requester(broker: Any) -> Any:
    """A client of the test's broker that sends commands."""
    made = Requester(broker.port)
    yield made
    made.close()


@both_protocols
def test_commands_are_answered(
    make_publisher: Any, broker: Any, listen: Any, wait_until: Any, requester: Requester, protocol: str
) -> None:
    """A command reaches the handler, and its answer the response topics, with correlation data in MQTT 5."""
    listener = listen(broker.port, f"{BASE}/response/#", "scada/#")
    publisher = make_publisher(broker.mqtt(protocol))
    wait_until(lambda: publisher.is_connected)
    requester.send("ping", b"1", ResponseTopic="scada/answers", CorrelationData=b"\x01\x02")
    expected = [f"{BASE}/response/ping"] + (["scada/answers"] if protocol == "5" else [])
    listener.wait_for(lambda m: len(m) == len(expected))
    assert [m.topic for m in listener.messages] == expected
    assert {m.payload for m in listener.messages} == {b"pong 1"}
    if protocol == "5":
        assert {m.properties.CorrelationData for m in listener.messages} == {b"\x01\x02"}


@both_protocols
def test_retained_commands_are_ignored(
    make_publisher: Any, broker: Any, listen: Any, requester: Requester, protocol: str
) -> None:
    """A retained command, which every reconnect would run again, is not run."""
    requester.send("ping", b"retained", retain=True)
    listener = listen(broker.port, f"{BASE}/response/#")
    publisher = make_publisher(broker.mqtt(protocol))
    for _ in range(100):
        if publisher.is_connected:
            break
        time.sleep(0.05)
    requester.send("ping", b"live")
    listener.wait_for(len)
    time.sleep(0.3)
    assert listener.payloads() == ["pong live"]


def test_a_failing_command_stops_nothing(
    make_publisher: Any, broker: Any, listen: Any, outbox: Outbox, wait_until: Any, requester: Requester
) -> None:
    """A handler that raises is logged; later commands and results go on (paho's loop would die silently)."""

    def handle(request: CommandRequest) -> CommandAnswer:
        if request.payload == b"bad":
            raise ZeroDivisionError
        return CommandAnswer(b"fine")

    listener = listen(broker.port, f"{BASE}/#")
    publisher = make_publisher(broker.mqtt(), on_command=handle)
    wait_until(lambda: publisher.is_connected)
    with capture_logs() as logs:
        requester.send("ping", b"bad")
        requester.send("ping", b"good")
        listener.wait_for(lambda m: b"fine" in [x.payload for x in m])
    assert [entry["event"] for entry in logs] == ["command failed"]
    outbox.put([result(1)])
    publisher.wake()
    listener.wait_for(lambda m: numbers(m) == [1])


def test_a_slow_command_holds_up_nobody(
    make_publisher: Any, broker: Any, listen: Any, outbox: Outbox, wait_until: Any, requester: Requester
) -> None:
    """While a handler hangs results flow, and commands beyond the queue are dropped and counted."""
    gate = threading.Event()

    def handle(_request: CommandRequest) -> CommandAnswer:
        gate.wait(30)
        return CommandAnswer(b"done")

    listener = listen(broker.port, f"{BASE}/#")
    publisher = make_publisher(broker.mqtt(), on_command=handle)
    wait_until(lambda: publisher.is_connected)
    for _ in range(25):
        requester.send("ping", b"")
    outbox.put([result(1)])
    publisher.wake()
    listener.wait_for(lambda m: numbers(m) == [1])
    wait_until(lambda: publisher.counters.commands_dropped == 8)
    gate.set()
    listener.wait_for(lambda m: [x.payload for x in m].count(b"done") == 17)


def test_answers_never_enter_the_agents_own_topics(
    make_publisher: Any, broker: Any, listen: Any, wait_until: Any, requester: Requester
) -> None:
    """A response topic among the agent's own would forge a result or a command loop: it is not used."""
    listener = listen(broker.port, f"{BASE}/#", f"image/{BASE}/#")
    publisher = make_publisher(broker.mqtt())
    wait_until(lambda: publisher.is_connected)
    requester.send("ping", b"1", ResponseTopic=f"{BASE}/cmd/ping")
    requester.send("ping", b"2", ResponseTopic=RESULT)
    requester.send("ping", b"3", ResponseTopic=f"image/{BASE}/cam/heatmap")
    requester.send("ping", b"4", ResponseTopic="bad/#")
    requester.send("ping", b"5")
    listener.wait_for(lambda m: b"pong 5" in [x.payload for x in m])
    answers = [m for m in listener.messages if "/cmd/" not in m.topic]
    assert [m.topic for m in answers] == [f"{BASE}/response/ping"] * 5


def test_client_certificates(
    make_broker: Any, make_publisher: Any, outbox: Outbox, wait_until: Any, certificates: Path
) -> None:
    """With TLS and a client certificate results arrive; a foreign authority is refused and said once."""
    tls = (
        f"cafile {certificates}/ca.pem",
        f"certfile {certificates}/broker.pem",
        f"keyfile {certificates}/broker.key",
        "require_certificate true",
    )
    broker = make_broker(tls=tls)
    mine = {
        "ca_file": certificates / "ca.pem",
        "cert_file": certificates / "agent.pem",
        "key_file": certificates / "agent.key",
    }
    with capture_logs() as logs:
        stranger = make_publisher(broker.mqtt(tls={"ca_file": certificates / "other.pem"}))
        wait_until(lambda: logs)
        time.sleep(2)
        assert not stranger.is_connected
        stranger.stop(1)
    assert [(entry["event"], "CERTIFICATE_VERIFY_FAILED" in entry["reason"]) for entry in logs] == [
        ("broker cannot be reached", True)
    ]
    publisher = make_publisher(broker.mqtt(tls=mine))
    outbox.put([result(n, 20_000) for n in range(50)])
    publisher.wake()
    wait_until(lambda: outbox.depth() == 0)
    assert publisher.counters.published == 50


@both_protocols
def test_throughput(make_broker: Any, make_publisher: Any, outbox: Outbox, wait_until: Any, protocol: str) -> None:
    """A backlog of 5,000 results of 1 kB leaves at many times the rate of a fast line."""
    outbox.put([result(n, 1000) for n in range(5000)])
    broker = make_broker()
    publisher: Publisher = make_publisher(broker.mqtt(protocol))
    wait_until(lambda: publisher.is_connected)
    started = time.monotonic()
    wait_until(lambda: outbox.depth() == 0, timeout_s=60)
    rate = 5000 / (time.monotonic() - started)
    figure(f"MQTT {protocol}: {rate:.0f} results/s of 1 kB from the outbox to their PUBACK")
    assert rate > 200


@both_protocols
def test_trying_the_broker_says_what_is_wrong(make_broker: Any, tmp_path: Path, protocol: str) -> None:
    """The check logs in and out again; a wrong password and an absent broker are errors with their reason."""
    passwords = tmp_path / "passwords"
    subprocess.run(["mosquitto_passwd", "-c", "-b", passwords, "agent", "right"], check=True, capture_output=True)
    broker = make_broker(f"password_file {passwords}", "allow_anonymous false")
    assert f"MQTT {protocol}" in try_broker(broker.mqtt(protocol, username="agent", password="right"))  # noqa: S106 - of this test
    with pytest.raises(AgentError, match="rejects"):
        try_broker(broker.mqtt(protocol, username="agent", password="wrong"))  # noqa: S106 - of this test
    broker.stop()
    with pytest.raises(OSError, match="refused"):
        try_broker(broker.mqtt(protocol))


def test_live_results_go_before_a_backlog_that_is_paced(
    make_broker: Any, make_publisher: Any, listen: Any, outbox: Outbox, wait_until: Any
) -> None:
    """A backlog comes at the rate allowed, marked and in order, and live results do not wait for it."""
    backlog, rate = 400, 100.0
    outbox.put([result(n) for n in range(backlog)])
    broker = make_broker()
    listener = listen(broker.port, RESULT)
    publisher = make_publisher(broker.mqtt(), replay_per_s=rate)
    wait_until(lambda: publisher.is_connected)
    began, sent = time.monotonic(), {}
    for number in range(backlog, backlog + 20):
        sent[number] = time.monotonic()
        outbox.put([result(number)])
        publisher.wake()
        listener.wait_for(lambda m, n=number: n in numbers(m))
        assert time.monotonic() - sent[number] < 1.0  # on a noisy machine; about a millisecond otherwise
    assert outbox.depth() > 0, "the backlog went before the live results"
    wait_until(lambda: outbox.depth() == 0)
    took_s = time.monotonic() - began
    listener.wait_for(lambda m: set(numbers(m)) == set(range(backlog + 20)))
    assert took_s > 0.8 * backlog / rate
    marks = {json.loads(m.payload)["number"]: json.loads(m.payload)["replayed"] for m in listener.messages}
    assert {number for number, is_late in marks.items() if not is_late} == set(sent)
    assert arrived_in_order(listener.messages) == list(range(backlog + 20))


def test_rejects_and_events_go_before_the_backlog_of_ok_results(
    make_broker: Any, make_publisher: Any, listen: Any, outbox: Outbox, wait_until: Any
) -> None:
    """In a backlog the important comes first, each kind in its own order."""
    broker = make_broker()
    listener = listen(broker.port, RESULT)
    kinds = [Priority.OK, Priority.REJECT, Priority.OK, Priority.EVENT, Priority.REJECT, Priority.WARN]
    outbox.put([result(number, priority=kind) for number, kind in enumerate(kinds)])
    make_publisher(broker.mqtt())
    wait_until(lambda: outbox.depth() == 0)
    listener.wait_for(lambda m: len(m) == len(kinds))
    assert numbers(listener.messages) == [3, 1, 4, 5, 0, 2]
