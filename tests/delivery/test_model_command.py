"""The command `model`: what is listed, what is passed on to the keeper, what is refused."""

import json
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kizu_agent.commands import Commands
from kizu_agent.errors import ModelError
from kizu_agent.model_command import model_command
from kizu_agent.records import CommandRequest, ModelId, ModelListing, ModelOrder, ModelSlot, StoredModel

SINCE = "2026-11-22T01:59:24.000Z"
IDS = {
    version: ModelId("gears", version, digest * 8)
    for version, digest in (("1", "1a" * 4), ("2", "2b" * 4), ("3", "3c" * 4))
}
TWIN = ModelId("gears", "3", "3c3c3c3c3c3c3c3d" * 4)
PLATES = ModelId("plates", "1", "4d" * 32)


def _slot(name: str | None, active: ModelId | None = None, previous: ModelId | None = None) -> ModelSlot:
    return ModelSlot(name, active, is_on_probation=False, previous=previous, since=SINCE if active else None)


class Keeper:
    """A keeper of two slots that takes notes of what it shall do."""

    def __init__(self) -> None:
        self.orders: list[ModelOrder] = []
        self.is_busy = False

    def listing(self) -> ModelListing:
        states = [("1", "previous", None), ("2", "active", None), ("3", "failed", "5 of 5 frames")]
        models = [StoredModel(f"gears-{v}.kizu", IDS[v], state, SINCE, why) for v, state, why in states]
        models.append(StoredModel("twin.kizu", TWIN, "stored", SINCE, None))
        models.append(StoredModel("plates.kizu", PLATES, "stored", SINCE, None))
        slots = (_slot(None), _slot("gears", IDS["2"], IDS["1"]))
        return ModelListing(slots, tuple(models))

    def order(self, order: ModelOrder) -> bool:
        if not self.is_busy:
            self.orders.append(order)
        return not self.is_busy

    def slot_of(self, model: ModelId) -> str | None:
        if model.name != "gears":
            raise ModelError(f"no camera asks for a model named {model.name!r}")
        return model.name


@pytest.fixture
def keeper() -> Keeper:
    return Keeper()


Ask = Callable[..., dict[str, Any]]


@pytest.fixture
def ask(keeper: Keeper) -> Ask:
    commands = Commands("box1", (model_command(keeper),))

    def ask(payload: bytes | dict[str, Any] = b"") -> dict[str, Any]:
        raw = payload if isinstance(payload, bytes) else json.dumps(payload).encode()
        handled = commands.handle(CommandRequest("model", raw))
        assert handled is not None
        answer: dict[str, Any] = json.loads(handled.payload)
        return answer

    return ask


def test_an_empty_request_lists(ask: Ask, keeper: Keeper) -> None:
    """Slots with what serves and the way back, models with their states, and nothing is done."""
    answer = ask()
    assert (answer["ok"], answer["outcome"], answer["target"]["name"]) == (True, "listed", None)
    assert [(slot["slot"], slot["active"]["version"], slot["previous"]["version"]) for slot in answer["slots"]] == [
        (None, None, None),
        ("gears", "2", "1"),
    ]
    assert [(model["file"], model["state"]) for model in answer["models"]][:3] == [
        ("gears-1.kizu", "previous"),
        ("gears-2.kizu", "active"),
        ("gears-3.kizu", "failed"),
    ]
    assert answer["models"][2]["reason"] == "5 of 5 frames"
    assert keeper.orders == []


@pytest.mark.parametrize("by", [{"sha256": "1a1a1a1a"}, {"name": "gears", "version": "1"}])
def test_activate_is_passed_on(ask: Ask, keeper: Keeper, by: dict[str, str]) -> None:
    """A stored model is found by hash or by name and version; the answer says that its outcome is to follow."""
    answer = ask({"action": "activate", "request_id": "5", **by})
    assert (answer["ok"], answer["outcome"], answer["target"]["version"]) == (True, "accepted", "1")
    assert keeper.orders == [ModelOrder("gears", "gears-1.kizu")]


def test_activating_what_serves_changes_nothing(ask: Ask, keeper: Keeper) -> None:
    """The same command twice is harmless."""
    answer = ask({"action": "activate", "sha256": "2b2b2b2b"})
    assert (answer["outcome"], answer["target"]["version"], keeper.orders) == ("unchanged", "2", [])


def test_rollback_is_passed_on(ask: Ask, keeper: Keeper) -> None:
    """The answer names the model that is to serve again."""
    answer = ask({"action": "rollback", "slot": "gears"})
    assert (answer["outcome"], answer["target"]["version"]) == ("accepted", "1")
    assert keeper.orders == [ModelOrder("gears")]


@pytest.mark.parametrize(
    ("payload", "code", "words"),
    [
        ({"action": "activate"}, "invalid", "sha256, or name and version"),
        ({"action": "activate", "name": "gears"}, "invalid", "sha256, or name and version"),
        ({"action": "activate", "sha256": "1a1a1a1a", "name": "gears", "version": "1"}, "invalid", "or name"),
        ({"action": "activate", "sha256": "1a"}, "invalid", "sha256"),
        ({"action": "activate", "sha256": "1A1A1A1A"}, "invalid", "sha256"),
        ({"action": "activate", "sha256": "00000000"}, "unknown_model", "list"),
        ({"action": "activate", "name": "gears", "version": "3"}, "ambiguous", "3c3c3c3c"),
        ({"action": "activate", "name": "plates", "version": "1"}, "invalid", "no camera asks"),
        ({"action": "activate", "sha256": "1a1a1a1a", "slot": "gears"}, "invalid", "slot"),
        ({"action": "rollback"}, "no_previous", "activate"),
        ({"action": "rollback", "slot": "bolts"}, "invalid", "gears"),
        ({"action": "rollback", "slot": "gears", "name": "gears"}, "invalid", "name"),
        ({"action": "list", "sha256": "1a1a1a1a"}, "invalid", "sha256"),
        ({"action": "delete"}, "invalid", "action"),
        (b"[]", "invalid", "object"),
    ],
)
def test_a_refused_command_says_why_and_does_nothing(
    ask: Ask, keeper: Keeper, payload: bytes | dict[str, Any], code: str, words: str
) -> None:
    """Errors are typed, name what is wrong, and the answer has the keys of any other."""
    answer = ask(payload)
    assert (answer["ok"], answer["error"]["code"], answer["outcome"], keeper.orders) == (False, code, None, [])
    assert words in answer["error"]["message"]
    assert answer.keys() == ask().keys()


def test_a_keeper_that_has_enough_to_do_is_told(ask: Ask, keeper: Keeper) -> None:
    """A command beyond those that wait is refused, not lost in silence."""
    keeper.is_busy = True
    assert ask({"action": "rollback", "slot": "gears"})["error"]["code"] == "busy"


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=200)
@given(
    st.dictionaries(
        st.sampled_from(["action", "sha256", "name", "version", "slot", "request_id", "x"]),
        st.none()
        | st.booleans()
        | st.integers()
        | st.text(max_size=80)
        | st.sampled_from(["list", "activate", "rollback", "gears", "1", "1a1a1a1a"]),
    )
)
def test_whatever_is_sent_is_answered(ask: Ask, payload: dict[str, Any]) -> None:
    """No request goes without a well-formed answer, and none raises."""
    answer = ask(payload)
    assert answer["ok"] == (answer["error"]["code"] is None) == (answer["outcome"] is not None)
