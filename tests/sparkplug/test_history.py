"""Results of an outage, and what the broker must have read before they are forgotten."""

import signal
from collections.abc import Callable
from typing import Any

from faults.plant import Broker

from kizu_agent.outage import Backoff
from kizu_contract.judging import Verdict


def test_results_of_an_outage_come_as_history(
    make_edge: Callable[..., Any], host: Any, tap: Any, wait: Callable[..., None]
) -> None:
    """What was committed while the broker was away comes afterwards, historical, in order, with its own times."""
    edge = make_edge(tap.port).start()
    host.await_count("DBIRTH", 2)
    tap.is_open = False
    tap.cut()
    wait(lambda: not edge.node.is_connected)
    for number in range(20):
        edge.result("top", Verdict.REJECT if number % 3 == 0 else Verdict.OK, float(number + 1))
    tap.is_open = True
    wait(lambda: len(host.values("Inspection/Sequence", "top", is_historical=True)) >= 20)
    assert host.values("Inspection/Sequence", "top", is_historical=True) == list(range(1, 21))
    late = [m for d in host.of("DDATA", "top") for m in d["metrics"] if m["name"] == "Inspection/Score"]
    assert all(metric["historical"] for metric in late)
    assert [metric["timestamp"] for metric in late] == sorted(metric["timestamp"] for metric in late)
    assert late[-1]["timestamp"] <= host.of("DBIRTH", "top")[1]["timestamp"]
    assert [m["value"] for m in host.of("DBIRTH", "top")[1]["metrics"] if m["name"] == "Inspection/Score"] == [20.0]
    wait(lambda: edge.node.store.depth() == 0)
    assert host.violations == []


def test_live_results_go_first(make_edge: Callable[..., Any], host: Any, wait: Callable[..., None]) -> None:
    """While a long backlog is paced out, a new result comes at once and is not historical."""
    edge = make_edge(history_per_s=5.0)
    for _ in range(30):
        edge.result("top")
    edge.start()
    host.await_count("DBIRTH", 2)
    edge.result("top", Verdict.REJECT, 9.0)
    wait(lambda: 31 in host.values("Inspection/Sequence", "top", is_historical=False)[1:])
    assert len(host.values("Inspection/Sequence", "top", is_historical=True)) < 30
    assert edge.node.store.depth() > 0
    assert host.violations == []


def test_in_order_all_history_goes_before_live(
    make_edge: Callable[..., Any], host: Any, wait: Callable[..., None]
) -> None:
    """With `in_order` a new result waits for the backlog; numbers only rise."""
    edge = make_edge(history="in_order", history_per_s=50.0)
    for _ in range(30):
        edge.result("top")
    edge.start()
    host.await_count("DBIRTH", 2)
    edge.result("top")

    def told() -> list[int]:
        return [m["value"] for d in host.of("DDATA", "top") for m in d["metrics"] if m["name"] == "Inspection/Sequence"]

    wait(lambda: len(told()) == 31)
    assert told() == list(range(1, 32))
    assert host.violations == []


def test_a_lost_devices_history_waits_for_its_birth(
    make_edge: Callable[..., Any], host: Any, wait: Callable[..., None]
) -> None:
    """No data of a dead device; its backlog comes after its DBIRTH, and another's is not held up."""
    edge = make_edge()
    edge.state("top", condition="lost", cause="timeout")
    edge.node.sink.commit(edge.make("top", Verdict.OK, 1.0), None)
    edge.result("side")
    edge.start()
    wait(lambda: host.values("Inspection/Sequence", "side", is_historical=True) == [1])
    assert [found for found in host.order() if found.endswith("top")] == ["DBIRTH top", "DDEATH top"]
    edge.state("top", verdict=Verdict.UNKNOWN, reason="starting")
    wait(lambda: host.values("Inspection/Sequence", "top", is_historical=True) == [1])
    assert host.violations == []


def test_what_the_broker_has_not_read_comes_again(
    make_edge: Callable[..., Any], host: Any, broker: Any, wait: Callable[..., None]
) -> None:
    """A broker that stands still takes bytes and reads none; after its death nothing that it took is missing."""
    edge = make_edge().start()
    host.await_count("DBIRTH", 2)
    assert broker.process is not None
    broker.process.send_signal(signal.SIGSTOP)
    for _ in range(40):
        edge.result("top")
    wait(lambda: not edge.node._results.is_pressed or len(edge.node._results._under_way) == 40)
    assert edge.node.store.depth() == 40
    broker.kill()
    broker.start()
    wait(lambda: edge.node.store.depth() == 0)
    wait(lambda: set(host.values("Inspection/Sequence", "top")) >= set(range(1, 41)))


def test_results_survive_the_process(make_edge: Callable[..., Any], host: Any, wait: Callable[..., None]) -> None:
    """What was committed and never sent is on disk, and goes as history after a restart."""
    edge = make_edge()
    for _ in range(5):
        edge.result("side")
    edge.stop()
    make_edge().start()
    wait(lambda: host.values("Inspection/Sequence", "side", is_historical=True) == [1, 2, 3, 4, 5])
    assert host.violations == []


def test_the_store_is_bounded_and_counts(make_edge: Callable[..., Any]) -> None:
    """Over its cap the oldest ok results go, rejects stay, and each loss is counted by cause and kind."""
    edge = make_edge(history_max_bytes=2**20)
    edge.result("top", Verdict.REJECT, 9.0)
    for _ in range(900):
        edge.node.sink.commit(edge.make("top", Verdict.OK, 1.0), None)
    losses = edge.node.store.losses()
    assert losses[("bytes", "ok")] > 0
    assert ("bytes", "reject") not in losses
    assert edge.node.store.depth() + losses.total() == 901
    assert edge.node.figures()["sparkplug_losses_total"] == [
        ({"cause": "bytes", "kind": "ok"}, losses[("bytes", "ok")])
    ]


def test_a_result_that_breaks_the_connection_is_set_aside(
    make_edge: Callable[..., Any], tmp_path: Any, make_host: Callable[..., Any], wait: Callable[..., None]
) -> None:
    """A picture that an MQTT 3.1.1 broker closes the connection for is found, counted, and holds nobody up."""
    narrow = Broker(tmp_path / "narrow", "message_size_limit 20000")
    narrow.start()
    try:
        other = make_host("scada", narrow.port)
        edge = make_edge(narrow.port, {"protocol": "3.1.1"}, images=True).start()
        other.await_count("DBIRTH", 2)
        edge.result("top", Verdict.REJECT, 9.0, jpeg=bytes(30_000))
        edge.result("top", Verdict.OK, 1.0)
        wait(lambda: edge.node.store.losses()[("refused", "heatmap")] == 1, seconds=20)
        wait(lambda: edge.node.store.depth() == 0)
        wait(lambda: 2 in other.values("Inspection/Sequence", "top"))
        assert edge.node.store.losses().total() == 1
    finally:
        edge.stop()
        narrow.close()


def test_births_that_break_the_connection_cost_no_result(
    make_edge: Callable[..., Any], tmp_path: Any, wait: Callable[..., None]
) -> None:
    """A broker too narrow for the births themselves gets none of the results blamed: they wait."""
    narrow = Broker(tmp_path / "narrow", "message_size_limit 500")
    narrow.start()
    try:
        edge = make_edge(narrow.port, {"protocol": "3.1.1"})
        edge.result("top")
        edge.node._backoff = Backoff(0.01, 0.02)
        edge.start()
        wait(lambda: edge.node._bd_seq > 8)
        assert edge.node.store.losses().total() == 0
        assert edge.node.store.depth() == 1
    finally:
        edge.stop()
        narrow.close()
