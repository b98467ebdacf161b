"""What stands between a command and its doing: how many, how often, how late, by whom; and what became of it."""

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kizu_agent.answers import InspectAnswer, PauseAnswer
from kizu_agent.audit import Audit, By, Change
from kizu_agent.basic_commands import ping_command, rebirth_command
from kizu_agent.camera_settings import CameraConfig
from kizu_agent.command_lane import MOST_ANSWERS, CommandLane
from kizu_agent.commands import Commands, SlowCommand
from kizu_agent.config import Config
from kizu_agent.inspect_command import inspect_command
from kizu_agent.outbox import Outbox
from kizu_agent.pause_command import pause_commands
from kizu_agent.pauses import PauseBook
from kizu_agent.products import ProductBook
from kizu_agent.rate_limit import REFUSALS_PER_S, Gate, TokenBucket
from kizu_agent.records import CommandAnswer, CommandRequest, Frame, Inspection, Message, Trigger
from kizu_agent.request_memory import DURABLE, RequestMemory
from kizu_agent.requests import Request
from kizu_agent.snapshot_command import snapshot_command
from kizu_agent.topics import Topics
from kizu_agent.triggers import Triggers

SLOW = 1e-9
"""Tokens a second: none comes during a test."""


class Desk:
    """Commands on real files: `pause` and `resume`, `ping`, and `slow`, whose answers come when asked for."""

    def __init__(self, folder: Path, quality: str = "synchronised", per_name: int = 1000) -> None:
        self.book = PauseBook(folder)
        self.told: list[tuple[Change, By]] = []
        self.replies: list[tuple[CommandRequest, dict[str, Any]]] = []
        self.waiting: list[Callable[[InspectAnswer], None]] = []
        self.applied = 0
        every = (
            ping_command("0.1.0"),
            rebirth_command(None),
            *pause_commands(self.book, ("top", "side"), self._apply),
            SlowCommand("slow", Request, InspectAnswer, lambda _r, answer, _ns, done: self._begin(answer, done)),
        )
        buckets = {command.name: TokenBucket(SLOW, per_name) for command in every}
        self.commands = Commands(
            "box1",
            every,
            self._reply,
            Gate(buckets, TokenBucket(SLOW, per_name)),
            RequestMemory(folder, 1000),
            lambda change, by: self.told.append((change, by)),
            lambda: quality,  # type: ignore[arg-type,return-value]
        )

    def ask(self, name: str, user: str | None = None, **members: Any) -> dict[str, Any] | None:
        handled = self.commands.handle(CommandRequest(name, json.dumps(members).encode(), user=user))
        return None if handled is None else dict(json.loads(handled.payload))

    def _apply(self) -> None:
        self.applied += 1

    def _begin(self, answer: InspectAnswer, done: Callable[[InspectAnswer], None]) -> None:
        self.waiting.append(lambda _: done(answer))

    def _reply(self, request: CommandRequest, answer: CommandAnswer) -> None:
        self.replies.append((request, json.loads(answer.payload)))


@pytest.fixture
def desk(tmp_path: Path) -> Desk:
    """A desk with plenty of allowance."""
    return Desk(tmp_path)


def test_a_repeated_request_is_answered_as_before_and_changes_nothing(desk: Desk) -> None:
    """The same id gives the same answer to the byte, although the state is another by now."""
    first = desk.ask("pause", camera="top", request_id="1")
    desk.ask("resume", request_id="2")
    assert desk.ask("pause", camera="top", request_id="1") == first
    assert desk.book.paused == set()
    assert desk.commands.counts.by_outcome() == {"done": 2, "repeated": 1}
    assert len(desk.told) == 2


def test_a_repeated_request_is_known_after_a_restart(desk: Desk, tmp_path: Path) -> None:
    """Requests that changed something are kept on disk, a bounded number of them."""
    first = desk.ask("pause", request_id="1")
    again = Desk(tmp_path)
    again.book.set(["top", "side"], is_paused=False)
    assert again.ask("pause", request_id="1") == first
    assert again.book.paused == set()
    for number in range(2, DURABLE + 2):
        again.ask("resume", request_id=str(number))
    answer = Desk(tmp_path).ask("pause", request_id="1")
    assert answer is not None
    assert answer["id"] != (first or {})["id"]


def test_another_request_under_the_same_id_is_refused(desk: Desk) -> None:
    """An id that was used for something else is neither repeated nor carried out."""
    desk.ask("pause", camera="top", request_id="1")
    answer = desk.ask("pause", camera="side", request_id="1")
    assert answer is not None
    assert answer["error"]["code"] == "request_id_reused"
    assert desk.book.paused == {"top"}


def test_reading_is_done_anew(desk: Desk) -> None:
    """A question that changes nothing is answered by what is so now, under whatever id."""
    first, second = desk.ask("ping", request_id="1"), desk.ask("ping", request_id="1")
    assert first is not None
    assert second is not None
    assert first["id"] != second["id"]


def test_a_damaged_memory_is_told_and_begun_anew(tmp_path: Path) -> None:
    """What cannot be read is moved aside; commands go on."""
    (tmp_path / "requests.json").write_text("{")
    assert Desk(tmp_path).ask("pause", request_id="1") is not None
    assert (tmp_path / "requests.json.damaged").exists()


def test_a_command_may_come_so_often_and_no_oftener(tmp_path: Path) -> None:
    """Each name has its own allowance; what is over is refused, and of a flood most is not even answered."""
    desk = Desk(tmp_path, per_name=2)
    assert [(desk.ask("ping") or {})["ok"] for _ in range(3)] == [True, True, False]
    answer = desk.ask("ping", request_id="7")
    assert answer is not None
    assert (answer["error"]["code"], answer["request_id"]) == ("rate_limited", "7")
    assert (desk.ask("pause") or {})["ok"]
    answers = [desk.ask(f"name{number}") for number in range(1000)]
    told = [answer["error"]["code"] for answer in answers if answer is not None]
    assert told[:2] == ["unknown_command"] * 2
    assert REFUSALS_PER_S / 2 < len(told) < 4 * REFUSALS_PER_S
    assert desk.commands.counts.by_outcome()["rate_limited"] == 1000
    assert set(desk.commands.counts.by_command()) == {
        ("ping", "done"),
        ("ping", "rate_limited"),
        ("pause", "done"),
        ("other", "refused"),
        ("other", "rate_limited"),
    }


def test_tokens_come_back_with_time() -> None:
    """An empty bucket fills at its rate, up to its burst."""
    bucket = TokenBucket(50.0, 2)
    assert [bucket.take() for _ in range(3)] == [True, True, False]
    time.sleep(0.3)
    assert [bucket.take() for _ in range(3)] == [True, True, False]


@pytest.mark.parametrize(
    ("expires_at", "quality", "code"),
    [
        ("2026-01-01T00:00:00.000Z", "synchronised", "expired"),
        ("2026-01-01T00:00:00Z", "synchronised", "expired"),
        ("2026-01-01T00:00:00.000Z", "unsynchronised", None),
        ("2026-01-01T00:00:00.000Z", "unknown", None),
        ("2926-01-01T00:00:00.000Z", "synchronised", None),
        ("2026-13-01T00:00:00.000Z", "synchronised", "invalid"),
        ("tomorrow", "synchronised", "invalid"),
        (17, "synchronised", "invalid"),
    ],
)
def test_a_command_whose_time_is_up_is_not_carried_out(
    tmp_path: Path, expires_at: Any, quality: str, code: str | None
) -> None:
    """Where the clock can be trusted an expired command is refused; where not, the clock is not asked."""
    desk = Desk(tmp_path, quality)
    answer = desk.ask("pause", expires_at=expires_at)
    assert answer is not None
    assert answer["error"]["code"] == code
    assert bool(desk.book.paused) == (code is None)
    assert desk.commands.counts.by_outcome() == {{None: "done", "expired": "expired"}.get(code, "refused"): 1}


def test_a_change_is_told_with_who_and_what(desk: Desk) -> None:
    """The audit hears user, request id, old and new; refused commands and questions are no changes."""
    desk.ask("pause", user="anna", camera="top", request_id="1")
    desk.ask("pause", camera="nowhere")
    desk.ask("ping")
    ((change, by),) = desk.told
    assert by == By("pause", "anna", "1")
    assert change.subject == "paused cameras"
    assert isinstance(desk.commands, Commands)
    assert (change.old, change.new) == (PauseAnswer.model_fields["old"].default, change.new)
    assert change.new is not None
    assert change.new.model_dump() == {"cameras": ["top"]}


def test_the_audit_goes_to_the_plant_durably(outbox: Outbox) -> None:
    """One event on the audit topic, both states as text."""
    woken: list[int] = []
    audit = Audit(Topics("acme/line", "box1"), outbox, lambda: woken.append(1))
    audit(Change("x", None, PauseAnswer.model_fields["new"].default), By("pause", "anna", "1"))
    (row,) = outbox.take(10)
    payload = json.loads(row.message.payload)
    assert row.message.topic == "acme/line/box1/audit"
    assert (payload["user"], payload["old"], payload["new"]) == ("anna", None, '{"cameras":[]}')
    assert (row.message.priority, row.message.retain, woken) == (0, False, [1])


def test_an_answer_that_comes_later_goes_to_all_who_asked(desk: Desk) -> None:
    """The same request twice while it is under way is begun once; both are answered, and whoever asks afterwards."""
    assert desk.ask("slow", request_id="1") is None
    assert desk.ask("slow", request_id="1") is None
    assert desk.ask("slow", request_id="2") is None
    assert len(desk.waiting) == 2
    desk.waiting[0](InspectAnswer)  # type: ignore[arg-type]
    assert [(reply["request_id"], reply["ok"]) for _, reply in desk.replies] == [("1", True)] * 2
    assert desk.ask("slow", request_id="1") == desk.replies[0][1]


def test_without_a_sparkplug_node_there_is_no_rebirth(desk: Desk) -> None:
    """The command is known and says that it is not enabled."""
    answer = desk.ask("rebirth")
    assert answer is not None
    assert answer["error"]["code"] == "not_enabled"
    done: list[int] = []
    commands = Commands("box1", (rebirth_command(lambda: done.append(1)),))
    handled = commands.handle(CommandRequest("rebirth", b""))
    assert handled is not None
    assert json.loads(handled.payload)["ok"]
    assert done == [1]


def test_a_pause_that_cannot_be_kept_is_none(tmp_path: Path) -> None:
    """The disk first: what a restart would not find is not done."""
    desk = Desk(tmp_path)
    (tmp_path / "paused.json").mkdir()
    answer = desk.ask("pause")
    assert answer is not None
    assert (answer["error"]["code"], desk.book.paused, desk.applied) == ("failed", set(), 0)


def test_answers_that_wait_for_the_broker_are_bounded() -> None:
    """The oldest answers go where more wait than anybody will read."""
    lane = CommandLane("acme/box1", lambda _request: None, lambda: None, lambda: None)
    for number in range(MOST_ANSWERS + 5):
        lane.answer(CommandRequest("ping", b""), CommandAnswer(str(number).encode()))
    first = lane.next_answer()
    assert first is not None
    assert first.message.payload == b"5"


@pytest.mark.parametrize("channels", [1, 3])
def test_a_snapshot_is_published_and_answered_with_its_reference(channels: int) -> None:
    """The picture goes out as a JPEG of the wanted width under its hash; without a picture the answer says so."""
    image = np.random.default_rng(1).integers(0, 256, (50, 100, channels), np.uint8)
    put: list[Message] = []
    frame = Frame("top", 7, image, None, time.time_ns(), time.monotonic_ns())
    newest = {"top": lambda: frame, "side": lambda: None}
    commands = Commands("box1", (snapshot_command(Topics("acme", "box1"), newest, put.extend, 60),))

    def ask(**members: Any) -> dict[str, Any]:
        handled = commands.handle(CommandRequest("snapshot", json.dumps(members).encode()))
        assert handled is not None
        return dict(json.loads(handled.payload))

    answer = ask(camera="top", width_px=40)
    (message,) = put
    assert (answer["frame"], answer["snapshot"]["width"], answer["snapshot"]["height"]) == (7, 40, 20)
    assert answer["snapshot"]["bytes"] == len(message.payload)
    assert (message.topic, message.content_type) == ("image/acme/box1/top/snapshot", "image/jpeg")
    assert f"kizu snapshot {answer['snapshot']['id']}".encode() in message.payload
    assert ask(camera="side")["error"]["code"] == "no_picture"
    assert ask(camera="x")["error"]["code"] == "unknown_camera"


class _Inspections:
    """The command `inspect` on one triggered camera whose frames the test makes."""

    def __init__(self, config: Config, folder: Path) -> None:
        self.shot: list[Trigger] = []
        self.replies: list[dict[str, Any]] = []
        self.triggers = Triggers(self.shot.append, lambda: None)
        cameras = {"top": CameraConfig(name="top", source="sim:gears", trigger="mqtt"), "side": config.cameras[1]}
        self.products = ProductBook(folder, (), tuple(cameras.values()))
        command = inspect_command(self.triggers, self.products, cameras)
        self.commands = Commands("box1", (command,), lambda _, answer: self.replies.append(json.loads(answer.payload)))

    def ask(self, **members: Any) -> None:
        assert self.commands.handle(CommandRequest("inspect", json.dumps(members).encode())) is None


def test_an_inspection_is_answered_with_its_verdict(
    config: Config, tmp_path: Path, inspect: Callable[..., Inspection]
) -> None:
    """The answer names the part, the verdict, the result and what it took."""
    site = _Inspections(config, tmp_path)
    site.products.set(None, "L1")
    site.ask(camera="top", part_id="p1", request_id="r1")
    found = inspect(2.5)
    site.triggers.settle(
        Inspection(**{**vars(found), "frame": Frame(**{**vars(found.frame), "trigger": site.shot[0]})})
    )
    (answer,) = site.replies
    assert (answer["verdict"], answer["part_id"], answer["batch"], answer["request_id"]) == ("reject", "p1", "L1", "r1")
    assert (answer["ok"], answer["result_id"], answer["score"]) == (True, found.id, 2.5)
    assert answer["elapsed_ms"] > 0


@pytest.mark.parametrize(
    ("members", "code"),
    [
        ({"camera": "side"}, "not_triggered"),
        ({"camera": "nowhere"}, "unknown_camera"),
        ({"camera": "top", "product": "other"}, "wrong_product"),
    ],
)
def test_an_inspection_that_cannot_be_is_unknown_at_once(
    config: Config, tmp_path: Path, members: dict[str, Any], code: str
) -> None:
    """The answer comes at once, with the verdict `unknown` and why."""
    site = _Inspections(config, tmp_path)
    site.ask(**members)
    (answer,) = site.replies
    assert (answer["ok"], answer["error"]["code"], answer["verdict"], answer["reason"]) == (
        False,
        code,
        "unknown",
        code,
    )
    assert site.shot == []


def test_a_missed_inspection_is_unknown_and_never_ok(config: Config, tmp_path: Path) -> None:
    """Whatever keeps the verdict away, the answer is `unknown`, once."""
    site = _Inspections(config, tmp_path)
    site.ask(camera="top")
    site.triggers.miss(site.shot[0], "camera_lost")
    site.triggers.miss(site.shot[0], "deadline")
    assert [(answer["verdict"], answer["reason"], answer["ok"]) for answer in site.replies] == [
        ("unknown", "camera_lost", False)
    ]
