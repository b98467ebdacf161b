"""Who changed what: each change that a command made goes to the plant, durably, and into the log."""

import uuid
from collections.abc import Callable
from dataclasses import asdict, dataclass

import structlog
from pydantic import BaseModel

from kizu_agent.clock import Clock
from kizu_agent.encoding import to_bytes, utc_now
from kizu_agent.errors import OutboxError
from kizu_agent.outbox import Outbox
from kizu_agent.payloads import AuditPayload
from kizu_agent.records import Message, Priority
from kizu_agent.topics import Topics

log = structlog.get_logger(__name__)


@dataclass(frozen=True)
class Change:
    """What changed (`subject`, e.g. `camera top`), and what was and is there; None where there is nothing."""

    subject: str
    old: BaseModel | None
    new: BaseModel | None


@dataclass(frozen=True)
class By:
    """Who asked for it: the command, its `user` as far as the request says (nobody vouches for it), and its id."""

    command: str
    user: str | None = None
    request_id: str | None = None


class Audit:
    """Tells changes; from any thread."""

    def __init__(self, topics: Topics, outbox: Outbox, wake: Callable[[], None]) -> None:
        self._topics, self._outbox, self._wake = topics, outbox, wake
        self._clock = Clock()

    def __call__(self, change: Change, by: By) -> None:
        """Tell `change`; a disk that refuses it is counted as a lost event, and the log has it all the same."""
        told = {**asdict(by), "subject": change.subject, "old": _text(change.old), "new": _text(change.new)}
        log.info("changed", **told)
        payload = AuditPayload(
            id=str(uuid.uuid4()),
            agent=self._topics.agent,
            changed_at=utc_now(),
            time_quality=self._clock.quality,
            **told,
        )
        try:
            self._outbox.put([Message(self._topics.audit, to_bytes(payload), priority=Priority.EVENT)])
        except OutboxError as exc:
            self._outbox.note_loss("disk", Priority.EVENT)
            log.warning("a change is not told to the plant", subject=change.subject, reason=str(exc))
        self._wake()


def _text(value: BaseModel | None) -> str | None:
    """One text, whatever the command: a SCADA's tag has one type."""
    return None if value is None else to_bytes(value).decode()
