"""From a file of the store to a model ready to inspect, and which cameras it is for."""

import contextlib
import threading
import time
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import structlog

from kizu_agent.errors import ModelError
from kizu_agent.inspector import load_inspector
from kizu_agent.model_keys import KeyRing
from kizu_agent.model_slots import Loaded
from kizu_agent.model_store import ModelStore
from kizu_agent.providers import needs_building
from kizu_agent.records import ModelId
from kizu_agent.settings import EngineConfig
from kizu_agent.slot_names import route
from kizu_contract.bundle import Bundle, read_bundle
from kizu_contract.errors import KizuError

log = structlog.get_logger(__name__)


@dataclass
class Progress:
    """What the thread that loads tells: `beat` as its work goes on, and since when a model loads, None while none does.

    `building` is the file whose graph is being compiled, None while none is. `stopping` ends its waits.
    """

    beat: Callable[[], None]
    stopping: threading.Event = field(default_factory=threading.Event)
    loading_since_mono_ns: int | None = None
    building: str | None = None

    def keep_waiting(self) -> bool:
        """Show life; tell whether the service goes on."""
        self.beat()
        return not self.stopping.is_set()

    @contextlib.contextmanager
    def told_of_building(self, file: str) -> Iterator[Callable[[], None]]:
        """Give what is to be called when the graph of `file` is being compiled; logs its begin and end."""
        started = time.monotonic()

        def begin() -> None:
            self.building = file
            log.info("compiling the graph for this machine's GPU: takes minutes, once", file=file)

        try:
            yield begin
        finally:
            if self.building is not None:
                log.info("compiling has ended", file=file, seconds=round(time.monotonic() - started, 1))
            self.building = None


class Loader:
    """Loads models of the store; used by the keeper's thread alone. `slot_names` are what cameras ask for."""

    def __init__(
        self,
        engine: EngineConfig,
        keys: KeyRing,
        slot_names: Collection[str | None],
        store: ModelStore,
        progress: Progress,
        build: Callable[[Path], None],
    ) -> None:
        """`build` compiles a bundle's graph in a process of its own; raises ModelError."""
        self.slot_names = frozenset(slot_names)
        self._engine, self._keys, self._build = engine, keys, build
        self._store, self._progress = store, progress

    def route(self, model: ModelId) -> str | None:
        """The slot that `model` goes to. Raises ModelError when no camera wants it."""
        return route(model, self.slot_names)

    def load(self, file: str, slot: str | None) -> Loaded:
        """Read and load a model of the store for `slot`. Raises KizuError."""
        self._progress.loading_since_mono_ns = time.monotonic_ns()
        try:
            return self._load(file, slot)
        finally:
            self._progress.beat()
            self._progress.loading_since_mono_ns = None

    def describe(self, file: str) -> None:
        """Note what a stored `file` holds that the record does not know; a damaged one stays unknown."""
        if file in self._store.index.models:
            return
        with contextlib.suppress(KizuError, OSError):
            bundle = read_bundle(self._store.path_of(file))
            self._store.note(file, _id_of(bundle), bundle.manifest.created, None)

    def _load(self, file: str, slot: str | None) -> Loaded:
        bundle = self._keys.trust.read(self._store.path_of(file))
        manifest, model = bundle.manifest, _id_of(bundle)
        if self.route(model) != slot:
            raise ModelError(f"{file}: another camera asks for models named {manifest.name!r} by now")
        self._store.note(file, model, manifest.created, bundle.signed_by)
        graphs = filter(None, (bundle.scorer, bundle.frame_graph))
        if any(needs_building(graph, self._engine, manifest.graph) for graph in graphs):
            # After another driver, say. Never here: onnxruntime would hold Python's lock, and everything would stand.
            self._build(self._store.path_of(file))
        inspector = load_inspector(bundle, self._engine)
        if inspector.engine.degraded_reason:
            log.warning("the graph runs on less than configured", file=file, reason=inspector.engine.degraded_reason)
        return Loaded(inspector, manifest, model, slot, file)


def _id_of(bundle: Bundle) -> ModelId:
    return ModelId(bundle.manifest.name, bundle.manifest.version, bundle.sha256)
