"""The commands `ping`, `status` and `rebirth`."""

from collections.abc import Callable
from functools import partial
from typing import Annotated, Any

from pydantic import Field

from kizu_agent.answers import PingAnswer, RebirthAnswer, StatusAnswer
from kizu_agent.commands import Command
from kizu_agent.errors import CommandError
from kizu_agent.payloads import StatusPayload
from kizu_agent.requests import Request


class PingRequest(Request):
    """`echo` comes back."""

    echo: Annotated[str, Field(max_length=1024)] | None = None


class StatusRequest(Request):
    """Ask for the agent's status."""


class RebirthRequest(Request):
    """Have the Sparkplug node publish its births anew."""


def rebirth_command(rebirth: Callable[[], None] | None) -> Command[RebirthRequest, RebirthAnswer]:
    """The command that calls `rebirth`; None where there is no Sparkplug node."""

    def carry_out(_request: RebirthRequest, answer: RebirthAnswer) -> RebirthAnswer:
        if rebirth is None:
            raise CommandError("not_enabled", "there is no Sparkplug node in this agent")
        rebirth()
        return answer

    return Command("rebirth", RebirthRequest, RebirthAnswer, carry_out)


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
