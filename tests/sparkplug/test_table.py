"""docs/sparkplug.md tells the truth: each requirement has tests, and they are there."""

import ast
import re
from pathlib import Path

from kizu_agent.sparkplug import metrics

FOLDER = Path(__file__).parent
DOC = (FOLDER.parents[1] / "docs" / "sparkplug.md").read_text("utf-8")
ROW = re.compile(r"^\| `([a-zA-Z0-9-]+)` \| (.*) \|$", re.MULTILINE)


def covered() -> dict[str, list[str]]:
    """Each requirement of the table with its tests, `name::test`."""
    return {number: re.findall(r"`(\w+::\w+)`", tests) for number, tests in ROW.findall(DOC)}


def there(name: str) -> set[str]:
    tree = ast.parse((FOLDER / f"test_{name}.py").read_text("utf-8"))
    return {f"{name}::{node.name}" for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}


def test_each_requirement_names_tests_that_exist() -> None:
    """No id without a test, no test that is not there, no id twice."""
    table = covered()
    assert len(table) == len(ROW.findall(DOC)) > 140
    named = {test for tests in table.values() for test in tests}
    assert [number for number, tests in table.items() if not tests] == []
    assert named - set().union(*(there(path.stem.removeprefix("test_")) for path in FOLDER.glob("test_*.py"))) == set()


def test_the_known_traps_are_in_the_table() -> None:
    """The requirements that known edges break are among those shown."""
    assert {
        "message-flow-edge-node-birth-publish-will-message-qos",
        "payloads-ndeath-will-message-publisher-disconnect-mqtt50",
        "principles-persistence-clean-session-50",
        "topics-nbirth-bdseq-increment",
        "operational-behavior-edge-node-termination-host-offline-timestamp",
    } <= covered().keys()


def test_the_page_names_every_metric() -> None:
    """Each metric's folder and name stand on the page."""
    for name in {**metrics.node_blank(), **metrics.device_blank(has_images=True)}:
        folder, _, last = name.rpartition("/")
        assert f"`{folder}/…`" in DOC or f"`{name}`" in DOC, name
        assert f"`{last}`" in DOC or f"`{name}`" in DOC, name
