"""Who commands the agent of a plant: a client of its own that keeps each answer with the moment it came."""

import json
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import paho.mqtt.client as paho
from faults.plant import BASE, wait_for
from paho.mqtt.enums import CallbackAPIVersion
from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.properties import Properties

REPLY = "reply/commander"


class Answered(NamedTuple):
    """An answer on the response topic: when it came (monotonic seconds), and what it says."""

    at: float
    answer: dict[str, Any]


class Commander:
    """Sends commands, and keeps the answers by correlation data; `pictures` are the payloads of heatmaps."""

    def __init__(self, port: int) -> None:
        self.answers: dict[bytes, list[Answered]] = {}
        self.pictures: list[bytes] = []
        self._number = 0
        self._lock = threading.Lock()
        subscribed = threading.Event()
        self._client = paho.Client(CallbackAPIVersion.VERSION2, protocol=paho.MQTTv5)
        self._client.max_inflight_messages_set(1000)
        self._client.on_connect = lambda client, *_: client.subscribe([(REPLY, 0), (f"image/{BASE}/#", 0)])
        self._client.on_subscribe = lambda *_: subscribed.set()
        self._client.on_message = self._keep
        # As other clients' libraries do by themselves; paho leaves it to us.
        self._client.on_socket_open = lambda _client, _, sock: sock.setsockopt(
            socket.IPPROTO_TCP, socket.TCP_NODELAY, 1
        )
        self._client.connect("127.0.0.1", port)
        self._client.loop_start()
        if not subscribed.wait(10):
            raise TimeoutError("the commander could not subscribe")

    def send(self, name: str, payload: bytes | dict[str, Any] = b"", user: str | None = None, qos: int = 1) -> bytes:
        """Send a command; its correlation data."""
        self._number += 1
        properties = Properties(PacketTypes.PUBLISH)
        properties.ResponseTopic = REPLY
        properties.CorrelationData = correlation = f"{self._number}".encode()
        if user is not None:
            properties.UserProperty = ("user", user)
        raw = payload if isinstance(payload, bytes) else json.dumps(payload).encode()
        self._client.publish(f"{BASE}/cmd/{name}", raw, qos=qos, properties=properties)
        return correlation

    def publish(self, topic: str, payload: bytes, *, retain: bool = False, qos: int = 1) -> None:
        """Publish anything anywhere."""
        self._client.publish(topic, payload, qos=qos, retain=retain)

    def ask(self, name: str, payload: bytes | dict[str, Any] = b"", user: str | None = None) -> dict[str, Any]:
        """Send a command and give its answer."""
        correlation = self.send(name, payload, user)
        wait_for(lambda: correlation in self.answers, 10, f"the answer to {name} {payload!r:.100}")
        return self.answers[correlation][0].answer

    def until_ok(self, name: str, payload: dict[str, Any], seconds: float = 30.0) -> None:
        """Send a command again and again until it is carried out: an agent that starts hears nothing at first."""
        sent: list[bytes] = []

        def is_ok() -> bool:
            sent.append(self.send(name, payload))
            time.sleep(0.2)
            return any(answered.answer["ok"] for key in sent for answered in self.answers.get(key, []))

        wait_for(is_ok, seconds, f"a {name} that is carried out")

    def close(self) -> None:
        """Disconnect."""
        self._client.disconnect()
        self._client.loop_stop()
        self._client._reset_sockets()  # paho leaves its inner pair to the garbage collector, which warns

    def _keep(self, _client: object, _data: object, message: paho.MQTTMessage) -> None:
        at = time.monotonic()
        if message.topic != REPLY:
            self.pictures.append(message.payload)
            return
        answered = Answered(at, json.loads(message.payload))
        with self._lock:
            self.answers.setdefault(message.properties.CorrelationData, []).append(answered)


@contextmanager
def commander(port: int) -> Iterator[Commander]:
    """A commander that is gone after the block."""
    client = Commander(port)
    try:
        yield client
    finally:
        client.close()
