"""The demo's own judgement: what it counts, when it calls itself a success, which folders it touches."""

import sys
from pathlib import Path
from typing import Any

import pytest

from kizu_agent.config import load_config
from kizu_agent.demo import DemoOptions, Tally, _clear, _count, _write_config, run_demo
from kizu_agent.errors import AgentError
from kizu_agent.simulation import SimulatedLine

LINE = SimulatedLine.from_url("sim:plates?seed=2&defects=0.3&width=32&height=32")


def result(seq: int, frame: int, verdict: str, model: str = "1") -> dict[str, Any]:
    timing = {"scoring_ms": 1.0}
    found = {"camera": "cam1", "seq": seq, "frame": frame, "verdict": verdict, "score": 1.0, "ratio": 0.5}
    return {**found, "timing": timing, "model": {"version": model}}


@pytest.fixture
def parts() -> tuple[int, int]:
    """Numbers of a good and of a defective part."""
    good = next(n for n in range(100) if LINE.defect_of(n) is None)
    return good, next(n for n in range(100) if LINE.defect_of(n) is not None)


def test_results_are_counted_against_the_truth(parts: tuple[int, int]) -> None:
    """Caught and missed, false alarms, gaps, models; a result that comes twice counts once."""
    good, bad = parts
    tally = Tally()
    verdicts = [(1, bad, "reject"), (2, bad, "warn"), (3, bad, "ok"), (4, good, "ok"), (5, good, "warn")]
    for seq, frame, verdict in [*verdicts, verdicts[-1], (8, good, "unknown")]:
        _count(tally, result(seq, frame, verdict), LINE)
    assert (tally.inspected, tally.caught, tally.missed, tally.rejected_defects) == (6, 2, 1, 1)
    assert (tally.good, tally.false_alarms, tally.unknown, tally.lost) == (3, 1, 1, 2)
    assert tally.by_model == {"1": 6}


def test_unknown_is_never_right(parts: tuple[int, int]) -> None:
    """A part that was not judged is marked wrong, good or not."""
    for frame in parts:
        assert "✗" in _count(Tally(), result(1, frame, "unknown"), LINE)[-1]
    assert "✓" in _count(Tally(), result(1, parts[0], "ok"), LINE)[-1]
    assert "✗" in _count(Tally(), result(1, parts[1], "ok"), LINE)[-1]


def test_the_swap_is_timed_to_the_first_result_of_the_second_model(parts: tuple[int, int]) -> None:
    """From the drop to the first result by model 2."""
    tally = Tally()
    _count(tally, result(1, parts[0], "ok", "2"), LINE)
    assert tally.swap_s is None
    tally.dropped_at = 0.0
    _count(tally, result(2, parts[0], "ok", "1"), LINE)
    assert tally.swap_s is None
    _count(tally, result(3, parts[0], "ok", "2"), LINE)
    assert tally.swap_s is not None


WELL = {"inspected": 200, "caught": 90, "missed": 10, "good": 100, "false_alarms": 5, "swap_s": 1.0}


@pytest.mark.parametrize(
    "worse",
    [
        {"caught": 89, "missed": 11},
        {"false_alarms": 6},
        {"lost": 1},
        {"unknown": 1},
        {"swap_s": None},
        {"caught": 0, "missed": 0},
        {"good": 0, "false_alarms": 0},
        {"inspected": 0, "caught": 0, "missed": 0, "good": 0, "false_alarms": 0},
    ],
)
def test_success_needs_everything(worse: dict[str, Any]) -> None:
    """Defects seen and caught, good parts let through, nothing lost, the model swapped: one missing is a failure."""
    assert Tally(**WELL).succeeded()
    assert not Tally(**{**WELL, **worse}).succeeded()


def test_a_foreign_folder_is_left_alone(tmp_path: Path) -> None:
    """A folder with something in it, or a file, is refused and stays as it is."""
    foreign = tmp_path / "mine"
    foreign.mkdir()
    (foreign / "thesis.txt").write_text("years of work")
    for path in (foreign, foreign / "thesis.txt"):
        with pytest.raises(AgentError, match="choose another with --out"):
            _clear(path)
    assert [path.name for path in foreign.iterdir()] == ["thesis.txt"]


def test_a_demo_folder_is_used_again(tmp_path: Path) -> None:
    """A new, an empty and an earlier demo's folder are begun afresh; what a link in it points at stays."""
    kept = tmp_path / "kept"
    kept.mkdir()
    (kept / "file").touch()
    out = tmp_path / "deep" / "out"
    _clear(out)
    (out / "agent.log").write_text("old")
    (out / "run1").mkdir()
    (out / "link").symlink_to(kept)
    _clear(out)
    assert sorted(path.name for path in out.iterdir()) == [".kizu-demo", "drop", "heatmaps", "state"]
    assert (kept / "file").exists()


def test_missing_extras_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the demo extra the demo says what to install and touches nothing."""
    monkeypatch.setitem(sys.modules, "amqtt", None)
    with pytest.raises(AgentError, match=r"needs amqtt: pip install 'kizu\[demo\]'"):
        run_demo(DemoOptions(tmp_path / "out", 1.0))
    assert not (tmp_path / "out").exists()


def test_its_configuration_survives_odd_folder_names(tmp_path: Path) -> None:
    """Quotes, backslashes and other scripts in the folder's name do not break the TOML."""
    out = tmp_path / 'de"mo\\n 傷🙂'
    out.mkdir()
    config = load_config(_write_config(out, 1883, DemoOptions(out, None)))
    assert config.agent.state_dir == out / "state"
    assert config.models.drop_dir == out / "drop"
