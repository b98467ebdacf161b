"""Many boxes: the bridge of deploy/mosquitto between two real brokers, and shared subscriptions."""

import contextlib
import json
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from faults.plant import Agent, Broker, Subscriber, brightness_bundle, give, pictures, wait_for

CONF = Path(__file__).parents[2] / "deploy" / "mosquitto" / "bridge.conf"
PREFIX = "acme/osaka/press/line2"


class _Bridge(Broker):
    """The line's broker, with the configuration as it is published: only addresses and folders are replaced."""

    def __init__(self, folder: Path, plant_port: int) -> None:
        super().__init__(folder)
        text = CONF.read_text("utf-8").replace("listener 1883 127.0.0.1", f"listener {self.port} 127.0.0.1\nuser root")
        text = text.replace("plant-broker:1883", f"127.0.0.1:{plant_port}").replace(PREFIX, "plant/line")
        text = text.replace("/var/lib/mosquitto/", f"{folder}/").replace("restart_timeout 1 30", "restart_timeout 1 1")
        self._config.write_text(text, "utf-8")


@pytest.fixture
def plant_broker(tmp_path: Path) -> Iterator[Broker]:
    """The plant's broker, which keeps sessions over a restart as deploy/mosquitto/kizu.conf has it."""
    broker = Broker(tmp_path / "plant", "persistence true", f"persistence_location {tmp_path}/plant/")
    broker.start()
    with contextlib.closing(broker):
        yield broker


def test_a_bridged_line_loses_nothing_while_its_uplink_is_away(tmp_path: Path, plant_broker: Broker) -> None:
    """Every result of the line reaches the plant, those from an outage of the uplink too; commands come back."""
    line = _Bridge(tmp_path / "line", plant_broker.port)
    line.start()
    subscriber = Subscriber(plant_broker.port)
    folder = pictures(tmp_path / "pictures", count=40)
    cameras = f'[[cameras]]\nname = "cam"\nsource = "folder:{folder}?loop=true&rate=40"\n'
    agent = Agent(tmp_path / "agent", line.port, cameras)
    try:
        subscriber.start()
        subscriber.await_subscribed(plant_broker.port)
        give(agent, brightness_bundle())
        agent.start()
        wait_for(lambda: len(subscriber.results()) >= 10, 30, "results at the plant")
        _await_answer(plant_broker.port)
        plant_broker.kill()
        time.sleep(2.0)  # the outage
        plant_broker.start()
        subscriber.await_subscribed(plant_broker.port)
        count = len(subscriber.results())
        wait_for(lambda: len(subscriber.results()) >= count + 20, 30, "results after the outage")
        agent.stop()
        wait_for(lambda: subscriber.of("/status")[-1].json["state"] == "offline", 20, "the last word at the plant")
        numbers = [heard.json["seq"] for heard in subscriber.results()]
    finally:
        agent.close()
        subscriber.close()
        line.close()
    assert sorted(set(numbers)) == list(range(1, max(numbers) + 1))


def _await_answer(port: int) -> None:
    """Ask through the plant's broker until the answer comes: the bridge subscribes in its own time."""
    base = ["-p", str(port), "-V", "5"]
    listen = [_tool("mosquitto_sub"), *base, "-t", "plant/line/box/response/ping", "-C", "1", "-W", "20"]
    with subprocess.Popen(listen, stdout=subprocess.PIPE, text=True) as listener:
        while listener.poll() is None:
            ask = [_tool("mosquitto_pub"), *base, "-q", "1", "-t", "plant/line/box/cmd/ping", "-m", '{"echo": "hello"}']
            subprocess.run(ask, check=True, timeout=10)
            time.sleep(0.2)
        assert listener.stdout is not None
        assert json.loads(listener.stdout.read())["echo"] == "hello"


def test_shared_subscribers_take_each_result_once(tmp_path: Path) -> None:
    """Two consumers of one group share the results: together they have all, and none twice."""
    broker = Broker(tmp_path / "broker")
    broker.start()
    shared = [Subscriber(broker.port, f"$share/store/{PREFIX}/#") for _ in range(2)]
    try:
        for subscriber in shared:
            subscriber.start()
        wait_for(lambda: _send(broker.port, "probe") and all(one.messages for one in shared), 20, "both to listen")
        before = [len(one.messages) for one in shared]
        for number in range(40):
            _send(broker.port, str(number))
        wait_for(lambda: sum(len(one.messages) for one in shared) >= sum(before) + 40, 20, "all of them")
        heard = [[m.payload for m in one.messages[start:]] for one, start in zip(shared, before, strict=True)]
    finally:
        for subscriber in shared:
            subscriber.close()
        broker.close()
    assert sorted(int(payload) for part in heard for payload in part if payload != b"probe") == list(range(40))
    assert all(part for part in heard)


def _send(port: int, text: str) -> bool:
    command = [_tool("mosquitto_pub"), "-p", str(port), "-t", f"{PREFIX}/box/cam/result", "-q", "1", "-m", text]
    subprocess.run(command, check=True, timeout=10)
    return True


def _tool(name: str) -> str:
    found = shutil.which(name)
    assert found, f"{name} is missing: apt-get install mosquitto-clients"
    return found
