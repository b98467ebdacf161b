"""From inspections to what lies in the outbox."""

import dataclasses
import hashlib
import itertools
import json
import math
import time
from collections.abc import Callable, Iterator
from typing import Any

import cv2
import numpy as np
import pytest

from kizu_agent.config import CameraConfig, Config
from kizu_agent.delivery import Delivery
from kizu_agent.errors import OutboxError
from kizu_agent.outbox import Outbox
from kizu_agent.records import Inspection, Message, as_replayed
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

    return StateBoard(config, publish, "0.1.0", time.time_ns())


@pytest.fixture
def wakes() -> list[int]:
    """One entry for each time the publisher is woken."""
    return []


@pytest.fixture
def delivery(config: Config, outbox: Outbox, board: StateBoard, wakes: list[int]) -> Delivery:
    """A delivery into `outbox`."""
    return Delivery(config, outbox, board, lambda: wakes.append(1))


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
    Delivery(config, outbox, board, lambda: None).deliver([inspect(0.1)])
    results = [json.loads(m.payload) for m in drain(outbox) if m.topic == f"{BASE}/top/result"]
    assert [result["seq"] for result in results] == [1, 2, 3, 4, 5, 6, 7]
    assert [result["score"] for result in results] == [*scores, 0.1]


def test_an_anomaly_keeps_its_id_over_a_restart_of_the_agent(
    config: Config, delivery: Delivery, outbox: Outbox, board: StateBoard, inspect: MakeInspection
) -> None:
    """Opened before the restart, closed after it: same id, and seq tells the order of the event's messages."""
    delivery.deliver([inspect(3.0)])
    Delivery(config, outbox, board, lambda: None).deliver([inspect(0.1) for _ in range(4)])
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
    delivery = Delivery(config.model_copy(update={"cameras": (camera,)}), outbox, board, lambda: None)
    delivery.deliver([inspect(0.1), inspect(1.0), inspect(2.0), inspect(math.nan)])
    messages = list(drain(outbox))
    results = [json.loads(m.payload) for m in messages if m.topic.endswith("/result")]
    assert [result["heatmap"]["id"] is not None for result in results] == wanted
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


def test_on_a_full_disk_results_are_counted_as_lost_and_the_state_goes_on(
    delivery: Delivery, outbox: Outbox, inspect: MakeInspection, retained: dict[str, dict[str, Any]]
) -> None:
    """A frame that cannot be committed leaves nothing behind: no half message, no number taken, no anomaly opened."""
    (pages,) = outbox._db.execute("PRAGMA page_count").fetchone()
    outbox._db.execute(f"PRAGMA max_page_count = {pages + 1}")
    delivery.deliver([inspect(3.0) for _ in range(20)])
    assert delivery.undelivered > 0
    assert delivery.problem is not None
    assert "full" in delivery.problem
    assert retained[f"{BASE}/top/state"]["verdict"] == "reject"
    committed = [json.loads(m.payload)["seq"] for m in drain(outbox) if m.topic.endswith("/result")]
    assert committed == list(range(1, len(committed) + 1))
    assert len(committed) == 20 - delivery.undelivered
    outbox._db.execute("PRAGMA max_page_count = 1000000")
    delivery.deliver([inspect(3.0)])
    assert delivery.problem is None


def test_an_anomaly_whose_opening_was_lost_opens_again(
    delivery: Delivery, outbox: Outbox, inspect: MakeInspection
) -> None:
    """After a full disk the next reject opens the anomaly: subscribers never see one go on that they saw not open."""
    (pages,) = outbox._db.execute("PRAGMA page_count").fetchone()
    outbox._db.execute(f"PRAGMA max_page_count = {pages}")
    while not delivery.undelivered:
        delivery.deliver([inspect(0.1)])
    delivery.deliver([inspect(3.0)])
    results = list(drain(outbox))
    outbox._db.execute("PRAGMA max_page_count = 1000000")
    delivery.deliver([inspect(3.0)])
    event, result, _ = (m.payload for m in drain(outbox))
    assert json.loads(event)["kind"] == "open"
    assert json.loads(result)["seq"] == len(results) + 1


def test_delivering_after_the_end_is_an_error(delivery: Delivery, outbox: Outbox, inspect: MakeInspection) -> None:
    """A closed outbox is no loss to be counted but a wrong order of stopping."""
    outbox.close()
    with pytest.raises(OutboxError, match="closed"):
        delivery.deliver([inspect(0.1)])
