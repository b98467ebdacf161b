"""docs/bundle-format.md names what the code has: members, limits and every key of the manifest."""

import re
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import get_args, get_type_hints

from kizu_contract.bundle import LIMITS
from kizu_contract.manifest import Manifest

DOCUMENT = (Path(__file__).parents[2] / "docs" / "bundle-format.md").read_text()
UNITS = {"bytes": 1, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30}


def _keys(kind: type, prefix: str = "") -> Iterator[str]:
    hints = get_type_hints(kind)
    for field in fields(kind):
        inner = hints[field.name]
        if type(None) in get_args(inner):
            inner = get_args(inner)[0]
        if is_dataclass(inner) and isinstance(inner, type):
            yield from _keys(inner, f"{prefix}{field.name}.")
        else:
            yield f"{prefix}{field.name}"


def test_every_key_is_described() -> None:
    """The table of the manifest has exactly the keys that the manifest has, in its order."""
    table = DOCUMENT.partition("## `manifest.json`")[2]
    assert re.findall(r"^\| `([a-z_.]+)` \|", table, flags=re.MULTILINE) == list(_keys(Manifest))


def test_members_and_limits() -> None:
    """The table of members has the names and the limits that readers apply."""
    rows = re.findall(r"^\| `([A-Za-z0-9.]+)` \| (\d+) (\w+) \|", DOCUMENT, flags=re.MULTILINE)
    assert {name: int(size) * UNITS[unit] for name, size, unit in rows} == LIMITS
