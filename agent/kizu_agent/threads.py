"""One budget of threads for the engine, OpenCV and BLAS, which each would take every core for themselves.

The engine has the cores: on the CPU as streams, each of which runs the graph on a batch of its own
(docs/decisions/0028). What is done between its runs (colours, stitching, smoothing) is done by the thread that does it,
and the numbers behind that are in docs/decisions/0026. `limit` is called first in every process of the agent.
"""

import math
import os
from dataclasses import dataclass
from pathlib import Path

_BLAS_VARIABLES = ("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS")
_MOST_OPENCV = 4
"""What OpenCV does to one frame gains nothing from more."""
_MOST_STREAMS = 8
"""Each has memory of its own for what a graph computes on the way."""
_GPUS = ("cuda", "tensorrt")
_CGROUP = Path("/proc/self/cgroup")
_CGROUPS = Path("/sys/fs/cgroup")


@dataclass(frozen=True)
class ThreadBudget:
    """Threads that score, in so many `streams`; inside a function of OpenCV, inside one of BLAS; of `cores`."""

    cores: int
    engine: int
    opencv: int
    blas: int = 1
    streams: int = 1

    @property
    def operator(self) -> int:
        """Threads inside an operator of the graph: those that are no stream help whichever needs them."""
        return self.engine - self.streams + 1

    def __str__(self) -> str:
        engine = f"engine {self.engine} in {self.streams} stream{'s' if self.streams > 1 else ''}"
        return f"threads: {engine}, OpenCV {self.opencv}, BLAS {self.blas}, of {self.cores} cores"


def budget(provider: str = "cpu", threads: int = 0, streams: int = 0) -> ThreadBudget:
    """Divide the cores for an engine on `provider` that is to have `threads` (0: one for each core).

    On the CPU they make `streams` (0: one for each thread, eight at most; never more than threads); elsewhere one.
    """
    cores = available_cores()
    threads = threads or cores
    streams = min(streams or _MOST_STREAMS, threads) if provider == "cpu" else 1
    # Beside a GPU the cores would idle: what is left to do for a frame may have some of them.
    opencv = max(1, min(_MOST_OPENCV, cores // 2)) if provider in _GPUS else 1
    return ThreadBudget(cores, threads, opencv, streams=streams)


def available_cores() -> int:
    """Cores this process may use: systemd's AllowedCPUs and a container's quota may grant fewer than there are."""
    cores = len(os.sched_getaffinity(0))
    return max(1, math.ceil(min(cores, _quota(_CGROUP, _CGROUPS))))


def limit(opencv: int = 1) -> None:
    """Hold OpenCV and BLAS of this process to the budget; BLAS listens only before numpy is imported."""
    for name in _BLAS_VARIABLES:
        os.environ.setdefault(name, "1")
    import cv2  # noqa: PLC0415 - after the variables: numpy comes with it

    cv2.setNumThreads(opencv)


def child_environment() -> dict[str, str]:
    """What a child process finds in its environment, for libraries that count cores when they are loaded."""
    return {name: os.environ.get(name, "1") for name in _BLAS_VARIABLES}


def _quota(membership: Path, root: Path) -> float:
    """Cores by the CPU quotas (cgroup v2, cpu.max) of this process's group and those above it; infinity without one."""
    try:
        lines = membership.read_text().splitlines()
    except OSError:
        return math.inf
    group = next((line.removeprefix("0::").strip("/") for line in lines if line.startswith("0::")), "")
    folder = root / group
    return min(_quota_of(place) for place in (folder, *folder.parents) if place.is_relative_to(root))


def _quota_of(folder: Path) -> float:
    try:
        quota, period = (folder / "cpu.max").read_text().split()
        return math.inf if quota == "max" else int(quota) / int(period)
    except (OSError, ValueError):
        return math.inf
