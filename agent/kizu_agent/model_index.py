"""The store's record, `models/current.json`: what serves each slot, what is on trial, what failed, what each file is.

Earlier agents knew `slots` alone: they read this record too, and this agent theirs.
"""

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, TypeVar

from kizu_agent.records import ModelId

MAX_FAILURES = 100
"""Failed models that are remembered; the oldest are forgotten first."""
_ANY_SLOT = "*"
_FILE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.+-]*\.kizu")
Item = TypeVar("Item")


@dataclass(frozen=True)
class Entry:
    """What a slot uses: the file's name in the store, the one before it, and since when (UTC text)."""

    file: str
    previous: str | None
    since: str | None = None


@dataclass(frozen=True)
class Trial:
    """A model that is being loaded or on probation: where a start finds this, the model may have killed the agent.

    `starts` counts the starts with it that did not end in an orderly stop; 0 after one. Without `is_judged` only its
    survival is asked for.
    """

    file: str
    starts: int = 1
    is_judged: bool = True


@dataclass(frozen=True)
class Failure:
    """Why a model is not to be used again, and since when (UTC text)."""

    reason: str
    at: str


@dataclass(frozen=True)
class Stored:
    """What a file of the store holds. `created` by its manifest, `since` when it was stored (UTC text)."""

    name: str
    version: str
    sha256: str
    created: str
    since: str

    @property
    def model(self) -> ModelId:
        """The model's id."""
        return ModelId(self.name, self.version, self.sha256)


@dataclass(frozen=True)
class Index:
    """The whole record. `failures` by the content hash of the bundle, `models` by file.

    `signers`: files → fingerprint of the trusted key that signed them; a table of its own, for earlier agents.
    """

    slots: Mapping[str | None, Entry] = field(default_factory=dict)
    trials: Mapping[str | None, Trial] = field(default_factory=dict)
    failures: Mapping[str, Failure] = field(default_factory=dict)
    models: Mapping[str, Stored] = field(default_factory=dict)
    signers: Mapping[str, str] = field(default_factory=dict)

    def to_json(self) -> bytes:
        """Write as schema 1."""
        failures = dict(sorted(self.failures.items(), key=lambda item: item[1].at)[-MAX_FAILURES:])
        tables = {"slots": _named(self.slots), "trials": _named(self.trials), "failures": _plain(failures)}
        files = {"models": _plain(self.models), "signers": dict(self.signers)}
        return json.dumps({"schema": 1, **tables, **files}, indent=2).encode()

    @classmethod
    def from_json(cls, data: bytes) -> "Index":
        """Read schema 1. Raises ValueError, TypeError, KeyError, AttributeError or RecursionError when damaged."""
        raw = json.loads(data)
        return cls(
            {_slot(name): _entry(item) for name, item in raw["slots"].items()},
            {_slot(name): _trial(item) for name, item in raw.get("trials", {}).items()},
            _records(raw.get("failures", {}), Failure),
            {_file(name): item for name, item in _records(raw.get("models", {}), Stored).items()},
            {_file(name): str(key) for name, key in raw.get("signers", {}).items()},
        )


def _named(table: Mapping[str | None, Entry] | Mapping[str | None, Trial]) -> dict[str, Any]:
    return {_ANY_SLOT if slot is None else slot: asdict(item) for slot, item in table.items()}


def _plain(table: Mapping[str, Failure] | Mapping[str, Stored]) -> dict[str, Any]:
    return {name: asdict(item) for name, item in table.items()}


def _slot(name: str) -> str | None:
    return None if name == _ANY_SLOT else name


def _file(name: Any) -> str:
    if not isinstance(name, str) or not _FILE_NAME.fullmatch(name):
        raise ValueError("not a name in the store")
    return name


def _entry(raw: Mapping[str, Any]) -> Entry:
    previous, since = raw["previous"], raw.get("since")
    return Entry(
        _file(raw["file"]), None if previous is None else _file(previous), None if since is None else str(since)
    )


def _trial(raw: Mapping[str, Any]) -> Trial:
    return Trial(_file(raw["file"]), int(raw["starts"]), bool(raw["is_judged"]))


def _records(raw: Mapping[str, Mapping[str, Any]], kind: Callable[..., Item]) -> dict[str, Item]:
    return {name: kind(**{key: str(value) for key, value in item.items()}) for name, item in raw.items()}
