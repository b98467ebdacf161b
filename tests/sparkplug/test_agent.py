"""The whole agent as a process: camera, model, inspection, store, edge node."""

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from faults.plant import Agent, Subscriber, brightness_bundle, committed_numbers, give, pictures

GROUP, NODE = "plant:line", "box"
PORT_OF_NOBODY = 1


@pytest.fixture
def make_agent(tmp_path: Path, broker: Any) -> Iterator[Callable[..., Agent]]:
    """Give a maker of agents with a model, not started, whose cameras are given as TOML."""
    agents: list[Agent] = []

    def make(cameras: str) -> Agent:
        agents.append(Agent(tmp_path / "agent", broker.port, cameras, "[sparkplug]\nenabled = true\n"))
        give(agents[-1], brightness_bundle())
        return agents[-1]

    yield make
    for agent in agents:
        agent.close()


def bd_seqs(host: Any) -> list[int]:
    return [m["value"] for birth in host.of("NBIRTH") for m in birth["metrics"] if m["name"] == "bdSeq"]


def test_no_result_is_missing_after_a_kill(
    make_agent: Callable[..., Agent], host: Any, tmp_path: Path, wait: Callable[..., None]
) -> None:
    """Killed in the middle, the agent tells every committed result once it is back; the host finds nothing wrong."""
    source = f"folder:{pictures(tmp_path / 'pictures', 20)}?loop=true&rate=60"
    agent = make_agent(f'[[cameras]]\nname = "cam"\nsource = "{source}"\n')
    agent.start()
    wait(lambda: len(host.of("DDATA", "cam")) > 60, seconds=40)
    agent.kill()
    host.await_count("NDEATH")
    killed_at = len(host.messages)
    agent.start()
    host.await_count("NBIRTH", 2)
    wait(lambda: len(host.of("DDATA", "cam")) > 120 and len(host.messages) > killed_at + 60, seconds=40)
    assert agent.stop() == 0
    wait(lambda: len(host.of("NDEATH")) >= 2)
    committed = committed_numbers(agent.state)["cam"]
    told = set(host.values("Inspection/Sequence", "cam")) - {None}
    assert told >= set(range(1, committed + 1)), sorted(set(range(1, committed + 1)) - told)
    assert bd_seqs(host) == [0, 1]
    assert set(host.values("Inspection/Verdict", "cam")) == {"unknown", "ok", "warn", "reject"}
    assert host.violations == []


def test_sparkplug_alone(
    make_agent: Callable[..., Agent], host: Any, broker: Any, tmp_path: Path, wait: Callable[..., None]
) -> None:
    """Without JSON topics nothing is published beside Sparkplug; thresholds can be written, a lost camera dies."""
    fault = tmp_path / "fault"
    fault.write_text("")
    source = f"sim:plates?rate=20&width=64&height=64&fault={fault}"
    agent = make_agent(f'[[cameras]]\nname = "cam"\nsource = "{source}"\nread_timeout_s = 1.0\n')
    subscriber = Subscriber(broker.port, "plant/#")
    subscriber.start()
    try:
        subscriber.await_subscribed(broker.port)
        agent.start(KIZU_MQTT__JSON_TOPICS="false")
        wait(lambda: len(host.of("DDATA", "cam")) > 5, seconds=40)
        wait(lambda: host.values("Thresholds/Warn", "cam")[-1] == 200.0)
        values = {"Warn": 123.0, "Reject": 230.0}
        written = [{"name": f"Thresholds/{name}", "type": "Double", "value": value} for name, value in values.items()]
        host.do("dcmd", group=GROUP, node=NODE, device="cam", metrics=written)
        wait(lambda: host.values("Inspection/Warn_At", "cam")[-1] == 123.0)
        fault.write_text("unplug")
        host.await_count("DDEATH", 1, "cam")
        assert host.values("Inspection/Verdict", "cam")[-1] == "unknown"
        fault.write_text("")
        host.await_count("DBIRTH", 2, "cam")
        assert agent.metric("sparkplug_in_session") == 1.0
        assert agent.metric("broker_connected") == 1.0
        began = time.monotonic()
        assert agent.stop() == 0
        assert time.monotonic() - began < 8
        assert [heard.topic for heard in subscriber.messages if not heard.topic.endswith("/mark")] == []
        assert host.violations == []
    finally:
        subscriber.close()
