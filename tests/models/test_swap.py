"""A good model dropped: proven, stored, swapped in, and there again after a restart."""

import json
import os
import shutil
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest

from kizu_agent.drop import DropDirectory
from kizu_agent.models import ModelKeeper
from kizu_agent.settings import EngineConfig, ModelsConfig


def test_good_drop_activates(box: Any) -> None:
    """A good bundle is accepted, then active, leaves the drop directory and is recorded as current."""
    box.start()
    assert box.keeper.current(None) is None
    box.put(factor=2.0)
    accepted, active = box.wait_for("accepted"), box.wait_for("active")
    assert box.score() == pytest.approx(200)
    assert (active.file, active.model.name, active.model.version) == ("m.kizu", "gears", "1")
    assert accepted.verify_s > 0
    assert accepted.self_test_s > 0
    assert active.load_s > 0
    assert 0 <= active.swap_s < 1
    assert not list(box.drop.iterdir())
    stored = f"gears-1-{active.model.sha256[:8]}.kizu"
    record = json.loads((box.state / "models" / "current.json").read_bytes())
    assert (record["slots"]["*"]["file"], record["slots"]["*"]["previous"]) == (stored, None)
    assert record["trials"] == {}
    assert sorted(path.name for path in (box.state / "models").iterdir()) == ["current.json", stored]


def test_swap_leaves_no_gap(box: Any) -> None:
    """While another thread inspects without pause, every batch has a model: first the old one, then the new one."""
    box.start()
    box.put(factor=1.0)
    box.wait_for("active")
    scores: list[float] = []
    ended = threading.Event()

    def inspect() -> None:
        while not ended.is_set():
            scores.append(box.score())

    thread = threading.Thread(target=inspect)
    thread.start()
    try:
        box.put("n.kizu", version="2", factor=2.0)
        box.wait_for("active", "n.kizu")
        time.sleep(0.1)
    finally:
        ended.set()
        thread.join(10)
    switched = scores.index(pytest.approx(200))
    assert scores[:switched] == pytest.approx([100] * switched)
    assert scores[switched:] == pytest.approx([200] * (len(scores) - switched))


def test_old_model_lives_while_it_is_used(box: Any) -> None:
    """A batch under way finishes on the model it began with, after the swap."""
    box.start()
    box.put(factor=1.0)
    box.wait_for("active")
    old = box.keeper.current(None)
    box.put("n.kizu", version="2", factor=2.0)
    box.wait_for("active", "n.kizu")
    picture = np.full((8, 8, 1), 100, np.uint8)
    assert old.inspector.inspect([picture])[0].score == pytest.approx(100)


def test_swap_without_inspection(box: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where no camera gives frames, a model gets into service all the same, without a swap time."""
    monkeypatch.setattr("kizu_agent.model_swap.TAKE_S", 0.2)
    box.start()
    box.put()
    deadline = time.monotonic() + 20
    while not any(report.kind == "active" for report in box.reports) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert box.reports[-1].kind == "active"
    assert box.reports[-1].swap_s is None


def test_same_content_again(box: Any) -> None:
    """The model in service, dropped again under another name, changes nothing and is reported."""
    box.start()
    box.put()
    box.wait_for("active")
    before = box.keeper.current(None)
    box.put("again.kizu")
    box.wait_for("unchanged", "again.kizu")
    assert box.keeper.current(None) is before
    assert not list(box.drop.iterdir())


def test_models_go_to_the_cameras_that_ask(box: Any) -> None:
    """A bundle goes to the cameras that name it, any other bundle to the cameras that name none."""
    box.slots = ("screws", None)
    box.start()
    box.put("a.kizu", name="screws", factor=3.0)
    box.wait_for("active", "a.kizu")
    assert box.keeper.current(None) is None
    box.put("b.kizu", name="gears", factor=2.0)
    box.wait_for("active", "b.kizu")
    assert (box.score("screws"), box.score(None)) == pytest.approx((300, 200))
    assert box.keeper.current("plates") is None


def test_unwanted_model_is_quarantined(box: Any) -> None:
    """A bundle that no camera asks for is refused, and the reason says what they ask for."""
    box.slots = ("screws",)
    box.start()
    box.put(name="gears")
    assert "they ask for screws" in box.wait_for("rejected").reason


def test_restart_goes_on_with_the_last_good_model(box: Any) -> None:
    """A new agent has the last model in service without anything being dropped."""
    box.start()
    box.put(factor=2.0)
    box.wait_for("active")
    box.stop()
    box.start()
    assert box.score() == pytest.approx(200)
    assert [(report.kind, report.reason) for report in box.reports] == [("active", "restored")]


def _two_models(box: Any) -> list[Path]:
    """Run the box through two models; returns their files in the store, the older first."""
    box.start()
    for version, factor in (("1", 1.0), ("2", 2.0)):
        box.put(f"{version}.kizu", version=version, factor=factor)
        box.wait_for("active", f"{version}.kizu")
    box.stop()
    return [next((box.state / "models").glob(f"gears-{version}-*.kizu")) for version in "12"]


@pytest.mark.parametrize("how", ["missing", "truncated"])
def test_damaged_model_falls_back_to_the_previous_one(box: Any, how: str) -> None:
    """When the current model's file is lost or damaged, the previous one goes on, and that is reported."""
    _, newer = _two_models(box)
    newer.unlink() if how == "missing" else os.truncate(newer, newer.stat().st_size // 2)
    box.start()
    assert box.score() == pytest.approx(100)
    assert [report.kind for report in box.reports] == ["failed", "active"]


def test_nothing_left_to_go_back_to(box: Any) -> None:
    """With both models damaged the agent runs without one and takes the next that is dropped."""
    for path in _two_models(box):
        os.truncate(path, 10)
    box.start()
    assert box.keeper.current(None) is None
    box.put("3.kizu", version="3", factor=3.0)
    box.wait_for("active", "3.kizu")
    assert box.score() == pytest.approx(300)


@pytest.mark.parametrize("text", [b"", b"{", b"[]", b'{"slots": {"*": {"file": "../../x.kizu", "previous": null}}}'])
def test_damaged_record(box: Any, text: bytes) -> None:
    """With current.json damaged, the newest model of the store goes on, and the record is whole again."""
    _two_models(box)
    record = box.state / "models" / "current.json"
    record.write_bytes(text)
    box.start()
    assert box.score() == pytest.approx(200)
    assert "gears-2-" in json.loads(record.read_bytes())["slots"]["*"]["file"]


def test_changed_configuration_never_guesses(box: Any) -> None:
    """When cameras come to ask by name, they get the model of that name, and the others none of it."""
    _two_models(box)
    box.slots = ("gears", None)
    box.start()
    assert box.score("gears") == pytest.approx(200)
    assert box.keeper.current(None) is None


def test_old_models_are_pruned(box: Any) -> None:
    """The store keeps the model in service and the one before it, not every model ever dropped."""
    box.start()
    for version in "123":
        box.put(f"{version}.kizu", version=version)
        box.wait_for("active", f"{version}.kizu")
    assert sorted(path.name[:7] for path in (box.state / "models").glob("*.kizu")) == ["gears-2", "gears-3"]


@pytest.mark.usefixtures("real_waits")
def test_slow_copy_in_pieces(box: Any) -> None:
    """A file that is still being copied is left alone, and taken as soon as it is whole."""
    data = box.make(box.root / "m", factor=2.0).read_bytes()
    box.start()
    with (box.drop / "m.kizu").open("wb") as out:
        for piece in range(5):
            out.write(data[piece * len(data) // 5 : (piece + 1) * len(data) // 5])
            out.flush()
            time.sleep(1.3 if piece == 2 else 0.3)
            assert not box.reports
    box.wait_for("active")
    assert box.score() == pytest.approx(200)


@pytest.mark.usefixtures("real_waits")
def test_copy_that_begins_with_the_end(box: Any) -> None:
    """A copy that makes the whole length and the end of the file first is left alone while it is written to."""
    data = box.make(box.root / "m", factor=2.0).read_bytes()
    box.start()
    with (box.drop / "m.kizu").open("wb") as out:
        out.write(bytes(len(data) - 1000) + data[-1000:])
        for piece in range(8):
            out.flush()
            time.sleep(0.4)
            out.seek(piece * len(data) // 8)
            out.write(data[piece * len(data) // 8 : (piece + 1) * len(data) // 8])
    box.wait_for("active")
    assert [report.kind for report in box.reports] == ["accepted", "active"]


def test_only_files_at_rest_are_named(box: Any) -> None:
    """A whole file that is written to again and again is not named before it rests, then until it is dealt with."""
    watched = DropDirectory(box.drop)
    path = box.put()
    for _ in range(8):
        path.touch()
        assert watched.ready() == []
        time.sleep(0.05)
    time.sleep(0.3)
    [file] = watched.ready()
    assert watched.ready() == [file]
    watched.leave(file)
    assert watched.ready() == []


def test_file_mended_while_it_is_proven(box: Any) -> None:
    """A file that changes during its self-test is not refused for what it was: it is looked at again."""
    data = box.make(box.root / "m", factor=2.0).read_bytes()
    box.start()
    path = box.drop / "m.kizu"
    path.write_bytes(data[:100] + bytes(100) + data[200:])
    deadline = time.monotonic() + 20
    while not psutil.Process().children() and time.monotonic() < deadline:
        time.sleep(0.01)
    path.write_bytes(data)
    box.wait_for("active")
    assert [report.kind for report in box.reports] == ["accepted", "active"]


def test_copy_from_another_file_system(box: Any, tmp_path: Path) -> None:
    """A drop directory on another file system than the state works as any other."""
    shared = Path("/dev/shm")  # noqa: S108 - another file system is the point
    if not shared.is_dir() or shared.stat().st_dev == tmp_path.stat().st_dev:
        pytest.skip("no second file system")
    box.drop = shared / f"kizu-test-{os.getpid()}"
    box.drop.mkdir()
    try:
        box.start()
        shutil.move(box.make(box.root / "good", factor=2.0), box.drop / "m.kizu")
        (box.drop / "bad.kizu").write_bytes(b"PK\x05\x06" + b"\0" * 18)
        box.wait_for("active", "m.kizu")
        box.wait_for("rejected", "bad.kizu")
        assert not list(box.drop.iterdir())
        assert [path.name[-8:] for path in box.quarantined()] == ["bad.kizu"]
        box.stop()
    finally:
        shutil.rmtree(box.drop)


def test_other_files_are_left_alone(box: Any) -> None:
    """Hidden files, other names, folders, links and pipes in the drop directory are neither read nor moved."""
    good = box.make(box.root / "good")
    names = [".m.kizu", "~m.kizu", "m.kizu.tmp", "m.txt"]
    for name in names:
        shutil.copy(good, box.drop / name)
    (box.drop / "folder.kizu").mkdir()
    (box.drop / "link.kizu").symlink_to(good)
    os.mkfifo(box.drop / "pipe.kizu")
    box.start()
    box.put("right.KIZU")
    box.wait_for("active")
    assert len(list(box.drop.iterdir())) == 7
    assert {report.file for report in box.reports} == {"right.KIZU"}


def test_drop_directory_comes_and_goes(box: Any) -> None:
    """A drop directory that is replaced, as a share that is mounted again, goes on working."""
    box.start()
    box.drop.rename(box.root / "gone")
    time.sleep(0.7)
    box.drop.mkdir()
    box.put()
    box.wait_for("active")


def test_stop_ends_a_self_test(box: Any) -> None:
    """Stopping does not wait for a self-test; the file is still there for the next start."""
    box.start()
    path = box.put()
    ends = time.monotonic() + 10
    while not list((box.state / "models").glob(".*")) and time.monotonic() < ends:  # the copy that is tested
        time.sleep(0.001)
    box.stop()
    assert path.exists()
    assert not list((box.state / "models").glob(".*"))
    box.start()
    box.wait_for("active")


def test_dead_thread_is_noticed(box: Any) -> None:
    """A keeper whose thread dies calls on_failure and keeps the error."""
    box.state.write_text("a file where the state directory should be")
    died = threading.Event()
    keeper = ModelKeeper(ModelsConfig(drop_dir=box.drop), EngineConfig(), box.state, [None], box.note, died.set)
    keeper.start()
    assert died.wait(5)
    assert isinstance(keeper.failure, OSError)
    assert keeper.stop(5)
