"""What a provider compiled of a graph for this machine, kept on disk: TensorRT's engines, OpenVINO's blobs.

A folder for each graph, named by all that it depends on. `entry.json`, written last, says that it is whole; a folder
without it is what a killed build left behind. Those used longest ago go first when there is too much.
"""

import contextlib
import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from kizu_agent.errors import EngineError
from kizu_agent.machine import Gpu
from kizu_contract.bundle import write_atomically
from kizu_contract.manifest import Graph

_MARK = "entry.json"
_NAME_DIGITS = 24


@dataclass(frozen=True)
class CacheEntry:
    """One graph's folder below `root`: `parts` are what its content depends on."""

    root: Path
    kind: str
    parts: Mapping[str, str]

    @property
    def folder(self) -> Path:
        """Where the provider keeps its files; the name changes with each of the parts."""
        digest = hashlib.sha256(json.dumps(dict(self.parts), sort_keys=True).encode()).hexdigest()
        return self.root / f"{self.kind}-{digest[:_NAME_DIGITS]}"

    @property
    def is_whole(self) -> bool:
        """Whether it holds all that opening the graph needs."""
        return (self.folder / _MARK).is_file()

    def begin(self) -> None:
        """Make the folder ready to be filled, or note that it is used. Raises EngineError."""
        try:
            if self.is_whole:
                with contextlib.suppress(PermissionError):  # made by another user's `kizu-agent check`
                    os.utime(self.folder)
                return
            shutil.rmtree(self.folder, ignore_errors=True)
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as exc:
            raise EngineError(f"the engine cache {self.folder} cannot be used: {exc.strerror or exc}") from exc

    def finish(self, max_bytes: int) -> None:
        """Mark it as whole, and let others go until all take at most `max_bytes`. Raises EngineError."""
        if self.is_whole:
            return
        try:
            write_atomically(self.folder / _MARK, json.dumps(dict(self.parts), indent=2).encode())
        except OSError as exc:
            raise EngineError(f"the engine cache {self.folder} cannot be used: {exc.strerror or exc}") from exc
        evict(self.root, max_bytes, keep=self.folder)


def tensorrt_entry(root: Path, scorer: bytes, graph: Graph, tensorrt: str | None, gpu: Gpu | None) -> CacheEntry:
    """The entry of a graph that TensorRT compiles: by graph, profile and precision, TensorRT, driver and GPU.

    The graph's own hash rather than its bundle's: a version with the same graph need not be compiled again.
    """
    parts = {**_graph_parts(scorer, graph), **_gpu_parts(tensorrt, gpu)}
    return CacheEntry(root, "tensorrt", parts)


def timing_entry(root: Path, tensorrt: str | None, gpu: Gpu | None) -> CacheEntry:
    """The entry of the kernels' timings, which all graphs on one GPU share: the second one is built faster."""
    return CacheEntry(root, "timing", _gpu_parts(tensorrt, gpu))


def openvino_entry(root: Path, scorer: bytes, graph: Graph, onnxruntime: str, cpu: str) -> CacheEntry:
    """The entry of a graph that OpenVINO compiles."""
    return CacheEntry(root, "openvino", {**_graph_parts(scorer, graph), "onnxruntime": onnxruntime, "cpu": cpu})


def evict(root: Path, max_bytes: int, keep: Path) -> None:
    """Delete the folders used longest ago until all take at most `max_bytes`; never `keep`."""
    folders = [path for path in root.iterdir() if path.is_dir() and path != keep] if root.is_dir() else []
    folders.sort(key=_used_ns, reverse=True)
    left = max_bytes - _size(keep)
    for folder in folders:
        left -= _size(folder)
        if left < 0:
            shutil.rmtree(folder, ignore_errors=True)


def _graph_parts(scorer: bytes, graph: Graph) -> dict[str, str]:
    batch = graph.batch
    return {
        "graph": hashlib.sha256(scorer).hexdigest(),
        "precision": graph.precision,
        "batches": f"{batch.min}/{batch.opt}/{batch.max}",
    }


def _gpu_parts(tensorrt: str | None, gpu: Gpu | None) -> dict[str, str]:
    return {
        "tensorrt": tensorrt or "unknown",
        "gpu": gpu.name if gpu else "unknown",
        "capability": gpu.capability if gpu else "unknown",
        "driver": gpu.driver if gpu else "unknown",
    }


def _used_ns(folder: Path) -> int:
    with contextlib.suppress(OSError):
        return folder.stat().st_mtime_ns
    return 0


def _size(folder: Path) -> int:
    total = 0
    for path in folder.rglob("*"):
        with contextlib.suppress(OSError):
            total += path.stat().st_size
    return total
