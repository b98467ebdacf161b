"""Providers that this machine lacks: the options they are given, their caches, and what is said where one is missing.

A session that stands for TensorRT, CUDA or OpenVINO notes its options and runs the graph on the CPU.
"""

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest

from kizu_agent import engine_cache, providers
from kizu_agent.engine import Engine
from kizu_agent.engine_cache import CacheEntry, evict, openvino_entry, tensorrt_entry, timing_entry
from kizu_agent.errors import EngineError
from kizu_agent.machine import Gpu
from kizu_agent.providers import needs_building, try_provider
from kizu_agent.settings import EngineConfig
from kizu_contract.manifest import BatchProfile, Graph

L4 = Gpu("NVIDIA L4", "8.9", "550.54.15")
ALL = ["TensorrtExecutionProvider", "CUDAExecutionProvider", "OpenVINOExecutionProvider", "CPUExecutionProvider"]


class Sessions:
    """What was asked of onnxruntime; `missing` providers are dropped without a word, as it does."""

    def __init__(self) -> None:
        self.asked: list[list[tuple[str, dict[str, str]]]] = []
        self.threads: list[int] = []
        self.missing: set[str] = set()
        self.real = onnxruntime.InferenceSession

    def __call__(self, scorer: bytes, options: Any, providers: list[tuple[str, dict[str, str]]]) -> Any:
        self.asked.append(providers)
        self.threads.append(options.intra_op_num_threads)
        session = self.real(scorer, options, providers=["CPUExecutionProvider"])
        session.get_providers = lambda: [name for name, _ in providers if name not in self.missing]
        return session

    @property
    def last(self) -> list[tuple[str, dict[str, str]]]:
        return self.asked[-1]


@pytest.fixture
def sessions(monkeypatch: pytest.MonkeyPatch) -> Sessions:
    found = Sessions()
    monkeypatch.setattr(onnxruntime, "InferenceSession", found)
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ALL)
    monkeypatch.setattr(providers, "gpu", lambda: L4)
    monkeypatch.setattr(providers, "tensorrt_version", lambda: "100900")
    return found


@pytest.fixture
def config(tmp_path: Path) -> EngineConfig:
    return EngineConfig(provider="tensorrt", threads=1, cache_dir=tmp_path / "engines")


def test_tensorrt_is_given_profile_and_caches(
    sessions: Sessions, make_scorer: Callable[..., bytes], graph: Graph, config: EngineConfig
) -> None:
    """The manifest's batches are the profile, each cache has its folder, CUDA and CPU follow."""
    Engine(make_scorer(), graph, config).close()
    (name, options), *others = sessions.last
    assert name == "TensorrtExecutionProvider"
    assert others == [("CUDAExecutionProvider", {}), ("CPUExecutionProvider", {})]
    assert options["trt_profile_min_shapes"] == "tiles:1x16x16x1"
    assert options["trt_profile_opt_shapes"] == "tiles:64x16x16x1"
    assert options["trt_profile_max_shapes"] == "tiles:256x16x16x1"
    assert (options["trt_engine_cache_enable"], options["trt_timing_cache_enable"]) == ("True", "True")
    engine_dir, timing_dir = Path(options["trt_engine_cache_path"]), Path(options["trt_timing_cache_path"])
    assert {engine_dir.parent, timing_dir.parent} == {config.cache_dir}
    assert engine_dir.is_dir()
    assert timing_dir.is_dir()


def test_tensorrt_is_given_the_shape_of_every_input(
    sessions: Sessions, make_scorer: Callable[..., bytes], graph: Graph, config: EngineConfig
) -> None:
    """A graph that takes positions has them in its profile: TensorRT wants all inputs or none."""
    placed = replace(graph, inputs=("tiles", "position"), batch=BatchProfile(2, 8, 32))
    Engine(make_scorer(placed=True), placed, config).close()
    options = sessions.last[0][1]
    assert options["trt_profile_min_shapes"] == "tiles:2x16x16x1,position:2"
    assert options["trt_profile_max_shapes"] == "tiles:32x16x16x1,position:32"


@pytest.mark.parametrize(
    ("precision", "flags"), [("fp32", ("False", "False")), ("fp16", ("True", "False")), ("int8", ("False", "True"))]
)
def test_tensorrt_rounds_no_more_than_the_export(
    sessions: Sessions,
    make_scorer: Callable[..., bytes],
    graph: Graph,
    config: EngineConfig,
    precision: Any,
    flags: tuple[str, str],
) -> None:
    """Half and eight bit kernels are for graphs whose loss at that precision was measured."""
    Engine(make_scorer(), replace(graph, precision=precision), config).close()
    options = sessions.last[0][1]
    assert (options["trt_fp16_enable"], options["trt_int8_enable"]) == flags


def test_a_graph_is_compiled_once(
    sessions: Sessions, make_scorer: Callable[..., bytes], graph: Graph, config: EngineConfig
) -> None:
    """It is told before, not again while the cache is whole, and again for what a killed build left behind."""
    told: list[str] = []
    scorer = make_scorer()
    for _ in range(2):
        Engine(scorer, graph, config, lambda: told.append("builds")).close()
    assert told == ["builds"]
    folder = Path(sessions.last[0][1]["trt_engine_cache_path"])
    (folder / "torn.engine").write_bytes(b"half")
    (folder / "entry.json").unlink()
    assert needs_building(scorer, config, graph)
    Engine(scorer, graph, config, lambda: told.append("builds")).close()
    assert told == ["builds"] * 2
    assert not (folder / "torn.engine").exists()


def test_without_a_folder_nothing_is_kept(
    sessions: Sessions, make_scorer: Callable[..., bytes], graph: Graph, config: EngineConfig
) -> None:
    """`kizu-agent score` has no state directory: TensorRT compiles anew, and says so each time."""
    told: list[str] = []
    homeless = config.model_copy(update={"cache_dir": None})
    for _ in range(2):
        Engine(make_scorer(), graph, homeless, lambda: told.append("builds")).close()
    assert told == ["builds"] * 2
    assert not any("cache" in key for key in sessions.last[0][1])


@pytest.mark.usefixtures("sessions")
def test_a_graph_that_fails_leaves_no_whole_entry(
    make_scorer: Callable[..., bytes], graph: Graph, config: EngineConfig
) -> None:
    """Only what has run is marked as whole."""
    with pytest.raises(EngineError):
        Engine(make_scorer(channels=3), graph, config)
    assert needs_building(make_scorer(channels=3), config, graph)


@pytest.mark.usefixtures("sessions")
def test_a_cache_that_cannot_be_written_is_an_error(
    make_scorer: Callable[..., bytes], graph: Graph, config: EngineConfig
) -> None:
    """Compiling for minutes at every start would be worse."""
    assert config.cache_dir is not None
    config.cache_dir.write_text("a file where the folder should be")
    with pytest.raises(EngineError, match="engine cache"):
        Engine(make_scorer(), graph, config)


def test_tensorrt_that_does_not_start_is_told(
    sessions: Sessions, make_scorer: Callable[..., bytes], graph: Graph, config: EngineConfig
) -> None:
    """The engine fails, or runs on the CPU and says why; nothing counts as built."""
    sessions.missing = {"TensorrtExecutionProvider"}
    with pytest.raises(EngineError, match="tensorrt did not start"):
        Engine(make_scorer(), graph, config)
    degrading = config.model_copy(update={"on_missing_provider": "degrade"})
    with Engine(make_scorer(), graph, degrading) as engine:
        assert engine.provider == "cpu"
        assert "tensorrt did not start" in str(engine.degraded_reason)
    assert needs_building(make_scorer(), config, graph)


def test_openvino_is_given_threads_and_its_cache(
    sessions: Sessions, make_scorer: Callable[..., bytes], graph: Graph, config: EngineConfig
) -> None:
    """It has the engine's threads, computes as exactly as the graph says, and keeps its blobs; the CPU follows."""
    told: list[str] = []
    on_intel = config.model_copy(update={"provider": "openvino", "threads": 3})
    Engine(make_scorer(), graph, on_intel, lambda: told.append("builds")).close()
    (name, options), *others = sessions.last
    assert (name, others) == ("OpenVINOExecutionProvider", [("CPUExecutionProvider", {})])
    assert (options["device_type"], options["num_of_threads"], options["precision"]) == ("CPU", "3", "ACCURACY")
    assert Path(options["cache_dir"]).parent == config.cache_dir
    assert told == []  # a second, not minutes


def test_the_cpu_keeps_nothing(make_scorer: Callable[..., bytes], graph: Graph, config: EngineConfig) -> None:
    """There is nothing to compile for the CPU."""
    Engine(make_scorer(), graph, config.model_copy(update={"provider": "cpu"})).close()
    assert config.cache_dir is not None
    assert not config.cache_dir.exists()


def test_what_starts_is_tried_on_a_real_graph() -> None:
    """The smallest graph runs on the CPU here, and a provider that is not there is named with its extra."""
    assert try_provider(EngineConfig(threads=1)) == ("cpu", None)
    if "openvino" not in providers.available_providers():
        with pytest.raises(EngineError, match="install the openvino extra"):
            try_provider(EngineConfig(provider="openvino", threads=1))
        started, reason = try_provider(EngineConfig(provider="openvino", on_missing_provider="degrade", threads=1))
        assert (started, "openvino was asked for" in str(reason)) == ("cpu", True)


def test_the_smallest_graph_computes() -> None:
    """It is written as bytes: onnxruntime must read it as what it is said to be."""
    session = onnxruntime.InferenceSession(providers._IDENTITY, providers=["CPUExecutionProvider"])
    (y,) = session.run(None, {"x": np.array([3.5], np.float32)})
    assert y.tolist() == [3.5]


def entry_of(graph: Graph, **other: Any) -> CacheEntry:
    parts = {"scorer": b"scorer", "graph": graph, "tensorrt": "100900", "gpu": L4, **other}
    return tensorrt_entry(Path("/cache"), **parts)


def test_each_part_makes_another_key(graph: Graph) -> None:
    """Another graph, profile, precision, TensorRT, GPU, capability or driver is another engine."""
    others = [
        entry_of(graph, scorer=b"other"),
        entry_of(replace(graph, batch=BatchProfile(1, 64, 128))),
        entry_of(replace(graph, precision="fp16")),
        entry_of(graph, tensorrt="101000"),
        entry_of(graph, tensorrt=None),
        entry_of(graph, gpu=replace(L4, name="NVIDIA L40")),
        entry_of(graph, gpu=replace(L4, capability="9.0")),
        entry_of(graph, gpu=replace(L4, driver="560.35.03")),
        entry_of(graph, gpu=None),
        timing_entry(Path("/cache"), "100900", L4),
        openvino_entry(Path("/cache"), b"scorer", graph, "1.24.1", "Xeon"),
        openvino_entry(Path("/cache"), b"scorer", graph, "1.25.0", "Xeon"),
        openvino_entry(Path("/cache"), b"scorer", graph, "1.24.1", "Atom"),
    ]
    assert entry_of(graph).folder == entry_of(graph).folder
    assert len({entry.folder for entry in [entry_of(graph), *others]}) == len(others) + 1


def filled(root: Path, number: int, size: int, used: int) -> CacheEntry:
    entry = CacheEntry(root, "tensorrt", {"graph": str(number)})
    entry.begin()
    (entry.folder / "x.engine").write_bytes(bytes(size))
    entry.finish(2**40)
    os.utime(entry.folder, (used, used))
    return entry


def test_what_was_used_longest_ago_goes_first(tmp_path: Path) -> None:
    """Above the bound the oldest engines go, until the others fit; opening one makes it young again."""
    entries = [filled(tmp_path, number, 1000, used=number + 1) for number in range(4)]
    entries[0].begin()
    newest = filled(tmp_path, 9, 1000, used=100)
    evict(tmp_path, 4000, keep=newest.folder)
    assert [entry.is_whole for entry in entries] == [True, False, False, True]
    assert newest.is_whole


def test_the_engine_in_use_is_never_deleted(tmp_path: Path) -> None:
    """One engine above the bound stays alone."""
    old = filled(tmp_path, 1, 1000, used=2**33)
    own = CacheEntry(tmp_path, "tensorrt", {"graph": "own"})
    own.begin()
    (own.folder / "x.engine").write_bytes(bytes(5000))
    own.finish(1000)
    assert (old.is_whole, own.is_whole) == (False, True)
    assert engine_cache._size(own.folder) > 5000


@pytest.mark.parametrize(
    ("provider", "missing", "is_tiled", "threads"),
    [
        ("cpu", False, True, [1]),
        ("cpu", False, False, [4]),
        ("cuda", False, True, [4]),
        ("cuda", True, True, [4, 1]),
    ],
)
def test_operators_of_tiles_have_one_thread_on_the_cpu(
    sessions: Sessions,
    make_scorer: Callable[..., bytes],
    graph: Graph,
    provider: Any,
    missing: bool,
    is_tiled: bool,
    threads: list[int],
) -> None:
    """There the streams have the cores; a frame that goes whole has them all, and so has what feeds a GPU."""
    if missing:
        sessions.missing.add("CUDAExecutionProvider")
    config = EngineConfig(provider=provider, threads=4, on_missing_provider="degrade")
    providers.open_session(make_scorer(), config, graph, is_tiled=is_tiled)
    assert sessions.threads == threads
