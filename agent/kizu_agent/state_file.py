"""A small file of the state directory: what commands changed, kept over restarts."""

from pathlib import Path
from typing import Generic, TypeVar

import structlog
from pydantic import BaseModel, ValidationError

from kizu_contract.bundle import write_atomically

log = structlog.get_logger(__name__)

Kept = TypeVar("Kept", bound=BaseModel)


class StateFile(Generic[Kept]):
    """One file of JSON that holds a `kind`; `problem` says in words why what it held is lost, None where nothing is."""

    def __init__(self, path: Path, kind: type[Kept]) -> None:
        self.problem: str | None = None
        self._path, self._kind = path, kind

    def load(self) -> Kept | None:
        """Read it; None where there is none or it cannot be read. A damaged one is moved aside."""
        try:
            return self._kind.model_validate_json(self._path.read_bytes())
        except FileNotFoundError:
            return None
        except OSError as exc:
            self.problem = f"{self._path}: cannot be read: {exc.strerror}"
        except ValidationError as exc:
            aside = self._path.with_name(f"{self._path.name}.damaged")
            self._path.replace(aside)
            first = exc.errors(include_url=False, include_input=False)[0]["msg"]
            self.problem = f"{self._path}: is damaged ({first}); moved to {aside.name}"
        log.error("what commands had set is lost", problem=self.problem)
        return None

    def save(self, kept: Kept) -> None:
        """Write it durably. Raises OSError, and the old file stays."""
        write_atomically(self._path, kept.model_dump_json(indent=2).encode())
        self.problem = None
