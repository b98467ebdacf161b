"""The guard of speed: ratios and counts of what a frame costs, never absolute times, which differ between machines."""

import gc
import math
import mmap
import platform
import sys
import threading
import time
import tracemalloc
import weakref
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from faults.plant import CELL_PX, TILE_PX, brightness_bundle, give, pictures, wait_for

from kizu_agent import delivery as delivery_module
from kizu_agent import sinks as sinks_module
from kizu_agent.camera_state import Inspected
from kizu_agent.capture import Capture
from kizu_agent.config import Config, load_config
from kizu_agent.delivery import Delivery
from kizu_agent.health import Health
from kizu_agent.inspection import inspect_frames
from kizu_agent.inspector import Inspector, load_inspector
from kizu_agent.mailbox import Mailbox
from kizu_agent.outbox import Outbox
from kizu_agent.pipeline import Pipeline
from kizu_agent.records import Frame, ModelId
from kizu_agent.settings import EngineConfig
from kizu_agent.sinks import JsonSink
from kizu_agent.state import StateBoard
from kizu_contract.bundle import Bundle
from kizu_contract.judging import Reduction
from kizu_contract.manifest import BatchProfile
from kizu_contract.tiles import TileGrid

HIGH, WIDE = 480, 640
BATCH = BatchProfile(64, 64, 256)
"""Whatever chooses the size of batches has to take at least 64 tiles at a time."""


@pytest.fixture
def bundle() -> Bundle:
    """Grey tiles of 16 px that overlap by half, with margins and smoothing: all that a frame can cost."""
    made = brightness_bundle()
    manifest = replace(
        made.manifest,
        graph=replace(made.manifest.graph, batch=BATCH),
        grid=TileGrid(TILE_PX, TILE_PX // 2, TILE_PX // 2),
        reduction=Reduction("max", 2.0),
    )
    return replace(made, manifest=manifest)


@pytest.fixture
def inspector(bundle: Bundle) -> Iterator[Inspector]:
    loaded = load_inspector(bundle, EngineConfig(threads=1))
    yield loaded
    loaded.close()


def picture(seed: int = 1, high: int = HIGH, wide: int = WIDE) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 180, (high, wide, 1), np.uint8)


class Calls:
    """Stands before the session of an engine: notes where the tiles of each call lie, and how many they are."""

    def __init__(self, inspector: Inspector) -> None:
        self.tiles: list[np.ndarray] = []
        self._session: Any = inspector.engine._session
        inspector.engine._session = self  # type: ignore[assignment]

    def io_binding(self) -> Any:
        binding = self._session.io_binding()
        bind = binding.bind_cpu_input

        def note(name: str, values: np.ndarray) -> None:
            if name == "tiles":
                self.tiles.append(values)
            bind(name, values)

        binding.bind_cpu_input = note
        return binding

    def run_with_iobinding(self, binding: Any) -> None:
        self._session.run_with_iobinding(binding)


class Chain:
    """Inspection and delivery of one camera in this thread, down to committed messages, which then count as sent."""

    def __init__(self, inspector: Inspector, folder: Path, heatmap: str = "always") -> None:
        self.inspector = inspector
        config = write_config(folder, f'source = "sim:plates"\nheatmap.when = "{heatmap}"\n')
        self.outbox = Outbox(folder / "outbox.sqlite3", config.outbox)
        sinks = [JsonSink(config, lambda _topic, _payload: None)]
        board = StateBoard(config, sinks, version("kizu"), time.time_ns())
        self._delivery = Delivery(config, self.outbox, board, sinks)
        self._thresholds = inspector.manifest.thresholds.scores()
        self._number = 0

    def step(self, *images: np.ndarray) -> int:
        """Inspect frames in one pass; how many messages they gave."""
        frames = [Frame("cam", n, image, None, time.time_ns(), time.monotonic_ns()) for n, image in enumerate(images)]
        found = inspect_frames(frames, self.inspector, ModelId("m", "1", "0" * 64), lambda *_: self._thresholds, {})
        self._delivery.deliver(found)
        rows = self.outbox.take(100)
        self.outbox.delete([row.id for row in rows])
        return len(rows)

    def close(self) -> None:
        self.outbox.close()


def write_config(folder: Path, camera: str) -> Config:
    file = folder / "agent.toml"
    file.write_text(
        f'[agent]\nname = "box"\nprefix = "plant"\nstate_dir = "{folder}"\n[mqtt]\nport = 1\n'
        f'[models]\ndrop_dir = "{folder / "drop"}"\n[[cameras]]\nname = "cam"\n{camera}'
    )
    return load_config(file)


@pytest.fixture
def chain(inspector: Inspector, tmp_path: Path) -> Iterator[Chain]:
    with closing(Chain(inspector, tmp_path)) as made:
        yield made


def counted(monkeypatch: pytest.MonkeyPatch, owner: Any, name: str) -> list[None]:
    """Count the calls of a function from now on: one entry each."""
    calls: list[None] = []
    own: Callable[..., Any] = getattr(owner, name)

    def call(*args: Any, **kwargs: Any) -> Any:
        calls.append(None)
        return own(*args, **kwargs)

    monkeypatch.setattr(owner, name, call)
    return calls


def peak_bytes(work: Callable[[], object]) -> int:
    """Bytes at the highest point of `work` above what was there before; numpy's buffers are counted."""
    tracemalloc.start()
    try:
        before = tracemalloc.get_traced_memory()[0]
        tracemalloc.reset_peak()
        kept = work()
        peak = tracemalloc.get_traced_memory()[1] - before
        del kept
        return peak
    finally:
        tracemalloc.stop()


def test_the_engine_is_called_for_whole_batches(inspector: Inspector) -> None:
    """A frame of thousands of tiles takes no more calls of the graph than batches of the usual size need."""
    tiles = inspector.manifest.grid.layout(HIGH, WIDE).count
    calls = Calls(inspector)
    inspector.inspect([picture()])
    assert sum(map(len, calls.tiles)) == tiles
    assert len(calls.tiles) <= math.ceil(tiles / BATCH.opt)


def test_frames_of_one_pass_share_a_call(inspector: Inspector) -> None:
    """Eight small frames, of several cameras for instance, are one call of the graph."""
    each = inspector.manifest.grid.layout(TILE_PX, TILE_PX).count
    calls = Calls(inspector)
    found = inspector.inspect([picture(seed, TILE_PX, TILE_PX) for seed in range(8)])
    assert [len(tiles) for tiles in calls.tiles] == [8 * each]
    assert len(found) == 8


def test_pixels_are_copied_once_on_their_way_to_the_engine(inspector: Inspector) -> None:
    """What the graph reads are the very tiles that were cut into the inspector's one buffer, frame after frame."""
    buffer = inspector._tiles
    calls = Calls(inspector)
    for seed in range(3):
        inspector.inspect([picture(seed)])
    assert inspector._tiles is buffer
    assert all(np.shares_memory(tiles, buffer) for tiles in calls.tiles)


def test_cutting_writes_tiles_and_nothing_else(bundle: Bundle) -> None:
    """Cutting into a buffer allocates the mirrored margins of the picture, and none of the tiles' bytes."""
    image = picture()
    layout = bundle.manifest.grid.layout(HIGH, WIDE)
    out = np.empty((layout.count, TILE_PX, TILE_PX, 1), np.uint8)
    padded = layout.pad(image)
    inner = replace(layout, grid=replace(layout.grid, margin_px=0), height=len(padded), width=padded.shape[1])
    assert out.nbytes > 3 * image.nbytes
    assert peak_bytes(lambda: inner.cut(padded, out)) < 0.05 * out.nbytes


def test_a_frame_allocates_a_fixed_multiple_of_itself(chain: Chain) -> None:
    """Maps, scores, thumbnail and payloads together stay below a ceiling in frames' sizes, and below the tiles' own."""
    image = picture()
    for _ in range(3):
        chain.step(image)
    peak = peak_bytes(lambda: chain.step(image))
    assert peak < 30 * image.nbytes


def test_scoring_allocates_maps_and_nothing_of_the_pictures(inspector: Inspector) -> None:
    """The inspector allocates the cells of all tiles and a few maps: four bytes a pixel each."""
    image = picture()
    layout = inspector.manifest.grid.layout(HIGH, WIDE)
    inspector.inspect([image])
    cells = 4 * layout.count * (TILE_PX // CELL_PX) ** 2
    peak = peak_bytes(lambda: inspector.inspect([image]))
    assert peak < cells + 2.9 * 4 * image.nbytes


def test_nothing_grows_from_frame_to_frame(chain: Chain) -> None:
    """In steady state frames leave neither Python objects nor buffers behind."""
    frames, image = 40, picture(high=64, wide=64)
    # numpy fills caches of its own for a while: the window in which least was kept tells.
    kept = min(_blocks_kept(chain, image, frames) for _ in range(4))
    assert kept < 4 * frames
    tracemalloc.start()
    try:
        chain.step(image)
        gc.collect()
        before = tracemalloc.get_traced_memory()[0]
        for _ in range(frames):
            chain.step(image)
        gc.collect()
        assert tracemalloc.get_traced_memory()[0] - before < frames * image.nbytes // 10
    finally:
        tracemalloc.stop()


def _blocks_kept(chain: Chain, image: np.ndarray, frames: int) -> int:
    gc.collect()
    before = sys.getallocatedblocks()
    for _ in range(frames):
        chain.step(image)
    gc.collect()
    return sys.getallocatedblocks() - before


def test_a_frame_is_encoded_and_committed_once(chain: Chain, monkeypatch: pytest.MonkeyPatch) -> None:
    """One thumbnail, one payload of the result and one transaction for each frame, and no more messages than those."""
    images = [picture(seed, 64, 96) for seed in range(5)]
    chain.step(images[0])
    encoded = counted(monkeypatch, cv2, "imencode")
    drawn = counted(monkeypatch, delivery_module, "draw_heatmap")
    payloads = counted(monkeypatch, sinks_module, "to_bytes")
    commits = counted(monkeypatch, chain.outbox, "transaction")
    assert chain.step(*images) == 2 * len(images)  # results and heatmaps
    assert (len(encoded), len(drawn), len(commits)) == (5, 5, 5)
    assert len(payloads) == 5  # results; retained states are encoded by the clock, not by the frame


def test_no_pixels_are_kept_once_a_frame_is_delivered(chain: Chain, monkeypatch: pytest.MonkeyPatch) -> None:
    """The retained state needs the verdict: picture and map, many bytes of sixteen cameras, go with the delivery."""
    found: list[Inspected] = []
    monkeypatch.setattr(StateBoard, "inspected", lambda _board, inspected: found.append(inspected))
    image = picture()
    frame = weakref.ref(image)
    chain.step(image)
    del image
    assert frame() is None
    assert found[0].inspection.frame_map is None


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library is left as it is")
def test_a_capture_process_keeps_the_memory_of_its_pictures(tmp_path: Path) -> None:
    """The kernel gives it no new pages from frame to frame: each picture lies where the one before it lay."""
    colours = np.random.default_rng(0).integers(0, 256, (1200, 1920, 3), np.uint8)
    cv2.imwrite(str(tmp_path / "large.bmp"), colours)
    mailbox = Mailbox()
    capture = Capture(write_config(tmp_path, f'source = "folder:{tmp_path}?loop=true"\n').cameras[0], mailbox)
    capture.start()
    try:
        _take(mailbox, 5)
        child = capture._child
        assert child is not None
        before = _page_faults(child.process.pid)
        _take(mailbox, 20)
        # Half a picture each, for slots that are first used now; without the allocator's settings it is two and more.
        assert (_page_faults(child.process.pid) - before) * mmap.PAGESIZE < 20 * 0.5 * colours.nbytes
    finally:
        mailbox.close()
        assert capture.stop(5.0)


def _take(mailbox: Mailbox, count: int) -> None:
    taken = 0
    deadline = time.monotonic() + 60
    while taken < count:
        taken += len(mailbox.take(count - taken, 0.5))
        assert time.monotonic() < deadline


def _page_faults(pid: int) -> int:
    """Pages that the kernel had to give a process so far (`minflt` of proc(5))."""
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[7])


def test_no_thumbnail_is_drawn_for_nobody(
    inspector: Inspector, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the configuration wants no heatmap, none is drawn."""
    drawn = counted(monkeypatch, delivery_module, "draw_heatmap")
    with closing(Chain(inspector, tmp_path, "never")) as chain:
        assert chain.step(picture(1, 64, 96), picture(2, 64, 96)) == 2
    assert drawn == []


def test_threads_do_not_grow_with_frames(tmp_path: Path) -> None:
    """The pipeline runs its hundredth frame with the threads that it had at its tenth."""
    folder = pictures(tmp_path / "pictures", 5)
    config = write_config(tmp_path, f'source = "folder:{folder}?loop=true&rate=100"\nheatmap.when = "always"\n')

    class Dropped:
        drop = config.models.drop_dir

    Dropped.drop.mkdir()
    give(Dropped, brightness_bundle())  # type: ignore[arg-type]
    pipeline = Pipeline(config, Health(), lambda: None)
    pipeline.start()
    try:
        before = _threads_after(pipeline, 10)
        assert _threads_after(pipeline, 100) <= before
    finally:
        assert pipeline.stop(10.0) == []


def _threads_after(pipeline: Pipeline, frames: int) -> int:
    """Threads of this process, onnxruntime's and OpenCV's too, once so many frames were inspected."""

    def is_through() -> bool:
        pipeline.tick()
        return pipeline.figures()["inspected_frames_total"][0][1] >= frames

    wait_for(is_through, 30, f"{frames} frames")
    assert threading.active_count() > 1
    return len(list(Path("/proc/self/task").iterdir()))
