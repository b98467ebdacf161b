"""The published schemas: generated from the code, whole, and true of what a running agent sends."""

import json
import re
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from faults.plant import Heard, pictures, plant, wait_for

from kizu_agent.integration.leaves import leaves
from kizu_agent.integration.schemas import MESSAGES, all_models, schema_of, schema_text
from kizu_agent.requests import Request

ROOT = Path(__file__).parents[2]
DOC = (ROOT / "docs" / "mqtt.md").read_text("utf-8")
EXAMPLES = re.findall(r"<!-- example: (\w+) -->\n```json\n(.*?)```", DOC, re.DOTALL)
BY_MODEL = {published.model.__name__: name for name, published in MESSAGES.items()}


def _published(name: str) -> dict[str, Any]:
    """A schema as the repository publishes it."""
    found: dict[str, Any] = json.loads((ROOT / "docs" / "schemas" / f"{name}.json").read_text("utf-8"))
    return found


def test_the_published_schemas_are_what_the_code_makes() -> None:
    """Run scripts/generate when this fails."""
    found = {path.stem: path.read_text("utf-8") for path in (ROOT / "docs" / "schemas").glob("*.json")}
    assert {name for name in MESSAGES if found.get(name) != schema_text(name)} == set()
    assert set(found) == set(MESSAGES)


def test_every_message_is_published() -> None:
    """A new payload or request is in the table."""
    published = {message.model for message in MESSAGES.values()}
    assert {model.__name__ for model in all_models() - published} == {"Document"}


@pytest.mark.parametrize(("name", "text"), EXAMPLES, ids=[name for name, _ in EXAMPLES])
def test_the_documented_examples_are_valid(name: str, text: str) -> None:
    """An example fits its schema, and no longer when a key is missing, added, or of another type."""
    validator = jsonschema.Draft202012Validator(_published(BY_MODEL[name]))
    example = json.loads(text)
    validator.validate(example)
    last = list(example)[-1]
    wrong = [{k: v for k, v in example.items() if k != last}, {**example, "surplus": 1}, {**example, "schema": "1"}]
    assert [validator.is_valid(broken) for broken in wrong] == [False] * 3


def test_requests_take_what_the_agent_takes() -> None:
    """A schema of a request and its model agree."""
    tried: list[tuple[str, dict[str, Any]]] = [
        ("request_ping", {}),
        ("request_ping", {"echo": "x", "request_id": "1"}),
        ("request_ping", {"echo": 1}),
        ("request_thresholds", {"camera": "top"}),
        ("request_thresholds", {"camera": "top", "action": "set", "warn_rate": 0.5, "reject_rate": 0.1}),
        ("request_thresholds", {"camera": "top", "warn_rate": 1.0}),
        ("request_thresholds", {"action": "get"}),
        ("request_model", {"action": "activate", "sha256": "XYZ"}),
        ("request_status", {"surplus": None}),
    ]
    for name, request in tried:
        model = MESSAGES[name].model
        assert issubclass(model, Request)
        try:
            model.model_validate(request)
            is_taken = True
        except ValueError:
            is_taken = False
        assert jsonschema.Draft202012Validator(_published(name)).is_valid(request) is is_taken, (name, request)


def test_leaves_hold_every_value_of_an_example() -> None:
    """The paths that tags and columns are made of are those of the messages, arrays and free keys aside."""
    example = json.loads(next(text for name, text in EXAMPLES if name == "ResultPayload"))
    found = {leaf.path: leaf.type for leaf in leaves(schema_of("result"))}
    assert set(found) == {path for path in _paths(example, ()) if path[0] != "zones"}
    assert found["timing", "waited_ms"] == "number"
    assert found["score",] == "number"
    assert found["seq",] == "integer"
    assert found["verdict",] == "string"


def _paths(value: Any, path: tuple[str, ...]) -> list[tuple[str, ...]]:
    if not isinstance(value, dict):
        return [path]
    return [found for key, item in value.items() for found in _paths(item, (*path, key))]


def test_what_a_running_agent_sends_fits(tmp_path: Path) -> None:
    """Every JSON message of a whole run, states of the stop included, fits the schema of its topic."""
    folder = pictures(tmp_path / "pictures", count=40)
    cameras = f'[[cameras]]\nname = "cam"\nsource = "folder:{folder}?loop=true&rate=20"\n'
    with plant(tmp_path, cameras) as site:
        site.begin(30)
        site.agent.stop()
        wait_for(lambda: site.subscriber.of("/status")[-1].json["state"] == "offline", 10, "the last word")
        heard = [message for message in list(site.subscriber.messages) if not message.topic.endswith("/mark")]
    kinds = {_kind(message) for message in heard}
    assert kinds >= {"status", "state", "result", "event", "model"}
    for message in heard:
        jsonschema.Draft202012Validator(_published(_kind(message))).validate(message.json)


def _kind(message: Heard) -> str:
    return message.topic.rpartition("/")[2]
