"""The best batch of models in service: measured beside them, once, and taken up between two runs."""

import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from kizu_agent import prover, self_test
from kizu_agent.batch_sizes import BatchSizes, Tuned
from kizu_agent.errors import ModelError
from kizu_agent.self_test import Request, _tune
from kizu_agent.settings import EngineConfig
from kizu_contract.bundle import read_bundle


@pytest.fixture
def measured(box: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A box whose proofs leave a batch of 16 for the model in service; the files that were proven."""
    proven: list[str] = []
    prove = prover.prove
    box.engine = EngineConfig(threads=1, cache_dir=tmp_path / "engines")

    def prove_and_measure(request: Request, *others: Any) -> Any:
        # The child itself measures nothing: the machine of a test run may be calm or busy.
        proof = prove(Request(**{**vars(request), "engine": EngineConfig(threads=1)}), *others)
        proven.append(Path(request.path).name)
        loaded = box.keeper.current(None)
        if loaded is not None:
            key = loaded.inspector.engine.batch._key
            BatchSizes(tmp_path / "engines").keep(key, Tuned(16, 100.0), "cpu")
        return proof

    monkeypatch.setattr(prover, "prove", prove_and_measure)
    return proven


def wait_until(holds: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 30
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_a_model_in_service_is_measured_later(box: Any, measured: list[str]) -> None:
    """One that came without a measurement serves at once, is measured beside that, and takes the batch as it serves."""
    box.start()
    box.put()
    box.wait_for("active")
    engine = box.keeper.current(None).inspector.engine
    wait_until(lambda: box.keeper.current(None).inspector.engine.batch.size == 16)
    assert box.keeper.current(None).inspector.engine is engine
    assert engine.batch.why == "measured here: 100 tiles/s"
    assert box.score() == pytest.approx(100)
    box.stop()
    proven = len(measured)
    box.start()
    assert box.keeper.current(None).inspector.engine.batch.size == 16
    time.sleep(0.5)
    assert len(measured) == proven  # known from the start: nothing is measured again


def test_a_busy_machine_is_left_alone(box: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where nothing could be measured it is not tried over and over."""
    box.engine = EngineConfig(threads=1, cache_dir=tmp_path / "engines")
    begun: list[str] = []
    ended: list[str] = []
    prove = prover.prove

    def count(request: Request, *others: Any) -> Any:
        begun.append(request.path)
        proof = prove(Request(**{**vars(request), "engine": EngineConfig(threads=1)}), *others)  # measures nothing
        ended.append(request.path)
        return proof

    monkeypatch.setattr(prover, "prove", count)
    box.start()
    box.put()
    box.wait_for("active")
    wait_until(lambda: len(ended) >= 2)
    time.sleep(1.0)  # ten rounds of the keeper
    assert len(begun) == len(ended) == 2  # the proof of the dropped file, and one more for its batch
    assert box.keeper.current(None).inspector.engine.batch.is_open


def test_the_proof_measures_with_the_agents_threads(
    make_bundle: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The golden tiles run on one thread, the batches on as many as the agent will have."""
    bundle = read_bundle(make_bundle(tmp_path / "m.kizu"))
    monkeypatch.setattr("kizu_agent.engine.measure", lambda *_: {8: 0.001})
    config = EngineConfig(threads=2, cache_dir=tmp_path / "engines")
    _tune(bundle, config.model_copy(update={"batch": 4}), "cpu")
    _tune(bundle, config.model_copy(update={"cache_dir": None}), "cpu")
    assert not (tmp_path / "engines").exists()
    _tune(bundle, config, "cpu")
    assert "cpu with 2 threads" in (tmp_path / "engines" / "batch_sizes.json").read_text()


def test_a_measurement_that_cannot_begin_ends_nothing(
    box: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """No room for another process, or for its output: the model serves on, and the keeper takes the next file."""
    box.engine = EngineConfig(threads=1, cache_dir=tmp_path / "engines")
    refused: list[str] = []
    prove = prover.prove

    def refuse_the_second(request: Request, *others: Any) -> Any:
        if box.keeper.current(None) is None or refused:
            return prove(Request(**{**vars(request), "engine": EngineConfig(threads=1)}), *others)
        refused.append(request.path)
        raise OSError(28, "No usable temporary directory")

    monkeypatch.setattr(prover, "prove", refuse_the_second)
    box.start()
    box.put()
    box.wait_for("active")
    wait_until(lambda: bool(refused))
    time.sleep(0.3)
    assert box.keeper.failure is None
    assert box.score() == pytest.approx(100)
    box.put("next.kizu", version="2")
    box.wait_for("active", "next.kizu")


@pytest.mark.parametrize(("says", "is_proven"), [("{}", True), ("", False)])
def test_a_proof_holds_though_the_measurement_does_not_end(
    make_bundle: Any, tmp_path: Path, says: str, is_proven: bool
) -> None:
    """The answer is there before batches are measured: a machine on which that takes for ever has proven the model."""
    path = str(make_bundle(tmp_path / "m.kizu"))
    request = Request(path, [], require_signature=False, engine=EngineConfig(threads=1), tolerance=1e-3, timeout_s=1.0)
    code = f"import sys, time; sys.stdin.read(); print({says!r}, end='', flush=True); time.sleep(60)"
    with tempfile.TemporaryFile() as answers:
        child = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=answers)
        builds = self_test._Builds(answers, lambda: None)
        try:
            converse = partial(self_test._converse, child, request, lambda: True, builds, answers)
            if is_proven:
                converse()
            else:
                with pytest.raises(ModelError, match="took more than 1 s"):
                    converse()
        finally:
            child.kill()
            child.communicate()


def test_a_file_of_nonsense_counts_as_empty(tmp_path: Path, make_bundle: Any) -> None:
    """An infinite batch is no batch."""
    profile = read_bundle(make_bundle(tmp_path / "m.kizu")).manifest.graph.batch
    (tmp_path / "batch_sizes.json").write_text('{"key": {"batch": Infinity, "tiles_per_s": 1.0}}')
    assert BatchSizes(tmp_path).find("key", profile) is None
