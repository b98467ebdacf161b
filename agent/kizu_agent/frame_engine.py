"""A bundle's two graphs at work: the one that takes frames of one size whole, and the tiled one for all others.

The tiled graph is loaded when the first frame of another size comes: most bundles see one size only, and two sessions
would hold their weights twice. Where loading may take minutes (GPU providers) it is loaded at once.
"""

import time
from collections.abc import Callable
from typing import Any

import numpy as np
import structlog
from numpy.typing import NDArray

from kizu_agent.batch_sizes import BatchChoice
from kizu_agent.engine import GROW_AFTER_S, Engine, is_out_of_memory, run_bound
from kizu_agent.errors import EngineError
from kizu_agent.providers import choose_batch, first_line, open_session
from kizu_agent.settings import EngineConfig
from kizu_agent.threads import budget
from kizu_contract.bundle import Bundle
from kizu_contract.manifest import FrameGraph, Manifest

Outputs = tuple[NDArray[np.float32], NDArray[np.float32]]

log = structlog.get_logger(__name__)


class FrameEngine:
    """An `Engine` that also takes frames of one `size` whole. Used by one thread at a time; `close` frees both graphs.

    `on_build` as in `Engine`. Raises EngineError as `Engine` does, for either graph.
    """

    def __init__(self, bundle: Bundle, config: EngineConfig, on_build: Callable[[], None] = lambda: None) -> None:
        manifest = bundle.manifest
        if bundle.frame_graph is None or manifest.frame_graph is None:
            raise EngineError(f"model {manifest.name} has no frame graph; open its tiled graph with Engine")
        self.graph, self.size = manifest.graph, manifest.frame_graph.size
        self._scorer, self._config, self._on_build = bundle.scorer, config, on_build
        self._tiles: Engine | None = None
        self._is_closed = False
        self._failures, self._tiled_until_mono_ns = 0, 0
        self._shapes = frame_shapes(manifest, manifest.frame_graph)
        opened = open_session(bundle.frame_graph, config, self.graph, on_build, is_tiled=False)
        self.provider, self.degraded_reason = opened.provider, opened.degraded_reason
        self._session: Any = opened.session
        _check_interface(self._session, self._shapes)
        self._batch = choose_batch(bundle.scorer, self.graph, config, self.provider)
        if self.provider != "cpu":
            self.tiled()
        self.run_frame(np.zeros(self._shapes["frame"], np.uint8))
        for entry in opened.caches:
            entry.finish(config.cache_max_bytes)

    def __enter__(self) -> "FrameEngine":  # noqa: PYI034 - typing.Self came with Python 3.11
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Free both graphs; idempotent. A closed engine refuses to run."""
        self._session, self._is_closed = None, True
        if self._tiles is not None:
            self._tiles.close()

    def run(self, tiles: NDArray[np.uint8], position: NDArray[np.int64] | None = None) -> Outputs:
        """Score tiles, as `Engine.run` does."""
        return self.tiled().run(tiles, position)

    def run_frame(self, frame: NDArray[np.uint8]) -> Outputs | None:
        """Score `frame` uint8 [H, W, C] whole: score float32 [N] of its tiles, and their maps joined.

        The joined map is what `TileLayout.join` gives: float32 [H'/u, W'/u].

        None where the tiled graph must do it: for frames of another size, and for ten minutes after the device had no
        memory for a whole one. Raises EngineError when the graph fails.
        """
        if self._is_closed:
            raise EngineError("the engine is closed; open a new one")
        is_taken = frame.dtype == np.uint8 and frame.shape == self._shapes["frame"]
        if not is_taken or time.monotonic_ns() < self._tiled_until_mono_ns:
            return None
        score, cells = np.empty(self._shapes["score"], np.float32), np.empty(self._shapes["map"], np.float32)
        try:
            run_bound(self._session, {"frame": np.ascontiguousarray(frame)}, score, cells)
        except Exception as exc:  # onnxruntime's errors share no base but Exception
            if not is_out_of_memory(exc):
                raise EngineError(f"the frame graph failed: {first_line(exc)}") from exc
            self._fall_back(exc)
            return None
        return score, cells

    def tiled(self) -> Engine:
        """The tiled graph alone, loaded where it was not yet. Raises EngineError."""
        if self._is_closed:
            raise EngineError("the engine is closed; open a new one")
        if self._tiles is None:
            self._tiles = Engine(self._scorer, self.graph, self._config, self._on_build)
            self._scorer = b""  # the session has it now
            log.info("the tiled graph is loaded too", whole_frames=str(self.size), provider=self._tiles.provider)
        return self._tiles

    def tune(self) -> None:
        """Measure the tiled graph's best batch, as `Engine.tune` does."""
        self.tiled().tune()

    @property
    def streams(self) -> int:
        """How many batches of the tiled graph run side by side."""
        return budget(self.provider, self._config.threads, self._config.streams).streams

    @property
    def batch(self) -> BatchChoice:
        """The tiled graph's batch, whether or not that is loaded."""
        return self._batch if self._tiles is None else self._tiles.batch

    @property
    def out_of_memory(self) -> int:
        """How often the device had no memory for a frame or a batch."""
        return self._failures + (self._tiles.out_of_memory if self._tiles is not None else 0)

    @property
    def memory_problem(self) -> str | None:
        """That frames are scored tile by tile, or in batches too small, for want of memory; None where they are not."""
        if time.monotonic_ns() < self._tiled_until_mono_ns:
            return f"{self.provider} is short of memory: whole frames do not fit, they are scored tile by tile"
        return self._tiles.memory_problem if self._tiles is not None else None

    def _fall_back(self, exc: Exception) -> None:
        self._failures += 1
        self._tiled_until_mono_ns = time.monotonic_ns() + round(GROW_AFTER_S * 1e9)
        log.warning("out of memory on the device: frames are scored tile by tile", reason=first_line(exc))


AnyEngine = Engine | FrameEngine


def open_engine(bundle: Bundle, config: EngineConfig, on_build: Callable[[], None] = lambda: None) -> AnyEngine:
    """Open the graph of `bundle`, or both where it has one for whole frames; `on_build` as in Engine.

    Raises EngineError.
    """
    if bundle.frame_graph is not None:
        return FrameEngine(bundle, config, on_build)
    return Engine(bundle.scorer, bundle.manifest.graph, config, on_build)


def frame_shapes(manifest: Manifest, frame_graph: FrameGraph) -> dict[str, tuple[int, ...]]:
    """Sizes of what a frame graph takes and gives: `frame` [H, W, C], `score` [N], `map` [H'/u, W'/u]."""
    layout = manifest.grid.layout(frame_graph.height, frame_graph.width)
    unit = layout.unit_px(manifest.graph.map_cell_px)
    return {
        "frame": (frame_graph.height, frame_graph.width, manifest.graph.channels),
        "score": (layout.count,),
        "map": (layout.padded_height // unit, layout.padded_width // unit),
    }


def _check_interface(session: Any, shapes: dict[str, tuple[int, ...]]) -> None:
    """Compare names, types and sizes with what the manifest says."""
    kinds = {"frame": "tensor(uint8)", "score": "tensor(float)", "map": "tensor(float)"}
    wanted = {name: (kinds[name], list(shape)) for name, shape in shapes.items()}
    found = {arg.name: (arg.type, arg.shape) for arg in (*session.get_inputs(), *session.get_outputs())}
    if found != wanted or [arg.name for arg in session.get_inputs()] != ["frame"]:
        raise EngineError(f"the frame graph's interface is {found}; the manifest says {wanted}")
