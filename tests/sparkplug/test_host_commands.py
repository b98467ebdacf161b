"""What hosts write: thresholds with range checks, and everything else that comes to the command topics."""

import random
import time
from collections.abc import Callable
from typing import Any

import pytest

from kizu_agent.sparkplug.payload import DataType, Metric, encode

GROUP, NODE = "acme:osaka:line2", "box1"
NCMD, DCMD = f"spBv1.0/{GROUP}/NCMD/{NODE}", f"spBv1.0/{GROUP}/DCMD/{NODE}"


def write(host: Any, device: str = "top", **thresholds: Any) -> None:
    metrics = [{"name": f"Thresholds/{name}", "type": "Double", "value": value} for name, value in thresholds.items()]
    host.do("dcmd", device=device, metrics=metrics)


def last(host: Any) -> tuple[float, float]:
    return host.values("Thresholds/Warn", "top")[-1], host.values("Thresholds/Reject", "top")[-1]


def test_thresholds_can_be_written(make_edge: Callable[..., Any], host: Any, wait: Callable[..., None]) -> None:
    """A DCMD sets them for the model in service, for every protocol, and a DDATA tells the new ones."""
    edge = make_edge().start()
    host.await_count("DBIRTH", 2)
    before = last(host)
    assert before == (edge.commands.effective("top").warn, edge.commands.effective("top").reject)
    write(host, Warn=5.5, Reject=7.25)
    wait(lambda: last(host) == (5.5, 7.25))
    assert (edge.commands.effective("top").warn, edge.commands.effective("top").reject) == (5.5, 7.25)
    write(host, Reject=8.0)
    wait(lambda: last(host) == (5.5, 8.0))
    assert edge.commands.effective("side").warn == before[0]
    assert edge.commands.outcomes["done"] == 3
    assert host.violations == []


@pytest.mark.parametrize(
    "thresholds",
    [{"Warn": 0.0}, {"Warn": -1.0}, {"Reject": 1e-9}, {"Warn": 1e9}, {"Warn": 9.0, "Reject": 8.0}],
    ids=str,
)
def test_values_out_of_range_change_nothing(
    make_edge: Callable[..., Any], host: Any, wait: Callable[..., None], thresholds: dict[str, float]
) -> None:
    """They are refused and counted, and the answer is what holds."""
    edge = make_edge().start()
    host.await_count("DBIRTH", 2)
    before = last(host)
    write(host, **thresholds)
    wait(lambda: edge.commands.outcomes["refused"] > 0)
    wait(lambda: len(host.values("Thresholds/Warn", "top")) > 1)
    assert last(host) == before
    assert edge.commands.outcomes["done"] == 0
    assert (edge.commands.effective("top").warn, edge.commands.effective("top").reject) == before


def test_without_a_model_nothing_can_be_set(
    make_edge: Callable[..., Any], host: Any, wait: Callable[..., None]
) -> None:
    """Thresholds are null until there is a model, and a write is refused."""
    edge = make_edge()
    edge.model = None
    edge.start()
    host.await_count("DBIRTH", 2)
    assert last(host) == (None, None)
    write(host, Warn=1.0, Reject=2.0)
    wait(lambda: edge.commands.outcomes["refused"] == 1)


def test_retained_commands_are_ignored(make_edge: Callable[..., Any], host: Any, wait: Callable[..., None]) -> None:
    """A command that was retained by mistake does nothing at each connect but be counted."""
    payload = encode([Metric("Node Control/Rebirth", DataType.BOOLEAN, value=True, timestamp_ms=1)], 1, None)
    host.do("raw", topic=NCMD, hex=payload.hex(), retain=True)
    edge = make_edge().start()
    host.await_count("DBIRTH", 2)
    wait(lambda: edge.commands.outcomes["retained"] == 1)
    assert len(host.of("NBIRTH")) == 1


def test_hostile_commands_change_nothing(make_edge: Callable[..., Any], host: Any, wait: Callable[..., None]) -> None:
    """Noise, foreign metrics, wrong types and foreign devices are counted; the session goes on as it was."""
    edge = make_edge().start()
    host.await_count("DBIRTH", 2)
    before, noise = last(host), random.Random(5)
    for number in range(300):
        topic = (NCMD, f"{DCMD}/top", f"{DCMD}/nobody")[number % 3]
        host.do("raw", topic=topic, hex=noise.randbytes(noise.randrange(200)).hex())
    for value in (True, "7", None):
        kinds = {bool: "Boolean", str: "String", type(None): "Double"}
        host.do("dcmd", device="top", metrics=[{"name": "Thresholds/Warn", "type": kinds[type(value)], "value": value}])
    host.do("ncmd", metrics=[{"name": "Node Control/Reboot", "type": "Boolean", "value": True}])
    host.do("ncmd", metrics=[{"name": "Node Control/Rebirth", "type": "Boolean", "value": False}])
    wait(lambda: edge.commands.outcomes["refused"] >= 4 and edge.commands.outcomes["unknown"] >= 101)
    wait(lambda: edge.commands.outcomes["malformed"] > 50)
    assert edge.commands.outcomes["done"] == 0
    assert (edge.commands.effective("top").warn, edge.commands.effective("top").reject) == before
    assert len(host.of("NBIRTH")) == 1
    edge.result("top")
    host.await_count("DDATA", 1, "top")
    assert host.violations == []


def test_a_storm_of_writes_is_limited(make_edge: Callable[..., Any], host: Any, wait: Callable[..., None]) -> None:
    """Writes go to the disk: beyond a few a second they are dropped and counted."""
    edge = make_edge().start()
    host.await_count("DBIRTH", 2)
    began = time.monotonic()
    for number in range(100):
        write(host, Warn=5.0 + number / 100, Reject=9.0)
    wait(lambda: edge.commands.outcomes.total() >= 100 and edge.commands.outcomes["rate_limited"] > 0)
    wait(lambda: edge.commands.outcomes["done"] / 2 + edge.commands.outcomes["rate_limited"] == 100)
    most = 10 + 5 * (time.monotonic() - began) + 1
    assert 10 <= edge.commands.outcomes["done"] / 2 <= most
