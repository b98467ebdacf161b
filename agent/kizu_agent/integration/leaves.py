"""The leaves of a JSON Schema: every value of a message by its path, with its type."""

from collections.abc import Iterator
from typing import Any, Literal, NamedTuple

LeafType = Literal["string", "integer", "number", "boolean"]
_TYPES: tuple[LeafType, ...] = ("string", "integer", "number", "boolean")


class Leaf(NamedTuple):
    """One value: the keys that lead to it, and its type where it is not null."""

    path: tuple[str, ...]
    type: LeafType


def leaves(schema: dict[str, Any]) -> list[Leaf]:
    """Every leaf of `schema`, in the order of the message.

    Left out are arrays and objects of free keys (the cameras of a status): no tag or column stands for them. Raises
    ValueError for a form that kizu's schemas do not use.
    """
    return list(_walk(schema, schema.get("$defs", {}), ()))


def _walk(part: dict[str, Any], definitions: dict[str, Any], path: tuple[str, ...]) -> Iterator[Leaf]:
    part = _resolve(part, definitions)
    kind = part.get("type") or ("string" if "enum" in part or isinstance(part.get("const"), str) else None)
    if kind == "object":
        for name, child in part.get("properties", {}).items():
            yield from _walk(child, definitions, (*path, name))
    elif kind in _TYPES:
        yield Leaf(path, kind)
    elif kind != "array":
        raise ValueError(f"{'.'.join(path)}: no type in {sorted(part)}")


def _resolve(part: dict[str, Any], definitions: dict[str, Any]) -> dict[str, Any]:
    """Follow references, and take the one alternative that is not null."""
    while "$ref" in part or "anyOf" in part:
        if "$ref" in part:
            part = definitions[part["$ref"].rpartition("/")[2]]
        else:
            real = [choice for choice in part["anyOf"] if choice.get("type") != "null"]
            if len(real) != 1:
                raise ValueError(f"{len(real)} alternatives: a tag has one type")
            part = real[0]
    return part
