"""What a frame allocates in steady state, from its pixels to its committed messages, in one thread."""

import gc
import sys
import time
import tracemalloc
from importlib.metadata import version
from pathlib import Path

import numpy as np
from harness import Row
from numpy.typing import NDArray
from speed_common import engine_config

from kizu_agent.config import load_config
from kizu_agent.delivery import Delivery
from kizu_agent.inspection import inspect_frames
from kizu_agent.inspector import load_inspector
from kizu_agent.outbox import Outbox
from kizu_agent.records import Frame, ModelId
from kizu_agent.sinks import JsonSink
from kizu_agent.state import StateBoard
from kizu_contract.bundle import Bundle

_WARM = 2


class Chain:
    """Inspection and delivery of one camera's frames, called one after the other; `close` it."""

    def __init__(self, bundle: Bundle, work: Path) -> None:
        work.mkdir(parents=True, exist_ok=True)
        file = work / "agent.toml"
        file.write_text(
            f'[agent]\nname = "box"\nprefix = "bench"\nstate_dir = "{work}"\n[[cameras]]\nname = "cam1"\n'
            f'source = "sim:plates"\nheatmap.when = "always"\n'
        )
        config = load_config(file)
        self._outbox = Outbox(work / "outbox.sqlite3", config.outbox)
        sinks = [JsonSink(config, lambda _topic, _payload: None)]
        board = StateBoard(config, sinks, version("kizu"), time.time_ns())
        self._delivery = Delivery(config, self._outbox, board, sinks)
        self._inspector = load_inspector(bundle, engine_config("cpu"))
        self._model = ModelId("bench", "1", "0" * 64)
        self._thresholds = bundle.manifest.thresholds.scores()
        self._number = 0

    def step(self, image: NDArray[np.uint8]) -> None:
        """Inspect one frame, commit what it gives, and take it out of the outbox as if it had been delivered."""
        frame = Frame("cam1", self._number, image, None, time.time_ns(), time.monotonic_ns())
        self._number += 1
        self._delivery.deliver(inspect_frames([frame], self._inspector, self._model, lambda *_: self._thresholds, {}))
        self._outbox.delete([row.id for row in self._outbox.take(100)])

    def close(self) -> None:
        """Free everything."""
        self._inspector.close()
        self._outbox.close()


def count_rows(bundle: Bundle, images: list[NDArray[np.uint8]], work: Path, frames: int) -> list[Row]:
    """Bytes at the peak of a frame, and what is kept from frame to frame."""
    chain = Chain(bundle, work)
    try:
        for image in images[:_WARM]:
            chain.step(image)
        kept_blocks = _blocks_kept(chain, images, frames)
        peak, kept = _bytes(chain, images, frames)
    finally:
        chain.close()
    size, name = images[0].nbytes, "fast default, steady state, a frame"
    return [
        Row(f"{name}: bytes allocated at its peak ÷ its own", peak / size, ""),
        Row(f"{name}: bytes allocated at its peak", peak / 2**20, "MiB"),
        Row(f"{name}: bytes kept after it", kept / frames, "B"),
        Row(f"{name}: Python blocks kept after it", kept_blocks / frames, ""),
    ]


def _blocks_kept(chain: Chain, images: list[NDArray[np.uint8]], frames: int) -> int:
    gc.collect()
    before = sys.getallocatedblocks()
    for number in range(frames):
        chain.step(images[number % len(images)])
    gc.collect()
    return sys.getallocatedblocks() - before


def _bytes(chain: Chain, images: list[NDArray[np.uint8]], frames: int) -> tuple[int, int]:
    """The highest peak above what was there before a frame, and what all frames left; numpy's buffers are counted."""
    tracemalloc.start()
    try:
        chain.step(images[0])
        gc.collect()
        began, peaks = tracemalloc.get_traced_memory()[0], []
        for number in range(frames):
            before = tracemalloc.get_traced_memory()[0]
            tracemalloc.reset_peak()
            chain.step(images[number % len(images)])
            peaks.append(tracemalloc.get_traced_memory()[1] - before)
        gc.collect()
        return max(peaks), tracemalloc.get_traced_memory()[0] - began
    finally:
        tracemalloc.stop()
