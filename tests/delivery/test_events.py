"""Verdicts over time."""

from collections.abc import Iterable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kizu_agent.camera_settings import EventsConfig
from kizu_agent.events import UPDATE_INTERVAL_NS, EventTracker, Judged, OpenEvents
from kizu_agent.records import Event, EventKind
from kizu_contract.judging import Verdict

WARN_RATIO = 0.5
FRAME_NS = 100_000_000


def judged(number: int, ratio: float) -> Judged:
    """Judge frame `number`; a negative ratio stands for an unknown verdict."""
    verdict = Verdict.REJECT if ratio >= 1 else Verdict.WARN if ratio >= WARN_RATIO else Verdict.OK
    verdict = Verdict.UNKNOWN if ratio < 0 else verdict
    return Judged(f"r{number}", verdict, ratio, WARN_RATIO, 10**18 + number * FRAME_NS, number * FRAME_NS)


def follow(config: EventsConfig, ratios: Iterable[float]) -> list[Event | None]:
    """Let a fresh tracker see `ratios`, ten a second."""
    tracker = EventTracker("top", config)
    return [tracker.observe(judged(number, ratio)) for number, ratio in enumerate(ratios)]


def kinds(events: list[Event | None]) -> list[str]:
    """Shorten messages to one letter each, `-` for none."""
    return [event.kind.value[0] if event else "-" for event in events]


def test_one_reject_opens_and_three_good_frames_close() -> None:
    """By default the first reject opens an anomaly and the third good frame in a row closes it, under one id."""
    events = follow(EventsConfig(), [0.1, 1.2, 0.1, 0.1, 0.1, 0.1])
    assert kinds(events) == ["-", "o", "-", "-", "c", "-"]
    opened, closed = events[1], events[4]
    assert opened is not None
    assert closed is not None
    assert (opened.id, opened.result_id, closed.result_id) == (closed.id, "r1", "r4")
    assert (closed.frames, closed.worst_ratio, closed.verdict) == (1, 1.2, Verdict.REJECT)
    assert (opened.closed_ns, closed.closed_ns) == (None, 10**18 + 4 * FRAME_NS)


def test_n_of_m_counts_within_the_window_only() -> None:
    """Two of three: two rejects three frames apart open nothing, two within three frames do."""
    config = EventsConfig(open_n=2, open_m=3)
    assert kinds(follow(config, [1.5, 0, 0, 1.5, 0, 1.5])) == ["-", "-", "-", "-", "-", "o"]


def test_it_is_held_open_for_a_time() -> None:
    """With half a second of hold it closes with the first good frame from then on; a bad one begins it anew."""
    config = EventsConfig(close_n=2, hold_s=0.5)
    assert kinds(follow(config, [1.5, 0, 0, 0, 0, 0, 0])) == ["o", "-", "-", "-", "-", "c", "-"]
    assert kinds(follow(config, [1.5, 0, 0, 1.2, 0, 0, 0, 0, 0])) == ["o", "-", "-", "-", "-", "-", "-", "-", "c"]


def test_a_resumed_anomaly_is_held_from_the_restart_on() -> None:
    """Nobody knows how long ago its last bad frame was."""
    (opened,) = follow(EventsConfig(), [1.5])
    tracker = EventTracker("top", EventsConfig(close_n=1, hold_s=0.5), opened)
    assert kinds([tracker.observe(judged(number, 0)) for number in range(7)]) == ["-"] * 5 + ["c", "-"]


def test_a_ratio_between_hysteresis_and_limit_keeps_the_anomaly_open() -> None:
    """A frame just below the limit is not good enough to close, and breaks the row."""
    config = EventsConfig(close_n=2, hysteresis=0.9)
    assert kinds(follow(config, [1.0, 0.8, 0.95, 0.8, 0.8])) == ["o", "-", "-", "-", "c"]


def test_hysteresis_is_of_the_warn_limit_where_warn_opens() -> None:
    """With `at = warn` a frame must lie below 0.9 × the warn threshold, not below 0.9 × the reject threshold."""
    config = EventsConfig(at="warn", close_n=1)
    assert kinds(follow(config, [0.6, 0.48, 0.44])) == ["o", "-", "c"]


def test_unknown_neither_opens_nor_closes_and_breaks_the_row() -> None:
    """An anomaly whose camera is lost stays open until the part is seen good often enough in a row."""
    config = EventsConfig(close_n=2)
    assert kinds(follow(config, [-1, 1.1, 0.1, -1, 0.1, -1, -1, 0.1, 0.1])) == list("-o------c")


def test_unknown_takes_no_place_in_the_window() -> None:
    """A frame that could not be judged does not push a reject out of the window."""
    assert kinds(follow(EventsConfig(open_n=2, open_m=2), [1.1, -1, -1, 1.1])) == ["-", "-", "-", "o"]


def test_a_worse_verdict_is_told_at_once_and_a_rising_ratio_once_a_second() -> None:
    """Ten frames a second, each worse: the step to reject is told at once, then one update a second."""
    ratios = [0.6, 0.7, 1.0, *(1.1 + 0.01 * step for step in range(20))]
    assert kinds(follow(EventsConfig(at="warn"), ratios)) == list("o-u---------u---------u")
    assert UPDATE_INTERVAL_NS == 10 * FRAME_NS


def test_what_opened_one_anomaly_does_not_open_the_next() -> None:
    """After a close the window starts empty."""
    config = EventsConfig(open_n=2, open_m=10, close_n=1)
    assert kinds(follow(config, [1.1, 1.1, 0.1, 1.1, 1.1])) == ["-", "o", "c", "-", "o"]


@given(
    st.lists(st.sampled_from([-1.0, 0.0, 0.4, 0.46, 0.6, 0.95, 1.0, 1.5, 3.0]), max_size=60),
    st.sampled_from(["warn", "reject"]),
    st.integers(1, 4),
    st.integers(0, 4),
    st.integers(1, 4),
)
def test_anomalies_are_well_formed(ratios: list[float], at: str, open_n: int, more: int, close_n: int) -> None:
    """Whatever is seen: open comes first, close last, ids differ between anomalies, and nothing ever gets better."""
    config = EventsConfig.model_validate({"at": at, "open_n": open_n, "open_m": open_n + more, "close_n": close_n})
    current: Event | None = None
    seen: set[str] = set()
    for number, event in enumerate(follow(config, ratios)):
        if event is None:
            continue
        assert event.result_id == f"r{number}"
        if event.kind is EventKind.OPEN:
            assert current is None
            assert event.id not in seen
        else:
            assert current is not None
            assert (event.id, event.opened_ns) == (current.id, current.opened_ns)
            assert event.worst_ratio >= current.worst_ratio
            assert event.frames >= current.frames
        assert event.worst_ratio == max(event.worst_ratio, ratios[number])
        assert (event.kind is EventKind.CLOSE) == (event.closed_ns is not None)
        seen.add(event.id)
        current = None if event.kind is EventKind.CLOSE else event


@given(st.lists(st.sampled_from([-1.0, 0.1, 0.6, 1.0, 2.0]), max_size=30), st.integers(0, 30))
def test_putting_the_track_back_undoes_a_verdict(ratios: list[float], at: int) -> None:
    """A tracker whose track is put back behaves as if the verdicts between had never been."""
    once, twice = EventTracker("top", EventsConfig(close_n=2)), EventTracker("top", EventsConfig(close_n=2))
    for number, ratio in enumerate(ratios):
        if number == at:
            before = twice.track
            twice.observe(judged(number, 5.0))
            twice.observe(judged(number, 0.0))
            twice.track = before
        told = [tracker.observe(judged(number, ratio)) for tracker in (once, twice)]
        assert kinds(told[:1]) == kinds(told[1:])


def test_an_open_anomaly_goes_on_after_a_restart_under_its_id(tmp_path: Path) -> None:
    """What was open when the agent died is closed by the next agent, with the id that subscribers know."""
    tracker = EventTracker("top", EventsConfig())
    opened = tracker.observe(judged(0, 1.5))
    assert opened is not None
    OpenEvents(tmp_path).save({"top": opened})
    resumed = OpenEvents(tmp_path).load()["top"]
    successor = EventTracker("top", EventsConfig(close_n=1), resumed)
    closed = successor.observe(judged(1, 0.1))
    assert closed is not None
    assert (closed.id, closed.kind, closed.worst_ratio) == (opened.id, EventKind.CLOSE, 1.5)


@pytest.mark.parametrize("damage", [b"", b"{", b'{"top": 1}', b"\xff\xfe"])
def test_a_damaged_file_of_open_anomalies_is_no_reason_not_to_start(tmp_path: Path, damage: bytes) -> None:
    """Damage means that no anomaly is known to be open."""
    (tmp_path / "events.json").write_bytes(damage)
    assert OpenEvents(tmp_path).load() == {}
