"""The commands `ping` and `status`."""

from collections.abc import Callable
from functools import partial
from typing import Annotated, Any

from pydantic import Field

from kizu_agent.answers import PingAnswer, StatusAnswer
from kizu_agent.commands import Command
from kizu_agent.payloads import StatusPayload
from kizu_agent.requests import Request


class PingRequest(Request):
    """`echo` comes back."""

    echo: Annotated[str, Field(max_length=1024)] | None = None


class StatusRequest(Request):
    """Ask for the agent's status."""


def ping_command(version: str) -> Command[PingRequest, PingAnswer]:
    """The command of an agent of this `version`."""
    return Command("ping", PingRequest, partial(PingAnswer, version=version), _echo)


def status_command(status: Callable[[], StatusPayload]) -> Command[StatusRequest, StatusAnswer]:
    """The command that tells `status`."""

    def blank(**known: Any) -> StatusAnswer:
        return StatusAnswer(status=status(), **known)

    return Command("status", StatusRequest, blank, lambda _request, answer: answer)


def _echo(request: PingRequest, answer: PingAnswer) -> PingAnswer:
    return answer.model_copy(update={"echo": request.echo})
