"""Graphs that are compiled for minutes: by a process of their own, told, and never in the way of what serves.

TensorRT itself is not here. What stands for it is onnxruntime with a session that writes an engine file as TensorRT
does, takes its time for it, and notes which process it was; the processes, the cache and the keeper are real.
"""

import os
import shutil
import time
from collections.abc import Iterator
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import onnxruntime
import pytest

from kizu_agent import model_load
from kizu_agent.settings import EngineConfig

STAND_IN = """
import os, pathlib, time
import onnxruntime as ort

REAL, HERE = ort.InferenceSession, pathlib.Path(__file__).parent


class Session:
    def __init__(self, scorer, options, providers):
        self.names = [name for name, _ in providers]
        if self.names[0] == "TensorrtExecutionProvider":
            folder = pathlib.Path(providers[0][1]["trt_engine_cache_path"])
            if not list(folder.glob("*.engine")):
                with (HERE / "built").open("a") as note:
                    note.write(f"{os.getpid()}\\n")
                time.sleep(float((HERE / "seconds").read_text()))
                (folder / "graph_sm90.engine").write_bytes(b"engine")
        self.real = REAL(scorer, options, providers=["CPUExecutionProvider"])

    def get_providers(self):
        return self.names

    def __getattr__(self, name):
        return getattr(self.real, name)


def available():
    return ["TensorrtExecutionProvider", "CUDAExecutionProvider", "CPUExecutionProvider"]


ort.InferenceSession, ort.get_available_providers = Session, available
"""


class Gpu:
    """A box with a GPU of sorts: how long it compiles, and which processes did."""

    def __init__(self, folder: Path, cache: Path) -> None:
        self.folder, self.cache = folder, cache

    def takes(self, seconds: float) -> None:
        (self.folder / "seconds").write_text(str(seconds))

    def builders(self) -> list[int]:
        note = self.folder / "built"
        return [int(line) for line in note.read_text().split()] if note.exists() else []


@pytest.fixture
def gpu(box: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Gpu]:
    folder = tmp_path / "gpu"
    folder.mkdir()
    (folder / "sitecustomize.py").write_text(STAND_IN)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(folder), os.environ.get("PYTHONPATH", "")]))
    monkeypatch.setattr(onnxruntime, "InferenceSession", onnxruntime.InferenceSession)
    monkeypatch.setattr(onnxruntime, "get_available_providers", onnxruntime.get_available_providers)
    spec = spec_from_file_location("stand_in", folder / "sitecustomize.py")
    assert spec is not None
    assert spec.loader is not None
    spec.loader.exec_module(module_from_spec(spec))
    found = Gpu(folder, tmp_path / "engines")
    found.takes(0.3)
    box.engine = EngineConfig(provider="tensorrt", threads=1, cache_dir=found.cache, batch=4)
    return found


def wait_until_building(box: Any, seconds: float = 20.0) -> str:
    deadline = time.monotonic() + seconds
    while box.keeper.building is None:
        assert time.monotonic() < deadline, box.reports
        time.sleep(0.01)
    return str(box.keeper.building)


def test_a_new_model_is_compiled_by_another_process(box: Any, gpu: Gpu) -> None:
    """The proof's process compiles once, the agent's loads what that left; TensorRT runs, and nothing is degraded."""
    box.start()
    box.put()
    box.wait_for("active")
    assert len(gpu.builders()) == 1
    assert gpu.builders()[0] != os.getpid()
    engine = box.keeper.current(None).inspector.engine
    assert (engine.provider, engine.degraded_reason) == ("tensorrt", None)
    assert box.score() == pytest.approx(100)


def test_the_old_model_serves_while_the_new_one_is_compiled(box: Any, gpu: Gpu) -> None:
    """Compiling is told by the name of the file, and frames go on to be judged; afterwards it is told no more."""
    box.start()
    box.put("1.kizu", version="1")
    box.wait_for("active", "1.kizu")
    gpu.takes(2.0)
    box.put("2.kizu", version="2", factor=2.0)
    assert wait_until_building(box) == "2.kizu"
    assert box.score() == pytest.approx(100)
    assert box.keeper.building == "2.kizu"
    box.wait_for("active", "2.kizu")
    assert box.score() == pytest.approx(200)
    assert box.keeper.building is None


def test_after_an_upgrade_a_model_is_compiled_before_it_is_restored(box: Any, gpu: Gpu) -> None:
    """With another driver the cache holds nothing that fits: the start compiles it, again not in the agent itself."""
    box.start()
    box.put()
    box.wait_for("active")
    box.stop()
    shutil.rmtree(gpu.cache)
    box.start()
    assert box.score() == pytest.approx(100)
    assert len(gpu.builders()) == 2
    assert os.getpid() not in gpu.builders()


def test_a_restart_with_its_engines_compiles_nothing(box: Any, gpu: Gpu) -> None:
    """What was compiled once is loaded from then on."""
    box.start()
    box.put()
    box.wait_for("active")
    box.stop()
    box.start()
    assert box.score() == pytest.approx(100)
    assert len(gpu.builders()) == 1


@pytest.mark.slow
def test_compiling_may_take_longer_than_a_self_test(box: Any, gpu: Gpu) -> None:
    """The deadline of a self-test is for bundles that hang; one that compiles has `build_timeout_s` more."""
    gpu.takes(8.0)
    box.settings = {"self_test_timeout_s": 7.0}
    box.start()
    box.put()
    box.wait_for("active")


@pytest.mark.slow
def test_compiling_has_an_end(box: Any, gpu: Gpu) -> None:
    """A model whose compiling does not end is refused, and the next one has its turn."""
    gpu.takes(60.0)
    box.settings = {"self_test_timeout_s": 7.0}
    box.engine = box.engine.model_copy(update={"build_timeout_s": 0.5})
    box.start()
    box.put()
    assert "more than 7.5 s" in box.wait_for("rejected").reason
    assert box.keeper.building is None


def test_a_stop_ends_compiling(box: Any, gpu: Gpu) -> None:
    """Neither a drop nor a restore holds up a stop; the next start goes on where it was."""
    gpu.takes(30.0)
    box.start()
    path = box.put()
    wait_until_building(box)
    box.stop()
    assert path.exists()
    gpu.takes(0.1)
    box.start()
    box.wait_for("active")


def test_a_stop_ends_the_compiling_of_a_restored_model(box: Any, gpu: Gpu) -> None:
    """A start that compiles stops in time, and loses no model by it."""
    box.start()
    box.put()
    box.wait_for("active")
    box.stop()
    shutil.rmtree(gpu.cache)
    gpu.takes(30.0)
    keeper = box.new()
    keeper.start()
    wait_until_building(box)
    started = time.monotonic()
    box.stop()
    assert time.monotonic() - started < 5
    keeper.keep_probation()
    gpu.takes(0.1)
    box.start()
    assert box.score() == pytest.approx(100)


@pytest.mark.parametrize("missing", [b"tiles", b"frame", b"neither"])
def test_each_of_two_graphs_is_compiled_elsewhere(missing: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    """A bundle whose engine is lacking for either of its graphs is never opened in this process before it is made."""
    manifest = SimpleNamespace(name="m", version="1", created="", graph=None)
    bundle = SimpleNamespace(manifest=manifest, sha256="0", scorer=b"tiles", frame_graph=b"frame", signed_by=None)
    happened: list[str] = []
    inspector = SimpleNamespace(engine=SimpleNamespace(degraded_reason=None))
    monkeypatch.setattr(model_load, "needs_building", lambda graph, *_: graph == missing)
    monkeypatch.setattr(model_load, "load_inspector", lambda *_: happened.append("load") or inspector)
    store: Any = SimpleNamespace(path_of=Path, note=lambda *_: None)
    keys: Any = SimpleNamespace(trust=SimpleNamespace(read=lambda _: bundle))
    progress = model_load.Progress(lambda: None)
    loader = model_load.Loader(
        EngineConfig(provider="tensorrt"), keys, [None], store, progress, lambda path: happened.append(f"build {path}")
    )
    loader.load("m.kizu", None)
    assert happened == (["load"] if missing == b"neither" else ["build m.kizu", "load"])
