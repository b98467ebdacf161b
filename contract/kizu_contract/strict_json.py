"""JSON read strictly into frozen dataclasses and back: nothing missing, nothing added, no type bent."""

import json
import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import Field, fields, is_dataclass
from types import NoneType, UnionType
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from kizu_contract.errors import ManifestError

_MAX_DEPTH = 32
_MAX_INTEGER = 2**63

Record = TypeVar("Record")


def parse_json(data: bytes, name: str) -> Any:
    """Read UTF-8 JSON: no key twice, no NaN or infinity, integers of 64 bits, at most 32 levels, no lone surrogate.

    Raises ManifestError that begins with `name`.
    """
    try:
        raw = json.loads(
            data.decode(),
            parse_constant=_refuse_constant,
            parse_float=_parse_float,
            parse_int=_parse_int,
            object_pairs_hook=_parse_object,
        )
        _check_depth(raw, _MAX_DEPTH)
        # A lone surrogate fails here: nothing downstream could write it.
        json.dumps(raw, ensure_ascii=False).encode()
    except (ValueError, RecursionError) as exc:
        raise ManifestError(f"{name} is not JSON as kizu reads it: {exc!s:.200}") from exc
    return raw


def parse_record(kind: type[Record], raw: object, where: str) -> Record:
    """Build the frozen dataclass `kind` from JSON data. Raises ManifestError that names the place as `where.key`.

    Fields may be str, bool, int, float, a Literal of strings, a tuple, a Mapping with string keys, or a dataclass.
    One that is None by default may be absent, and is never null.
    """
    if not isinstance(raw, dict):
        raise ManifestError(f"{where} must be an object, not {type(raw).__name__}")
    hints = get_type_hints(kind)
    names = {field.name: _may_be_absent(field) for field in fields(kind)}  # type: ignore[arg-type]  # it is a dataclass
    missing = sorted(name for name, may in names.items() if name not in raw and not may)
    unknown = sorted(raw.keys() - names.keys())
    if missing or unknown:
        raise ManifestError(f"{where}: missing keys {missing}, unknown keys {unknown!s:.200}")
    values = {name: _parse(hints[name], raw[name], f"{where}.{name}") for name in names if name in raw}
    try:
        return kind(**values)
    except ValueError as exc:
        raise ManifestError(f"{where}: {exc}") from exc


def to_plain(value: Any) -> Any:
    """Turn dataclasses into dicts and tuples into lists, all the way down: what `json.dumps` takes.

    A field that is None, and None by default, is left out.
    """
    if is_dataclass(value):
        found = ((field, getattr(value, field.name)) for field in fields(value))
        return {field.name: to_plain(item) for field, item in found if not (item is None and _may_be_absent(field))}
    if isinstance(value, Mapping):
        return {key: to_plain(item) for key, item in value.items()}
    if isinstance(value, tuple | list):
        return [to_plain(item) for item in value]
    return value


def _may_be_absent(field: "Field[Any]") -> bool:
    return field.default is None


def _parse(hint: Any, raw: object, where: str) -> Any:
    origin, args = get_origin(hint), get_args(hint)
    if origin in (UnionType, Union):
        (hint,) = (kind for kind in args if kind is not NoneType)
        return _parse(hint, raw, where)
    if origin is Literal:
        return _parse_literal(args, raw, where)
    if origin is tuple:
        return _parse_tuple(args, raw, where)
    if origin is not None and issubclass(origin, Mapping):
        return _parse_mapping(args[1], raw, where)
    if is_dataclass(hint):
        return parse_record(hint, raw, where)  # type: ignore[arg-type]  # is_dataclass also admits instances
    return _parse_value(hint, raw, where)


def _parse_literal(choices: tuple[str, ...], raw: object, where: str) -> str:
    if isinstance(raw, str) and raw in choices:
        return raw
    raise ManifestError(f"{where} is {raw!r:.80}; it must be one of {', '.join(choices)}")


def _parse_tuple(kinds: tuple[Any, ...], raw: object, where: str) -> tuple[Any, ...]:
    is_open = kinds[-1] is ...
    if not isinstance(raw, list) or not (is_open or len(raw) == len(kinds)):
        raise ManifestError(f"{where} must be a list of {'any' if is_open else len(kinds)} entries")
    each = [kinds[0]] * len(raw) if is_open else list(kinds)
    return tuple(_parse(kind, item, f"{where}[{i}]") for i, (kind, item) in enumerate(zip(each, raw, strict=True)))


def _parse_mapping(kind: Any, raw: object, where: str) -> dict[str, Any]:
    if not isinstance(raw, dict):
        raise ManifestError(f"{where} must be an object, not {type(raw).__name__}")
    return {key: value if kind is Any else _parse(kind, value, f"{where}.{key:.80}") for key, value in raw.items()}


def _parse_value(kind: type, raw: object, where: str) -> Any:
    if isinstance(raw, bool) != (kind is bool) or not isinstance(raw, int | float if kind is float else kind):
        raise ManifestError(f"{where} is {raw!r:.80}; it must be a {kind.__name__}")
    return kind(raw)


def _check_depth(raw: object, levels: int) -> None:
    if levels < 0:
        raise ValueError(f"nested deeper than {_MAX_DEPTH} levels")
    for item in raw.values() if isinstance(raw, dict) else raw if isinstance(raw, list) else ():
        _check_depth(item, levels - 1)


def _parse_object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        counts = Counter(key for key, _ in pairs)
        raise ValueError(f"key {counts.most_common(1)[0][0]!r:.80} stands there twice")
    return found


def _parse_float(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(f"{text:.80} is too large a number")
    return number


def _parse_int(text: str) -> int:
    number = int(text) if len(text) <= 20 else _MAX_INTEGER
    if not -_MAX_INTEGER <= number < _MAX_INTEGER:
        raise ValueError(f"{text:.80} is too large a number")
    return number


def _refuse_constant(text: str) -> float:
    raise ValueError(f"{text} is not a JSON number")
