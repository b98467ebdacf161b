"""The commands that the agent answers: ping, status, thresholds, model."""

import uuid
from collections.abc import Callable
from typing import Annotated, Any, Literal, TypeVar

import structlog
from pydantic import Field, ValidationError
from pydantic_core import from_json

from kizu_agent.answers import (
    Answer,
    ErrorPart,
    ModelAnswer,
    PingAnswer,
    StatusAnswer,
    ThresholdsAnswer,
    ThresholdSettingPart,
)
from kizu_agent.camera_settings import Rate, ThresholdRates
from kizu_agent.encoding import to_bytes, utc_now
from kizu_agent.errors import CommandError
from kizu_agent.model_command import Keeper, ModelRequest, carry_out
from kizu_agent.payloads import ModelPart, StatusPayload
from kizu_agent.records import CommandAnswer, CommandRequest, ModelId
from kizu_agent.requests import MAX_REQUEST_ID, Request
from kizu_agent.thresholds import ScoreThresholds, ThresholdBook
from kizu_contract.manifest import Manifest

log = structlog.get_logger(__name__)

MAX_REQUEST_BYTES = 64 * 1024
_MAX_TEXT = 500
"""An error message tells at most this much of what went wrong."""

Score = Annotated[float, Field(gt=0)]
CameraModel = Callable[[str], tuple[ModelId, Manifest] | None]
"""The model in service for a camera; None where there is none."""


Asked = TypeVar("Asked", bound="Request")


class PingRequest(Request):
    """`echo` comes back."""

    echo: Annotated[str, Field(max_length=1024)] | None = None


class StatusRequest(Request):
    """Ask for the agent's status."""


class ThresholdsRequest(Request):
    """Read, set or reset a camera's thresholds; set takes both rates or both scores."""

    action: Literal["get", "set", "reset"] = "get"
    camera: Annotated[str, Field(min_length=1, max_length=64)]
    warn_rate: Rate | None = None
    reject_rate: Rate | None = None
    warn: Score | None = None
    reject: Score | None = None


class Commands:
    """Answers every request, whatever it holds; called by one thread at a time."""

    def __init__(
        self,
        agent: str,
        version: str,
        book: ThresholdBook,
        camera_model: CameraModel,
        status: Callable[[], StatusPayload],
        keeper: Keeper,
    ) -> None:
        self._agent = agent
        self._version = version
        self._book = book
        self._camera_model = camera_model
        self._status = status
        self._keeper = keeper

    def handle(self, request: CommandRequest) -> CommandAnswer:
        """Carry out `request` and answer it; never raises for anything that a request may hold.

        A refused command has changed nothing; its answer has the same keys as any other answer of that command.
        """
        answer = self._blank(request.name)
        try:
            raw = _parse(request.payload)
            answer = answer.model_copy(update={"request_id": _request_id(raw)})
            answer = self._carry_out(request.name, raw, answer)
        except CommandError as exc:
            error = ErrorPart(code=exc.code, message=str(exc)[:_MAX_TEXT])
            answer = answer.model_copy(update={"ok": False, "error": error})
            log.warning("command refused", command=answer.command, code=exc.code, message=error.message)
        return CommandAnswer(to_bytes(answer))

    def _blank(self, name: str) -> Answer:
        """Give the answer to `name` before anything is known of the request."""
        ident, now = str(uuid.uuid4()), utc_now()
        if name == "ping":
            return PingAnswer(id=ident, agent=self._agent, command=name, answered_at=now, version=self._version)
        if name == "status":
            return StatusAnswer(id=ident, agent=self._agent, command=name, answered_at=now, status=self._status())
        if name == "thresholds":
            return ThresholdsAnswer(id=ident, agent=self._agent, command=name, answered_at=now)
        if name == "model":
            return ModelAnswer(id=ident, agent=self._agent, command=name, answered_at=now)
        return Answer(id=ident, agent=self._agent, command=name[:64], answered_at=now)

    def _carry_out(self, name: str, raw: dict[str, Any], answer: Answer) -> Answer:
        if name == "ping":
            return answer.model_copy(update={"echo": _validate(PingRequest, raw).echo})
        if name == "status":
            _validate(StatusRequest, raw)
            return answer
        if name == "thresholds":
            return self._thresholds(_validate(ThresholdsRequest, raw), answer)
        if name == "model" and isinstance(answer, ModelAnswer):
            return carry_out(_validate(ModelRequest, raw), self._keeper, answer)
        known = "ping, status, thresholds, model"
        raise CommandError("unknown_command", f"there is no command {name[:64]!r}; there are {known}")

    def _thresholds(self, request: ThresholdsRequest, answer: Answer) -> Answer:
        camera = request.camera
        self._book.check_camera(camera)
        found = self._camera_model(camera)
        old = self._setting(camera, found)
        try:
            self._change_thresholds(request, found)
        except OSError as exc:
            raise CommandError("failed", f"thresholds cannot be kept, nothing was changed: {exc.strerror}") from exc
        new = self._setting(camera, found)
        if request.action != "get":
            log.info(
                "thresholds changed",
                camera=camera,
                request_id=request.request_id,
                old=old.model_dump(),
                new=new.model_dump(),
            )
        model = ModelPart.of(found[0] if found else None)
        return answer.model_copy(update={"camera": camera, "model": model, "old": old, "new": new})

    def _change_thresholds(self, request: ThresholdsRequest, found: tuple[ModelId, Manifest] | None) -> None:
        numbers = (request.warn_rate, request.reject_rate, request.warn, request.reject)
        if request.action != "set":
            if numbers != (None,) * 4:
                raise CommandError("invalid", f"{request.action} takes no thresholds; use action set to change them")
            if request.action == "reset":
                self._book.reset(request.camera)
            return
        if found is None:
            raise CommandError("no_model", f"camera {request.camera} has no model yet; drop one, then set thresholds")
        model, manifest = found
        self._book.set(request.camera, _wanted(request, model), manifest, model.sha256)

    def _setting(self, camera: str, found: tuple[ModelId, Manifest] | None) -> ThresholdSettingPart:
        if found is None:
            return ThresholdSettingPart()
        model, manifest = found
        setting = self._book.describe(camera, manifest, model.sha256)
        return ThresholdSettingPart(
            origin=setting.origin,
            warn=setting.thresholds.warn,
            reject=setting.thresholds.reject,
            warn_rate=setting.rates.warn_rate if setting.rates else None,
            reject_rate=setting.rates.reject_rate if setting.rates else None,
            note=setting.note,
        )


def _wanted(request: ThresholdsRequest, model: ModelId) -> ThresholdRates | ScoreThresholds:
    rates, scores = (request.warn_rate, request.reject_rate), (request.warn, request.reject)
    try:
        if None not in rates and scores == (None, None):
            return ThresholdRates.model_validate({"warn_rate": rates[0], "reject_rate": rates[1]})
        if None not in scores and rates == (None, None):
            return ScoreThresholds.model_validate(
                {"warn": scores[0], "reject": scores[1], "model_sha256": model.sha256}
            )
    except ValidationError as exc:
        raise CommandError("invalid", _explain(exc)) from exc
    raise CommandError("invalid", "set takes warn_rate and reject_rate, or warn and reject: both of one pair")


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
        raise CommandError("invalid", _explain(exc)) from exc


def _explain(exc: ValidationError) -> str:
    """Every problem by its key, without what was sent: it may be anything."""
    problems = exc.errors(include_url=False, include_input=False)
    return "; ".join(
        f"{'.'.join(map(str, problem['loc']))[:64] or 'request'}: {problem['msg']}" for problem in problems
    )
