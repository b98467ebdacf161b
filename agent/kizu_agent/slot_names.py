"""Names of the slots that hold models in service: what cameras and products ask for.

A slot is a bundle's name, a name with a version (`gears@3`) or with a content hash (`gears#0b9d7c42`), or None for any
bundle that nothing asks for by name. Neither sign can stand in a bundle's name.
"""

from collections.abc import Collection

from kizu_agent.errors import ModelError
from kizu_agent.records import ModelId

NO_SLOT = "?"
"""A slot that no model can ever be in: for cameras whose product is not known."""


def slot_name(model: str, version: str | None = None, sha256: str | None = None) -> str:
    """The slot for bundles of the name `model`, of this version or hash alone where one is given."""
    if sha256 is not None:
        return f"{model}#{sha256}"
    return model if version is None else f"{model}@{version}"


def route(model: ModelId, slots: Collection[str | None]) -> str | None:
    """The slot of `slots` that `model` goes to, the most particular first. Raises ModelError when none takes it."""
    hashes = [slot for slot in slots if slot is not None and _is_hash_of(slot, model)]
    if hashes:
        return max(hashes, key=len)
    for slot in (slot_name(model.name, model.version), model.name, None):
        if slot in slots:
            return slot
    wanted = ", ".join(sorted(slot for slot in slots if slot is not None))
    raise ModelError(f"no camera asks for a model named {model.name!r}; they ask for {wanted}")


def _is_hash_of(slot: str, model: ModelId) -> bool:
    name, sign, digits = slot.partition("#")
    return bool(sign) and name == model.name and model.sha256.startswith(digits)
