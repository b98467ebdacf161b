"""Models by file drop: verify, prove, store, load, swap between frames; and the last good one after a restart.

A slot is what cameras ask for: a bundle name, or None for any bundle that no other camera asks for by name.
"""

import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path

import structlog

from kizu_agent.config import EngineConfig, ModelsConfig
from kizu_agent.drop import DropDirectory, DroppedFile
from kizu_agent.errors import ConfigError, ModelError
from kizu_agent.inspector import Inspector, load_inspector
from kizu_agent.model_store import Entry, ModelStore, StillChanging
from kizu_agent.records import ModelId, ModelReport
from kizu_agent.self_test import Proof, ProofInterrupted, Request, prove
from kizu_agent.stages import Stage
from kizu_contract.bundle import load_public_key, read_bundle
from kizu_contract.errors import BundleError, KizuError
from kizu_contract.manifest import Manifest

POLL_S = 0.5
TAKE_S = 5.0
"""Where nothing is inspected for this long, a new model counts as taken: there is nothing to swap between."""
RETRY_S = 30.0
"""After trouble that is not the file's own (disk full, no permission), it is tried again."""

log = structlog.get_logger(__name__)


@dataclass(frozen=True, eq=False)
class Loaded:
    """A model ready to inspect. `file` is its name in the store.

    Whoever holds it may go on using it after a swap: its engine is freed with the last reference.
    """

    inspector: Inspector
    manifest: Manifest
    id: ModelId
    slot: str | None
    file: str


class ModelKeeper:
    """Keeps a model in service for every slot; a thread of its own does all the work but the swap.

    `on_report` is called in that thread, `on_failure` when the thread dies (`failure` then holds the error). Raises
    ConfigError when a trusted key cannot be read.
    """

    def __init__(
        self,
        config: ModelsConfig,
        engine: EngineConfig,
        state_dir: Path,
        slots: Iterable[str | None],
        on_report: Callable[[ModelReport], None],
        on_failure: Callable[[], None] = lambda: None,
    ) -> None:
        try:
            self._keys = [load_public_key(path) for path in config.trusted_keys]
        except BundleError as exc:
            raise ConfigError(f"models.trusted_keys: {exc}") from exc
        self._config, self._engine, self._slots = config, engine, frozenset(slots)
        self._on_report = on_report
        self._store = ModelStore(state_dir)
        self._drop = DropDirectory(config.drop_dir)
        self._lock = threading.Lock()
        self._active: dict[str | None, Loaded] = {}
        self._offered: dict[str | None, Loaded] = {}
        self._taken = threading.Event()
        self._restored = threading.Event()
        self._stopping = threading.Event()
        self._loading_since_mono_ns: int | None = None
        self._last_trouble: dict[str, str] = {}
        self._stage = Stage("models", self._work, on_failure)

    @property
    def failure(self) -> BaseException | None:
        """What killed the thread; None while it is well."""
        return self._stage.failure

    @property
    def progress_mono_ns(self) -> int:
        """`time.monotonic_ns()` of the last progress; now while a model loads, for as long as a self-test may take."""
        now, since = time.monotonic_ns(), self._loading_since_mono_ns
        is_loading = since is not None and now - since < self._config.self_test_timeout_s * 1e9
        return now if is_loading else self._stage.progress_mono_ns

    def start(self) -> None:
        """Start the thread; the models of the last run are its first work. Idempotent."""
        self._stage.start()

    def stop(self, deadline_s: float) -> bool:
        """Stop, ending a self-test under way; idempotent. Tell whether the thread is gone."""
        self._stopping.set()
        return self._stage.stop(deadline_s)

    def wait_restored(self, timeout_s: float) -> bool:
        """Wait until the models of the last run are in service or given up; tell whether that is so."""
        return self._restored.wait(timeout_s)

    def current(self, camera_model: str | None) -> Loaded | None:
        """The model for cameras that ask for `camera_model`; None while there is none. From any thread, never blocks.

        Called at the start of a batch: this is the moment of the swap.
        """
        with self._lock:
            offer = self._offered.pop(camera_model, None)
            if offer is not None:
                self._active[camera_model] = offer
                self._taken.set()
            return self._active.get(camera_model)

    def _work(self) -> None:
        if not self._restored.is_set():
            self._restore()
            self._restored.set()
        for file in self._drop.ready():
            if self._stopping.is_set():
                return
            self._handle(file)
            self._stage.beat()
        self._stopping.wait(POLL_S)

    # -- a dropped file --------------------------------------------------------------------------------------------

    def _handle(self, file: DroppedFile) -> None:
        name = file.path.name
        try:
            self._take_into_service(file)
        except (StillChanging, ProofInterrupted):
            return
        except KizuError as exc:
            if file.is_unchanged():  # else it was still being written: it is looked at again when it has come to rest
                self._refuse(file, str(exc))
        except OSError as exc:
            self._drop.leave(file, RETRY_S)
            reason = f"cannot be taken now, will be tried again: {exc.strerror or exc}"
            if self._last_trouble.get(name) != reason:
                self._report(ModelReport("failed", name, reason=reason))
            self._last_trouble[name] = reason
        else:
            self._last_trouble.pop(name, None)

    def _take_into_service(self, file: DroppedFile) -> None:
        incoming = self._store.take_in(file, self._stage.beat)
        try:
            proof = prove(self._request(incoming), self._keep_waiting)
            slot = self._route(proof.name)
            report = _report_of(file, slot, proof)
            before = self.current(slot)
            if before is None or before.id != proof.model:
                stored = self._store.keep(incoming, proof.model)
                self._report(report)
                report = self._swap(report, stored)
            else:
                report = replace(report, kind="unchanged", reason="this model is in service already")
        finally:
            incoming.unlink(missing_ok=True)
        self._commit(slot, before)
        self._remove(file)
        self._report(report)

    def _request(self, incoming: Path) -> Request:
        config = self._config
        keys = [str(path.absolute()) for path in config.trusted_keys]
        limits = (config.self_test_tolerance, config.self_test_timeout_s)
        return Request(str(incoming.absolute()), keys, config.require_signature, self._engine, *limits)

    def _keep_waiting(self) -> bool:
        self._stage.beat()
        return not self._stopping.is_set()

    def _route(self, name: str) -> str | None:
        """The slot that a bundle of this `name` goes to. Raises ModelError when no camera wants it."""
        if name in self._slots:
            return name
        if None in self._slots:
            return None
        wanted = ", ".join(sorted(slot for slot in self._slots if slot is not None))
        raise ModelError(f"no camera asks for a model named {name!r}; they ask for {wanted}")

    def _swap(self, report: ModelReport, stored: str) -> ModelReport:
        """Load the `stored` model and offer it; the report once it was taken, or nobody was there to take it."""
        started = time.monotonic()
        try:
            loaded = self._load(stored, report.slot)
        except (KizuError, MemoryError) as exc:
            self._store.discard(stored)
            raise ModelError(f"passed its self-test and cannot be loaded beside the model in service: {exc}") from exc
        offered = time.monotonic()
        with self._lock:
            self._taken.clear()
            self._offered[report.slot] = loaded
        was_taken = self._await_taken()
        swap_s = time.monotonic() - offered if was_taken else None
        self.current(report.slot)
        return replace(report, kind="active", load_s=offered - started, swap_s=swap_s, at_ns=time.time_ns())

    def _await_taken(self) -> bool:
        deadline = time.monotonic() + TAKE_S
        while not self._stopping.is_set() and time.monotonic() < deadline:
            if self._taken.wait(0.05):
                return True
            self._stage.beat()
        return self._taken.is_set()

    def _commit(self, slot: str | None, before: Loaded | None) -> None:
        """Record what `slot` uses now; the way back leads to the model that was in service, not to a damaged one."""
        file, entry = self._active[slot].file, self._store.entries.get(slot)
        if entry is None or entry.file != file:
            previous = before.file if before is not None and before.file != file else None
            self._store.commit(slot, Entry(file, previous))
            self._store.prune()

    def _load(self, file: str, slot: str | None) -> Loaded:
        """Read and load a model of the store. Raises KizuError."""
        self._loading_since_mono_ns = time.monotonic_ns()
        try:
            return self._read_and_load(file, slot)
        finally:
            self._stage.beat()
            self._loading_since_mono_ns = None

    def _read_and_load(self, file: str, slot: str | None) -> Loaded:
        config = self._config
        bundle = read_bundle(self._store.path_of(file), self._keys, require_signature=config.require_signature)
        manifest = bundle.manifest
        if self._route(manifest.name) != slot:
            raise ModelError(f"{file}: another camera asks for models named {manifest.name!r} by now")
        inspector = load_inspector(bundle, self._engine)
        return Loaded(inspector, manifest, ModelId(manifest.name, manifest.version, bundle.sha256), slot, file)

    def _refuse(self, file: DroppedFile, reason: str) -> None:
        try:
            self._store.quarantine(file.path, reason)
        except OSError as exc:
            self._drop.leave(file)
            reason = f"{reason} (and it cannot be moved to quarantine: {exc.strerror or exc})"
        self._report(ModelReport("rejected", file.path.name, reason=reason))

    def _remove(self, file: DroppedFile) -> None:
        """Take the file out of the drop directory, unless it was replaced meanwhile."""
        if not file.is_unchanged():
            return
        try:
            file.path.unlink()
        except OSError as exc:
            self._drop.leave(file)
            log.warning("cannot remove a model from the drop directory", file=file.path.name, error=str(exc))

    # -- after a restart -------------------------------------------------------------------------------------------

    def _restore(self) -> None:
        self._store.open()
        try:
            self._config.drop_dir.mkdir(parents=True, exist_ok=True)
        except OSError as exc:
            log.warning("cannot make the drop directory", folder=str(self._config.drop_dir), error=str(exc))
        if self._store.is_damaged:
            log.error("models/current.json is damaged: going by the newest models of the store")
        for slot in sorted(self._slots, key=lambda slot: slot or ""):
            self._restore_slot(slot)

    def _restore_slot(self, slot: str | None) -> None:
        entry = self._store.entries.get(slot)
        for file in self._candidates(slot, entry):
            self._stage.beat()
            try:
                loaded = self._load(file, slot)
            except (KizuError, OSError) as exc:
                if entry is not None:
                    self._report(ModelReport("failed", file, slot, reason=str(exc)))
                continue
            with self._lock:
                self._active[slot] = loaded
            if entry is None:
                self._commit(slot, None)
            self._report(ModelReport("active", file, slot, loaded.id, reason="restored"))
            return

    def _candidates(self, slot: str | None, entry: Entry | None) -> list[str]:
        """Files to try for `slot`, the best first.

        Without a record, the newest model of the right name will do. A slot that takes any name gets one only where
        the record is lost: after a change of the configuration, a guess could judge parts by a foreign model.
        """
        if entry is not None:
            return [file for file in (entry.file, entry.previous) if file is not None]
        return self._store.newest() if slot is not None or self._store.is_damaged else []

    def _report(self, report: ModelReport) -> None:
        write = log.warning if report.kind in ("rejected", "failed") else log.info
        model = f"{report.model.name} {report.model.version}" if report.model else None
        write(f"model {report.kind}", file=report.file, model=model, reason=report.reason)
        self._on_report(report)


def _report_of(file: DroppedFile, slot: str | None, proof: Proof) -> ModelReport:
    return ModelReport(
        "accepted", file.path.name, slot, proof.model, verify_s=proof.verify_s, self_test_s=proof.self_test_s
    )
