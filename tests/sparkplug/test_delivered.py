"""What is under way, what a fence proves, and who is blamed for a broken connection."""

from itertools import count

import pytest

from kizu_agent.outbox import Stored
from kizu_agent.records import Message
from kizu_agent.sparkplug.delivered import MOST, STRIKES, UnderWay


@pytest.fixture
def under_way() -> UnderWay:
    """Nothing is under way; fences count from 1."""
    numbers = count(1)
    return UnderWay(lambda: next(numbers))


def row(number: int) -> Stored:
    return Stored(number, Message("top", b""), 0.0)


def break_under(under_way: UnderWay, *numbers: int) -> Stored | None:
    """Send rows and have the connection break."""
    for number in numbers:
        under_way.add(row(number))
    return under_way.broken()


def test_only_what_lies_before_a_fence_is_read(under_way: UnderWay) -> None:
    """A fence proves the rows sent before it and none after; a later one proves earlier ones too."""
    under_way.add(row(1))
    under_way.fence(is_now=True)
    under_way.add(row(2))
    assert under_way.passed(7) == []
    assert under_way.passed(1) == [1]
    under_way.fence(is_now=True)
    under_way.add(row(3))
    under_way.fence(is_now=True)
    assert under_way.passed(3) == [2, 3]
    assert len(under_way) == 0


def test_no_more_than_the_window_goes(under_way: UnderWay) -> None:
    """Room shrinks with each row; a full window asks for a sign at once."""
    for number in range(MOST):
        under_way.add(row(number))
    assert under_way.room == 0
    under_way.fence()
    assert len(under_way.passed(1)) == MOST
    assert under_way.room == MOST


def test_a_row_that_breaks_it_alone_is_found(under_way: UnderWay) -> None:
    """After a break rows go one by one; one that is alone under way at several breaks in a row is the culprit."""
    assert break_under(under_way, 1, 2, 3) is None
    for _ in range(STRIKES - 1):
        under_way.begin()
        assert under_way.passed(under_way._births or 0) == []
        assert under_way.room == 1
        assert break_under(under_way, 2) is None
    found = break_under(under_way, 2)
    assert found is not None
    assert found.id == 2


def test_nobody_is_blamed_for_the_births(under_way: UnderWay) -> None:
    """After a break no row goes before the broker has read the births: one that breaks then is theirs."""
    assert break_under(under_way, 1) is None
    for _ in range(STRIKES):
        under_way.begin()
        assert under_way.room == 0
        assert under_way.broken() is None


def test_the_window_opens_again(under_way: UnderWay) -> None:
    """Each proof doubles what may go, up to the whole window."""
    break_under(under_way, 1, 2)
    rooms = []
    while under_way.room < MOST:
        rooms.append(under_way.room)
        under_way.add(row(len(rooms)))
        under_way.fence(is_now=True)
        under_way.passed(len(rooms))
    assert rooms == [1, 2, 4, 8, 16, 32, 64, 128]
