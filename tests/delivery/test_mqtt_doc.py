"""docs/mqtt.md tells the truth."""

import re
from pathlib import Path

import pytest

from kizu_agent import answers, payloads
from kizu_agent.encoding import to_bytes
from kizu_agent.payloads import Document

DOC = (Path(__file__).parents[2] / "docs" / "mqtt.md").read_text("utf-8")
EXAMPLES = re.findall(r"<!-- example: (\w+) -->\n```json\n(.*?)```", DOC, re.DOTALL)
ALL = {
    name: kind
    for name, kind in {**vars(payloads), **vars(answers)}.items()
    if isinstance(kind, type) and issubclass(kind, payloads.Payload)
}
_STRING_OR_SPACE = re.compile(r'("(?:[^"\\]|\\.)*")|\s+')


@pytest.mark.parametrize(("name", "text"), EXAMPLES, ids=[name for name, _ in EXAMPLES])
def test_each_example_is_what_the_agent_would_send(name: str, text: str) -> None:
    """An example has every key of its model in the model's order, and the agent would write these very bytes."""
    model = ALL[name]
    compact = _STRING_OR_SPACE.sub(lambda match: match[1] or "", text)
    assert to_bytes(model.model_validate_json(text)).decode() == compact


def test_every_payload_but_the_bare_answers_has_an_example() -> None:
    """No message goes out that the page does not show; a status answer is a ping's head and a status."""
    kinds = [kind for kind in ALL.values() if issubclass(kind, Document)]
    shown = {name for name, _ in EXAMPLES}
    assert {kind.__name__ for kind in kinds} - shown == {"Document", "Answer", "StatusAnswer"}


def test_the_page_names_every_key() -> None:
    """Each key of each payload stands somewhere on the page."""
    names = {field.alias or name for kind in ALL.values() for name, field in kind.model_fields.items()}
    assert (
        sorted(name for name in names if f"`{name}`" not in DOC and f'"{name}"' not in DOC and name != "status") == []
    )
