"""For every test: no leaked threads or processes, and a small whole bundle for those who want one."""

import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

import hypothesis
import numpy as np
import onnx
import psutil
import pytest
from children import children_of
from onnx import TensorProto, helper

from kizu_contract.bundle import Bundle, Golden, write_bundle
from kizu_contract.calibration import Calibration, Tail
from kizu_contract.judging import Reduction
from kizu_contract.manifest import BatchProfile, DefaultThresholds, Graph, Manifest, Provenance
from kizu_contract.tiles import TileGrid

# The same examples in every run, on machines of any speed; `pytest --hypothesis-profile=search` looks for new ones.
hypothesis.settings.register_profile("repeatable", deadline=None, derandomize=True)
hypothesis.settings.register_profile("search", deadline=None, max_examples=1000)
hypothesis.settings.load_profile("repeatable")

# A shell's background job ignores SIGINT, and so would every process that a test starts there and ends by Ctrl-C.
signal.signal(signal.SIGINT, signal.default_int_handler)

Leak = TypeVar("Leak")
GRACE_S = 3.0
"""How long something that was told to stop may take to be gone."""


@pytest.fixture(autouse=True)
def no_leaked_threads() -> Iterator[None]:
    """Fail a test that leaves a thread running."""
    before = set(threading.enumerate())
    yield
    left = _settle(lambda: [thread for thread in threading.enumerate() if thread not in before])
    if left:
        pytest.fail("the test left threads running:\n" + "\n".join(_describe(thread) for thread in left), pytrace=False)


@pytest.fixture(autouse=True)
def no_leaked_processes() -> Iterator[None]:
    """Fail a test that leaves a child process running; kill it, so that the next test starts clean."""
    before = set(children_of("self"))
    yield
    left = _settle(lambda: [pid for pid in children_of("self") if pid not in before])
    found = [text for pid in left if (text := _end(pid))]
    if found:
        pytest.fail("the test left child processes:\n" + "\n".join(found), pytrace=False)


def _settle(leaked: Callable[[], list[Leak]]) -> list[Leak]:
    deadline = time.monotonic() + GRACE_S
    while (left := leaked()) and time.monotonic() < deadline:
        time.sleep(0.01)
    return left


def _describe(thread: threading.Thread) -> str:
    frame = sys._current_frames().get(thread.ident or 0)
    return f"{thread!r}\n{''.join(traceback.format_stack(frame, limit=-3)) if frame else ''}"


def _end(pid: int) -> str | None:
    """Kill the leaked child `pid`; what it was, None for Python's own helper, which lives as long as we do."""
    try:
        process = psutil.Process(pid)
        command = " ".join(process.cmdline()) or process.name()
        if "multiprocessing.resource_tracker" in command:
            return None
        process.kill()
        process.wait(GRACE_S)
    except psutil.NoSuchProcess:
        return None
    return f"{pid}: {command}"


@pytest.fixture
def manifest() -> Manifest:
    """The manifest of a small grey model."""
    calibration = Calibration(
        frames=200,
        quantiles=((0.0, 0.1), (0.5, 0.5), (0.9, 1.0), (1.0, 2.0)),
        tail=Tail(start=1.0, fraction=0.1, shape=0.1, scale=0.3),
    )
    limits = calibration.thresholds(0.01, 0.001)
    return Manifest(
        schema=1,
        name="plates",
        version="1.0.0",
        created="2026-01-31T12:00:00.000Z",
        graph=Graph(17, "fp32", ("tiles",), tile_px=4, channels=1, map_cell_px=2, batch=BatchProfile(1, 8, 64)),
        grid=TileGrid(4, 2, 1),
        colour="grey",
        reduction=Reduction("max", 1.5),
        calibration=calibration,
        thresholds=DefaultThresholds(limits.warn, limits.reject, 0.01, 0.001),
        provenance=Provenance(
            detector="patch_vae",
            recipe={"widths": [32, 64], "nested": {"beta": 1.0, "note": "傷", "off": None, "on": True}},
            seed=7,
            data_fingerprint="ab" * 32,
            train_pictures=100,
            kizu_version="0.1.0",
            metrics={"image_auroc": 0.97},
        ),
    )


@pytest.fixture
def model() -> onnx.ModelProto:
    """A graph of the right interface with one initializer: the mean brightness of each 2 × 2 cell, times one."""
    weight = helper.make_tensor("gain", TensorProto.FLOAT, [1], [1.0])
    nodes = [
        helper.make_node("Cast", ["tiles"], ["pixels"], to=TensorProto.FLOAT),
        helper.make_node("Transpose", ["pixels"], ["planes"], perm=[0, 3, 1, 2]),
        helper.make_node("AveragePool", ["planes"], ["cells"], kernel_shape=[2, 2], strides=[2, 2]),
        helper.make_node("Mul", ["cells", "gain"], ["gained"]),
        helper.make_node("Squeeze", ["gained", "channel"], ["map"]),
        helper.make_node("ReduceMax", ["map"], ["score"], axes=[1, 2], keepdims=0),
    ]
    channel = helper.make_tensor("channel", TensorProto.INT64, [1], [1])
    graph = helper.make_graph(
        nodes,
        "scorer",
        [helper.make_tensor_value_info("tiles", TensorProto.UINT8, ["N", 4, 4, 1])],
        [
            helper.make_tensor_value_info("score", TensorProto.FLOAT, ["N"]),
            helper.make_tensor_value_info("map", TensorProto.FLOAT, ["N", 2, 2]),
        ],
        [weight, channel],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


@pytest.fixture
def bundle(manifest: Manifest, model: onnx.ModelProto) -> Bundle:
    """A whole bundle of that manifest and that graph."""
    tiles = np.random.default_rng(1).integers(0, 256, (3, 4, 4, 1), np.uint8)
    cells = tiles.reshape(3, 2, 2, 2, 2).mean((2, 4)).astype(np.float32)
    golden = Golden(tiles, cells.max((1, 2)), cells)
    return Bundle(manifest, model.SerializeToString(), golden, b"\x89PNG\r\n\x1a\n")


@pytest.fixture
def bundle_file(bundle: Bundle, tmp_path: Path) -> Path:
    """The bundle, written."""
    path = tmp_path / "plates.kizu"
    write_bundle(bundle, path)
    return path
