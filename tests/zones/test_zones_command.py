"""The command `zones`: what it takes, what it refuses, what is kept and told."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kizu_agent.audit import By, Change
from kizu_agent.camera_settings import CameraConfig, ZoneConfig
from kizu_agent.commands import Commands
from kizu_agent.records import CommandRequest, Frame
from kizu_agent.zone_book import FILE_NAME, ZoneBook
from kizu_agent.zones_command import zones_command

RIM = {"name": "rim", "polygon": [[0, 0], [9, 0], [9, 9]]}
HOLE = {"name": "hole", "kind": "exclude", "polygon": [[2, 2], [5, 2], [5, 5]]}
FAR, TEXT = [[0, 0], [99, 0], [9, 9]], [["0", 0], [9, 0], [9, 9]]
CAMERAS = (
    CameraConfig(name="top", source="sim:gears", zones=(ZoneConfig.model_validate(RIM),)),
    CameraConfig(name="side", source="sim:gears"),
)
Ask = Callable[..., dict[str, Any]]


@pytest.fixture
def book(tmp_path: Path) -> ZoneBook:
    return ZoneBook(tmp_path, CAMERAS)


@pytest.fixture
def told() -> list[tuple[Change, By]]:
    return []


@pytest.fixture
def ask(book: ZoneBook, told: list[tuple[Change, By]]) -> Ask:
    """Send `zones`; camera `top` has given a picture of 20 × 10 px, `side` none."""
    picture = Frame("top", 0, np.zeros((10, 20, 1), np.uint8), None, 0, 0)
    command = zones_command(book, lambda camera: picture if camera == "top" else None)
    commands = Commands("box1", (command,), audit=lambda change, by: told.append((change, by)))

    def ask(**request: Any) -> dict[str, Any]:
        answer = commands.handle(CommandRequest("zones", json.dumps(request).encode()))
        assert answer is not None
        found: dict[str, Any] = json.loads(answer.payload)
        return found

    return ask


def names(part: dict[str, Any]) -> tuple[str, list[str]]:
    return part["origin"], [zone["name"] for zone in part["zones"]]


def test_set_holds_from_the_next_pass_on_and_over_restarts(ask: Ask, book: ZoneBook, tmp_path: Path) -> None:
    """The new zones judge at once, the answer tells old and new, and a new agent finds them."""
    answer = ask(action="set", camera="top", zones=[RIM, HOLE])
    assert (names(answer["old"]), names(answer["new"])) == (("config", ["rim"]), ("command", ["rim", "hole"]))
    assert answer["new"]["zones"][1] == {**HOLE, "threshold_factor": 1.0, "min_area_px": 0, "min_area_mm2": 0.0}
    assert [zone.name for zone in book.views["top"].zones] == ["rim", "hole"]
    assert ZoneBook(tmp_path, CAMERAS).views["top"] == book.views["top"]
    assert book.views["side"].zones == ()


def test_revert_takes_the_last_change_back_and_again(ask: Ask, book: ZoneBook) -> None:
    """Also over a reset; where nothing was changed there is nothing to take back."""
    assert ask(action="revert", camera="top")["error"]["code"] == "no_previous"
    ask(action="set", camera="top", zones=[])
    assert names(ask(action="revert", camera="top")["new"]) == ("config", ["rim"])
    assert names(ask(action="revert", camera="top")["new"]) == ("command", [])
    ask(action="set", camera="top", zones=[HOLE])
    assert names(ask(action="reset", camera="top")["new"]) == ("config", ["rim"])
    assert names(ask(action="revert", camera="top")["new"]) == ("command", ["hole"])
    assert [zone.name for zone in book.views["top"].zones] == ["hole"]


@pytest.mark.parametrize(
    ("request_", "code", "words"),
    [
        ({"action": "set", "camera": "top"}, "invalid", "set takes zones"),
        ({"action": "get", "camera": "top", "zones": []}, "invalid", "take none"),
        ({"action": "set", "camera": "nowhere", "zones": []}, "unknown_camera", "there are side, top"),
        ({"action": "set", "camera": "top", "zones": [RIM, RIM]}, "invalid", "share a name: rim"),
        ({"action": "set", "camera": "top", "zones": [{**RIM, "min_area_mm2": 1.0}]}, "invalid", "mm_per_px"),
        (
            {"action": "set", "camera": "top", "zones": [{**RIM, "polygon": [[0, 0], [99, 0], [9, 9]]}]},
            "invalid",
            "fit",
        ),
        (
            {"action": "set", "camera": "top", "zones": [{**RIM, "polygon": [["0", 0], [9, 0], [9, 9]]}]},
            "invalid",
            "int",
        ),
        ({"action": "set", "camera": "top", "zones": [{**RIM, "surplus": 1}]}, "invalid", "surplus"),
    ],
)
def test_what_makes_no_sense_changes_nothing(
    ask: Ask, book: ZoneBook, told: list[tuple[Change, By]], request_: dict[str, Any], code: str, words: str
) -> None:
    """Each with a code and a word on what is wrong."""
    before = book.views
    answer = ask(**request_)
    assert (answer["ok"], answer["error"]["code"]) == (False, code)
    assert words in answer["error"]["message"]
    assert book.views == before
    assert told == []


def test_changes_are_told_and_reading_is_not(ask: Ask, told: list[tuple[Change, By]]) -> None:
    """Who and what, old and new, once for each change."""
    ask(camera="side")
    ask(action="set", camera="side", zones=[RIM], request_id="7")
    ((change, by),) = told
    assert (change.subject, by.command, by.request_id) == ("zones of camera side", "zones", "7")


def test_a_disk_that_refuses_changes_nothing(ask: Ask, book: ZoneBook, tmp_path: Path) -> None:
    """What judges is what a restart would find."""
    (tmp_path / FILE_NAME).mkdir()
    answer = ask(action="set", camera="top", zones=[])
    assert answer["error"]["code"] == "failed"
    assert [zone.name for zone in book.views["top"].zones] == ["rim"]
