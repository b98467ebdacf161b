"""How requests become answers: each command is a request, a function and an answer, and this reads, checks, answers.

On the way: how many are carried out (rate_limit), whether it was asked before (request_memory), who changed what
(audit), and what became of it (command_counts).
"""

import threading
import uuid
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from datetime import datetime, timezone
from typing import Any, Generic, TypeVar

from pydantic import ValidationError

from kizu_agent.answers import Answer, ErrorPart
from kizu_agent.audit import By, Change
from kizu_agent.clock import TimeQuality, read_quality
from kizu_agent.command_counts import CommandCounts, CommandOutcome
from kizu_agent.encoding import to_bytes, utc_now
from kizu_agent.errors import CommandError
from kizu_agent.rate_limit import Gate
from kizu_agent.records import CommandAnswer, CommandRequest
from kizu_agent.request_memory import RequestMemory
from kizu_agent.requests import MAX_REQUEST_ID, Request, explain, parse_time
from kizu_contract.errors import KizuError
from kizu_contract.strict_json import parse_json

MAX_REQUEST_BYTES = 64 * 1024
MOST_WAITERS = 8
"""So many requesters of one id are told when it is done; more are not answered."""
_MAX_TEXT = 500
"""An error message tells at most this much of what went wrong."""
_OUTCOMES: dict[str, CommandOutcome] = {"rate_limited": "rate_limited", "expired": "expired"}

Asked = TypeVar("Asked", bound=Request)
Answered = TypeVar("Answered", bound=Answer)


def _changes_nothing(_request: Any, _answer: Any) -> None:
    return None


@dataclass(frozen=True)
class Command(Generic[Asked, Answered]):
    """A command by its `name`: what a request must be, what an answer is, and what turns one into the other.

    `blank` makes the answer to which nothing is known yet, from the members that all answers have; `carry_out` fills
    it in, or raises CommandError and has changed nothing then. `change` says what an answer that was carried out
    changed, None for nothing. A change, and where `is_kept` anything else, is done once for each request id.
    """

    name: str
    request: type[Asked]
    blank: Callable[..., Answered]
    carry_out: Callable[[Asked, Answered], Answered]
    change: Callable[[Asked, Answered], Change | None] = _changes_nothing
    is_kept: bool = False


@dataclass(frozen=True)
class SlowCommand(Generic[Asked, Answered]):
    """A command whose answer comes later: `begin` gets the request, the blank answer, and who takes the answer.

    It may raise CommandError, and answers nothing then. Each request id is carried out once.
    """

    name: str
    request: type[Asked]
    blank: Callable[..., Answered]
    begin: Callable[[Asked, Answered, int, Callable[[Answered], None]], None]
    """The integer is `time.monotonic_ns()` of the command's arrival."""


AnyCommand = Command[Any, Any] | SlowCommand[Any, Any]
Reply = Callable[[CommandRequest, CommandAnswer], None]


class Commands:
    """Answers every request, whatever it holds; from any thread.

    `reply` takes the answers that come later. Without `gate` every command is carried out, without `memory` also one
    that comes again; `audit` hears of changes.
    """

    def __init__(
        self,
        agent: str,
        commands: Iterable[AnyCommand],
        reply: Reply = lambda _request, _answer: None,
        gate: Gate | None = None,
        memory: RequestMemory | None = None,
        audit: Callable[[Change, By], None] = lambda _change, _by: None,
        quality: Callable[[], TimeQuality] = read_quality,
    ) -> None:
        self._agent = agent
        self._commands = {command.name: command for command in commands}
        self._reply, self._gate, self._memory, self._audit, self._quality = reply, gate, memory, audit, quality
        self._under_way: dict[tuple[str, str], list[CommandRequest]] = {}
        self._lock = threading.Lock()
        self.counts = CommandCounts(self._commands)

    def handle(self, request: CommandRequest) -> CommandAnswer | None:
        """Carry out `request`; never raises for anything that a request may hold.

        Gives the answer; None where it comes later, or where it is one of too many that are refused. A refused command
        has changed nothing; its answer has the same keys as any other answer of that command.
        """
        is_allowed = self._gate is None or self._gate.allows(request.name)
        if not is_allowed and self._gate is not None and not self._gate.may_refuse():
            self.counts.note(request.name, "rate_limited")
            return None
        command = self._commands.get(request.name)
        blank = command.blank if command else Answer
        answer = blank(id=str(uuid.uuid4()), agent=self._agent, command=request.name[:64], answered_at=utc_now())
        try:
            raw = _parse(request.payload)
            answer = answer.model_copy(update={"request_id": _request_id(raw)})
            if not is_allowed:
                raise CommandError("rate_limited", "too many of these commands; nothing was done, try again later")
            if command is None:
                known = ", ".join(self._commands)
                raise CommandError("unknown_command", f"there is no command {request.name[:64]!r}; there are {known}")
            return self._carry_out(command, request, _validate(command.request, raw), answer)
        except CommandError as exc:
            self.counts.note(request.name, _OUTCOMES.get(exc.code, "refused"), f"{exc.code}: {str(exc)[:_MAX_TEXT]}")
            error = ErrorPart(code=exc.code, message=str(exc)[:_MAX_TEXT])
            return CommandAnswer(to_bytes(answer.model_copy(update={"ok": False, "error": error})))

    def _carry_out(
        self, command: AnyCommand, request: CommandRequest, asked: Request, answer: Answer
    ) -> CommandAnswer | None:
        earlier = self._earlier(command.name, asked, request)
        if earlier is not None:
            self.counts.note(command.name, "repeated")
            return CommandAnswer(earlier)
        self._check_expiry(asked)
        if isinstance(command, SlowCommand):
            self._begin(command, request, asked, answer)
            return None
        answer = command.carry_out(asked, answer)
        change = command.change(asked, answer)
        payload = to_bytes(answer)
        if change is not None:
            self._audit(change, By(command.name, request.user, asked.request_id))
        if change is not None or command.is_kept:
            self._keep(command.name, asked, request, payload, is_durable=change is not None)
        self.counts.note(command.name, "done")
        return CommandAnswer(payload)

    def _begin(self, command: SlowCommand[Any, Any], request: CommandRequest, asked: Request, answer: Answer) -> None:
        """Begin, unless the same request is under way: its answer is this one's too."""
        key = (command.name, asked.request_id or answer.id)
        with self._lock:
            waiters = self._under_way.get(key)
            if waiters is not None:
                waiters[:] = [*waiters, request][:MOST_WAITERS]
                self.counts.note(command.name, "repeated")
                return
            self._under_way[key] = [request]

        def finish(done: Answer) -> None:
            payload = to_bytes(done)
            self._keep(command.name, asked, request, payload, is_durable=False)
            self.counts.note(command.name, "done" if done.ok else "refused", done.error.code)
            for waiter in self._close(key):
                self._reply(waiter, CommandAnswer(payload))

        try:
            command.begin(asked, answer, request.came_mono_ns, finish)
        except CommandError:
            self._close(key)
            raise

    def _close(self, key: tuple[str, str]) -> list[CommandRequest]:
        with self._lock:
            return self._under_way.pop(key, [])

    def _earlier(self, name: str, asked: Request, request: CommandRequest) -> bytes | None:
        if self._memory is None or asked.request_id is None:
            return None
        return self._memory.find(name, asked.request_id, request.payload)

    def _keep(self, name: str, asked: Request, request: CommandRequest, payload: bytes, *, is_durable: bool) -> None:
        if self._memory is not None and asked.request_id is not None:
            self._memory.keep(name, asked.request_id, request.payload, payload, is_durable=is_durable)

    def _check_expiry(self, asked: Request) -> None:
        # A clock that nobody keeps right would refuse good commands, or take old ones: it is not asked.
        if asked.expires_at is None or self._quality() != "synchronised":
            return
        if datetime.now(timezone.utc) > parse_time(asked.expires_at):
            raise CommandError("expired", f"its time was up at {asked.expires_at}; nothing was done")


def _parse(payload: bytes) -> dict[str, Any]:
    """Read a JSON object; nothing at all stands for an empty one."""
    if len(payload) > MAX_REQUEST_BYTES:
        raise CommandError("too_large", f"a request of {len(payload)} bytes; at most {MAX_REQUEST_BYTES} are read")
    try:
        raw = parse_json(payload, "the request") if payload.strip() else {}
    except KizuError as exc:
        raise CommandError("invalid_json", str(exc)) from exc
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
