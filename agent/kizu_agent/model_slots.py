"""The models in service, one for each slot: where the inspection takes them, and where a bad one is taken away.

A slot is what cameras ask for: a bundle name, or None for any bundle that no other camera asks for by name.
"""

import threading
from collections.abc import Sequence
from dataclasses import dataclass, field

from kizu_agent.inspector import Inspector
from kizu_agent.probation import Probation, Tallies, count
from kizu_agent.records import Inspection, ModelId
from kizu_contract.manifest import Manifest


@dataclass(frozen=True, eq=False)
class Loaded:
    """A model ready to inspect. `file` is its name in the store, `tallies` what it did on each camera lately.

    Whoever holds it may go on using it after a swap: its engine is freed with the last reference.
    """

    inspector: Inspector
    manifest: Manifest
    id: ModelId
    slot: str | None
    file: str
    tallies: Tallies = field(default_factory=dict)


@dataclass(eq=False)
class Watch:
    """A model on probation. `way_back` is the model that served before, None where only its file is there.

    Without a `way_back_file` a failing model stays, for it is no worse than none, and is told.
    """

    loaded: Loaded
    way_back: Loaded | None
    way_back_file: str | None
    probation: Probation
    is_committed: bool = False


class Slots:
    """Hands models to the inspection thread and takes its findings; every method is quick, from any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._active: dict[str | None, Loaded] = {}
        self._offered: dict[str | None, Loaded] = {}
        self._watches: dict[str | None, Watch] = {}
        self._taken = threading.Event()

    def current(self, slot: str | None) -> Loaded | None:
        """The model for cameras that ask for `slot`; None while there is none. This is the moment of a swap."""
        with self._lock:
            offer = self._offered.pop(slot, None)
            if offer is not None:
                self._active[slot] = offer
                self._taken.set()
            return self._active.get(slot)

    def observe(self, loaded: Loaded, inspections: Sequence[Inspection]) -> bool:
        """Count what `loaded` found; one that fails its probation by it is out of service at once.

        Called by the inspection thread, after each pass. Tells whether a model on probation fails.
        """
        count(loaded.tallies, inspections)
        watch = self._watches.get(loaded.slot)
        if watch is None or watch.loaded is not loaded:
            return False
        watch.probation.judge(loaded.tallies, inspections)
        if watch.probation.failing is not None and watch.way_back_file is not None:
            self.withdraw(watch)
        return watch.probation.failing is not None

    def put(self, loaded: Loaded) -> None:
        """Take `loaded` into service without waiting for a swap: nothing served before it."""
        with self._lock:
            self._active[loaded.slot] = loaded

    def offer(self, loaded: Loaded) -> None:
        """Offer `loaded` to the inspection."""
        with self._lock:
            self._taken.clear()
            self._offered[loaded.slot] = loaded

    def wait_taken(self, timeout_s: float) -> bool:
        """Wait until the last offer was taken; tell whether it was."""
        return self._taken.wait(timeout_s)

    def withdraw(self, watch: Watch) -> None:
        """Let the model before it serve again, or none until that is loaded. Idempotent."""
        slot = watch.loaded.slot
        with self._lock:
            if self._active.get(slot) is not watch.loaded:
                return
            if watch.way_back is None:
                del self._active[slot]
            else:
                self._active[slot] = watch.way_back

    def clear(self) -> None:
        """Let go of every model: whichever no one else holds is freed. Nothing serves afterwards."""
        with self._lock:
            self._active, self._offered, self._watches = {}, {}, {}

    def watch(self, watch: Watch) -> None:
        """Put a model on probation; one that was on probation in its slot is so no longer."""
        self._watches = {**self._watches, watch.loaded.slot: watch}

    def unwatch(self, slot: str | None) -> None:
        """End a probation."""
        self._watches = {name: watch for name, watch in self._watches.items() if name != slot}

    def watched(self, slot: str | None) -> Watch | None:
        """The model of `slot` that is on probation, None where none is."""
        return self._watches.get(slot)

    def all_watched(self) -> list[Watch]:
        """All models on probation."""
        return list(self._watches.values())
