"""The command `thresholds`: read, set, reset or revert the thresholds of a camera."""

from collections.abc import Callable
from typing import Annotated, Literal

from pydantic import Field, ValidationError

from kizu_agent.answers import ThresholdsAnswer, ThresholdSettingPart
from kizu_agent.audit import Change
from kizu_agent.camera_settings import Rate, ThresholdRates
from kizu_agent.commands import Command
from kizu_agent.errors import CommandError
from kizu_agent.payloads import ModelPart
from kizu_agent.records import ModelId
from kizu_agent.requests import Request, explain
from kizu_agent.thresholds import ScoreThresholds, ThresholdBook
from kizu_contract.manifest import Manifest

Score = Annotated[float, Field(gt=0)]
CameraModel = Callable[[str], tuple[ModelId, Manifest] | None]
"""The model in service for a camera; None where there is none."""


class ThresholdsRequest(Request):
    """Read, set, reset or revert (the last change) a camera's thresholds; set takes both rates or both scores."""

    action: Literal["get", "set", "reset", "revert"] = "get"
    camera: Annotated[str, Field(min_length=1, max_length=64)]
    warn_rate: Rate | None = None
    reject_rate: Rate | None = None
    warn: Score | None = None
    reject: Score | None = None


def thresholds_command(
    book: ThresholdBook, camera_model: CameraModel, product: Callable[[], str | None] = lambda: None
) -> Command[ThresholdsRequest, ThresholdsAnswer]:
    """The command on `book`, for the models that `camera_model` gives and the `product` that runs."""
    thresholds = _Thresholds(book, camera_model, product)
    return Command("thresholds", ThresholdsRequest, ThresholdsAnswer, thresholds.carry_out, _audited)


def _audited(request: ThresholdsRequest, answer: ThresholdsAnswer) -> Change | None:
    if request.action == "get":
        return None
    product = "" if answer.product is None else f", product {answer.product}"
    return Change(f"thresholds of camera {answer.camera}{product}", answer.old, answer.new)


class _Thresholds:
    def __init__(self, book: ThresholdBook, camera_model: CameraModel, product: Callable[[], str | None]) -> None:
        self._book, self._camera_model, self._product = book, camera_model, product

    def carry_out(self, request: ThresholdsRequest, answer: ThresholdsAnswer) -> ThresholdsAnswer:
        """Answer `request`. Raises CommandError, and then nothing has changed."""
        camera = request.camera
        self._book.check_camera(camera)
        found, product = self._camera_model(camera), self._product()
        old = self._setting(camera, found, product)
        try:
            self._change(request, found, product)
        except OSError as exc:
            raise CommandError("failed", f"thresholds cannot be kept, nothing was changed: {exc.strerror}") from exc
        new = self._setting(camera, found, product)
        model = ModelPart.of(found[0] if found else None)
        known = {"camera": camera, "product": product, "model": model}
        return answer.model_copy(update={**known, "old": old, "new": new})

    def _change(self, request: ThresholdsRequest, found: tuple[ModelId, Manifest] | None, product: str | None) -> None:
        numbers = (request.warn_rate, request.reject_rate, request.warn, request.reject)
        if request.action != "set":
            if numbers != (None,) * 4:
                raise CommandError("invalid", f"{request.action} takes no thresholds; use action set to change them")
            if request.action == "reset":
                self._book.reset(request.camera, product)
            elif request.action == "revert":
                self._book.revert(request.camera, product)
            return
        if found is None:
            raise CommandError("no_model", f"camera {request.camera} has no model yet; drop one, then set thresholds")
        model, manifest = found
        self._book.set(request.camera, _wanted(request, model), manifest, model.sha256, product)

    def _setting(
        self, camera: str, found: tuple[ModelId, Manifest] | None, product: str | None
    ) -> ThresholdSettingPart:
        if found is None:
            return ThresholdSettingPart()
        model, manifest = found
        setting = self._book.describe(camera, manifest, model.sha256, product)
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
        raise CommandError("invalid", explain(exc)) from exc
    raise CommandError("invalid", "set takes warn_rate and reject_rate, or warn and reject: both of one pair")
