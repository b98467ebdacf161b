"""Requests that were carried out, by their ids: one that comes again is answered as before, and changes nothing."""

import hashlib
import threading
from collections import OrderedDict
from pathlib import Path

import structlog
from pydantic import BaseModel, ConfigDict

from kizu_agent.errors import CommandError
from kizu_agent.state_file import StateFile

log = structlog.get_logger(__name__)

FILE_NAME = "requests.json"
DURABLE = 100
"""So many of the last requests that changed something are on disk: they are known after a restart too."""


class _Answered(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    command: str
    request_id: str
    digest: str
    answer: str


class _File(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    requests: list[_Answered]


class RequestMemory:
    """The last `size` requests; from any thread.

    Those that changed something are kept in `state_dir`; what the disk refuses is known until the agent ends.
    """

    def __init__(self, state_dir: Path, size: int) -> None:
        self._size = size
        self._lock = threading.Lock()
        self._known: OrderedDict[tuple[str, str], _Answered] = OrderedDict()
        self._durable: OrderedDict[tuple[str, str], _Answered] = OrderedDict()
        self._file = StateFile(state_dir / FILE_NAME, _File)
        for answered in (self._file.load() or _File(requests=[])).requests[-DURABLE:]:
            self._known[answered.command, answered.request_id] = answered
            self._durable[answered.command, answered.request_id] = answered

    def find(self, command: str, request_id: str, payload: bytes) -> bytes | None:
        """The first answer to this request; None where it is new.

        Raises CommandError (`request_id_reused`) where another request had the id: it was neither, then.
        """
        with self._lock:
            answered = self._known.get((command, request_id))
        if answered is None:
            return None
        if answered.digest != digest(payload):
            raise CommandError("request_id_reused", f"another {command} had the request_id {request_id[:64]!r}")
        return answered.answer.encode()

    def keep(self, command: str, request_id: str, payload: bytes, answer: bytes, *, is_durable: bool) -> None:
        """Remember the answer to a request."""
        answered = _Answered(
            command=command, request_id=request_id, digest=digest(payload), answer=answer.decode("utf-8", "replace")
        )
        with self._lock:
            _push(self._known, answered, self._size)
            if is_durable and self._size:
                _push(self._durable, answered, DURABLE)
                self._save()

    def _save(self) -> None:
        try:
            self._file.save(_File(requests=list(self._durable.values())))
        except OSError as exc:
            log.warning("a request's id is not kept over a restart", error=str(exc))


def digest(payload: bytes) -> str:
    """What tells one request from another under the same id."""
    return hashlib.sha256(payload).hexdigest()


def _push(table: OrderedDict[tuple[str, str], _Answered], answered: _Answered, size: int) -> None:
    table[answered.command, answered.request_id] = answered
    while len(table) > size:
        table.popitem(last=False)
