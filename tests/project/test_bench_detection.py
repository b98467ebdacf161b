"""The detection bench: cells in children, kept and used again, failures shown, a page and aims written."""

import importlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

from kizu_agent.simulation import SimulatedLine, write_dataset

BENCH = Path(__file__).parents[2] / "benchmarks" / "detection.py"
TINY = """
detector = "patch_vae"
score = "m"
[grid]
tile_px = 16
stride_px = 8
margin_px = 8
[network]
widths = [8, 16]
decoder_start = 16
decoder_widths = [8]
latent = 4
[train]
steps = 30
batch = 16
learning_rate = {rate}
"""


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """The bench's own modules, which lie in no package."""
    monkeypatch.syspath_prepend(str(BENCH.parent))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    yield importlib.import_module("detection")
    for name in [name for name in sys.modules if name == "harness" or name.startswith("detection")]:
        del sys.modules[name]


@pytest.mark.slow
def test_cells_are_measured_once_and_failures_are_shown(
    bench: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """1. A good and a failing cell are measured; the page says so. 2. They are used again. 3. Not for other code.

    Where asked, the bundles of kept cells are timed again, and nothing else of them changes.
    """
    cells = sys.modules["detection_cells"]
    monkeypatch.setattr(cells, "code_fingerprint", lambda: "code")
    data = tmp_path / "plates"
    write_dataset(data, SimulatedLine("plates", width=64, height=64), good=10, test_good=3, defective=4)
    for name, rate in (("tiny", "1e-3"), ("wild", "1e30")):
        (tmp_path / f"{name}.toml").write_text(TINY.format(rate=rate))
    names = ",".join(str(tmp_path / name) for name in ("tiny.toml", "wild.toml"))
    arguments = ["--sets", str(data), "--recipes", names, "--seeds", "1", "--work", str(tmp_path / "work")]
    arguments += ["--page", str(tmp_path / "page.md"), "--json", str(tmp_path / "rows.json")]
    arguments += ["--jobs", "2", "--most-tests", "2"]
    monkeypatch.setattr(sys, "argv", ["detection", *arguments])
    assert bench.main() == 0
    page = (tmp_path / "page.md").read_text()
    assert "## plates" in page
    assert f"at commit `{sys.modules['harness'].commit()}` on" in page
    assert "| wild | failed: the loss at step 10 is not finite" in page
    rows = {row["name"]: row for row in json.loads((tmp_path / "rows.json").read_text())["rows"]}
    assert rows["cells that failed"]["value"] == 1
    assert rows["parity with torch, worst"]["met"]
    kept = tmp_path / "work/cells/plates/tiny-seed0.json"
    figures = json.loads(kept.read_text())["cell"]["figures"]
    assert figures["training_s"] > 0
    assert figures["ms_256"] > 0
    assert 0 <= figures["image_auroc"] <= 1
    _forget_the_times(kept)
    monkeypatch.setattr(sys, "argv", ["detection", *arguments, "--only-kept", "--retime"])
    assert bench.main() == 0
    again = json.loads(kept.read_text())
    assert again["key"]["code"] == "code"
    assert again["cell"]["figures"] | {"ms_256": 0, "cpu_ms_256": 0} == figures | {"ms_256": 0, "cpu_ms_256": 0}
    assert again["cell"]["figures"]["ms_256"] > 0
    assert again["cell"]["figures"]["cpu_ms_256"] > 0
    monkeypatch.setattr(sys, "argv", ["detection", *arguments])
    monkeypatch.setattr(cells.Bench, "_run_child", lambda *_: "was measured again")
    assert bench.main() == 0
    assert "measured again" not in (tmp_path / "page.md").read_text()
    monkeypatch.setattr(sys, "argv", ["detection", *arguments, "--only-kept", "--seeds", "2"])
    assert bench.main() == 0
    assert "measured again" not in (tmp_path / "page.md").read_text()
    monkeypatch.setattr(cells, "code_fingerprint", lambda: "other code")
    monkeypatch.setattr(sys, "argv", ["detection", *arguments, "--keep"])
    assert bench.main() == 0
    assert "measured again" not in (tmp_path / "page.md").read_text()
    monkeypatch.setattr(sys, "argv", ["detection", *arguments])
    assert bench.main() == 0
    assert "measured again" in (tmp_path / "page.md").read_text()


def test_the_page_says_how_many_seeds_there_are(bench: ModuleType) -> None:
    """One number where all methods have as many, else which method has how many."""
    cell = sys.modules["detection_cells"].Cell

    def cells(**seeds: int) -> list[object]:
        return [
            cell(name, data, seed, None, "broke", "abc")
            for name, count in seeds.items()
            for seed in range(count)
            for data in "ab"
        ]

    assert bench._seeds([]) == "nothing measured"
    assert bench._seeds(cells(a=1)) == "one seed"
    assert bench._seeds([*cells(a=1), cell("a", "b", 1, None, "broke", "abc")]) == "one seed"
    assert bench._seeds(cells(a=3, b=3)) == "3 seeds"
    assert bench._seeds(cells(a=1, best=3, b=1, good=3, c=1)) == "3 seeds of best, good; one seed of others"


def _forget_the_times(kept: Path) -> None:
    """As if the cell had been kept with times of nought."""
    cell = json.loads(kept.read_text())
    cell["cell"]["figures"] |= {"ms_256": 0.0, "cpu_ms_256": 0.0}
    kept.write_text(json.dumps(cell))


@pytest.mark.usefixtures("bench")
def test_sets_are_thinned_by_links(tmp_path: Path) -> None:
    """At most so many good and defective test pictures stay, with masks, the same each time; training stays whole."""
    cells = sys.modules["detection_cells"]
    data = tmp_path / "plates"
    write_dataset(data, SimulatedLine("plates", width=64, height=64), good=6, test_good=5, defective=7)
    views = [cells.thinned(data, 3, tmp_path / "work") for _ in range(2)]
    tests = [path for path in (views[1] / "test").rglob("*.png") if path.is_file()]
    good = [path for path in tests if path.parent.name == "good"]
    assert (len(good), len(tests) - len(good)) == (3, 3)
    masks = {path.stem for path in (views[1] / "ground_truth").rglob("*.png")}
    assert masks == {f"{path.stem}_mask" for path in tests if path not in good}
    before = cells.folder_fingerprint(views[1])
    assert before == cells.folder_fingerprint(cells.thinned(data, 3, tmp_path / "work"))
    assert before != cells.folder_fingerprint(cells.thinned(data, 4, tmp_path / "work"))
    (data / "train/good/extra.png").write_bytes(good[0].read_bytes())
    assert before != cells.folder_fingerprint(cells.thinned(data, 3, tmp_path / "work"))


def test_what_is_summed_up(bench: ModuleType) -> None:
    """Deviation is over seeds of the means over sets; a missing cell fails the mean; the defaults are as named."""
    cells, tables = sys.modules["detection_cells"], sys.modules["detection_tables"]

    def cell(method: str, name: str, seed: int, auroc: float | None, ms: float = 1.0) -> object:
        values = dict.fromkeys(cells.Figures.__dataclass_fields__, 1) | {"is_fixtured": False}
        values |= {"image_auroc": auroc, "au_pro_30": auroc, "ms_256": ms}
        figures = None if auroc is None else cells.Figures(**values)
        return cells.Cell(method, name, seed, figures, "broke" if auroc is None else None, "abc")

    slow = [cell("slow", name, seed, 0.9 + 0.02 * seed, 9.0) for name in "ab" for seed in (0, 1)]
    fast = [cell("fast", name, seed, 0.9) for name in "ab" for seed in (0, 1)]
    weak = [cell("weak", name, seed, 0.5, 0.1) for name in "ab" for seed in (0, 1)]
    backed = [cell("slow+backbone", name, seed, 0.95) for name in "ab" for seed in (0, 1)]
    broken = [cell("broken", "a", 0, 0.99), cell("broken", "b", 0, None)]
    means = [tables.mean_over_sets(own[0].method, own, ("a", "b")) for own in (slow, fast, weak, backed, broken)]
    assert means[0].figures["image_auroc"].mean == pytest.approx(0.91)
    assert means[0].figures["image_auroc"].deviation == pytest.approx(0.02 / 2**0.5)
    assert means[4].failed == "no figures on b"
    chosen = tables.choose_defaults(means)
    named = [item.method for item in (chosen.best, chosen.fastest, chosen.with_backbone)]
    assert named == ["slow", "fast", "slow+backbone"]
    assert bench._commits([cell("a", "x", 0, 1.0)]) == "commit `abc`"
    shown = sys.modules["detection_page"]._safe("/a/b/c.png: has 3 / 4 | 5 pixels\nin a/b")
    assert shown == "c.png: has 3 / 4 / 5 pixels in a/b"
    assert bench.SETS == ("magnetic_tile", "deeppcb_tiles", "cookies")
