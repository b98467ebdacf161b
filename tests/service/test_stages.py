"""Stages: named threads that live by their progress."""

import threading
import time

from kizu_agent.stages import Stage


def test_work_is_repeated_and_each_return_is_progress(wait) -> None:
    """The work runs until stop, and every return moves the progress on."""
    calls: list[int] = []
    stage = Stage("worker", lambda: calls.append(time.sleep(0.005) or 1), lambda: None)
    before = stage.progress_mono_ns
    stage.start()
    stage.start()
    wait(lambda: len(calls) > 3)
    assert [thread.name for thread in threading.enumerate()].count("worker") == 1
    assert stage.is_running
    assert stage.stop(2.0)
    assert not stage.is_running
    assert stage.progress_mono_ns > before
    count = len(calls)
    time.sleep(0.03)
    assert len(calls) == count
    assert stage.failure is None


def test_a_dead_stage_keeps_its_error_and_calls() -> None:
    """Whatever the work raises is kept, told once, and ends the thread."""
    failed = threading.Event()

    def work() -> None:
        raise SystemExit("not even this passes by unnoticed")

    stage = Stage("dying", work, failed.set)
    stage.start()
    assert failed.wait(2)
    assert isinstance(stage.failure, SystemExit)
    assert stage.stop(2.0)


def test_stop_keeps_its_deadline_when_the_work_hangs() -> None:
    """A stage that hangs is reported as not gone, in time; a beat counts as progress meanwhile."""
    release = threading.Event()
    stage = Stage("hanging", lambda: None, lambda: None)
    assert stage.stop(0.1)  # not started: nothing to wait for
    begun = threading.Event()

    def hang() -> None:
        begun.set()
        release.wait(10)

    stage = Stage("hanging", hang, lambda: None)
    stage.start()
    assert begun.wait(5)
    began = time.monotonic()
    assert not stage.stop(0.2)
    assert 0.15 < time.monotonic() - began < 1.0
    before = stage.progress_mono_ns
    stage.beat()
    assert stage.progress_mono_ns > before
    release.set()
    assert stage.stop(2.0)
