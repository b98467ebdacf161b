"""The hand-off between cameras and inspection."""

import threading
import time
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kizu_agent.mailbox import Mailbox
from kizu_agent.records import Frame

PIXEL = np.zeros((1, 1, 1), np.uint8)


def frame(camera: str, number: int) -> Frame:
    return Frame(camera, number, PIXEL, None, 0, 0)


@pytest.fixture
def timed() -> Callable[[Callable[[], object]], tuple[object, float]]:
    """Call something; its result and how many seconds it took."""

    def call(what: Callable[[], object]) -> tuple[object, float]:
        began = time.monotonic()
        return what(), time.monotonic() - began

    return call


@given(
    st.lists(st.tuples(st.sampled_from("abc"), st.booleans()), max_size=60),
    st.integers(1, 4),
    st.integers(1, 5),
)
def test_live_lanes_keep_their_newest_frames_in_order(
    moves: list[tuple[str, bool]], capacity: int, at_once: int
) -> None:
    """Whatever the order of puts and takes, each camera's frames come in order, and each is taken, kept or counted."""
    mailbox = Mailbox()
    put = dict.fromkeys("abc", 0)
    taken: list[Frame] = []
    for camera in put:
        mailbox.open_lane(camera, capacity, is_lossless=False)
    for camera, is_put in moves:
        if is_put:
            assert mailbox.put(frame(camera, put[camera]), 0)
            put[camera] += 1
        else:
            taken += mailbox.take(at_once, 0)
    waiting = mailbox.depth()
    rest = mailbox.take(1000, 0)
    assert len(rest) == waiting
    for camera, count in put.items():
        numbers = [each.number for each in taken + rest if each.camera == camera]
        assert numbers == sorted(set(numbers))
        assert len(numbers) + sum(mailbox.drops(camera).values()) == count
        last = [each.number for each in rest if each.camera == camera]
        assert last == list(range(count - len(last), count))


def test_cameras_are_served_in_turn() -> None:
    """A camera with many frames does not keep the others waiting, also from one take to the next."""
    mailbox = Mailbox()
    for camera, count in (("a", 9), ("b", 2), ("c", 1)):
        mailbox.open_lane(camera, 20, is_lossless=True)
        for number in range(count):
            mailbox.put(frame(camera, number), 0)
    served = ["".join(each.camera for each in mailbox.take(2, 0)) for _ in range(4)]
    assert served == ["ab", "ca", "ba", "aa"]


def test_a_pass_of_large_frames_ends_early_and_keeps_the_turn() -> None:
    """A frame beyond the bytes asked for waits for the next pass; the first always comes; nobody loses a turn."""
    mailbox = Mailbox()
    for camera in "ab":
        mailbox.open_lane(camera, 20, is_lossless=True)
        for number in range(3):
            mailbox.put(Frame(camera, number, np.zeros((10, 10, 1), np.uint8), None, 0, 0), 0)
    assert ["".join(each.camera for each in mailbox.take(8, 0, 99)) for _ in range(2)] == ["a", "b"]
    assert [each.camera for each in mailbox.take(8, 0, 399)] == ["a", "b", "a"]
    assert [(each.camera, each.number) for each in mailbox.take(8, 0, 400)] == [("b", 2)]
    for number in range(3):
        mailbox.put(Frame("a", number, np.zeros((10, 10, 1), np.uint8), None, 0, 0), 0)
    assert len(mailbox.take(8, 0, 99, lambda _frame: 33)) == 3  # of a small region


def test_full_lossless_lane_makes_put_wait(timed: Callable) -> None:
    """Putting into a full lossless lane waits for room, and says when none came."""
    mailbox = Mailbox()
    mailbox.open_lane("a", 1, is_lossless=True)
    assert mailbox.put(frame("a", 0), 0)
    is_put, took_s = timed(lambda: mailbox.put(frame("a", 1), 0.1))
    assert not is_put
    assert took_s >= 0.1
    taker = threading.Timer(0.1, lambda: mailbox.take(1, 0))
    taker.start()
    is_put, took_s = timed(lambda: mailbox.put(frame("a", 1), 10))
    taker.join()
    assert is_put
    assert took_s < 5
    assert mailbox.drops("a") == {}


@pytest.mark.parametrize("close", [lambda mailbox: mailbox.close_lane("a"), Mailbox.close])
def test_closing_wakes_who_waits_and_keeps_what_lies_there(close: Callable[[Mailbox], None], timed: Callable) -> None:
    """A put that waits for room is woken when its lane is closed; frames already there are still taken."""
    mailbox = Mailbox()
    mailbox.open_lane("a", 1, is_lossless=True)
    mailbox.put(frame("a", 0), 0)
    closer = threading.Timer(0.1, lambda: close(mailbox))
    closer.start()
    is_put, took_s = timed(lambda: mailbox.put(frame("a", 1), 10))
    closer.join()
    assert not is_put
    assert took_s < 5
    assert [each.number for each in mailbox.take(5, 0)] == [0]
    assert not mailbox.put(frame("a", 2), 0)


def test_closing_wakes_who_waits_for_frames(timed: Callable) -> None:
    """A take that waits is woken when the mailbox is closed; those that begin later wait as always."""
    mailbox = Mailbox()
    mailbox.open_lane("a", 1, is_lossless=False)
    closer = threading.Timer(0.1, mailbox.close)
    closer.start()
    taken, took_s = timed(lambda: mailbox.take(4, 10))
    closer.join()
    assert taken == []
    assert took_s < 5
    assert timed(lambda: mailbox.take(4, 0.1))[1] >= 0.1


def test_closed_mailbox_stays_closed() -> None:
    """A camera that is opened while the service stops puts nothing more into the mailbox."""
    mailbox = Mailbox()
    mailbox.close()
    mailbox.open_lane("a", 1, is_lossless=True)
    assert not mailbox.put(frame("a", 0), 0)


def test_lane_opened_again_has_its_new_form() -> None:
    """A lane opened again keeps its frames, and holds no more than it may from the next frame on."""
    mailbox = Mailbox()
    mailbox.open_lane("a", 5, is_lossless=True)
    for number in range(5):
        mailbox.put(frame("a", number), 0)
    mailbox.close_lane("a")
    mailbox.open_lane("a", 2, is_lossless=False)
    assert mailbox.put(frame("a", 5), 0)
    assert [each.number for each in mailbox.take(9, 0)] == [4, 5]
    assert mailbox.drops("a") == {"inspection_busy": 4}


def test_take_wakes_for_the_first_frame(timed: Callable) -> None:
    """Waiting for frames ends with the first that comes, or empty-handed in time."""
    mailbox = Mailbox()
    mailbox.open_lane("a", 1, is_lossless=False)
    nothing, took_s = timed(lambda: mailbox.take(4, 0.1))
    assert nothing == []
    assert took_s >= 0.1
    putter = threading.Timer(0.1, lambda: mailbox.put(frame("a", 7), 0))
    putter.start()
    taken, took_s = timed(lambda: mailbox.take(4, 10))
    putter.join()
    assert [each.number for each in taken] == [7]
    assert took_s < 5
