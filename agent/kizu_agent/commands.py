"""How requests become answers: each command is a request, a function and an answer, and this reads, checks, answers."""

import uuid
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import structlog
from pydantic import ValidationError
from pydantic_core import from_json

from kizu_agent.answers import Answer, ErrorPart
from kizu_agent.encoding import to_bytes, utc_now
from kizu_agent.errors import CommandError
from kizu_agent.records import CommandAnswer, CommandRequest
from kizu_agent.requests import MAX_REQUEST_ID, Request, explain

log = structlog.get_logger(__name__)

MAX_REQUEST_BYTES = 64 * 1024
_MAX_TEXT = 500
"""An error message tells at most this much of what went wrong."""

Asked = TypeVar("Asked", bound=Request)
Answered = TypeVar("Answered", bound=Answer)


@dataclass(frozen=True)
class Command(Generic[Asked, Answered]):
    """A command by its `name`: what a request must be, what an answer is, and what turns one into the other.

    `blank` makes the answer to which nothing is known yet, from the members that all answers have; `carry_out` fills
    it in, or raises CommandError and has changed nothing then.
    """

    name: str
    request: type[Asked]
    blank: Callable[..., Answered]
    carry_out: Callable[[Asked, Answered], Answered]


AnyCommand = Command[Any, Any]


class Commands:
    """Answers every request, whatever it holds; called by one thread at a time."""

    def __init__(self, agent: str, commands: Iterable[AnyCommand]) -> None:
        self._agent = agent
        self._commands = {command.name: command for command in commands}

    def handle(self, request: CommandRequest) -> CommandAnswer:
        """Carry out `request` and answer it; never raises for anything that a request may hold.

        A refused command has changed nothing; its answer has the same keys as any other answer of that command.
        """
        command = self._commands.get(request.name)
        blank = command.blank if command else Answer
        answer = blank(id=str(uuid.uuid4()), agent=self._agent, command=request.name[:64], answered_at=utc_now())
        try:
            raw = _parse(request.payload)
            answer = answer.model_copy(update={"request_id": _request_id(raw)})
            if command is None:
                known = ", ".join(self._commands)
                raise CommandError("unknown_command", f"there is no command {request.name[:64]!r}; there are {known}")
            answer = command.carry_out(_validate(command.request, raw), answer)
        except CommandError as exc:
            error = ErrorPart(code=exc.code, message=str(exc)[:_MAX_TEXT])
            answer = answer.model_copy(update={"ok": False, "error": error})
            log.warning("command refused", command=answer.command, code=exc.code, message=error.message)
        return CommandAnswer(to_bytes(answer))


def _parse(payload: bytes) -> dict[str, Any]:
    """Read a JSON object; nothing at all stands for an empty one."""
    if len(payload) > MAX_REQUEST_BYTES:
        raise CommandError("too_large", f"a request of {len(payload)} bytes; at most {MAX_REQUEST_BYTES} are read")
    try:
        raw = from_json(payload, allow_inf_nan=False) if payload.strip() else {}
    except ValueError as exc:
        raise CommandError("invalid_json", f"the request is not JSON: {exc}") from exc
    if not isinstance(raw, dict):
        raise CommandError("invalid", "the request must be a JSON object")
    return raw


def _request_id(raw: dict[str, Any]) -> str | None:
    """The request's id for the answer, even where the rest of the request is refused."""
    found = raw.get("request_id")
    return found if isinstance(found, str) and len(found) <= MAX_REQUEST_ID else None


def _validate(kind: type[Asked], raw: dict[str, Any]) -> Asked:
    try:
        return kind.model_validate(raw)
    except ValidationError as exc:
        raise CommandError("invalid", explain(exc)) from exc
