"""What commands are answered with: payloads like all others, of one shape for each command."""

from typing import Literal

from pydantic import Field

from kizu_agent.payloads import Document, ModelPart, Payload, StatusPayload, Time
from kizu_agent.records import ModelState


class ErrorPart(Payload):
    """Why a command was refused; both null when it was not."""

    code: str | None = None
    message: str | None = None


class Answer(Document):
    """What every command answers with; the whole answer where the command is unknown."""

    id: str
    request_id: str | None = None
    agent: str
    command: str
    ok: bool = True
    error: ErrorPart = ErrorPart()
    answered_at: Time


class PingAnswer(Answer):
    """`echo` is what was sent."""

    echo: str | None = None
    version: str


class ThresholdSettingPart(Payload):
    """Thresholds in effect, all null where there is no model to know them by.

    `origin`: `command` (set by command), `config` or `bundle`. Rates are null where the scores were set directly.
    `note` says what is set and cannot be applied, and why.
    """

    origin: Literal["bundle", "config", "command"] | None = None
    warn: float | None = None
    reject: float | None = None
    warn_rate: float | None = None
    reject_rate: float | None = None
    note: str | None = None


class ThresholdsAnswer(Answer):
    """`old` and `new` are the same unless something was set."""

    camera: str | None = None
    model: ModelPart = ModelPart()
    old: ThresholdSettingPart = ThresholdSettingPart()
    new: ThresholdSettingPart = ThresholdSettingPart()


class ModelSlotPart(Payload):
    """What serves the cameras that ask for `slot` (null: for any model), and what a rollback leads to."""

    slot: str | None
    active: ModelPart
    on_probation: bool
    previous: ModelPart
    since: Time | None


class StoredModelPart(Payload):
    """A model in the store; `reason` says why it is `failed`, `signed_by` is the fingerprint of a trusted key."""

    file: str
    model: ModelPart
    state: ModelState
    since: Time
    reason: str | None
    signed_by: str | None = None


class ModelAnswer(Answer):
    """What is in service and in the store as the command comes in.

    `outcome`: `listed`, `accepted` (the outcome follows on the model topic) or `unchanged`; `target` is the model that
    shall serve. Both null where the command is refused.
    """

    outcome: Literal["listed", "accepted", "unchanged"] | None = None
    target: ModelPart = ModelPart()
    slots: list[ModelSlotPart] = Field(default_factory=list)
    models: list[StoredModelPart] = Field(default_factory=list)


class StatusAnswer(Answer):
    """The agent's status, as on its topic."""

    status: StatusPayload
