"""The command `model`: list what is there, activate a stored model, roll back. Loading is the model keeper's work."""

from collections.abc import Callable
from typing import Annotated, Literal, NamedTuple, Protocol

from pydantic import Field

from kizu_agent.answers import ModelAnswer, ModelSlotPart, StoredModelPart
from kizu_agent.audit import Change
from kizu_agent.commands import Command
from kizu_agent.errors import CommandError
from kizu_agent.payloads import ModelPart
from kizu_agent.records import ModelId, ModelListing, ModelOrder, ModelSlot, StoredModel
from kizu_agent.requests import Request
from kizu_contract.errors import KizuError

Text = Annotated[str, Field(min_length=1, max_length=64)]


class ModelRequest(Request):
    """List, activate (by `sha256`, eight digits or more, or by `name` and `version`), or roll back.

    `slot`: the name that cameras ask for, null for any; needed for a rollback where cameras ask for several.
    """

    action: Literal["list", "activate", "rollback"] = "list"
    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{8,64}$")] | None = None
    name: Text | None = None
    version: Text | None = None
    slot: Text | None = None


class Keeper(Protocol):
    """What the command needs of the model keeper."""

    def listing(self) -> ModelListing:
        """What is in the store and in service."""
        ...

    def order(self, order: ModelOrder) -> bool:
        """Have `order` carried out; tell whether it was taken."""
        ...

    def slot_of(self, model: ModelId) -> str | None:
        """The slot for `model`. Raises ModelError when no camera wants it."""
        ...


class Outcome(NamedTuple):
    """What is told of a request that was not refused."""

    outcome: Literal["listed", "accepted", "unchanged"]
    target: ModelId | None = None


def model_command(keeper: Keeper) -> Command[ModelRequest, ModelAnswer]:
    """The command on what `keeper` keeps."""
    return Command(
        "model", ModelRequest, ModelAnswer, lambda request, answer: _carry_out(request, keeper, answer), _change
    )


def _change(_request: ModelRequest, answer: ModelAnswer) -> Change | None:
    """What was ordered; how it went is told on the model topic."""
    if answer.outcome != "accepted":
        return None
    wanted = [slot for slot in answer.slots if slot.active.name == answer.target.name]
    return Change("model in service", wanted[0].active if wanted else None, answer.target)


def _carry_out(request: ModelRequest, keeper: Keeper, answer: ModelAnswer) -> ModelAnswer:
    """Answer `request`. Raises CommandError, and then nothing has changed."""
    listing = keeper.listing()
    _check_keys(request)
    actions: dict[str, Callable[[ModelRequest, Keeper, ModelListing], Outcome]] = {
        "list": lambda *_: Outcome("listed"),
        "activate": _activate,
        "rollback": _roll_back,
    }
    done = actions[request.action](request, keeper, listing)
    return answer.model_copy(
        update={
            "outcome": done.outcome,
            "target": ModelPart.of(done.target),
            "slots": [_slot_part(slot) for slot in listing.slots],
            "models": [_stored_part(model) for model in listing.models],
        }
    )


def _check_keys(request: ModelRequest) -> None:
    keys = {"sha256": request.sha256, "name": request.name, "version": request.version, "slot": request.slot}
    takes = {"list": [], "activate": ["sha256", "name", "version"], "rollback": ["slot"]}[request.action]
    wrong = [key for key, value in keys.items() if value is not None and key not in takes]
    if wrong:
        raise CommandError("invalid", f"{request.action} takes no {', '.join(wrong)}")
    if request.action == "activate" and (request.sha256 is None) == (request.name is None or request.version is None):
        raise CommandError("invalid", "activate takes sha256, or name and version")


def _activate(request: ModelRequest, keeper: Keeper, listing: ModelListing) -> Outcome:
    wanted = _find(request, listing)
    try:
        slot = keeper.slot_of(wanted.model)
    except KizuError as exc:
        raise CommandError("invalid", str(exc)) from exc
    if wanted.state == "active":
        return Outcome("unchanged", wanted.model)
    _order(keeper, ModelOrder(slot, wanted.file))
    return Outcome("accepted", wanted.model)


def _roll_back(request: ModelRequest, keeper: Keeper, listing: ModelListing) -> Outcome:
    slot = _slot(request, listing)
    if slot.previous is None:
        raise CommandError("no_previous", "there is no model to go back to; activate names one of the store")
    _order(keeper, ModelOrder(slot.slot))
    return Outcome("accepted", slot.previous)


def _order(keeper: Keeper, order: ModelOrder) -> None:
    if not keeper.order(order):
        raise CommandError("busy", "too many commands wait for the models; nothing was changed")


def _find(request: ModelRequest, listing: ModelListing) -> StoredModel:
    """The one stored model that `request` names."""
    found = [stored for stored in listing.models if _is_named(request, stored.model)]
    if not found:
        raise CommandError(
            "unknown_model", "no such model is in the store; action list shows what is, or drop its file"
        )
    if len(found) > 1:
        hashes = ", ".join(stored.model.sha256[:12] for stored in found)
        raise CommandError("ambiguous", f"several models are meant; name one by its sha256: {hashes}")
    return found[0]


def _is_named(request: ModelRequest, model: ModelId) -> bool:
    if request.sha256 is not None:
        return model.sha256.startswith(request.sha256)
    return (model.name, model.version) == (request.name, request.version)


def _slot(request: ModelRequest, listing: ModelListing) -> ModelSlot:
    found = [slot for slot in listing.slots if slot.slot == request.slot]
    if not found and request.slot is None and len(listing.slots) == 1:
        found = list(listing.slots)
    if not found:
        names = ", ".join("null" if slot.slot is None else slot.slot for slot in listing.slots)
        raise CommandError("invalid", f"slot: cameras ask for {names}")
    return found[0]


def _slot_part(slot: ModelSlot) -> ModelSlotPart:
    return ModelSlotPart(
        slot=slot.slot,
        active=ModelPart.of(slot.active),
        on_probation=slot.is_on_probation,
        previous=ModelPart.of(slot.previous),
        since=slot.since,
    )


def _stored_part(stored: StoredModel) -> StoredModelPart:
    return StoredModelPart(
        file=stored.file,
        model=ModelPart.of(stored.model),
        state=stored.state,
        since=stored.since,
        reason=stored.reason,
        signed_by=stored.signed_by,
    )
