"""Changing the models in service: load, swap, probation, the way back; and the last good ones after a restart.

Before a model is loaded into this process, the store's record says so, durably: where a start finds that record again,
the model may have killed the agent (or the power went), and the last good one goes on.
"""

import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace

import structlog

from kizu_agent.encoding import utc_now
from kizu_agent.errors import ModelError
from kizu_agent.model_index import Entry, Trial
from kizu_agent.model_load import Loader, Progress
from kizu_agent.model_slots import Loaded, Slots, Watch
from kizu_agent.model_store import ModelStore
from kizu_agent.probation import Cause, Failing, Probation
from kizu_agent.records import ModelReport
from kizu_agent.settings import ProbationConfig
from kizu_contract.errors import KizuError

TAKE_S = 5.0
"""Where nothing is inspected for this long, a new model counts as taken: there is nothing to swap between."""
MOST_STARTS = 5
"""So often in a row may a start with a model end without a stop while there is nothing else to go back to."""
BY_COMMAND = Failing("command", "rolled back by command")
CRASHED = "the agent ended without a stop while this model was being loaded or on probation"

log = structlog.get_logger(__name__)


class Swapper:
    """Owns the changes of what serves; used by the keeper's thread alone.

    `rollbacks` counts the models that left service again, by cause; `problems` are words for the agent's status.
    """

    def __init__(
        self,
        config: ProbationConfig,
        store: ModelStore,
        loader: Loader,
        slots: Slots,
        report: Callable[[ModelReport], None],
        progress: Progress,
    ) -> None:
        self.rollbacks: Counter[str] = Counter()
        self.problems: dict[str | None, str] = {}
        self._config, self._store, self._loader, self._slots = config, store, loader, slots
        self._report, self._progress = report, progress
        self._unmarked: dict[str | None, tuple[str, str]] = {}
        self._last_trouble = ""

    def swap(self, report: ModelReport, stored: str, *, is_judged: bool = True) -> ModelReport:
        """Load the `stored` model, offer it and put it on probation; the report once it was taken.

        Raises ModelError when it cannot be loaded (nothing has changed then), OSError by the disk.
        """
        slot, started = report.slot, time.monotonic()
        try:
            loaded = self._load_on_trial(Trial(stored, is_judged=is_judged), slot)
        except (KizuError, MemoryError) as exc:
            raise ModelError(f"passed its self-test and cannot be loaded beside the model in service: {exc}") from exc
        load_s = time.monotonic() - started
        self.settle()  # the model before may have failed meanwhile
        self._slots.watch(self._watch(loaded, self._last_good(slot), is_judged=is_judged))
        swap_s = self._offer(loaded)
        self.problems.pop(slot, None)
        self.settle()
        return replace(report, kind="active", load_s=load_s, swap_s=swap_s, at_ns=time.time_ns())

    def _load_on_trial(self, trial: Trial, slot: str | None) -> Loaded:
        """Load a model with the record saying so; where it cannot be loaded, what was on trial before is so again.

        Raises KizuError or MemoryError when it cannot be loaded, OSError by the disk.
        """
        earlier = self._store.index.trials.get(slot)
        self._store.begin_trial(slot, trial)
        try:
            return self._loader.load(trial.file, slot)
        except BaseException:
            self._store.end_trial(slot, trial.file, earlier)
            raise

    def settle(self) -> None:
        """End the probations that are over, take models that failed theirs out for good; quick where there are none."""
        with self._tolerant():
            for watch in self._slots.all_watched():
                self._settle(watch)

    def tidy(self) -> None:
        """Write what a full disk refused, take trials out that are none any more; while nothing is being loaded."""
        self._mark_failed()
        if self._unmarked:
            return
        with self._tolerant():
            for slot, trial in self._store.index.trials.items():
                watch = self._slots.watched(slot)
                if watch is None or watch.loaded.file != trial.file or watch.is_committed:
                    self._store.end_trial(slot, trial.file)

    def _mark_failed(self) -> None:
        with self._tolerant():
            for slot, (file, reason) in list(self._unmarked.items()):
                self._store.fail(slot, file, reason)
                del self._unmarked[slot]

    @contextmanager
    def _tolerant(self) -> Iterator[None]:
        """Go on when the disk is full: what serves is right all the same, and the record follows when it can."""
        try:
            yield
        except OSError as exc:
            if str(exc) != self._last_trouble:
                log.warning("the record of models cannot be written, will be tried again", error=str(exc))
            self._last_trouble = str(exc)
        else:
            self._last_trouble = ""

    def confirm(self, slot: str | None) -> bool:
        """End the probation of what serves `slot` because somebody says so; tell whether there was one."""
        watch = self._slots.watched(slot)
        if watch is not None:
            self._confirm(watch, "by command")
        return watch is not None

    def roll_back(self, slot: str | None) -> None:
        """Go back to the model before by command: end the probation, or take the one before the last good one.

        Raises ModelError when there is none or it cannot be loaded (nothing has changed then), OSError by the disk.
        """
        watch, entry = self._slots.watched(slot), self._store.entries.get(slot)
        if watch is not None and watch.way_back_file is not None:
            self._give_up(watch, BY_COMMAND)
        elif entry is None or entry.previous is None:
            raise ModelError("there is no model to go back to")
        else:
            self._return_to(entry.previous, slot)

    def _return_to(self, file: str, slot: str | None) -> None:
        left = self._slots.current(slot)
        try:
            loaded = self._load_on_trial(Trial(file, is_judged=False), slot)
        except (KizuError, MemoryError) as exc:
            raise ModelError(f"{file} cannot be loaded: {exc}") from exc
        swap_s = self._offer(loaded)
        self._slots.unwatch(slot)
        # Nothing to go back to from here: the same command once more must not undo the first.
        self._store.commit(slot, Entry(file, None, utc_now()))
        self.problems.pop(slot, None)
        if left is not None:
            self._tell_left(left, BY_COMMAND)
        self._report(ModelReport("active", file, slot, loaded.id, reason=BY_COMMAND.reason, swap_s=swap_s))

    # -- probation -------------------------------------------------------------------------------------------------

    def _watch(self, loaded: Loaded, before: tuple[Loaded | None, str | None], *, is_judged: bool) -> Watch:
        tallies = before[0].tallies if before[0] is not None else {}
        probation = Probation(self._config, loaded.manifest.calibration, tallies, is_judged=is_judged)
        return Watch(loaded, *before, probation)

    def _settle(self, watch: Watch) -> None:
        probation, slot = watch.probation, watch.loaded.slot
        if self._config.frames == 0:
            self._commit(watch)
            self._slots.unwatch(slot)
        elif probation.failing is not None and watch.way_back_file is not None:
            self._give_up(watch, probation.failing)
        elif probation.failing is not None:
            self._tell_stays(watch, probation.failing)
        elif probation.is_over:
            self._confirm(watch)
        elif watch.way_back_file is None and probation.has_survived:
            self._commit(watch)

    def _confirm(self, watch: Watch, reason: str | None = None) -> None:
        self._commit(watch)
        self._slots.unwatch(watch.loaded.slot)
        loaded = watch.loaded
        self._report(ModelReport("confirmed", loaded.file, loaded.slot, loaded.id, reason=reason))

    def _commit(self, watch: Watch) -> None:
        """Record that the slot uses this model from now on."""
        if watch.is_committed:
            return
        slot, file, before = watch.loaded.slot, watch.loaded.file, watch.way_back_file
        self._store.commit(slot, Entry(file, before if before != file else None, utc_now()))
        self._store.prune()
        watch.is_committed = True

    def _tell_stays(self, watch: Watch, failing: Failing) -> None:
        loaded = watch.loaded
        reason = f"{failing.reason}; it stays, for there is no model to go back to"
        if loaded.slot not in self.problems:
            self.problems[loaded.slot] = f"model {loaded.id.name} {loaded.id.version}: {reason}"
            self._report(ModelReport("failed", loaded.file, loaded.slot, loaded.id, reason=reason, cause=failing.cause))
        if watch.probation.has_survived:
            self._commit(watch)
            self._slots.unwatch(loaded.slot)

    def _give_up(self, watch: Watch, failing: Failing) -> None:
        """Take a model out of service for good, and mark it, unless a command sent it away."""
        loaded = watch.loaded
        if failing.cause == "command":
            self._store.end_trial(loaded.slot, loaded.file)
        else:
            self._store.fail(loaded.slot, loaded.file, failing.reason)
        self._slots.withdraw(watch)
        self._slots.unwatch(loaded.slot)
        self._tell_left(loaded, failing)
        if watch.way_back is None:
            self._serve_last_good(loaded.slot, "back after the rollback")
        else:
            back = watch.way_back
            self._report(ModelReport("active", back.file, loaded.slot, back.id, reason="back after the rollback"))

    def _tell_left(self, left: Loaded, failing: Failing) -> None:
        self.rollbacks[failing.cause] += 1
        self._report(
            ModelReport("rolled_back", left.file, left.slot, left.id, reason=failing.reason, cause=failing.cause)
        )

    def _last_good(self, slot: str | None) -> tuple[Loaded | None, str | None]:
        """What a failing model is replaced by, and its file: what serves, unless that is on probation itself."""
        watch, serving = self._slots.watched(slot), self._slots.current(slot)
        if watch is not None and watch.way_back_file is not None:
            return watch.way_back, watch.way_back_file
        if watch is not None:
            self._commit(watch)  # the first model of this slot: it has not crashed so far
        return serving, serving.file if serving is not None else None

    # -- loading ---------------------------------------------------------------------------------------------------

    def _offer(self, loaded: Loaded) -> float | None:
        """Offer `loaded` and wait until it is taken; the seconds that took, None where nobody was there to take it."""
        offered = time.monotonic()
        self._slots.offer(loaded)
        was_taken = False
        while not (was_taken or self._progress.stopping.is_set()) and time.monotonic() < offered + TAKE_S:
            was_taken = self._slots.wait_taken(0.05)
            self._progress.beat()
        swap_s = time.monotonic() - offered if was_taken else None
        self._slots.current(loaded.slot)
        return swap_s

    # -- after a restart -------------------------------------------------------------------------------------------

    def restore(self) -> None:
        """Take the models of the last run into service; on a full disk too."""
        for slot in sorted(self._loader.slot_names, key=lambda slot: slot or ""):
            self._restore_slot(slot)

    def _restore_slot(self, slot: str | None) -> None:
        trial, entry = self._store.index.trials.get(slot), self._store.entries.get(slot)
        if trial is not None and (entry is None or trial.file != entry.file):
            if trial.starts >= (1 if entry is not None else MOST_STARTS):
                self._tell_crash(slot, trial.file, CRASHED)
            elif self._resume(slot, trial):
                return
        self._serve_last_good(slot, "restored")

    def _resume(self, slot: str | None, trial: Trial) -> bool:
        """Go on with a model on probation after an orderly stop, or where there is no other; tell whether it serves."""
        entry = self._store.entries.get(slot)
        with self._tolerant():
            self._store.begin_trial(slot, replace(trial, starts=trial.starts + 1))
        try:
            loaded = self._loader.load(trial.file, slot)
        except (KizuError, OSError, MemoryError) as exc:
            self._report(ModelReport("failed", trial.file, slot, reason=str(exc)))
            return False
        before = entry.file if entry is not None else None
        self._slots.watch(self._watch(loaded, (None, before), is_judged=trial.is_judged))
        self._slots.put(loaded)
        self.settle()
        self._report(ModelReport("active", trial.file, slot, loaded.id, reason="restored, on probation"))
        return True

    def _serve_last_good(self, slot: str | None, reason: str) -> None:
        """Load the first model that can be, the best first; one that several starts died of is left out."""
        for file in self._candidates(slot):
            self._progress.beat()
            starts = self._starts_with(slot, file)
            if starts >= MOST_STARTS:
                self._tell_crash(slot, file, f"{starts} starts of the agent ended while this model was being loaded")
            elif self._serve(slot, file, starts, reason):
                return

    def _serve(self, slot: str | None, file: str, starts: int, reason: str) -> bool:
        entry = self._store.entries.get(slot)
        with self._tolerant():
            self._store.begin_trial(slot, Trial(file, starts + 1))
        try:
            loaded = self._loader.load(file, slot)
        except (KizuError, OSError, MemoryError) as exc:
            if entry is not None:
                self._report(ModelReport("failed", file, slot, reason=str(exc)))
            return False
        self._slots.put(loaded)
        if entry is None:  # a guess proves itself anew
            self._slots.watch(self._watch(loaded, (None, None), is_judged=True))
            self.settle()
        else:
            with self._tolerant():
                self._store.end_trial(slot, file)
        self._report(ModelReport("active", file, slot, loaded.id, reason=reason))
        return True

    def _starts_with(self, slot: str | None, file: str) -> int:
        trial = self._store.index.trials.get(slot)
        return trial.starts if trial is not None and trial.file == file else 0

    def _candidates(self, slot: str | None) -> list[str]:
        """Files to try for `slot`, the best first; none that failed.

        Without a record, the newest model of the right name will do. A slot that takes any name gets one only where
        the record is lost: after a change of the configuration, a guess could judge parts by a foreign model.
        """
        entry = self._store.entries.get(slot)
        if entry is not None:
            files = [file for file in (entry.file, entry.previous) if file is not None]
        else:
            files = self._store.newest() if slot is not None or self._store.is_damaged else []
        return [file for file in files if self._store.failure_of(file) is None]

    def _tell_crash(self, slot: str | None, file: str, reason: str) -> None:
        cause: Cause = "crash"
        stored = self._store.index.models.get(file)
        self._unmarked[slot] = (file, reason)
        self._mark_failed()
        self.rollbacks[cause] += 1
        model = stored.model if stored is not None else None
        self._report(ModelReport("rolled_back", file, slot, model, reason=reason, cause=cause))
