"""The bench of published small experiments: its files read, its figures right, one through the whole path."""

import gzip
import importlib
import json
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import cv2
import numpy as np
import pytest

BENCH = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """The bench's own modules, which lie in no package."""
    monkeypatch.syspath_prepend(str(BENCH))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    yield importlib.import_module("small")
    for name in [name for name in sys.modules if name == "harness" or name.startswith("small")]:
        del sys.modules[name]


def _write_idx(path: Path, values: np.ndarray, *, is_packed: bool) -> None:
    head = bytes([0, 0, 8, values.ndim]) + b"".join(length.to_bytes(4, "big") for length in values.shape)
    data = head + values.astype(np.uint8).tobytes()
    if is_packed:
        path.with_name(f"{path.name}.gz").write_bytes(gzip.compress(data))
    else:
        path.write_bytes(data)


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Something like MNIST: ones are upright strokes, nines are rings; 40 of each to learn from, 12 for tests."""
    random = np.random.default_rng(3)
    folder = tmp_path / "data" / "mnist"
    folder.mkdir(parents=True)
    for part, each in (("train", 40), ("t10k", 12)):
        pictures = np.zeros((2 * each, 28, 28), np.uint8)
        for index, picture in enumerate(pictures):
            x, y = (int(at) for at in random.integers(11, 17, 2))
            if index % 2:
                cv2.circle(picture, (x, y), 7, 255, 2)
            else:
                cv2.line(picture, (x, 4), (x, 23), 255, 3)
        labels = np.where(np.arange(2 * each) % 2, 9, 1)
        _write_idx(folder / f"{part}-images-idx3-ubyte", pictures, is_packed=part == "train")
        _write_idx(folder / f"{part}-labels-idx1-ubyte", labels, is_packed=part == "train")
    return tmp_path / "data"


def _call(bench: ModuleType, monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["small", *arguments])
    found: int = bench.main()
    return found


def test_an_experiment_from_files_to_rows(
    bench: ModuleType, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """1. The dense autoencoder and AnoGAN are measured with two seeds. 2. What lacks pictures is named and left out."""
    target = tmp_path / "rows.json"
    small = replace(bench.EXPERIMENTS["anogan_mnist"], sets=("train.batch=4", "encode.batch=4", "network.widths=[4,8]"))
    monkeypatch.setitem(bench.EXPERIMENTS, "anogan_mnist", small)
    sizes = ("--effort", "0.005", "--seeds", "2", "--quick", "--work", str(tmp_path / "work"))
    only = "ae_mnist,anogan_mnist,doc_cifar"
    assert _call(bench, monkeypatch, "--data", str(data), "--only", only, "--json", str(target), *sizes) == 0
    rows = {row["name"]: row for row in json.loads(target.read_text())["rows"]}
    assert 0 <= rows["MNIST 1 / 9, ae_dense@l2, image AUROC"]["value"] <= 1
    accuracy = rows["MNIST 1 / 9, anogan_28px@izi_f, best accuracy over thresholds"]
    assert 0.5 <= accuracy["value"] <= 1
    assert accuracy["aim"] == 0.97
    assert rows["MNIST 1 / 9, anogan_28px, latent search on 24 pictures, image AUROC, ± over 2 seeds"]["aim"] is None
    assert (tmp_path / "anogan_mnist-izi_f-seed1.png").is_file()
    assert (tmp_path / "anogan_mnist-search-seed0.png").is_file()
    assert "doc_cifar: left out" in capsys.readouterr().err
    pictures = tmp_path / "work" / "effort-0.005-pictures-100" / "mnist" / "data"
    assert len(list((pictures / "train/good").iterdir())) == 40
    first = cv2.imread(str(pictures / "test/bad/00000.png"), cv2.IMREAD_GRAYSCALE)
    assert np.array_equal(first, sys.modules["small_data"].mnist_1_9(data).bad[0, :, :, 0])


@pytest.mark.parametrize(
    "arguments", [(), ("--data", "nowhere", "--only", "ae_cifar"), ("--data", "x", "--seeds", "0")]
)
def test_wrong_usage(
    bench: ModuleType, monkeypatch: pytest.MonkeyPatch, arguments: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    """Without pictures, with unknown experiments or without seeds, it ends with exit code 2 and says what it wants."""
    with pytest.raises(SystemExit, match="2"):
        _call(bench, monkeypatch, *arguments)
    assert "usage" in capsys.readouterr().err


def test_nothing_there(
    bench: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A folder without any of the sets ends with exit code 2 and what is wanted."""
    assert _call(bench, monkeypatch, "--data", str(tmp_path), "--only", "vae_fashion") == 2
    assert "train-images-idx3-ubyte" in capsys.readouterr().err


def test_damaged_idx(bench: ModuleType, data: Path) -> None:
    """A cut file, or one that is no idx file of bytes, is refused by name."""
    path = data / "mnist" / "t10k-labels-idx1-ubyte"
    whole = path.read_bytes()
    for spoilt in (whole[:-1], b"\0\0\x0d\x01" + whole[4:], b""):
        path.write_bytes(spoilt)
        with pytest.raises(ValueError, match="t10k-labels"):
            sys.modules["small_data"].read_idx(path)
    assert bench


def test_best_split(bench: ModuleType, tmp_path: Path) -> None:
    """The best threshold is that of a search over all, also with ties; heaps that part are split without error."""
    assert bench
    scores = sys.modules["small_scores"]
    random = np.random.default_rng(0)
    for _ in range(20):
        good, bad = random.integers(0, 9, 15).astype(float), random.integers(3, 12, 10).astype(float)
        split = scores.best_split(good, bad)
        tried = [np.mean(np.append(good < limit, bad >= limit)) for limit in np.arange(-0.5, 13)]
        assert split.accuracy == pytest.approx(max(tried))
        assert np.mean(np.append(good < split.threshold, bad >= split.threshold)) == pytest.approx(split.accuracy)
    assert scores.best_split(np.array([0.1, 0.2]), np.array([0.4])).threshold == pytest.approx(0.3)
    scores.draw_histogram(tmp_path / "heaps.png", np.ones(3), np.ones(2), 1.0, "all alike")
    assert cv2.imread(str(tmp_path / "heaps.png")) is not None
