"""The keeper's side of proving models: under which terms, told while it compiles, and for the best batch size too."""

import os
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import structlog

from kizu_agent.batch_sizes import BatchChoice
from kizu_agent.errors import ModelError
from kizu_agent.model_keys import KeyRing
from kizu_agent.model_load import Progress
from kizu_agent.model_slots import Loaded
from kizu_agent.self_test import Proof, ProofInterrupted, Request, prove
from kizu_agent.settings import EngineConfig, ModelsConfig

log = structlog.get_logger(__name__)

RETRY_S = 600.0
"""So long a busy machine is left alone before batches are measured again."""

KeepWaiting = Callable[[], bool]


class Prover:
    """Has models proven in a confined process; used by the keeper's thread alone."""

    def __init__(self, config: ModelsConfig, engine: EngineConfig, keys: KeyRing, progress: Progress) -> None:
        self._config, self._engine, self._keys, self._progress = config, engine, keys, progress
        self._tune_mono_s: dict[str, float] = {}
        self._has_warned = False

    def prove(self, path: Path, file: str, keep_waiting: KeepWaiting) -> Proof:
        """Prove the bundle at `path`, which people know as `file`. Raises ModelError, ProofInterrupted."""
        with self._progress.told_of_building(file) as begin:
            return prove(self._request(path), keep_waiting, begin)

    def build(self, stored: Path) -> None:
        """Have the graph of a stored model compiled. Raises ModelError, ProofInterrupted."""
        self.prove(stored, stored.name, self._progress.keep_waiting)

    def tune(self, serving: Iterable[Loaded], path_of: Callable[[str], Path], keep_waiting: KeepWaiting) -> None:
        """Have the best batch measured for a model in service that came without; one in a call.

        It serves meanwhile, with the bundle's own batch, and takes the other between two runs. Where the machine was
        too busy to tell, that stays so for RETRY_S.
        """
        if not self._can_keep():
            return
        for loaded in serving:
            choice, due_mono_s = loaded.inspector.engine.batch, self._tune_mono_s.get(loaded.file, 0.0)
            if time.monotonic() < due_mono_s or not choice.is_open:
                continue
            self._tune_mono_s[loaded.file] = time.monotonic() + RETRY_S
            self._tune(path_of(loaded.file), loaded.file, choice, keep_waiting)
            return

    def _can_keep(self) -> bool:
        """Whether what is measured can be kept; said once where it cannot."""
        folder, problem = self._engine.cache_dir, ""
        try:
            if folder is not None:
                folder.mkdir(parents=True, exist_ok=True)
                problem = "" if os.access(folder, os.W_OK | os.X_OK) else "not writable by this user"
        except OSError as exc:
            problem = exc.strerror or str(exc)
        if problem and not self._has_warned:
            log.warning("batch sizes cannot be kept, the bundles' own hold", folder=str(folder), reason=problem)
        self._has_warned = bool(problem)
        return not problem

    def _tune(self, path: Path, file: str, choice: BatchChoice, keep_waiting: KeepWaiting) -> None:
        try:
            self.prove(path, file, keep_waiting)
        except ProofInterrupted:
            return
        except (ModelError, OSError) as exc:  # no room for a process, or on the disk: the model serves all the same
            log.warning("batches cannot be measured", file=file, reason=str(exc))
            return
        choice.read()
        what = "no batch measured: the machine is busy" if choice.is_open else "batch size measured"
        log.info(what, file=file, tiles=choice.size, why=choice.why)

    def _request(self, path: Path) -> Request:
        config = self._config
        self._keys.refresh()
        trust, limits = self._keys.trust, (config.self_test_tolerance, config.self_test_timeout_s)
        keys, revoked = [key.public_bytes_raw().hex() for key in trust.keys.values()], sorted(trust.revoked)
        return Request(str(path.absolute()), keys, trust.is_required, self._engine, *limits, revoked)
