"""The batch size that is best for a graph on this machine: measured once, kept in a file, read at every start."""

import hashlib
import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from kizu_agent.encoding import utc_now
from kizu_agent.errors import EngineError
from kizu_agent.machine import waited_s
from kizu_contract.bundle import write_atomically
from kizu_contract.manifest import BatchProfile, Graph

FILE = "batch_sizes.json"
TUNE_S = 1.0
"""So long the measurement of one graph may take, but for the last run."""
TOLERANCE = 0.03
"""A smaller batch may give so much less tiles a second than the best: a frame waits for less."""
MAX_BATCH_BYTES = 64 * 2**20
"""Larger batches of tiles are not tried: they leave the caches and fill the memory."""
MAX_KEPT = 256
_MAX_FILE_BYTES = 2**20
_ROUNDS = 8
CALM_SHARE = 0.1
"""A run may wait for a core for this share of its time, all its threads together."""


@dataclass(frozen=True)
class Tuned:
    """What was measured: tiles a batch, and how many of them a second that gives."""

    batch: int
    tiles_per_s: float


def candidates(graph: Graph) -> list[int]:
    """Sizes to try, rising: the powers of two of the profile, its ends and its usual size."""
    profile = graph.batch
    tile_bytes = graph.tile_px * graph.tile_px * graph.channels
    most = max(profile.min, min(profile.max, MAX_BATCH_BYTES // tile_bytes))
    powers = (2**power for power in range(17))
    return sorted({size for size in (profile.min, profile.opt, most, *powers) if profile.min <= size <= most})


@dataclass(frozen=True)
class Clocks:
    """What a measurement goes by: seconds passed, and seconds for which others had the cores that it wanted."""

    now: Callable[[], float] = time.perf_counter
    waited: Callable[[], float] = waited_s


def measure(
    run: Callable[[int], None], sizes: Sequence[int], budget_s: float = TUNE_S, clocks: Clocks | None = None
) -> dict[int, float]:
    """Shortest seconds of `run(size)` for the rising `sizes` that fit into `budget_s`; empty on a busy machine.

    A run keeps all streams at work. There are rounds over all sizes, so that a disturbance does not meet one of them
    alone. A first run lays out memory and does not count. A size that is expected to take longer than what is left is
    left out; the smallest never is. A run that waited for a core does not count either: short ones slip through between
    two such waits, and a busy machine would always seem to be best at small batches. Hence one size without a calm run
    makes the others worthless.
    """
    clocks = clocks or Clocks()
    end = clocks.now() + budget_s
    took: dict[int, float] = {}
    calm: dict[int, float] = {}
    for size, is_first in _turns(sizes):
        expected = min((seconds / done * size for done, seconds in took.items()), default=0.0)
        if (took or not is_first) and clocks.now() + expected * (1 + is_first) > end:
            continue
        try:
            if is_first:
                run(size)
            seconds, is_calm = _timed(run, size, clocks)
        except EngineError:  # no memory for so many
            if not took:
                raise
            break
        took[size] = min(took.get(size, seconds), seconds)
        if is_calm:
            calm[size] = min(calm.get(size, seconds), seconds)
    return calm if calm.keys() == took.keys() else {}


def choose(seconds: Mapping[int, float], streams: int = 1) -> Tuned:
    """Give the smallest batch whose tiles a second are within TOLERANCE of the best. `seconds` is not empty.

    They are what as many batches of that size take as there are `streams`, side by side.
    """
    rates = {size: streams * size / max(took, 1e-9) for size, took in seconds.items()}
    enough = (1 - TOLERANCE) * max(rates.values())
    batch = min(size for size, rate in rates.items() if rate >= enough)
    return Tuned(batch, rates[batch])


class BatchSizes:
    """The file of measured batch sizes in `folder`; a damaged one counts as empty, and is written anew."""

    def __init__(self, folder: Path) -> None:
        self._path = folder / FILE

    def find(self, key: str, profile: BatchProfile) -> Tuned | None:
        """What was measured for `key`; None where nothing was that `profile` allows."""
        entry = self._read().get(key)
        try:
            tuned = Tuned(int(entry["batch"]), float(entry["tiles_per_s"]))  # type: ignore[index]
        except (TypeError, ValueError, KeyError, OverflowError):
            return None
        return tuned if profile.min <= tuned.batch <= profile.max else None

    def keep(self, key: str, tuned: Tuned, what: str) -> None:
        """Write what was measured for `key` (in words: `what`); the oldest of too many go. Raises OSError."""
        entries = {name: entry for name, entry in self._read().items() if name != key}
        entries[key] = {"batch": tuned.batch, "tiles_per_s": tuned.tiles_per_s, "at": utc_now(), "what": what}
        kept = dict(list(entries.items())[-MAX_KEPT:])
        self._path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(self._path, json.dumps(kept, indent=1).encode())

    def _read(self) -> dict[str, Any]:
        try:
            if self._path.stat().st_size > _MAX_FILE_BYTES:
                return {}
            entries = json.loads(self._path.read_bytes())
        except (OSError, ValueError, RecursionError):
            return {}
        return entries if isinstance(entries, dict) else {}


class BatchChoice:
    """The batch size in use for one graph, `size`, and `why` it is that one, in words."""

    def __init__(
        self,
        wanted: Literal["auto"] | int,
        folder: Path | None,
        key: str,
        profile: BatchProfile,
        what: str,
        streams: int = 1,
    ) -> None:
        """`key` names what a measurement holds for, `what` says it in words; without `folder` nothing is known.

        Until then `streams` share the bundle's own: each has memory for a batch.
        """
        self.size, self.why = max(profile.min, profile.opt // streams), "the bundle's own"
        if self.size != profile.opt:
            self.why += f", shared by {streams} streams"
        self._is_measured = False
        self._profile, self._key, self._what = profile, key, what
        self._file = BatchSizes(folder) if wanted == "auto" and folder is not None else None
        if wanted != "auto":
            self.size = min(max(wanted, profile.min), profile.max)
            self.why = "as configured" if self.size == wanted else f"the bundle's bound; {wanted} is configured"
        self.read()

    @property
    def is_open(self) -> bool:
        """Whether a measurement is wanted and there was none when it was last looked for."""
        return self._file is not None and not self._is_measured

    def read(self) -> None:
        """Take what was measured meanwhile, in another process for one; any thread may."""
        tuned = self._file.find(self._key, self._profile) if self._file is not None else None
        if tuned is not None:
            self._take(tuned)

    def keep(self, tuned: Tuned) -> None:
        """Take what was measured here, and write it. Raises OSError."""
        self._take(tuned)
        if self._file is not None:
            self._file.keep(self._key, tuned, self._what)

    def _take(self, tuned: Tuned) -> None:
        self._is_measured = True
        self.size, self.why = tuned.batch, f"measured here: {tuned.tiles_per_s:.0f} tiles/s"


def tuning_key(scorer: bytes, graph: Graph, machine: str) -> str:
    """Name what a measurement holds for: the graph, its profile, and the `machine` in words."""
    profile = graph.batch
    parts = [hashlib.sha256(scorer).hexdigest(), f"{profile.min}/{profile.opt}/{profile.max}", machine]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def _turns(sizes: Sequence[int]) -> Iterator[tuple[int, bool]]:
    return ((size, turn == 0) for turn in range(_ROUNDS) for size in sizes)


def _timed(run: Callable[[int], None], size: int, clocks: Clocks) -> tuple[float, bool]:
    """Seconds of a run, and whether it had the cores for itself."""
    waited, started = clocks.waited(), clocks.now()
    run(size)
    seconds = clocks.now() - started
    return seconds, clocks.waited() - waited <= CALM_SHARE * seconds
