"""Opening runs: whole ones for each kind of score, broken ones with the reason."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from kizu_contract.tiles import FrameSize
from kizu_train.errors import TrainError, UsageError
from kizu_train.fit import FitRequest, fit
from kizu_train.naming import slug
from kizu_train.recipes import resolve_recipe
from kizu_train.runs import open_run


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run on six pictures of noise."""
    import cv2

    folder = tmp_path_factory.mktemp("data") / "Ø 5 mm gears!"
    folder.mkdir()
    random = np.random.default_rng(0)
    for index in range(6):
        cv2.imwrite(str(folder / f"{index}.png"), random.integers(0, 256, (30, 400), dtype=np.uint8))
    sets = ("grid.tile_px=16", "grid.stride_px=8", "grid.margin_px=0", "network.widths=[4,8]", "train.steps=3")
    recipe = resolve_recipe("patch_vae", (*sets, "network.decoder_widths=[4]", "network.decoder_start=4"))
    fit(FitRequest(recipe, folder, folder.parent / "run", "cpu", seed=4))
    return folder.parent / "run"


@pytest.fixture
def copy(finished: Path, tmp_path: Path) -> Path:
    """A run of its own, to break."""
    shutil.copytree(finished, tmp_path / "run")
    return tmp_path / "run"


def test_open_run(finished: Path) -> None:
    """A run gives all that export needs, named after its data folder."""
    run = open_run(finished)
    assert run.name == "5-mm-gears"
    assert (run.colour, run.score, run.score_kinds) == ("grey", "m", ("m", "l", "d", "a"))
    assert (run.grid.tile_px, run.map_cell_px, run.reduction.kind) == (16, 4, "max")
    assert run.golden_tiles.shape == (16, 16, 16, 1)
    assert run.golden_tiles.dtype == np.uint8
    assert run.preview.shape == (24, 320, 3)
    assert (run.provenance.detector, run.provenance.seed, run.provenance.train_pictures) == ("patch_vae", 4, 3)
    assert run.calibration.frames == 3
    assert not run.stopped_early
    assert not run.scorer.training
    json.dumps(run.recipe)


def test_size_of_the_pictures(copy: Path) -> None:
    """The one size of the training pictures is kept; a run of a version that did not note it opens all the same."""
    assert open_run(copy).picture_size == FrameSize(30, 400)
    raw = json.loads((copy / "run.json").read_text())
    del raw["picture_size"]
    (copy / "run.json").write_text(json.dumps(raw))
    assert open_run(copy).picture_size is None


def test_each_kind_of_score(finished: Path) -> None:
    """A run opened for another kind has that kind's scorer, calibration and provenance."""
    tiles = torch.from_numpy(open_run(finished).golden_tiles)
    found = {}
    for kind in ("m", "l", "d", "a"):
        run = open_run(finished, kind)
        with torch.no_grad():
            score, cells = run.scorer(tiles)
        found[kind] = (score.tolist(), run.thresholds)
        assert cells.shape == (16, 4, 4)
        assert run.provenance.recipe["score"] == kind
    assert len({tuple(score) for score, _ in found.values()}) == 4
    assert len({limits for _, limits in found.values()}) == 4
    with pytest.raises(UsageError, match="has m, l, d, a"):
        open_run(finished, "q")


def test_not_a_run(tmp_path: Path) -> None:
    """A folder that is no run is refused with the command that makes one."""
    with pytest.raises(TrainError, match="kizu-train fit"):
        open_run(tmp_path)


def test_unfinished_run(copy: Path) -> None:
    """A run that was killed is refused with the way to go on."""
    (copy / "run.json").rename(copy / "checkpoint.json")
    with pytest.raises(TrainError, match="--resume"):
        open_run(copy)


@pytest.mark.parametrize("name", ["weights.safetensors", "golden.npy", "preview.png"])
@pytest.mark.parametrize("damage", [Path.unlink, lambda path: path.write_bytes(path.read_bytes()[:-1] + b"\x07")])
def test_damaged_files(copy: Path, name: str, damage: Callable[[Path], object]) -> None:
    """A missing or changed file is named."""
    damage(copy / name)
    with pytest.raises(TrainError, match=name):
        open_run(copy)


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (lambda raw: raw.pop("seed"), "missing keys"),
        (lambda raw: raw.update(extra=1), "unknown keys"),
        (lambda raw: raw.update(schema=9), "schema 9"),
        (lambda raw: raw["recipe"].update(detector="oracle"), "oracle"),
        (lambda raw: raw["recipe"]["network"].update(widths=[4, 16]), "does not fit the recipe"),
    ],
)
def test_damaged_record(copy: Path, change: Callable[[dict[str, object]], object], why: str) -> None:
    """A record that is not what this version writes is refused with the place."""
    raw = json.loads((copy / "run.json").read_text())
    change(raw)
    (copy / "run.json").write_text(json.dumps(raw))
    with pytest.raises(TrainError, match=why):
        open_run(copy)


def test_slug() -> None:
    """Any folder's name becomes one that a bundle may have."""
    assert slug(Path("/data/Cookies v2")) == "Cookies-v2"
    assert slug(Path("/data/クッキー")) == "model"
    assert len(slug(Path("a" * 200))) == 64
