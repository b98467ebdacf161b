"""The example configuration loads, names every option, and says the defaults that hold; so does docs/operations.md."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import pytest
from pydantic import BaseModel, SecretStr
from pydantic_core import PydanticUndefined

from kizu_agent.config import Config, load_config

ROOT = Path(__file__).parents[2]
EXAMPLE = ROOT / "deploy" / "agent.example.toml"
OPERATIONS = ROOT / "docs" / "operations.md"


def _options(model: type[BaseModel], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Each option as (`table.key`, default); tables inside tables as well."""
    for name, field in model.model_fields.items():
        inner = [kind for kind in _kinds(field.annotation) if isinstance(kind, type) and issubclass(kind, BaseModel)]
        if inner:
            yield from _options(inner[0], f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", field.default


def _kinds(annotation: Any) -> list[Any]:
    return [annotation, *(kind for argument in get_args(annotation) for kind in _kinds(argument))]


def _plain(default: Any) -> Any:
    if default is PydanticUndefined:
        return "required"
    if isinstance(default, tuple):
        return list(default)
    return str(default) if isinstance(default, Path | SecretStr) else default


OPTIONS = {name: _plain(default) for name, default in _options(Config)}


def test_options_are_found() -> None:
    """The walk over the models finds options at every depth."""
    assert OPTIONS["agent.name"] == "required"
    assert OPTIONS["mqtt.tls.ca_file"] == "required"
    assert OPTIONS["cameras.events.close_n"] == 3
    assert len(OPTIONS) > 40


@pytest.fixture(autouse=True)
def _clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    import os

    for name in [name for name in os.environ if name.startswith("KIZU_") or name == "CREDENTIALS_DIRECTORY"]:
        monkeypatch.delenv(name)


def test_example_loads() -> None:
    """The example is a configuration that the agent takes as it is."""
    config = load_config(EXAMPLE)
    assert config.agent.name == "box1"
    assert config.cameras[0].source.startswith("sim:")


def test_example_with_everything_loads(tmp_path: Path) -> None:
    """With every comment mark of an option taken away, the example still loads: no option is misspelt."""
    text = re.sub(r"^#(?=\[|[a-z0-9_]+ = )", "", EXAMPLE.read_text(), flags=re.MULTILINE)
    path = tmp_path / "agent.toml"
    path.write_text(text)
    assert load_config(path).cameras[0].region is not None


def _example_options() -> dict[str, tuple[str, str]]:
    """Each option of the example: `table.key` → (value as written, what follows)."""
    found, table = {}, ""
    for line in EXAMPLE.read_text().splitlines():
        heading = re.match(r"#?\[+([a-z0-9_.]+)\]+", line)
        option = re.match(r"#?([a-z0-9_]+) = (\"[^\"]*\"|\S+)(.*)", line)
        if heading:
            table = heading[1]
        elif option:
            found[f"{table}.{option[1]}"] = (option[2], option[3])
    return found


def test_example_names_every_option() -> None:
    """Every option stands in the example, and nothing else does."""
    assert _example_options().keys() == OPTIONS.keys()


def test_example_says_the_defaults() -> None:
    """A commented option of the example shows the default, unless it is called an example or has none."""
    for name, (value, note) in _example_options().items():
        default = OPTIONS[name]
        if default in ("required", None) or "example" in note or "mqtt.tls" in name:
            continue
        assert json.loads(value) == default or name == "mqtt.host", name


def _table() -> dict[str, str]:
    rows = re.findall(r"^\| `([a-z0-9_.]+)` \| (.+?) \|", OPERATIONS.read_text(), flags=re.MULTILINE)
    return dict(rows)


def test_operations_name_every_option() -> None:
    """The table in docs/operations.md has exactly the options that there are."""
    assert _table().keys() == OPTIONS.keys()


@pytest.mark.parametrize("name", sorted(OPTIONS))
def test_operations_say_the_defaults(name: str) -> None:
    """The table says each option's default, `required` or `none`."""
    default = OPTIONS[name]
    words = {"required": "required", None: "none"}
    wanted = words.get(default) if isinstance(default, str | None) else None
    assert _table()[name] == (wanted or f"`{json.dumps(default)}`")
