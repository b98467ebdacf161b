"""Models that fail in every way we know, before a real agent and a real broker: noticed when, and back when.

Each scenario takes an empty folder and a seed for the pictures, and gives an Outcome; it raises where the line did not
come through. `model_line` and `small_models` lie beside this file.
"""

import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import numpy as np
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from faults.models.model_line import Line, line_with
from faults.models.small_models import busy, heavy, nan_below, write
from faults.plant import Outcome

SHORT = "[models.probation]\nframes = 100\nleast_s = 1.0\n"
"""A probation that a test can wait for; all else as by default."""
CRASH_AT_LOAD = """
import ctypes
from kizu_agent import model_load
load = model_load.load_inspector
def load_or_crash(bundle, config):
    if bundle.manifest.version == "2":
        ctypes.string_at(0)
    return load(bundle, config)
model_load.load_inspector = load_or_crash
"""
CRASH_IN_FRAMES = """
import ctypes
from kizu_agent.inspector import Inspector
inspect, calls = Inspector.inspect, []
def inspect_or_crash(self, pictures):
    calls.extend(pictures if self.manifest.version == "2" else ())
    if len(calls) > 3:
        ctypes.string_at(0)
    return inspect(self, pictures)
Inspector.inspect = inspect_or_crash
"""
HANG_IN_FRAMES = """
import time
from kizu_agent import pipeline
from kizu_agent.inspector import Inspector
pipeline.STUCK_S["inspection"] = 3.0
inspect = Inspector.inspect
def inspect_or_hang(self, pictures):
    if self.manifest.version == "2":
        time.sleep(600)
    return inspect(self, pictures)
Inspector.inspect = inspect_or_hang
"""


def _outcome(scenario: str, done: str, noticed_s: float, recovered_s: float, note: str) -> Outcome:
    return Outcome(scenario, done, noticed_s=noticed_s, recovered_s=recovered_s, note=note)


ModelScenario = Callable[[Path, int], Outcome]


def _serve_first(line: Line, frames: int = 0, key: Ed25519PrivateKey | None = None) -> None:
    """Have version 1 serve, proven, with so many frames behind it."""
    line.give(write(line.folder / "1.kizu", "1", key=key))
    line.wait("confirmation of version 1", lambda: line.report("confirmed", "1"))
    began = time.monotonic()
    line.wait("frames of version 1", lambda: line.result("1", began, frames) if frames else True)


def _check_whole(line: Line) -> None:
    """Raise unless the results, of all starts, are without gap and in order."""
    numbers = [heard.payload["seq"] for heard in line.results]
    first_time = list(dict.fromkeys(numbers))
    if first_time != list(range(1, len(first_time) + 1)):
        raise AssertionError(f"results are missing or out of order: {numbers}")


def _crash(folder: Path, seed: int, scenario: str, before: str) -> Outcome:
    with line_with(folder, seed, before=before, models=SHORT) as line:
        _serve_first(line)
        dropped = line.give(write(folder / "2.kizu", "2"))
        ended = line.wait("end of the process", lambda: bool(line.ends))
        told = line.wait("rollback", lambda: line.report("rolled_back", "2"))
        back = line.wait("results of version 1", lambda: line.result("1", ended, 10))
        line.give(write(folder / "again.kizu", "2"))
        line.wait("refusal of the same bytes", lambda: line.report("rejected", file="again.kizu"))
        again = time.monotonic()
        line.wait("results after it", lambda: line.result("1", again, 10))
        report = line.report("rolled_back", "2")
        assert report is not None
        assert report.payload["cause"] == "crash"
        assert len(line.ends) == 1, line.ends
        _check_whole(line)
        text = f"process ended ({line.ends[0]}), one restart, version 1 again, the same bytes refused"
        return _outcome(scenario, "dropped a model", told - dropped, back - ended, text)


def crash_at_load(folder: Path, seed: int) -> Outcome:
    """Loading the new model crashes the agent, though its self-test passed."""
    return _crash(folder, seed, "crash at load", CRASH_AT_LOAD)


def crash_in_first_frames(folder: Path, seed: int) -> Outcome:
    """The new model crashes the agent at its fourth frame."""
    return _crash(folder, seed, "crash in first frames", CRASH_IN_FRAMES)


def hang_in_first_frames(folder: Path, seed: int) -> Outcome:
    """The new model never comes back from its first frame; the limit for a stuck stage is 3 s here, not 60."""
    return _crash(folder, seed, "hang in first frames", HANG_IN_FRAMES)


def power_cut(folder: Path, seed: int) -> Outcome:
    """The agent is gone between swap and commit: killed with the first result of the new model."""
    with line_with(folder, seed, models=SHORT.replace("1.0", "30.0")) as line:
        line.give(write(folder / "1.kizu", "1"))
        line.wait("version 1 in the record", lambda: '"file": "gears-1-' in _record(line))
        line.give(write(folder / "2.kizu", "2"))
        line.wait("first result of version 2", lambda: line.result("2"))
        line.kill()
        assert '"trials": {\n    "*"' in _record(line)
        line.start()
        started = time.monotonic()
        told = line.wait("rollback", lambda: line.report("rolled_back", "2"))
        back = line.wait("results of version 1", lambda: line.result("1", started, 10))
        assert line.versions() == ["1", "2", "1"], line.versions()
        _check_whole(line)
        text = "version 1 again, from the record"
        return _outcome("power cut between swap and commit", "SIGKILL", told - started, back - started, text)


def restart_on_probation(folder: Path, seed: int) -> Outcome:
    """A stop in good order and a start while a model is on probation: nothing is held against the model."""
    with line_with(folder, seed, models=SHORT.replace("1.0", "5.0")) as line:
        line.give(write(folder / "1.kizu", "1"))
        line.wait("version 1 in the record", lambda: '"file": "gears-1-' in _record(line))
        line.give(write(folder / "2.kizu", "2"))
        line.wait("first result of version 2", lambda: line.result("2"))
        line.stop()
        line.start()
        started = time.monotonic()
        back = line.wait("results of version 2", lambda: line.result("2", started, 10))
        told = line.wait("confirmation of version 2", lambda: line.report("confirmed", "2"))
        assert line.versions() == ["1", "2"], line.versions()
        _check_whole(line)
        text = "version 2 goes on, and passes"
        return _outcome("orderly restart on probation", "SIGTERM", told - started, back - started, text)


def _record(line: Line) -> str:
    path = line.state / "models" / "current.json"
    return path.read_text() if path.exists() else ""


def _rolled_back(
    folder: Path, seed: int, scenario: str, cause: str, make: Callable[[Path], Path], frames: int = 0
) -> Outcome:
    """Version 1 serves for a while, version 2 is bad in a way that its frames show."""
    models = SHORT.replace("100", "200")
    with line_with(folder, seed, models=models) as line:
        _serve_first(line, frames)
        line.give(make(folder / "2.kizu"))
        first = line.wait("results of version 2", lambda: line.result("2"))
        told = line.wait("rollback", lambda: line.report("rolled_back", "2"))
        back = line.wait("results of version 1", lambda: line.result("1", first, 10))
        report = line.report("rolled_back", "2")
        assert report is not None
        assert report.payload["cause"] == cause, report.payload
        assert line.versions() == ["1", "2", "1"], line.versions()
        assert line.ends == [], line.ends
        bad = [h for h in line.results if h.payload["model"]["version"] == "2"]
        assert all(h.payload["verdict"] != "ok" for h in bad) or cause == "latency"
        _check_whole(line)
        return _outcome(scenario, "dropped a model", told - first, back - first, f"rolled back after {len(bad)} frames")


def not_a_number(folder: Path, seed: int) -> Outcome:
    """The new model passes its golden tiles and gives NaN for the pictures of the line."""
    make = lambda path: write(path, "2", extra=nan_below(112.0))  # noqa: E731
    return _rolled_back(folder, seed, "NaN output", "unknown", make)


def wrong_channels(folder: Path, seed: int) -> Outcome:
    """The new model was trained on colour pictures, the camera is grey."""
    make = lambda path: write(path, "2", is_colour=True)  # noqa: E731
    return _rolled_back(folder, seed, "wrong channel count", "unknown", make)


def too_slow(folder: Path, seed: int) -> Outcome:
    """The new model takes far more time for a frame than the one before it."""
    make = lambda path: write(path, "2", extra=busy(500, 6))  # noqa: E731
    return _rolled_back(folder, seed, "latency", "latency", make, frames=60)


def too_many_rejects(folder: Path, seed: int) -> Outcome:
    """The new model rejects every part of a line on which the one before it rejected none."""
    make = lambda path: write(path, "2", factor=5.0)  # noqa: E731
    return _rolled_back(folder, seed, "reject rate", "rejects", make, frames=150)


def half_written(folder: Path, seed: int) -> Outcome:
    """A copy that stops half-way for ever."""
    with line_with(folder, seed, models=SHORT) as line:
        _serve_first(line)
        whole = write(folder / "2.kizu", "2").read_bytes()
        (line.drop / "2.kizu").write_bytes(whole[: len(whole) // 2])
        dropped = time.monotonic()
        told = line.wait("refusal", lambda: line.report("rejected", file="2.kizu"))
        back = line.wait("results after it", lambda: line.result("1", told))
        assert line.versions() == ["1"], line.versions()
        assert not list(line.drop.glob("*.kizu"))
        _check_whole(line)
        text = "in quarantine, version 1 never stopped"
        return _outcome("half-written file", "wrote half a file", told - dropped, back - told, text)


def drop_while_loading(folder: Path, seed: int) -> Outcome:
    """The next model is dropped while one is being proven, and the one after that too."""
    with line_with(folder, seed, models=SHORT) as line:
        _serve_first(line)
        files = [write(folder / f"{version}.kizu", version, factor=1.1) for version in "234"]
        dropped = [line.give(path) for path in files]
        told = line.wait("version 4", lambda: line.report("active", "4"))
        line.wait("its confirmation", lambda: line.report("confirmed", "4"))
        back = line.wait("results of version 4", lambda: line.result("4"))
        assert line.versions() == sorted(line.versions()), line.versions()
        assert line.versions()[-1] == "4"
        kinds = [(h.payload["kind"], h.payload["model"]["version"]) for h in line.reports]
        assert [v for kind, v in kinds if kind == "active"] == ["1", "2", "3", "4"], kinds
        _check_whole(line)
        text = "taken one after the other, no frame without a model"
        last = dropped[-1]
        return _outcome("drop while another is loading", "dropped 3 models at once", told - last, back - last, text)


def bad_files(folder: Path, seed: int) -> Outcome:
    """Files that must never serve, at once: golden mismatch, unsigned, foreign key, a graph that eats memory."""
    folder.mkdir(parents=True, exist_ok=True)
    trusted, foreign = Ed25519PrivateKey.generate(), Ed25519PrivateKey.generate()
    pem = trusted.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
    (folder / "key.pem").write_bytes(pem)
    keys = f'trusted_keys = ["{folder / "key.pem"}"]\nrequire_signature = true\n'
    with line_with(folder, seed, models=keys + SHORT) as line:
        _serve_first(line, key=trusted)
        write(folder / "golden.kizu", "2", golden_factor=1.01, key=trusted)
        write(folder / "unsigned.kizu", "2")
        write(folder / "foreign.kizu", "2", key=foreign)
        write(folder / "memory.kizu", "2", extra=busy(28_000, 1), key=trusted)
        words = {"golden": "deviate", "unsigned": "not signed", "foreign": "trusted keys", "memory": "llocat"}
        dropped = max(line.give(folder / f"{name}.kizu") for name in words)
        for name in words:
            line.wait(f"refusal of {name}", lambda name=name: line.report("rejected", file=f"{name}.kizu"))
        told = time.monotonic()
        back = line.wait("results after it", lambda: line.result("1", told))
        for name, word in words.items():
            report = line.report("rejected", file=f"{name}.kizu")
            assert report is not None
            assert word in report.payload["reason"], report.payload
        assert line.versions() == ["1"], line.versions()
        assert line.ends == []
        _check_whole(line)
        text = "all four in quarantine, version 1 never stopped"
        return _outcome("files that must not serve", "dropped 4 files at once", told - dropped, back - told, text)


def commands(folder: Path, seed: int) -> Outcome:
    """Somebody rolls back a model by command while it is on probation, and activates it again."""
    with line_with(folder, seed, models=SHORT.replace("100", "5000")) as line:
        line.give(write(folder / "1.kizu", "1"))
        line.wait("version 1 in the record", lambda: '"file": "gears-1-' in _record(line))
        line.give(write(folder / "2.kizu", "2"))
        line.wait("results of version 2", lambda: line.result("2"))
        asked = time.monotonic()
        answer = line.ask({"action": "rollback", "request_id": "7"})
        assert (answer["outcome"], answer["target"]["version"], answer["request_id"]) == ("accepted", "1", "7"), answer
        told = line.wait("rollback", lambda: line.report("rolled_back", "2"))
        back = line.wait("results of version 1", lambda: line.result("1", asked))
        listed = {part["model"]["version"]: part["state"] for part in line.ask({})["models"]}
        assert listed["2"] == "stored", listed
        assert line.ask({"action": "activate", "name": "gears", "version": "2"})["outcome"] == "accepted"
        line.wait("results of version 2 again", lambda: line.result("2", back))
        assert line.versions() == ["1", "2", "1", "2"], line.versions()
        _check_whole(line)
        return _outcome("commands", "rollback, then activate", told - asked, back - asked, "carried out, no frame lost")


def many_swaps(folder: Path, seed: int, swaps: int = 50) -> Outcome:
    """One model after the other, of 8 MB each: the memory of all but the last two must come back.

    `noticed_s` is the longest wait between two results, `recovered_s` the median time from drop to service.
    """
    took, resident = [], []
    with line_with(folder, seed, models="[models.probation]\nframes = 5\nleast_s = 0.0\n") as line:
        for number in range(swaps):
            version = str(number)
            path = write(folder / "next.kizu", version, extra=heavy(8, number))
            dropped = line.give(path, f"{version}.kizu")
            took.append(line.wait(f"version {version}", lambda v=version: line.report("active", v)) - dropped)
            line.wait("its confirmation", lambda v=version: line.report("confirmed", v))
            resident.append(line.memory_bytes() / 1e6)
        _check_whole(line)
        assert line.ends == []
        times = [heard.at_s for heard in line.results]
    slope, error = _slope(resident[5:])
    text = (
        f"{swaps} swaps, {resident[5]:.0f} MB after 6, {resident[-1]:.0f} MB at the end: "
        f"{slope:+.2f} ± {error:.2f} MB a swap (95 %)"
    )
    return Outcome(
        "many swaps",
        f"{swaps} drops",
        noticed_s=max(np.diff(times)),
        recovered_s=median(took),
        note=f"{text}; `noticed`: longest wait between two results, `recovered`: median from drop to service",
        failed="" if slope - error < 4 else f"memory grows by {slope:.1f} MB a swap",
    )


def _slope(values: list[float]) -> tuple[float, float]:
    """The slope of a straight line through `values`, and half of its 95 % confidence interval."""
    x, y = np.arange(len(values)), np.array(values)
    (slope, _), covariance = np.polyfit(x, y, 1, cov=True)
    return float(slope), float(1.96 * np.sqrt(covariance[0, 0]))


SCENARIOS: tuple[ModelScenario, ...] = (
    crash_at_load,
    crash_in_first_frames,
    hang_in_first_frames,
    power_cut,
    restart_on_probation,
    not_a_number,
    wrong_channels,
    too_slow,
    too_many_rejects,
    half_written,
    drop_while_loading,
    bad_files,
    commands,
    many_swaps,
)
"""In the order of the table."""
