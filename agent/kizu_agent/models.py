"""Models by file drop and by command: verify, prove, store, and swap between frames, in a thread of its own.

A slot is what cameras ask for: a bundle name, or None for any bundle that no other camera asks for by name.
"""

import queue
import threading
import time
from collections import Counter
from collections.abc import Callable, Collection, Sequence
from dataclasses import replace
from pathlib import Path

import structlog

from kizu_agent.drop import DropDirectory, DroppedFile
from kizu_agent.errors import ModelError
from kizu_agent.model_keys import KeyRing
from kizu_agent.model_listing import list_models
from kizu_agent.model_load import Loader, Progress
from kizu_agent.model_slots import Loaded, Slots
from kizu_agent.model_store import ModelStore, StillChanging
from kizu_agent.model_swap import Swapper
from kizu_agent.prover import Prover
from kizu_agent.records import Inspection, ModelId, ModelListing, ModelOrder, ModelReport
from kizu_agent.self_test import Proof, ProofInterrupted
from kizu_agent.settings import EngineConfig, ModelsConfig
from kizu_agent.stages import Stage
from kizu_contract.errors import KizuError

__all__ = ["Loaded", "ModelKeeper"]

POLL_S = 0.5
RETRY_S = 30.0
"""After trouble that is not the file's own (disk full, no permission), it is tried again."""
MOST_ORDERS = 4
"""Commands that may wait for the one that is carried out."""

_WARNED = ("rejected", "failed", "rolled_back")

log = structlog.get_logger(__name__)


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
        slots: Collection[str | None],
        on_report: Callable[[ModelReport], None],
        on_failure: Callable[[], None] = lambda: None,
    ) -> None:
        self._keys = KeyRing(config)
        self._config = config
        self._on_report = on_report
        self._stage = Stage("models", self._work, on_failure)
        self._progress = Progress(self._stage.beat)
        self._store = ModelStore(state_dir)
        self._drop = DropDirectory(config.drop_dir)
        self._slots = Slots()
        self._prover = Prover(config, engine, self._keys, self._progress)
        self._loader = Loader(engine, self._keys, slots, self._store, self._progress, self._prover.build)
        self._swapper = Swapper(config.probation, self._store, self._loader, self._slots, self._report, self._progress)
        self._orders: queue.Queue[ModelOrder] = queue.Queue(MOST_ORDERS)
        self._wake = threading.Event()
        self._listing = ModelListing()
        self._restored = threading.Event()
        self._last_trouble: dict[str, str] = {}
        self._objections: dict[str, str] = {}

    @property
    def failure(self) -> BaseException | None:
        """What killed the thread; None while it is well."""
        return self._stage.failure

    @property
    def progress_mono_ns(self) -> int:
        """`time.monotonic_ns()` of the last progress; now while a model loads, for as long as a self-test may take."""
        now, since = time.monotonic_ns(), self._progress.loading_since_mono_ns
        is_loading = since is not None and now - since < self._config.self_test_timeout_s * 1e9
        return now if is_loading else self._stage.progress_mono_ns

    @property
    def rollbacks(self) -> Counter[str]:
        """Models that left service again, by cause, since the start."""
        return self._swapper.rollbacks

    @property
    def problems(self) -> list[str]:
        """What is wrong with models in service, in words."""
        return [*self._swapper.problems.values(), *self._objections.values(), *self._keys.problems]

    @property
    def building(self) -> str | None:
        """The file whose graph is being compiled for the GPU, for minutes; None while none is."""
        return self._progress.building

    @property
    def on_probation(self) -> int:
        """How many models are on probation."""
        return len(self._slots.all_watched())

    def start(self) -> None:
        """Start the thread; the models of the last run are its first work. Idempotent."""
        self._stage.start()

    def stop(self, deadline_s: float) -> bool:
        """Stop, ending a self-test under way; idempotent. Tell whether the thread is gone."""
        self._progress.stopping.set()
        self._wake.set()
        return self._stage.stop(deadline_s)

    def free(self) -> None:
        """Let go of all models, once the inspection and this have stopped."""
        self._slots.clear()

    def keep_probation(self) -> None:
        """Record that models on probation did nothing to end the service; only once it has stopped in good order.

        Without this the next start takes them for the cause of a crash.
        """
        try:
            self._store.pause_trials()
        except OSError as exc:
            log.warning("the record of models cannot be written", error=str(exc))

    def wait_restored(self, timeout_s: float) -> bool:
        """Wait until the models of the last run are in service or given up; tell whether that is so."""
        return self._restored.wait(timeout_s)

    def current(self, camera_model: str | None) -> Loaded | None:
        """The model for cameras that ask for `camera_model`; None while there is none. From any thread, never blocks.

        Called at the start of a batch: this is the moment of the swap.
        """
        return self._slots.current(camera_model)

    def observe(self, loaded: Loaded, inspections: Sequence[Inspection]) -> None:
        """Take what `loaded` found in a pass: by it, a model on probation passes or leaves. Quick."""
        if self._slots.observe(loaded, inspections):
            self._wake.set()  # the record and the report shall not wait for the next round

    def listing(self) -> ModelListing:
        """What is in the store and in service, as of the last change; from any thread."""
        return self._listing

    def slot_of(self, model: ModelId) -> str | None:
        """The slot that `model` goes to. Raises ModelError when no camera wants it."""
        return self._loader.route(model)

    def order(self, order: ModelOrder) -> bool:
        """Have `order` carried out; its outcome is reported. Tell whether it was taken: few may wait."""
        try:
            self._orders.put_nowait(order)
        except queue.Full:
            return False
        self._wake.set()
        return True

    def _work(self) -> None:
        if not self._restored.is_set():
            try:
                self._restore()
            except ProofInterrupted:
                return
            self._restored.set()
        self._wake.clear()
        self._keys.refresh()
        self._check_signers()
        self._swapper.settle()
        self._swapper.tidy()
        self._carry_out_orders()
        for file in self._drop.ready():
            if self._progress.stopping.is_set():
                return
            self._handle(file)
            self._carry_out_orders()
            self._stage.beat()
        serving = filter(None, map(self._slots.current, self._loader.slot_names))
        self._prover.tune(serving, self._store.path_of, self._keep_waiting)
        self._list()
        self._wake.wait(POLL_S)

    def _carry_out_orders(self) -> None:
        while not (self._orders.empty() or self._progress.stopping.is_set()):
            order = self._orders.get_nowait()
            try:
                self._carry_out(order)
            except ProofInterrupted:
                return
            except (KizuError, OSError) as exc:
                self._report(ModelReport("failed", order.file or "", order.slot, reason=f"by command: {exc}"))

    def _check_signers(self) -> None:
        """Tell of models in service whose signature is good no more; they serve on, and are not loaded again."""
        before, self._objections = self._objections, {}
        for serving in filter(None, map(self._slots.current, self._loader.slot_names)):
            objection = self._keys.trust.objection(self._store.index.signers.get(serving.file))
            if objection is None:
                continue
            model = f"model {serving.id.name} {serving.id.version}"
            self._objections[serving.file] = f"{model} {objection}: replace it; a restart will not load it"
            if serving.file not in before:
                reason = f"{objection}; it serves on until it is replaced, and is not loaded again"
                self._report(
                    ModelReport("failed", serving.file, serving.slot, serving.id, reason=reason, cause="revoked")
                )

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
            proof = self._prover.prove(incoming, file.path.name, self._keep_waiting)
            slot = self._loader.route(proof.model)
            serving = self._slots.current(slot)
            report = _report_of(file, slot, proof)
            if serving is not None and serving.id == proof.model:
                report = replace(report, kind="unchanged", reason="this model is in service already")
                self._take_signature(serving, proof, incoming)
            else:
                stored = self._store.keep(incoming, proof.model, proof.created, proof.signed_by)
                self._check_not_failed(stored)
                self._report(replace(report, reason=_doubt(proof, serving)))
                report = self._swap(report, stored)
        finally:
            incoming.unlink(missing_ok=True)
        self._remove(file)
        self._report(report)

    def _take_signature(self, serving: Loaded, proof: Proof, incoming: Path) -> None:
        """Keep the file in place of the stored one where another key signed the same content: a restart needs it."""
        if proof.signed_by is not None and proof.signed_by != self._store.index.signers.get(serving.file):
            self._store.keep(incoming, proof.model, proof.created, proof.signed_by)
            self._store.save()

    def _check_not_failed(self, stored: str) -> None:
        """Raise ModelError where this very model failed before; it stays in the store for those who want it."""
        failure = self._store.failure_of(stored)
        if failure is not None:
            self._store.prune()
            raise ModelError(
                f"failed before, at {failure.at}: {failure.reason}. Mend and export it anew, or have it all the "
                "same by the command model, action activate"
            )

    def _swap(self, report: ModelReport, stored: str) -> ModelReport:
        try:
            return self._swapper.swap(report, stored)
        except ModelError:
            self._store.discard(stored)
            raise

    def _keep_waiting(self) -> bool:
        self._stage.beat()
        self._swapper.settle()
        return not self._progress.stopping.is_set()

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

    # -- a command -------------------------------------------------------------------------------------------------

    def _carry_out(self, order: ModelOrder) -> None:
        if order.file is None:
            self._swapper.roll_back(order.slot)
            return
        serving = self._slots.current(order.slot)
        if serving is not None and serving.file == order.file:
            if not self._swapper.confirm(order.slot):
                self._report(ModelReport("unchanged", order.file, order.slot, serving.id, reason="by command"))
            return
        self._activate(order.slot, order.file)

    def _activate(self, slot: str | None, file: str) -> None:
        """Prove a stored model anew, since driver and configuration may have changed, and swap it in.

        One that failed is not judged again: whoever asks for it by name knows why.
        """
        proof = self._prover.prove(self._store.path_of(file), file, self._keep_waiting)
        has_failed = self._store.failure_of(file) is not None
        self._store.forgive(proof.sha256)
        report = ModelReport("accepted", file, slot, proof.model, "by command", proof.verify_s, proof.self_test_s)
        self._report(report)
        self._report(self._swapper.swap(report, file, is_judged=not has_failed))

    def _list(self) -> None:
        self._listing = list_models(self._store, self._slots, self._loader.slot_names)

    # -- after a restart -------------------------------------------------------------------------------------------

    def _restore(self) -> None:
        self._store.open()
        try:
            self._config.drop_dir.mkdir(parents=True, exist_ok=True)
        except OSError as exc:
            log.warning("cannot make the drop directory", folder=str(self._config.drop_dir), error=str(exc))
        if self._store.is_damaged:
            log.error("models/current.json is damaged: going by the newest models of the store")
        for file in self._store.newest():
            self._loader.describe(file)
        self._swapper.restore()

    def _report(self, report: ModelReport) -> None:
        if report.signed_by is None and report.model is not None:
            report = replace(report, signed_by=self._store.signer_of(report.model))
        is_doubtful = report.kind in _WARNED or (report.kind == "accepted" and report.reason is not None)
        write = log.warning if is_doubtful else log.info
        model = f"{report.model.name} {report.model.version}" if report.model else None
        write(f"model {report.kind}", file=report.file, model=model, reason=report.reason)
        self._list()  # whoever hears of it and asks finds it there
        self._on_report(report)


def _report_of(file: DroppedFile, slot: str | None, proof: Proof) -> ModelReport:
    return ModelReport(
        "accepted",
        file.path.name,
        slot,
        proof.model,
        verify_s=proof.verify_s,
        self_test_s=proof.self_test_s,
        signed_by=proof.signed_by,
    )


def _doubt(proof: Proof, serving: Loaded | None) -> str | None:
    """What somebody who drops this model should know of it; None where nothing is odd.

    Older ones are taken: whoever drops one means to go back. `created` is UTC text that sorts by time.
    """
    if serving is None or serving.id.name != proof.name:
        return None
    if serving.id.version == proof.version:
        return f"it has other content than the model in service, which is version {proof.version} as well"
    if proof.created < serving.manifest.created:
        return (
            f"it is older ({proof.created}) than version {serving.id.version} in service ({serving.manifest.created})"
        )
    return None
