"""(d) Where a frame's time goes: the very functions that the agent uses, timed from outside while its pipeline runs.

Frames of 1920 × 1200 come one at a time, with room between them, so that stages of neighbours do not share the cores.
A stage's time is that of its functions without what they call of another stage.
"""

import os
import pkgutil
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import cv2
import numpy as np
from harness import Row
from numpy.typing import NDArray
from service import Subscriber, broker
from speed_common import FAST, Request, engine_config, paced
from speed_counts import count_rows
from speed_models import pictures, write_pictures

from kizu_agent.capture_feeder import Feeder
from kizu_agent.capture_process import SLOTS
from kizu_agent.config import Config, load_config
from kizu_agent.health import Health
from kizu_agent.inspector import load_inspector
from kizu_agent.pipeline import Pipeline
from kizu_contract.pictures import decode_picture

WIDTH, HEIGHT = 1920, 1200
STAGES = {
    "copy": ("kizu_agent.capture_process.CaptureProcess.copy",),
    "tile": ("kizu_contract.tiles.TileLayout.pad", "kizu_contract.tiles.TileLayout.cut"),
    "engine": ("kizu_agent.engine.Engine.run",),
    "stitch": ("kizu_contract.tiles.TileLayout.join", "kizu_contract.tiles.TileLayout.spread"),
    "judge": ("kizu_agent.inspector.reduce_frame", "kizu_agent.inspection._judge"),
    "inspection, the rest": ("kizu_agent.pipeline.inspect_frames",),
    "encode, thumbnail": ("kizu_agent.delivery.draw_heatmap",),
    "encode, payloads": ("kizu_agent.delivery.Delivery._judge", "kizu_agent.sinks.to_bytes"),
    "commit": ("kizu_agent.delivery.Delivery._commit_once",),
    "delivery, the rest": ("kizu_agent.delivery.Delivery.deliver",),
    "publish": (
        "kizu_agent.outbox.Outbox.take",
        "kizu_agent.connection.Connection.publish",
        "kizu_agent.outbox.Outbox.delete",
    ),
}
"""What is timed of each stage, by its full name; `publish` without waiting for the broker."""
_WARM, _PATIENCE_S = 2, 300.0
_Call = Callable[..., Any]


class Stopwatch:
    """Seconds by stage, each without what it calls of another; any thread may run what is watched."""

    def __init__(self) -> None:
        self.seconds: Counter[str] = Counter()
        self._inner = threading.local()
        self._lock = threading.Lock()

    def wrap(self, stage: str, call: _Call) -> _Call:
        """`call`, timed as `stage`."""

        def timed(*args: Any, **kwargs: Any) -> Any:
            outer = getattr(self._inner, "seconds", 0.0)
            self._inner.seconds = 0.0
            began = time.perf_counter()
            try:
                return call(*args, **kwargs)
            finally:
                took = time.perf_counter() - began
                self._note(stage, took - self._inner.seconds)
                self._inner.seconds = outer + took

        return timed

    @contextmanager
    def watch(self) -> Iterator[None]:
        """Time all STAGES inside the block."""
        with ExitStack() as stack:
            for stage, names in STAGES.items():
                for name in names:
                    stack.enter_context(patch(name, self.wrap(stage, pkgutil.resolve_name(name))))
            yield

    def _note(self, stage: str, seconds: float) -> None:
        with self._lock:
            self.seconds[stage] += seconds  # type: ignore[assignment]


def measure(request: Request) -> list[Row]:
    """All rows of this family, with the fast default on the CPU."""
    bundle = request.models.bundle(FAST)
    images = pictures(bundle.manifest.colour, 4, WIDTH, HEIGHT)
    work = request.work / "stages"
    folder = write_pictures(work / "pictures", images)
    inspector = load_inspector(bundle, engine_config("cpu"))
    inspector.inspect(images[:1])
    frame_s = 1 / paced(lambda: len(inspector.inspect(images[:1])), request.seconds).rate
    inspector.close()
    frames = 5 if request.is_quick else 40
    source = f"folder:{folder}?loop=true&rate={min(20.0, 0.5 / frame_s):.2f}"
    with broker(work / "broker") as port:
        config = write_config(work, request.models.path(FAST), port, source)
        stages = _run(config, port, frames)
    rows = [*_capture_rows(images, request.seconds), *(Row(f"{_NAME}: {k}", v * 1e3, "ms") for k, v in stages.items())]
    total = sum(row.value for row in rows if row.unit == "ms" and "JPEG" not in row.name)
    rows.append(Row(f"{_NAME}: all stages, from PNG", total, "ms"))
    rows.append(Row(f"{_NAME}: engine's share of inspection and delivery", _share(stages), ""))
    return rows + count_rows(bundle, images, work / "counts", 3 if request.is_quick else 30)


_NAME = f"fast default, a frame of {WIDTH} × {HEIGHT}"


def _share(stages: dict[str, float]) -> float:
    return stages["engine"] / sum(stages.values())


def write_config(work: Path, bundle: Path, port: int, source: str) -> Config:
    """An agent with one camera, whose every result has a heatmap."""
    drop = work / "drop"
    drop.mkdir(parents=True, exist_ok=True)
    (drop / bundle.name).write_bytes(bundle.read_bytes())
    config = work / "agent.toml"
    config.write_text(
        f'[agent]\nname = "stages"\nprefix = "bench"\nstate_dir = "{work / "state"}"\n[mqtt]\nport = {port}\n'
        f'[models]\ndrop_dir = "{drop}"\n[[cameras]]\nname = "cam1"\nsource = "{source}"\nheatmap.when = "always"\n'
    )
    return load_config(config)


def _run(config: Config, port: int, frames: int) -> dict[str, float]:
    """Mean seconds of a frame by stage, of the whole pipeline in this process."""
    watch = Stopwatch()
    with watch.watch(), Subscriber(port, "bench/stages/cam1/result") as subscriber:
        pipeline = Pipeline(config, Health(), lambda: None)
        pipeline.start()
        try:
            _await(pipeline, subscriber, _WARM)
            watch.seconds.clear()
            first = len(subscriber.arrivals)
            _await(pipeline, subscriber, first + frames)
            seconds, heard = dict(watch.seconds), len(subscriber.arrivals) - first
        finally:
            pipeline.stop(10.0)
    if unseen := STAGES.keys() - seconds:
        raise RuntimeError(f"nothing was timed of {', '.join(sorted(unseen))}: are these still the functions' names?")
    return {stage: seconds[stage] / heard for stage in STAGES}


def _await(pipeline: Pipeline, subscriber: Subscriber, count: int) -> None:
    deadline = time.monotonic() + _PATIENCE_S
    while len(subscriber.arrivals) < count:
        if time.monotonic() > deadline:
            raise TimeoutError(f"waited {_PATIENCE_S:g} s for {count} results; {len(subscriber.arrivals)} came")
        pipeline.tick()  # as often as the supervisor does
        time.sleep(0.5)


def _capture_rows(images: list[NDArray[np.uint8]], seconds: float) -> list[Row]:
    """What the capture process does with a picture: decode it, and store it in the shared memory."""
    bgr = cv2.cvtColor(images[0], cv2.COLOR_RGB2BGR) if images[0].shape[2] == 3 else images[0]
    rows = []
    for kind in ("PNG", "JPEG"):
        data = cv2.imencode(f".{kind.lower()}", bgr)[1].tobytes()
        pace = paced(lambda data=data: len(decode_picture(data)[:1]), seconds)
        rows.append(Row(f"{_NAME}: decode, {kind}", 1e3 / pace.rate, "ms"))
    rows.append(Row(f"{_NAME}: store in shared memory", _store_s(images[0], seconds) * 1e3, "ms"))
    return rows


def _store_s(image: NDArray[np.uint8], seconds: float) -> float:
    memory = os.memfd_create("kizu-bench")
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    feeder = Feeder(theirs, memory, SLOTS)

    def work() -> int:
        slot = feeder.store(image)
        ours.send(f'{{"release": {slot}}}'.encode())
        assert feeder.has_free_slot(1.0)
        return 1

    try:
        return 1 / paced(work, seconds).rate
    finally:
        ours.close()
        theirs.close()
        os.close(memory)
