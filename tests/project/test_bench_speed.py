"""The bench of speed: its own counting is right, what it times exists, what it keeps becomes a page."""

import importlib
import json
import pkgutil
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

BENCH = Path(__file__).parents[2] / "benchmarks"
_OWN = ("harness", "service")


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """The bench's own modules, which lie in no package."""
    monkeypatch.syspath_prepend(str(BENCH))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    yield importlib.import_module("speed")
    for name in [name for name in sys.modules if name in _OWN or name.startswith("speed")]:
        del sys.modules[name]


def _scorer() -> bytes:
    """Cast, Conv (2 filters of 3 × 3 over 1 channel, stride 1, valid), its transpose, a product: shapes by hand."""
    nodes = [
        helper.make_node("Transpose", ["tiles"], ["planes"], perm=[0, 3, 1, 2]),
        helper.make_node("Cast", ["planes"], ["pixels"], to=TensorProto.FLOAT),
        helper.make_node("Conv", ["pixels", "filters"], ["features"]),
        helper.make_node("ConvTranspose", ["features", "filters"], ["spread"]),
        helper.make_node("Flatten", ["spread"], ["flat"]),
        helper.make_node("MatMul", ["flat", "weights"], ["score"]),
    ]
    weights = {"filters": np.ones((2, 1, 3, 3), np.float32), "weights": np.ones((64, 5), np.float32)}
    graph = helper.make_graph(
        nodes,
        "scorer",
        [helper.make_tensor_value_info("tiles", TensorProto.UINT8, ["N", 8, 8, 1])],
        [helper.make_tensor_value_info("score", TensorProto.FLOAT, ["N", 5])],
        [onnx.numpy_helper.from_array(value, name) for name, value in weights.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8).SerializeToString()


def test_flops_and_bytes_are_counted_as_by_hand(bench: ModuleType) -> None:
    """Two FLOPs a product of Conv, ConvTranspose and MatMul; every tensor once each way, views not at all."""
    assert bench
    cost = sys.modules["speed_graph"].count(_scorer(), 3)
    found = {node.operator: (node.flops, node.moved) for node in cost.nodes}
    conv, spread = 2 * 3 * 2 * 6 * 6 * 9, 2 * 3 * 2 * 6 * 6 * 9
    features, weights = 3 * 2 * 36 * 4, 2 * 9 * 4
    assert found["Conv"] == (conv, 3 * 64 * 4 + weights + features)
    assert found["ConvTranspose"] == (spread, features + weights + 3 * 64 * 4)
    assert found["MatMul"] == (2 * 3 * 64 * 5, 3 * 64 * 4 + 64 * 5 * 4 + 3 * 5 * 4)
    assert found["Cast"] == (0, 3 * 64 + 3 * 64 * 4)
    assert found["Flatten"] == (0, 0)
    assert (cost.flops, cost.unknown) == (conv + spread + 2 * 3 * 64 * 5, 0)
    assert cost.seconds(1e9, 1e30) == pytest.approx(cost.flops / 1e9)
    assert cost.seconds(1e30, 1e9) == pytest.approx(cost.moved / 1e9)


def test_stages_are_the_agents_own_functions(bench: ModuleType) -> None:
    """Every function that the bench times by name exists; a stage's time is without what it calls of another."""
    assert bench
    stages = sys.modules["speed_stages"]
    for names in stages.STAGES.values():
        assert all(callable(pkgutil.resolve_name(name)) for name in names)
    watch = stages.Stopwatch()
    inner = watch.wrap("inner", lambda: time.sleep(0.05))
    watch.wrap("outer", lambda: (inner(), inner(), time.sleep(0.02)))()
    assert watch.seconds["inner"] >= 0.1
    assert 0.02 <= watch.seconds["outer"] < watch.seconds["inner"]


def test_latency_is_counted_on_the_monotonic_clock(bench: ModuleType) -> None:
    """Arrival − capture and what of it is not scoring, frame by frame."""
    assert bench
    arrival = sys.modules["service"].Arrival
    utc_s, differ_s = 1_769_860_800.0, 1_769_860_000.0  # 2026-01-31T12:00:00Z is 800 s on the monotonic clock
    assert utc_s - differ_s == 800.0
    payload = {"captured_at": "2026-01-31T12:00:00.000Z", "timing": {"scoring_ms": 7.0}}
    heard = [arrival(800.0 + wait, "t", json.dumps(payload).encode()) for wait in (0.010, 0.012, 0.020)]
    rows = {row.name: row for row in sys.modules["speed_latency"].latency_rows(heard, differ_s, "x")}
    assert rows["x: capture → subscriber, p50"].value == pytest.approx(12.0, abs=1e-3)
    assert rows["x: over the scoring time, p50"].value == pytest.approx(5.0, abs=1e-3)
    assert rows["x: over the scoring time, p99"].value == pytest.approx(13.0, abs=0.3)
    assert rows["x: over the scoring time, p99"].met is False


def test_unequal_shares_show(bench: ModuleType) -> None:
    """A camera that is served half as often, or not at all, is below the aim."""
    assert bench
    cameras, arrival = sys.modules["speed_cameras"], sys.modules["service"].Arrival

    def row(counts: dict[str, int], configured: int) -> float:
        heard = [
            arrival(0.0, name, json.dumps({"camera": name, "timing": {"total_ms": 5.0}}).encode())
            for name, count in counts.items()
            for _ in range(count)
        ]
        rows = cameras.served_rows(cameras.Served(configured, 10.0, 2.0, heard, {"inspection_busy": 4.0}))
        found = {each.name.partition(": ")[2]: each for each in rows}
        assert found["dropped, inspection_busy"].value == 2.0
        return float(found["least ÷ most served"].value)

    assert row({"a": 40, "b": 40}, 2) == 1.0
    assert row({"a": 40, "b": 20}, 2) == 0.5
    assert row({"a": 40, "b": 40}, 3) == 0.0


def test_arrivals_in_heaps_give_the_true_rate(bench: ModuleType) -> None:
    """Results that come eight at a time, 100 ms apart, are 80 a second, wherever the window was cut."""
    assert bench
    rate = sys.modules["speed_agent"]._steady_rate
    at = [heap * 0.1 + piece * 0.001 for heap in range(20) for piece in range(8)]
    assert rate(at) == pytest.approx(80.0)
    assert rate(at[3:-2]) == pytest.approx(80.0, rel=0.04)
    assert rate([n * 0.05 for n in range(40)]) == pytest.approx(20.0, rel=0.1)


def test_families_are_kept_and_become_a_page(
    bench: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A family's rows survive with their aims; the page keeps its words and shows what was missed."""
    row = sys.modules["harness"].Row
    rows = [row("agent ÷ bare engine", 0.5, "", 0.95), row("p99", 3.25, "ms", 10.0, at_most=True)]
    monkeypatch.setitem(bench.FAMILIES, "latency", ("Latency", lambda _request: rows))
    monkeypatch.setattr(
        bench, "Models", lambda _folder: type("None", (), {"try_path": staticmethod(lambda _name: True)})
    )
    page, target = tmp_path / "page.md", tmp_path / "rows.json"
    page.write_text(f"# Words\n\n{bench.MARK}\n\nold table\n")
    work = ("--work", str(tmp_path / "kept"), "--quick")
    monkeypatch.setattr(sys, "argv", ["speed", "--only", "latency", "--providers", "cpu,tensorrt", *work])
    assert bench.main() == 0
    assert "tensorrt: left out" in capsys.readouterr().err
    monkeypatch.setattr(sys, "argv", ["speed", "--only-kept", "--page", str(page), "--json", str(target), *work])
    assert bench.main() == 0
    text = page.read_text()
    assert text.startswith("# Words")
    assert "old table" not in text
    assert "| agent ÷ bare engine | 0.5 |  | ≥ 0.95 | **missed** |" in text
    assert "| p99 | 3.25 | ms | ≤ 10 | met |" in text
    assert [found["met"] for found in json.loads(target.read_text())["rows"]] == [False, True]


@pytest.mark.parametrize("arguments", [("--only", "engines"), ("--recipes", "joint_fastest")])
def test_unknown_names_are_wrong_usage(
    bench: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], arguments: tuple[str, str]
) -> None:
    """A family or recipe that is not there ends with exit code 2 and its name."""
    monkeypatch.setattr(sys, "argv", ["speed", *arguments])
    with pytest.raises(SystemExit, match="2"):
        bench.main()
    assert arguments[1] in capsys.readouterr().err
