"""The commands `pause` and `resume`, of one camera or of all."""

from collections.abc import Callable, Collection
from functools import partial
from typing import Annotated

from pydantic import Field

from kizu_agent.answers import PauseAnswer, PausedPart
from kizu_agent.audit import Change
from kizu_agent.commands import Command
from kizu_agent.errors import CommandError, unknown_camera
from kizu_agent.pauses import PauseBook
from kizu_agent.requests import Request


class PauseRequest(Request):
    """Pause or resume `camera`; null: all."""

    camera: Annotated[str, Field(min_length=1, max_length=64)] | None = None


def pause_commands(
    book: PauseBook, cameras: Collection[str], on_change: Callable[[], None]
) -> tuple[Command[PauseRequest, PauseAnswer], Command[PauseRequest, PauseAnswer]]:
    """Both commands on `book`; `on_change` hears that other cameras may be paused now."""
    pause, resume = (
        Command(name, PauseRequest, PauseAnswer, partial(_carry_out, book, cameras, on_change, is_paused), _change)
        for name, is_paused in (("pause", True), ("resume", False))
    )
    return pause, resume


def _carry_out(
    book: PauseBook,
    cameras: Collection[str],
    on_change: Callable[[], None],
    is_paused: bool,
    request: PauseRequest,
    answer: PauseAnswer,
) -> PauseAnswer:
    """Answer `request`. Raises CommandError, and then nothing has changed."""
    if request.camera is not None and request.camera not in cameras:
        raise unknown_camera(request.camera, cameras)
    old = sorted(book.paused & set(cameras))
    try:
        book.set(cameras if request.camera is None else [request.camera], is_paused=is_paused)
    except OSError as exc:
        raise CommandError("failed", f"it cannot be kept, nothing was changed: {exc}") from exc
    on_change()
    new = sorted(book.paused & set(cameras))
    return answer.model_copy(update={"old": PausedPart(cameras=old), "new": PausedPart(cameras=new)})


def _change(_request: PauseRequest, answer: PauseAnswer) -> Change:
    return Change("paused cameras", answer.old, answer.new)
