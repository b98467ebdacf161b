"""From inspections to what lies in the outbox."""

import dataclasses
import hashlib
import itertools
import json
import math
import time
from collections.abc import Callable, Iterator
from operator import itemgetter
from typing import Any

import cv2
import numpy as np
import pytest

from kizu_agent.camera_settings import CameraConfig
from kizu_agent.config import Config
from kizu_agent.delivery import Delivery
from kizu_agent.errors import OutboxError
from kizu_agent.outbox import Outbox
from kizu_agent.records import Inspection, Message, Priority, as_replayed
from kizu_agent.sinks import JsonSink
from kizu_agent.state import StateBoard

MakeInspection = Callable[..., Inspection]
BASE = "acme/osaka/press/line2/box1"


@pytest.fixture
def retained() -> dict[str, dict[str, Any]]:
    """What a broker would retain: topic → JSON."""
    return {}


@pytest.fixture
def board(config: Config, retained: dict[str, dict[str, Any]]) -> StateBoard:
    """A board that publishes into `retained`."""

    def publish(topic: str, payload: bytes) -> None:
        retained[topic] = json.loads(payload)

    return StateBoard(config, [JsonSink(config, publish)], "0.1.0", time.time_ns())


@pytest.fixture
def wakes() -> list[int]:
    """One entry for each time the publisher is woken."""
    return []


def deliver_into(
    config: Config, outbox: Outbox, board: StateBoard, wake: Callable[[], None] = lambda: None
) -> Delivery:
    """Make a delivery of JSON messages into `outbox`."""
    return Delivery(config, outbox, board, [JsonSink(config, lambda _topic, _payload: None, wake)])


@pytest.fixture
def delivery(config: Config, outbox: Outbox, board: StateBoard, wakes: list[int]) -> Delivery:
    """A delivery into `outbox`."""
    return deliver_into(config, outbox, board, lambda: wakes.append(1))


def drain(outbox: Outbox) -> Iterator[Message]:
    """Give what waits, in the order it would be published."""
    rows = outbox.take(10_000)
    outbox.delete([row.id for row in rows])
    return iter([row.message for row in rows])


def shape(value: object) -> object:
    """Give keys and kinds of JSON data; int and float stay apart, null is `None` wherever it stands."""
    if isinstance(value, dict):
        return {key: shape(item) for key, item in value.items()}
    return None if value is None else type(value).__name__


def same_shape(one: object, other: object) -> bool:
    """Tell whether two shapes have the same keys in the same order and no kind differs but by null."""
    if isinstance(one, dict) or isinstance(other, dict):
        if not (isinstance(one, dict) and isinstance(other, dict) and list(one) == list(other)):
            return False
        return all(same_shape(one[key], other[key]) for key in one)
    return one is None or other is None or one == other


def test_a_good_frame_gives_one_result(
    delivery: Delivery, outbox: Outbox, inspect: MakeInspection, wakes: list[int]
) -> None:
    """A frame that is ok leads to its result alone, and wakes the publisher."""
    inspection = inspect(0.1)
    delivery.deliver([inspection])
    (message,) = drain(outbox)
    result = json.loads(message.payload)
    assert (message.topic, message.qos, message.retain) == (f"{BASE}/top/result", 1, False)
    assert (result["schema"], result["seq"], result["verdict"], result["replayed"]) == (1, 1, "ok", False)
    assert (result["score"], result["ratio"]) == (0.1, 0.05)
    assert result["thresholds"] == {"warn": 1.0, "reject": 2.0}
    assert (result["width"], result["height"], result["tiles"]) == (96, 48, 6)
    assert (result["timing"]["waited_ms"], result["timing"]["scoring_ms"]) == (1.0, 5.5)
    assert set(result["heatmap"].values()) == {None}
    assert wakes == [1]


def test_a_reject_gives_event_result_and_heatmap_that_point_to_each_other(
    delivery: Delivery, outbox: Outbox, inspect: MakeInspection
) -> None:
    """The event names the result, the result names event and heatmap, with the heatmap's size and hash."""
    delivery.deliver([inspect(3.0)])
    event_message, result_message, heatmap = drain(outbox)
    event, result = json.loads(event_message.payload), json.loads(result_message.payload)
    assert (event["kind"], event["result_id"], event["result_seq"]) == ("open", result["id"], result["seq"])
    assert (event["worst_verdict"], event["worst_ratio"], event["closed_at"]) == ("reject", 1.5, None)
    assert result["event_id"] == event["id"]
    assert heatmap.topic == f"image/{BASE}/top/heatmap"
    assert (heatmap.content_type, heatmap.expiry_s) == ("image/jpeg", 86_400)
    assert result["heatmap"] == {
        "topic": heatmap.topic,
        "id": result["id"],
        "width": 96,
        "height": 48,
        "bytes": len(heatmap.payload),
        "sha256": hashlib.sha256(heatmap.payload).hexdigest(),
        "content_type": "image/jpeg",
    }


def test_a_heatmap_is_a_jpeg_of_the_wanted_width_that_carries_its_result(
    delivery: Delivery, outbox: Outbox, inspect: MakeInspection
) -> None:
    """The picture decodes, is 64 wide as configured, red where the score is high, and its comment names the result."""
    delivery.deliver([inspect(4.0, camera="side")])
    _, result_message, heatmap = drain(outbox)
    picture = cv2.imdecode(np.frombuffer(heatmap.payload, np.uint8), cv2.IMREAD_COLOR)
    assert picture is not None
    assert picture.shape == (32, 64, 3)
    blue, _, red = picture.mean(axis=(0, 1))
    assert red > blue + 50
    assert f"kizu result {json.loads(result_message.payload)['id']}".encode() in heatmap.payload


def test_every_result_has_the_same_shape(delivery: Delivery, outbox: Outbox, inspect: MakeInspection) -> None:
    """Keys and types are the same with and without heatmap, event, source and score, but for null."""
    nameless = inspect(0.2)
    nameless = dataclasses.replace(nameless, frame=dataclasses.replace(nameless.frame, source=None))
    delivery.deliver(
        [inspect(0), inspect(1.0), inspect(2.0), nameless, inspect(math.nan), inspect(1e-7, camera="side")]
    )
    messages = list(drain(outbox))
    for kind in ("result", "event"):
        shapes = [shape(json.loads(m.payload)) for m in messages if m.topic.endswith(kind)]
        assert all(same_shape(one, other) for one, other in itertools.combinations(shapes, 2))
        assert shapes


def test_an_unknown_verdict_says_why_and_has_no_score(
    delivery: Delivery, outbox: Outbox, inspect: MakeInspection
) -> None:
    """A frame that could not be scored is told as unknown with its reason; score and ratio are null."""
    delivery.deliver([inspect(math.nan, camera="side")])
    (message,) = drain(outbox)
    result = json.loads(message.payload)
    assert (result["verdict"], result["reason"]) == ("unknown", "scoring failed")
    assert (result["score"], result["ratio"], result["heatmap"]["id"]) == (None, None, None)


def test_results_of_a_camera_come_in_order_and_numbers_go_on_after_a_restart(
    config: Config, delivery: Delivery, outbox: Outbox, board: StateBoard, inspect: MakeInspection
) -> None:
    """Numbers rise by one per camera whatever its verdicts, and a new delivery goes on where the last one was."""
    scores = [0.1, 3.0, 0.2, 1.5, 2.5, 0.1]
    delivery.deliver([inspect(score, camera=camera) for score in scores for camera in ("top", "side")])
    deliver_into(config, outbox, board).deliver([inspect(0.1)])
    messages = [m for m in drain(outbox) if m.topic == f"{BASE}/top/result"]
    assert [m.priority for m in messages] == [Priority.REJECT] * 2 + [Priority.WARN] + [Priority.OK] * 4
    results = [json.loads(m.payload) for m in messages]
    assert [result["seq"] for result in results] == [2, 5, 4, 1, 3, 6, 7]
    assert [result["score"] for result in sorted(results, key=itemgetter("seq"))] == [*scores, 0.1]


def test_an_anomaly_keeps_its_id_over_a_restart_of_the_agent(
    config: Config, delivery: Delivery, outbox: Outbox, board: StateBoard, inspect: MakeInspection
) -> None:
    """Opened before the restart, closed after it: same id, and seq tells the order of the event's messages."""
    delivery.deliver([inspect(3.0)])
    deliver_into(config, outbox, board).deliver([inspect(0.1) for _ in range(4)])
    messages = list(drain(outbox))
    opened, closed = (json.loads(m.payload) for m in messages if m.topic.endswith("/event"))
    results = [json.loads(m.payload)["event_id"] for m in messages if m.topic.endswith("/result")]
    assert results == [opened["id"]] * 4 + [None]
    assert (opened["kind"], closed["kind"]) == ("open", "close")
    assert opened["id"] == closed["id"]
    assert (opened["seq"], closed["seq"]) == (1, 2)


@pytest.mark.parametrize(
    ("heatmap", "wanted"),
    [
        ({"when": "always"}, [True, True, True, False]),
        ({"when": "warn"}, [False, True, True, False]),
        ({"when": "reject"}, [False, False, True, False]),
        ({"when": "every_nth", "every_n": 2}, [True, False, True, False]),
        ({"when": "never"}, [False, False, False, False]),
    ],
)
def test_heatmaps_are_made_as_configured(
    config: Config,
    outbox: Outbox,
    board: StateBoard,
    inspect: MakeInspection,
    heatmap: dict[str, Any],
    wanted: list[bool],
) -> None:
    """ok, warn, reject and unknown frames get a heatmap where the configuration wants one and there is a map."""
    camera = CameraConfig.model_validate({"name": "top", "source": "sim:gears", "heatmap": {**heatmap, "qos": 0}})
    delivery = deliver_into(config.model_copy(update={"cameras": (camera,)}), outbox, board)
    delivery.deliver([inspect(0.1), inspect(1.0), inspect(2.0), inspect(math.nan)])
    messages = list(drain(outbox))
    results = [json.loads(m.payload) for m in messages if m.topic.endswith("/result")]
    assert [result["heatmap"]["id"] is not None for result in sorted(results, key=itemgetter("seq"))] == wanted
    assert [m.qos for m in messages if m.topic.endswith("/heatmap")] == [0] * sum(wanted)


def test_only_the_replayed_mark_changes_when_a_result_comes_late(
    delivery: Delivery, outbox: Outbox, inspect: MakeInspection
) -> None:
    """A source that looks like the mark is left alone."""
    inspection = inspect(0.1)
    tricky = dataclasses.replace(inspection.frame, source='"replayed":false')
    delivery.deliver([dataclasses.replace(inspection, frame=tricky)])
    (message,) = drain(outbox)
    late = json.loads(as_replayed(message.payload))
    assert late == {**json.loads(message.payload), "replayed": True}


@pytest.fixture
def fill_disk(outbox: Outbox, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Leave the outbox no more than `pages`, by default those it has; a refused commit is tried again at once."""
    monkeypatch.setattr("kizu_agent.delivery.RETRY_S", 0.0)

    def fill(pages: int = 1) -> None:
        outbox._db.execute(f"PRAGMA max_page_count = {pages}")  # never below what there is

    return fill


def test_on_a_full_disk_results_are_held_and_committed_in_order_when_it_is_back(
    delivery: Delivery,
    outbox: Outbox,
    inspect: MakeInspection,
    retained: dict[str, dict[str, Any]],
    fill_disk: Callable[..., None],
) -> None:
    """Nothing but heatmaps is lost, the state goes on, and numbers, anomalies and order are as if nothing had been."""
    fill_disk()
    scores = [0.1, 3.0, 3.0, *[0.1] * 30]
    for score in scores:
        delivery.deliver([inspect(score)])
    assert delivery.held > 0
    assert "full" in (delivery.problem or "")
    state = retained[f"{BASE}/top/state"]
    assert (state["verdict"], state["last_result_id"]) == ("ok", None)
    fill_disk(pages=1_000_000)
    delivery.retry()
    assert (delivery.held, delivery.problem) == (0, None)
    messages = list(drain(outbox))
    results = [json.loads(m.payload) for m in messages if m.topic.endswith("/result")]
    results.sort(key=itemgetter("seq"))
    assert [result["score"] for result in results] == scores
    assert [result["seq"] for result in results] == list(range(1, len(scores) + 1))
    events = [json.loads(m.payload) for m in messages if m.topic.endswith("/event")]
    assert [event["kind"] for event in events] == ["open", "close"]
    assert [event["result_seq"] for event in events] == [2, 6]
    heatmaps = [m for m in messages if m.topic.endswith("/heatmap")]
    assert sum(result["heatmap"]["id"] is not None for result in results) == len(heatmaps)
    assert outbox.losses()["disk", "heatmap"] == outbox.losses().total() == 2 - len(heatmaps)


def test_memory_is_bounded_and_gives_up_the_least_important_first(
    delivery: Delivery,
    outbox: Outbox,
    inspect: MakeInspection,
    fill_disk: Callable[..., None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Beyond the bound ok results go before warnings, and rejects with their events stay; each loss is counted."""
    monkeypatch.setattr("kizu_agent.held.MAX_HELD", 5)
    fill_disk()
    while delivery.held < 5:
        delivery.deliver([inspect(0.1)])
    before = outbox.depth()
    delivery.deliver([inspect(1.5) for _ in range(3)])
    delivery.deliver([inspect(3.0) for _ in range(4)])
    assert delivery.held == 5
    fill_disk(pages=1_000_000)
    delivery.retry()
    losses = outbox.losses()
    assert (losses["disk", "ok"], losses["disk", "warn"], losses["disk", "reject"]) == (5, 2, 0)
    verdicts = [json.loads(m.payload)["verdict"] for m in drain(outbox) if m.topic.endswith("/result")]
    assert sorted(verdicts[: len(verdicts) - before]) == ["reject"] * 4 + ["warn"]


def test_a_held_result_waits_before_the_disk_is_tried_again(
    delivery: Delivery, inspect: MakeInspection, fill_disk: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A disk that refuses is not asked again with every frame."""
    fill_disk()
    monkeypatch.setattr("kizu_agent.delivery.RETRY_S", 60.0)
    while not delivery.held:
        delivery.deliver([inspect(0.1)])
    fill_disk(pages=1_000_000)
    delivery.deliver([inspect(0.1)])
    assert delivery.held == 2


def test_delivering_after_the_end_is_an_error(delivery: Delivery, outbox: Outbox, inspect: MakeInspection) -> None:
    """A closed outbox is no loss to be counted but a wrong order of stopping."""
    outbox.close()
    with pytest.raises(OutboxError, match="closed"):
        delivery.deliver([inspect(0.1)])
