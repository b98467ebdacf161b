"""New models on trial: they pass, or the last good one serves again; across crashes, stops and commands."""

import json
import time
from typing import Any

import pytest
from onnx import TensorProto, helper

from kizu_agent.model_store import ModelStore
from kizu_agent.records import ModelOrder
from kizu_agent.settings import ProbationConfig

SHORT = ProbationConfig(frames=20, least_s=0.0)


def not_a_number_on(level: int) -> list[Any]:
    """Nodes whose `scale` is `factor` for pictures brighter than `level` on the whole, and NaN for darker ones."""
    limit = helper.make_tensor("limit", TensorProto.FLOAT, [], [float(level)])
    return [
        helper.make_node("Constant", [], ["limit"], value=limit),
        helper.make_node("ReduceMean", ["float"], ["mean"], keepdims=0),
        helper.make_node("Sub", ["mean", "limit"], ["above"]),
        helper.make_node("Sqrt", ["above"], ["root"]),
        helper.make_node("Div", ["root", "root"], ["one"]),
        helper.make_node("Mul", ["factor", "one"], ["scale"]),
    ]


BROKEN = {"extra": not_a_number_on(110), "scale": "scale"}
"""Passes its golden tiles, whose mean is 127, and gives NaN for the pictures of the line."""


@pytest.fixture
def watched(box: Any) -> Any:
    """A box with version 1 proven in service, and a short probation."""
    box.settings = {"probation": SHORT}
    box.start()
    box.put("1.kizu", version="1")
    box.wait_for("active", "1.kizu")
    box.inspect(frames=60)
    box.wait_for("confirmed")
    return box


def record(box: Any) -> Any:
    return json.loads((box.state / "models" / "current.json").read_bytes())


def on_trial(box: Any, version: str = "2", **kind: Any) -> Any:
    """Drop a model of this version and wait until it serves; its report."""
    box.put(f"{version}.kizu", version=version, **kind)
    return box.wait_for("active", f"{version}.kizu")


def versions(box: Any) -> list[tuple[str, str]]:
    return [(report.kind, report.model.version) for report in box.reports if report.model is not None]


def test_a_model_that_passes_becomes_the_last_good_one(watched: Any) -> None:
    """The record names the new model only after its probation; the one before it is the way back."""
    on_trial(watched, factor=2.0)
    assert "gears-1-" in record(watched)["slots"]["*"]["file"]
    assert "gears-2-" in record(watched)["trials"]["*"]["file"]
    assert watched.keeper.on_probation == 1
    watched.inspect(frames=20)
    deadline = time.monotonic() + 10
    while ("confirmed", "2") not in versions(watched) and time.monotonic() < deadline:
        time.sleep(0.02)
    entry = record(watched)["slots"]["*"]
    assert ("gears-2-" in entry["file"], "gears-1-" in entry["previous"], record(watched)["trials"]) == (True, True, {})
    assert watched.keeper.on_probation == 0


def test_a_model_that_gives_no_numbers_leaves_at_once(watched: Any) -> None:
    """After five frames that are no number the old model serves the sixth, and the new one is marked."""
    on_trial(watched, **BROKEN)
    reasons = [inspection.reason for inspection in watched.inspect(frames=8)]
    assert reasons == ["the score is not a number"] * 5 + [None] * 3
    report = watched.wait_for("rolled_back")
    assert (report.cause, report.model.version, report.file[:8]) == ("unknown", "2", "gears-2-")
    assert "5 of 5 frames" in report.reason
    assert watched.wait_for("active", next((watched.state / "models").glob("gears-1-*")).name).model.version == "1"
    assert watched.keeper.rollbacks == {"unknown": 1}
    assert watched.score() == pytest.approx(100)


def test_a_model_that_rejects_everything_leaves(watched: Any) -> None:
    """Where the model before rejected nothing, one that rejects all goes back after fifty frames."""
    watched.stop()
    watched.settings = {"probation": ProbationConfig(frames=200)}
    watched.start()
    watched.inspect(frames=200)
    on_trial(watched, factor=5.0)
    found = watched.inspect(frames=80)
    assert [i.verdict.value for i in found] == ["reject"] * 50 + ["ok"] * 30
    assert watched.wait_for("rolled_back").cause == "rejects"


def test_a_failed_model_is_refused_and_taken_only_by_command(watched: Any) -> None:
    """The same bytes dropped again are refused with the reason, also after a restart; a command has them serve."""
    on_trial(watched, **BROKEN)
    watched.inspect(frames=5)
    watched.wait_for("rolled_back")
    watched.stop()
    watched.start()
    assert watched.score() == pytest.approx(100)
    watched.put("again.kizu", version="2", **BROKEN)
    refused = watched.wait_for("rejected", "again.kizu")
    assert "failed before" in refused.reason
    assert "5 of 5 frames" in refused.reason
    [failed] = [stored for stored in watched.keeper.listing().models if stored.state == "failed"]
    assert "5 of 5" in failed.reason
    assert watched.keeper.order(ModelOrder(None, failed.file))
    watched.wait_for("active", failed.file)
    found = watched.inspect(frames=30)
    assert all(inspection.reason == "the score is not a number" for inspection in found)  # it was asked for
    watched.wait_for("confirmed", failed.file)
    assert record(watched)["failures"] == {}


def test_a_crash_on_probation_leads_back(watched: Any) -> None:
    """A start that finds a model on trial goes on with the last good one and never tries the other again."""
    on_trial(watched, factor=2.0)
    watched.inspect(frames=3)
    watched.crash()
    watched.start()
    assert watched.score() == pytest.approx(100)
    assert [(r.kind, r.cause) for r in watched.reports] == [("rolled_back", "crash"), ("active", None)]
    watched.put("again.kizu", version="2", factor=2.0)
    assert "ended without a stop" in watched.wait_for("rejected", "again.kizu").reason


def test_an_orderly_stop_is_no_crash(watched: Any) -> None:
    """After a stop in good order the model goes on with its probation, and can still be sent back from the store."""
    on_trial(watched, **BROKEN)
    watched.inspect(level=120, frames=3)
    watched.stop()
    watched.keeper.keep_probation()
    watched.start()
    assert [(r.kind, r.reason) for r in watched.reports] == [("active", "restored, on probation")]
    watched.inspect(frames=5)
    assert watched.keeper.current(None) is None  # the bad one is gone at once, the old one is being loaded
    watched.wait_for("rolled_back")
    watched.wait_for("active", next((watched.state / "models").glob("gears-1-*")).name)
    assert watched.score() == pytest.approx(100)


def test_the_first_model_is_tried_again_after_a_crash_but_not_for_ever(box: Any) -> None:
    """With nothing to go back to, a model gets several starts to show ten frames; then the agent runs without it."""
    box.settings = {"probation": SHORT}
    box.start()
    box.put(factor=2.0)
    box.wait_for("active")
    for _ in range(4):
        box.inspect(frames=2)
        box.crash()
        box.start()
        assert box.score() == pytest.approx(200)
    box.crash()
    box.start()
    assert box.keeper.current(None) is None
    assert [(r.kind, r.cause) for r in box.reports] == [("rolled_back", "crash")]


def test_the_first_model_is_kept_once_it_survived(box: Any) -> None:
    """After its first ten frames no crash is held against the only model there is."""
    box.settings = {"probation": SHORT}
    box.start()
    box.put(factor=2.0)
    box.wait_for("active")
    box.inspect(frames=10)
    deadline = time.monotonic() + 10
    while "*" not in record(box)["slots"] and time.monotonic() < deadline:
        time.sleep(0.02)
    for _ in range(7):
        box.crash()
        box.start()
        assert box.score() == pytest.approx(200)


def test_a_bad_first_model_stays_and_is_told(box: Any) -> None:
    """Without another model a failing one is no worse than none: it serves on, reported and shown as a problem."""
    box.settings = {"probation": SHORT}
    box.start()
    box.put(**BROKEN)
    box.wait_for("active")
    box.inspect(frames=12)
    report = box.wait_for("failed")
    assert (report.cause, "no model to go back to" in report.reason) == ("unknown", True)
    assert "gears 1" in box.keeper.problems[0]
    on_trial(box, factor=1.0)
    assert box.keeper.problems == []


def test_a_proven_model_that_kills_every_start_is_left(watched: Any) -> None:
    """When starts end while the last good model is being loaded (a new driver), the one before it comes to serve."""
    on_trial(watched, factor=2.0)
    watched.inspect(frames=20)
    watched.wait_for("confirmed", next((watched.state / "models").glob("gears-2-*")).name)
    watched.crash()
    kept = record(watched)
    kept["trials"] = {"*": {"file": kept["slots"]["*"]["file"], "starts": 4, "is_judged": True}}
    (watched.state / "models" / "current.json").write_text(json.dumps(kept))
    watched.start()
    assert watched.score() == pytest.approx(200)
    watched.crash()
    kept["trials"]["*"]["starts"] = 5
    (watched.state / "models" / "current.json").write_text(json.dumps(kept))
    watched.start()
    assert watched.score() == pytest.approx(100)
    assert watched.reports[0].cause == "crash"


def test_a_model_dropped_during_a_probation_takes_over(watched: Any) -> None:
    """The one on probation is superseded; the way back from its successor leads to the last proven one."""
    on_trial(watched, "2", factor=2.0)
    watched.inspect(frames=2)
    on_trial(watched, "3", **BROKEN)
    watched.inspect(frames=5)
    watched.wait_for("rolled_back")
    assert watched.score() == pytest.approx(100)
    states = {stored.model.version: stored.state for stored in watched.keeper.listing().models}
    assert states["3"] == "failed"


def test_older_models_and_other_content_of_a_version_are_taken_with_a_word(watched: Any) -> None:
    """Whoever drops an older file means to go back; a version that comes twice with other content is told."""
    watched.put("old.kizu", version="0", factor=2.0, created="2025-12-31T12:00:00.000Z")
    watched.wait_for("active", "old.kizu")
    assert "older" in watched.wait_for("accepted", "old.kizu").reason
    watched.put("twice.kizu", version="0", factor=3.0, created="2026-12-31T12:00:00.000Z")
    watched.wait_for("active", "twice.kizu")
    assert "other content" in watched.wait_for("accepted", "twice.kizu").reason
    assert watched.score() == pytest.approx(300)


def test_commands_roll_back_and_forth(watched: Any) -> None:
    """Roll back ends a probation; activate confirms one, brings a stored model back, and does nothing twice."""
    keeper = watched.keeper
    on_trial(watched, factor=2.0)
    assert keeper.order(ModelOrder(None))
    report = watched.wait_for("rolled_back")
    assert (report.cause, report.model.version) == ("command", "2")
    assert watched.score() == pytest.approx(100)
    file = next((watched.state / "models").glob("gears-2-*")).name
    assert {s.file: s.state for s in keeper.listing().models}[file] == "stored"  # sent away, not failed
    keeper.order(ModelOrder(None, file))
    watched.wait_for("active", file)
    keeper.order(ModelOrder(None, file))
    assert watched.wait_for("confirmed", file).reason == "by command"
    assert watched.score() == pytest.approx(200)
    keeper.order(ModelOrder(None, file))
    watched.wait_for("unchanged", file)
    watched.reports.clear()
    keeper.order(ModelOrder(None))
    watched.wait_for("rolled_back", file)
    assert watched.score() == pytest.approx(100)
    keeper.order(ModelOrder(None))  # the same command once more undoes nothing
    assert "no model to go back to" in watched.wait_for("failed").reason
    assert watched.score() == pytest.approx(100)
    assert record(watched)["trials"] == {}


def test_the_listing_shows_what_serves_and_what_is_stored(watched: Any) -> None:
    """One slot with its way back, and each file with its state."""
    on_trial(watched, factor=2.0)
    deadline = time.monotonic() + 10
    while not watched.keeper.listing().slots[0].is_on_probation and time.monotonic() < deadline:
        time.sleep(0.02)
    listing = watched.keeper.listing()
    [slot] = listing.slots
    assert (slot.slot, slot.active.version, slot.previous.version) == (None, "2", "1")
    assert {stored.model.version: stored.state for stored in listing.models} == {"1": "previous", "2": "probation"}
    assert slot.since.endswith("Z")


def test_a_record_of_an_earlier_agent_is_read(watched: Any) -> None:
    """A record that knows slots alone serves on, and the listing finds out what the files hold."""
    watched.crash()
    kept = record(watched)
    entry = {key: kept["slots"]["*"][key] for key in ("file", "previous")}
    (watched.state / "models" / "current.json").write_text(json.dumps({"schema": 1, "slots": {"*": entry}}))
    watched.start()
    assert watched.score() == pytest.approx(100)
    [stored] = watched.keeper.listing().models
    assert (stored.model.version, stored.state) == ("1", "active")


def test_a_disk_that_refuses_the_record_changes_nothing_that_serves(
    watched: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A rollback happens at once even where it cannot be written, and is written when the disk takes it again."""
    on_trial(watched, **BROKEN)
    write = watched.keeper._store._write

    def refuse(_index: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(watched.keeper._store, "_write", refuse)
    watched.inspect(frames=5)
    assert watched.score() == pytest.approx(100)
    time.sleep(0.4)
    assert watched.keeper.failure is None
    assert "gears-2-" in record(watched)["trials"]["*"]["file"]
    monkeypatch.setattr(watched.keeper._store, "_write", write)
    watched.wait_for("rolled_back")
    assert record(watched)["trials"] == {}


def test_a_full_disk_at_the_start_keeps_no_model_from_serving(watched: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The last good model serves though nothing can be written, and the record is right once something can."""
    on_trial(watched, factor=2.0)
    watched.crash()
    write = ModelStore._write

    def refuse(_store: ModelStore, _index: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(ModelStore, "_write", refuse)
    watched.start()
    assert watched.score() == pytest.approx(100)
    assert watched.keeper.failure is None
    monkeypatch.setattr(ModelStore, "_write", write)
    deadline = time.monotonic() + 10
    while record(watched)["trials"] and time.monotonic() < deadline:
        time.sleep(0.02)
    assert record(watched)["trials"] == {}
    assert [failure["reason"][:9] for failure in record(watched)["failures"].values()] == ["the agent"]
