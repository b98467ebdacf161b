"""Inspections that were asked for: one answer each, in time."""

import dataclasses
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from kizu_agent.errors import CommandError
from kizu_agent.records import Inspection, Part, Trigger
from kizu_agent.triggers import Order, Triggers

MakeInspection = Callable[..., Inspection]


class Desk:
    """Triggers with a camera that only notes what it is asked for, and what they were answered."""

    def __init__(self) -> None:
        self.shot: list[Trigger] = []
        self.answers: list[Inspection | CommandError] = []
        self.refuse: CommandError | None = None
        self.answered = threading.Event()
        self.triggers = Triggers(self._shoot, lambda: None)
        self.triggers.stage.start()

    def ask(self, deadline_s: float = 5.0, most: int = 4) -> None:
        order = Order("top", Part("p1"), "r", time.monotonic_ns(), deadline_s, most)
        self.triggers.ask(order, self._settle)

    def _shoot(self, trigger: Trigger) -> None:
        if self.refuse is not None:
            raise self.refuse
        self.shot.append(trigger)

    def _settle(self, found: Inspection | CommandError) -> None:
        self.answers.append(found)
        self.answered.set()


@pytest.fixture
def desk() -> Iterator[Desk]:
    """A desk; its thread ends with the test."""
    desk = Desk()
    yield desk
    desk.triggers.stop()
    assert desk.triggers.stage.stop(5)


def _of(inspection: Inspection, trigger: Trigger) -> Inspection:
    return dataclasses.replace(inspection, frame=dataclasses.replace(inspection.frame, trigger=trigger))


def test_the_verdict_is_the_answer(desk: Desk, inspect: MakeInspection) -> None:
    """An inspection of the trigger's frame answers it once, and is not late."""
    desk.ask()
    found = desk.triggers.settle(_of(inspect(), desk.shot[0]))
    assert desk.answers == [found]
    assert not found.is_late
    assert desk.triggers.counts() == {("top", "answered"): 1}
    assert desk.triggers.waiting() == 0


def test_a_deadline_answers_and_what_comes_then_is_late(desk: Desk, inspect: MakeInspection) -> None:
    """After the deadline the answer is that there is none; the result that comes then is marked, and told to nobody."""
    began = time.monotonic()
    desk.ask(deadline_s=0.2)
    assert desk.answered.wait(5)
    assert time.monotonic() - began >= 0.2
    assert [answer.code for answer in desk.answers if isinstance(answer, CommandError)] == ["deadline"]
    assert desk.triggers.settle(_of(inspect(), desk.shot[0])).is_late
    assert len(desk.answers) == 1
    assert desk.triggers.counts() == {("top", "deadline"): 1, ("top", "late"): 1}


def test_a_frame_that_nobody_asked_for_answers_nothing(desk: Desk, inspect: MakeInspection) -> None:
    """A free-running frame is given back as it is."""
    found = inspect()
    assert desk.triggers.settle(found) is found
    assert desk.answers == []


def test_too_many_are_refused(desk: Desk) -> None:
    """No more than the order allows wait on a camera; the refusal raises and settles nothing."""
    desk.ask(most=1)
    with pytest.raises(CommandError) as refused:
        desk.ask(most=1)
    assert refused.value.code == "busy"
    assert desk.answers == []


def test_a_camera_that_refuses_is_told_at_once(desk: Desk) -> None:
    """What the camera raises is the refusal, and nothing waits."""
    desk.refuse = CommandError("camera_lost", "gone")
    with pytest.raises(CommandError, match="gone"):
        desk.ask()
    assert desk.triggers.waiting() == 0


def test_a_miss_and_the_end_answer_too(desk: Desk) -> None:
    """Each trigger without a picture is answered with the cause, and all that wait when the agent ends."""
    desk.ask()
    desk.ask()
    desk.triggers.miss(desk.shot[0], "black")
    desk.triggers.miss(desk.shot[0], "black")
    desk.triggers.stop()
    codes: list[Any] = [answer.code for answer in desk.answers if isinstance(answer, CommandError)]
    assert codes == ["black", "stopped"]
    with pytest.raises(CommandError) as refused:
        desk.ask()
    assert refused.value.code == "stopped"
