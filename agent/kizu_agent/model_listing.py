"""The store and its slots as a command shows them."""

from collections.abc import Collection

from kizu_agent.model_slots import Slots
from kizu_agent.model_store import ModelStore
from kizu_agent.records import ModelListing, ModelSlot, ModelState, StoredModel


def list_models(store: ModelStore, slots: Slots, names: Collection[str | None]) -> ModelListing:
    """List what serves the slots `names` and every model of the store, the oldest first; in the keeper's thread."""
    ordered = sorted(names, key=lambda slot: slot or "")
    files = sorted(store.index.models, key=lambda file: (store.index.models[file].since, file))
    return ModelListing(
        tuple(_slot(store, slots, slot) for slot in ordered),
        tuple(_stored(store, slots, ordered, file) for file in files),
    )


def way_back(store: ModelStore, slots: Slots, slot: str | None) -> str | None:
    """The file that a rollback of `slot` leads to, None where there is none."""
    watch, entry = slots.watched(slot), store.entries.get(slot)
    if watch is not None and watch.way_back_file is not None:
        return watch.way_back_file
    return entry.previous if entry is not None else None


def _slot(store: ModelStore, slots: Slots, slot: str | None) -> ModelSlot:
    serving, watch, entry = slots.current(slot), slots.watched(slot), store.entries.get(slot)
    if serving is None:
        return ModelSlot(slot, None, is_on_probation=False, previous=None, since=None)
    before = store.index.models.get(way_back(store, slots, slot) or "")
    is_committed = entry is not None and entry.file == serving.file
    return ModelSlot(
        slot,
        serving.id,
        is_on_probation=watch is not None and watch.loaded is serving,
        previous=before.model if before is not None else None,
        since=entry.since if entry is not None and is_committed else store.index.models[serving.file].since,
    )


def _stored(store: ModelStore, slots: Slots, names: Collection[str | None], file: str) -> StoredModel:
    stored, failure = store.index.models[file], store.failure_of(file)
    reason = failure.reason if failure is not None else None
    signer, state = store.index.signers.get(file), _state(store, slots, names, file)
    return StoredModel(file, stored.model, state, stored.since, reason, signer)


def _state(store: ModelStore, slots: Slots, names: Collection[str | None], file: str) -> ModelState:
    serving = {loaded.file for slot in names if (loaded := slots.current(slot)) is not None}
    if file in serving:
        return "probation" if any(watch.loaded.file == file for watch in slots.all_watched()) else "active"
    if store.failure_of(file) is not None:
        return "failed"
    return "previous" if file in {way_back(store, slots, slot) for slot in names} else "stored"
