"""The bench of lower precisions: its rows come from real exports, with the aims of the issue."""

import importlib
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

BENCH = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """The bench's own module, which lies in no package."""
    monkeypatch.syspath_prepend(str(BENCH))
    yield importlib.import_module("speed_precision")
    for name in [name for name in sys.modules if name in ("harness", "speed_precision")]:
        del sys.modules[name]


@pytest.mark.timeout(300)
def test_rows_of_one_recipe(bench: ModuleType, tmp_path: Path) -> None:
    """A recipe gives a rate, a ratio for each lower precision, and what each lost, with aims where there are some."""
    effort = bench.Effort(share=0.001, good=8, judged=4, turns=2, seconds=0.05)
    rows = {row.name: row for row in bench.measure(tmp_path, ["patch_vae"], effort)}
    assert rows["patch_vae, cpu: fp32"].value > 0
    for precision in ("fp16", "int8"):
        assert 0.05 < rows[f"patch_vae, cpu: {precision} ÷ fp32, tiles/s"].value < 20
        assert rows[f"patch_vae: lost by {precision}"].aim == 0.5
    faster = rows["patch_vae, cpu: int8 ÷ fp32, tiles/s"]
    assert faster.aim == (1.8 if bench.has_vnni() else None)
    assert rows["patch_vae: good scores moved by int8"].value > 0
    assert rows["patch_vae: layers in int8, of 8"].value == 8
