"""What the agent answers to commands."""

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kizu_agent.basic_commands import ping_command, status_command
from kizu_agent.commands import MAX_REQUEST_BYTES, Commands
from kizu_agent.config import Config
from kizu_agent.model_command import model_command
from kizu_agent.records import CommandRequest, ModelId, ModelListing, ModelOrder
from kizu_agent.state import StateBoard
from kizu_agent.thresholds import ThresholdBook
from kizu_agent.thresholds_command import thresholds_command
from kizu_contract.judging import Thresholds
from kizu_contract.manifest import Manifest

Ask = Callable[..., dict[str, Any]]


class _NoModels:
    """A model keeper with nothing to keep: these tests are about other commands."""

    def listing(self) -> ModelListing:
        return ModelListing()

    def order(self, order: ModelOrder) -> bool:
        raise AssertionError(order)

    def slot_of(self, model: ModelId) -> str | None:
        return model.name


@pytest.fixture
def book(tmp_path: Path, config: Config) -> ThresholdBook:
    """The book that commands change."""
    return ThresholdBook(tmp_path, config.cameras)


@pytest.fixture
def ask(config: Config, book: ThresholdBook, model: ModelId, manifest: Manifest) -> Ask:
    """Send a command and give its answer; camera `side` has no model."""
    board = StateBoard(config, [], "0.1.0", time.time_ns())

    def find(camera: str) -> tuple[ModelId, Manifest] | None:
        return (model, manifest) if camera == "top" else None

    commands = Commands(
        "box1",
        (
            ping_command("0.1.0"),
            status_command(board.status),
            thresholds_command(book, find),
            model_command(_NoModels()),
        ),
    )

    def ask(name: str, payload: bytes | dict[str, Any] = b"") -> dict[str, Any]:
        raw = payload if isinstance(payload, bytes) else json.dumps(payload).encode()
        handled = commands.handle(CommandRequest(name, raw))
        assert handled is not None
        answer: dict[str, Any] = json.loads(handled.payload)
        return answer

    return ask


def test_ping_echoes(ask: Ask) -> None:
    """The answer carries request id, echo and version."""
    answer = ask("ping", {"request_id": "7", "echo": "hello"})
    assert (answer["ok"], answer["request_id"], answer["echo"], answer["version"]) == (True, "7", "hello", "0.1.0")
    assert answer["error"] == {"code": None, "message": None}


def test_an_empty_message_is_an_empty_request(ask: Ask) -> None:
    """`mosquitto_pub -n` is enough to ping and to ask for the status."""
    assert ask("ping")["ok"]
    assert ask("status")["status"]["agent"] == "box1"


def test_thresholds_are_set_by_rates_and_told_with_old_and_new(
    ask: Ask, book: ThresholdBook, manifest: Manifest, model: ModelId
) -> None:
    """Rates become scores of the model in service and judge from then on."""
    answer = ask("thresholds", {"action": "set", "camera": "top", "warn_rate": 0.05, "reject_rate": 0.02})
    expected = manifest.calibration.thresholds(0.05, 0.02)
    assert answer["ok"]
    assert (answer["old"]["origin"], answer["old"]["warn"], answer["old"]["warn_rate"]) == ("bundle", 1.0, 0.01)
    assert (answer["new"]["origin"], answer["new"]["warn"], answer["new"]["reject"]) == (
        "command",
        expected.warn,
        expected.reject,
    )
    assert answer["model"]["sha256"] == model.sha256
    assert book.get("top", manifest, model.sha256) == expected


def test_thresholds_are_set_by_scores_read_and_reset(
    ask: Ask, book: ThresholdBook, manifest: Manifest, model: ModelId
) -> None:
    """Whole numbers are taken as scores; get tells them; reset goes back to the bundle's."""
    ask("thresholds", {"action": "set", "camera": "top", "warn": 3, "reject": 4})
    assert book.get("top", manifest, model.sha256) == Thresholds(3.0, 4.0)
    told = ask("thresholds", {"camera": "top"})
    assert (told["new"]["warn"], told["new"]["warn_rate"], told["old"]) == (3.0, None, told["new"])
    assert ask("thresholds", {"action": "reset", "camera": "top"})["new"]["origin"] == "bundle"
    assert book.get("top", manifest, model.sha256) == Thresholds(1.0, 2.0)


RATES = {"action": "set", "camera": "top", "warn_rate": 0.05, "reject_rate": 0.02}


@pytest.mark.parametrize(
    ("payload", "code", "words"),
    [
        ({**RATES, "reject_rate": 0.06}, "invalid", "above warn_rate"),
        ({**RATES, "reject_rate": 0}, "invalid", "reject_rate"),
        ({**RATES, "warn_rate": "0.05"}, "invalid", "warn_rate"),
        ({**RATES, "warn_rate": True}, "invalid", "warn_rate"),
        ({**RATES, "warn": 1.0}, "invalid", "both of one pair"),
        ({"action": "set", "camera": "top"}, "invalid", "both of one pair"),
        ({"action": "set", "camera": "top", "warn": 4.0, "reject": 3.0}, "invalid", "do not fit"),
        ({**RATES, "action": "get"}, "invalid", "takes no thresholds"),
        ({**RATES, "action": "drop"}, "invalid", "action"),
        ({**RATES, "camera": "bottom"}, "unknown_camera", "top"),
        ({**RATES, "camera": "side"}, "no_model", "side"),
        ({**RATES, "colour": 1}, "invalid", "colour"),
        ({"action": "get"}, "invalid", "camera"),
        (b'{"camera": "top", "warn": NaN}', "invalid_json", "JSON"),
        (b'{"action":"set","camera":"top","warn":1.0,"reject":1e999}', "invalid_json", "JSON"),
        (b"[1]", "invalid", "object"),
        (b"[" * 60_000, "invalid_json", "JSON"),
        (b"\xff\xfe", "invalid_json", "JSON"),
        (b" " * (MAX_REQUEST_BYTES + 1), "too_large", "65536"),
    ],
)
def test_a_refused_command_says_why_and_changes_nothing(
    ask: Ask,
    tmp_path: Path,
    payload: bytes | dict[str, Any],
    code: str,
    words: str,
) -> None:
    """Errors are typed, name what is wrong, and leave neither a file nor other thresholds."""
    if isinstance(payload, dict):
        payload = {**payload, "request_id": "42"}
    answer = ask("thresholds", payload)
    assert (answer["ok"], answer["error"]["code"]) == (False, code)
    assert words in answer["error"]["message"]
    assert answer["request_id"] == ("42" if isinstance(payload, dict) else None)
    assert not (tmp_path / "thresholds.json").exists()


def test_an_unknown_command_is_answered_too(ask: Ask) -> None:
    """The answer lists what there is, and does not repeat an endless name."""
    answer = ask("x" * 5000, {"request_id": "1"})
    assert answer["error"]["code"] == "unknown_command"
    assert "ping, status, thresholds" in answer["error"]["message"]
    assert len(answer["command"]) == 64


def test_a_disk_that_refuses_is_told(ask: Ask, tmp_path: Path) -> None:
    """Thresholds that cannot be kept are not used, and the answer says so."""
    (tmp_path / "thresholds.json").mkdir()
    answer = ask("thresholds", RATES)
    assert (answer["ok"], answer["error"]["code"]) == (False, "failed")
    assert ask("thresholds", {"camera": "top"})["new"]["origin"] == "bundle"


def test_answers_of_a_command_have_the_same_keys_whether_it_was_carried_out_or_not(ask: Ask) -> None:
    """A SCADA that made tags of the first answer finds them in every other."""
    for name, good in (("ping", b""), ("status", b""), ("thresholds", RATES), ("model", b"")):
        answers = [ask(name, good), ask(name, b"nonsense"), ask(name, {"camera": "nowhere"})]
        assert [answer["ok"] for answer in answers] == [True, False, False]
        assert len({str(keys(answer)) for answer in answers}) == 1


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=300)
@given(
    st.sampled_from(["ping", "status", "thresholds", "model", "", "é" * 100]),
    st.binary(max_size=200)
    | st.builds(
        lambda pairs: json.dumps(pairs).encode(),
        st.dictionaries(
            st.sampled_from(["request_id", "action", "camera", "warn", "reject", "warn_rate", "echo", "x"]),
            st.none()
            | st.booleans()
            | st.integers()
            | st.floats()
            | st.text(max_size=200)
            | st.lists(st.integers(), max_size=2)
            | st.sampled_from(["get", "set", "reset", "top", "side"]),
        ),
    ),
)
def test_whatever_is_sent_is_answered(ask: Ask, name: str, payload: bytes) -> None:
    """No request, however malformed, goes without a well-formed answer or breaks the agent."""
    answer = ask(name, payload)
    assert answer["schema"] == 1
    assert answer["request_id"] is None or isinstance(answer["request_id"], str)
    assert answer["ok"] == (answer["error"]["code"] is None)
    assert len(json.dumps(answer)) < 10_000


def keys(value: object) -> object:
    """The keys of JSON data, nested as they are."""
    return {key: keys(item) for key, item in value.items()} if isinstance(value, dict) else None
