"""The pipeline in one process: accounting, models for several slots, the way out."""

import json
from pathlib import Path

import pytest

from kizu_agent.errors import ConfigError
from kizu_agent.health import Health
from kizu_agent.outbox import Outbox
from kizu_agent.pipeline import STUCK_S, Pipeline
from kizu_agent.settings import OutboxConfig


def kept(state: Path) -> list[dict[str, object]]:
    """The results that wait in a stopped agent's outbox."""
    outbox = Outbox(state / "outbox.sqlite3", OutboxConfig())
    try:
        rows = outbox.take(1000)
        return [json.loads(row.message.payload) for row in rows if row.message.topic.endswith("/result")]
    finally:
        outbox.close()


def test_each_camera_waits_for_its_own_model(box, begin, wait) -> None:
    """Two cameras with two models: the one without a model reads nothing; each is judged by its own."""
    cameras = [
        {"name": "one", "source": box.pictures("one", 3), "model": "plates"},
        {"name": "two", "source": box.pictures("two", 4, height=21, width=9), "model": "bolts"},
    ]
    box.give("plates")
    pipeline = begin(box.config(cameras))

    def captured() -> dict[str, float]:
        pipeline.tick()
        return {labels["camera"]: count for labels, count in pipeline.figures()["captured_frames_total"]}

    wait(lambda: captured()["one"] == 3)
    assert captured()["two"] == 0
    box.give("bolts")
    wait(lambda: captured()["two"] == 4)
    wait(lambda: pipeline._undelivered() == 0)
    assert not pipeline.has_ended()  # there is no broker: the results are not delivered
    assert not pipeline.has_ended()
    figures = pipeline.figures()
    assert figures["inspected_frames_total"] == [({}, 7)]
    assert all(count == 0 for _, count in figures["dropped_frames_total"])
    assert pipeline.stop(5.0) == []
    results = kept(box.state)
    assert [(r["camera"], r["model"]["name"]) for r in results] == [("one", "plates")] * 3 + [("two", "bolts")] * 4


def test_figures_tell_waiting_from_lost(box, begin, wait) -> None:
    """A camera that waits for its trigger counts as running; a loss is counted under its cause."""
    fault = box.folder / "fault"
    fault.write_text("silent")
    box.give()
    url = f"sim:plates?rate=20&width=64&height=64&trigger=true&fault={fault}"
    pipeline = begin(box.config([{"name": "cam", "source": url}]))

    def figure(name: str) -> list[tuple[dict[str, str], float]]:
        pipeline.tick()
        return pipeline.figures()[name]

    wait(lambda: figure("camera_running") == [({"camera": "cam"}, True)])
    assert figure("camera_losses_total") == []
    assert figure("captured_frames_total") == [({"camera": "cam"}, 0)]
    fault.write_text("unplug")
    wait(lambda: figure("camera_running") == [({"camera": "cam"}, False)])
    assert figure("camera_losses_total") == [({"camera": "cam", "cause": "lost"}, 1)]


def test_it_has_ended_when_the_last_camera_has_and_all_is_delivered(box, begin, wait, broker: int) -> None:
    """A camera that is away keeps it open; once it came, ended and was delivered, it is the end."""
    cameras = [
        {"name": "one", "source": box.pictures("one", 2)},
        {"name": "two", "source": f"folder:{box.folder / 'later'}"},
    ]
    box.give()
    pipeline = begin(box.config(cameras, mqtt=f'port = {broker}\nusername = "line"\npassword = "right"'))

    def conditions() -> list[str]:
        pipeline.tick()
        return [capture.status().condition for capture in pipeline._captures.values()]

    wait(lambda: conditions() == ["ended", "lost"])
    wait(lambda: pipeline.figures()["outbox_messages"] == [({}, 0)])
    assert not pipeline.has_ended()
    assert not pipeline.has_ended()
    box.pictures("later", 1)
    wait(lambda: conditions() == ["ended", "ended"])
    wait(pipeline.has_ended)
    assert pipeline.figures()["inspected_frames_total"] == [({}, 3)]
    assert pipeline.stop(5.0) == []
    assert kept(box.state) == []


def test_what_was_captured_is_inspected_before_the_end(box, begin, wait) -> None:
    """Stopping in the middle loses no frame that was captured, and results and counters agree."""
    box.give()
    pipeline = begin(box.config([{"name": "cam", "source": box.pictures("cam", 3) + "?loop=true"}]))

    def captured() -> float:
        pipeline.tick()
        return pipeline.figures()["captured_frames_total"][0][1]

    wait(lambda: captured() > 20)
    assert pipeline.stop(5.0) == []
    status = next(iter(pipeline._captures.values())).status()
    results = kept(box.state)
    assert len(results) == status.captured - status.drops.get("stopped", 0)
    assert [result["seq"] for result in results] == list(range(1, len(results) + 1))
    assert pipeline.stop(1.0) == []


def test_a_dead_delivery_does_not_hold_the_end_up(box, begin, wait) -> None:
    """Frames that nobody can deliver any more are not waited for."""
    box.give()
    pipeline = begin(box.config([{"name": "cam", "source": box.pictures("cam", 3) + "?loop=true"}]))

    def break_it(_: object) -> None:
        raise RuntimeError("a bug")

    pipeline._delivery.deliver = break_it
    wait(lambda: pipeline.tick() or pipeline.failures())
    assert list(pipeline.failures()) == ["delivery"]
    began = pipeline._inspection.progress_mono_ns
    wait(lambda: pipeline._inspection.progress_mono_ns > began)
    assert pipeline.stop(30.0) == []


def test_keys_are_read_before_anything_is_opened(box) -> None:
    """A trusted key that is none leaves no outbox behind."""
    config = box.config([{"name": "cam", "source": "sim:gears"}])
    keys = config.models.model_copy(update={"trusted_keys": (box.config_file,)})
    with pytest.raises(ConfigError, match=r"models.trusted_keys"):
        Pipeline(config.model_copy(update={"models": keys}), Health(), lambda: None)
    assert not (box.state / "outbox.sqlite3").exists()


def test_the_publisher_may_block_as_long_as_it_says() -> None:
    """Resolving, connecting and TLS block in one piece for up to a minute."""
    assert STUCK_S["publisher"] >= 60
