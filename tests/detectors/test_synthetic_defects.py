"""Segmentation on synthetic defects, on generated products."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from kizu_contract.pictures import read_picture
from kizu_export.build import build_bundle
from kizu_train.detectors.base import Extras
from kizu_train.errors import DataError, UsageError
from kizu_train.fit import FitRequest, fit
from kizu_train.nets.descent import Descent
from kizu_train.nets.unet import UNet, UNetSettings
from kizu_train.recipes import resolve_recipe
from kizu_train.runs import Run, build_detector, open_run
from kizu_train.scoring import frame_scorer
from kizu_train.tile_pool import TilePool

Picture = NDArray[np.uint8]

QUICK = (
    "grid.tile_px=64",
    "grid.stride_px=64",
    "grid.margin_px=0",
    "network.widths=[8,16,24]",
    "network.out_stride=2",
    "train.steps=80",
    "train.batch=8",
    "train.learning_rate=5e-3",
)


def test_separates_planted_defects(
    make_product: Callable[..., Path],
    stand_trial: Callable[..., Any],
    tmp_path: Path,
) -> None:
    """After a hundred steps it ranks spoilt pictures above good ones, finds the spots, and has no border problem.

    The other kinds of score come from the same run and pass the same gates: parity, operators.
    """
    data = make_product(tmp_path / "weave", "weave", side=128, train=16)
    trial = stand_trial("synthetic_defects", data, *QUICK)
    assert trial.image_auroc > 0.95
    assert trial.pixel_auroc > 0.95
    assert _border_over_inside(trial.run, data) < 1.1
    for kind in ("features", "joint"):
        build_bundle(open_run(trial.run.path, kind))


def _border_over_inside(run: Run, data: Path) -> float:
    """Mean of good tiles' maps along the tiles' edges over that of their middle.

    Where single maxima lie says little after so few steps; with a full recipe the profile is flat (docs/methods.md).
    """
    pool = TilePool(sorted((data / "test/good").iterdir()), run.grid, run.colour, 0, 64)
    with torch.inference_mode():
        maps = run.scorer(torch.from_numpy(pool.batch(0, 64)))[1]
    inside = torch.zeros(maps.shape[1:], dtype=torch.bool)
    inside[2:-2, 2:-2] = True
    return float(maps[:, ~inside].mean() / maps[:, inside].mean())


def test_features_and_joint_find_what_was_never_shown(
    make_product: Callable[..., Path], stand_trial: Callable[..., Any], tmp_path: Path
) -> None:
    """On a part in colour, against the surroundings of each pixel, both maps together separate defects."""
    data = make_product(tmp_path / "part", "part", channels=3)
    trial = stand_trial("synthetic_defects", data, *QUICK, "contrast=local", "score=joint")
    assert trial.image_auroc > 0.9
    assert trial.pixel_auroc > 0.9


def test_a_network_that_adds_and_does_not_refine_learns_too(
    make_product: Callable[..., Path], stand_trial: Callable[..., Any], tmp_path: Path
) -> None:
    """The cheaper form of the U-Net has fewer weights, separates defects, and exports to what torch computes."""
    data = make_product(tmp_path / "weave", "weave")
    trial = stand_trial("synthetic_defects", data, *QUICK, "network.join=add", "network.refine=false")
    assert trial.image_auroc > 0.9
    assert trial.pixel_auroc > 0.9
    plain = UNet(UNetSettings((8, 16, 24)), 1)
    cheap = UNet(UNetSettings((8, 16, 24), join="add", refine=False), 1)
    counts = [sum(weight.numel() for weight in net.parameters()) for net in (plain, cheap)]
    assert counts[1] < 0.85 * counts[0]


def _with_spot(path: Path, shade: int) -> tuple[Picture, Picture]:
    """The picture at `path` with a spot of another shade, and the spot's mask."""
    picture = read_picture(path, "grey")
    mask = np.zeros((*picture.shape[:2], 1), np.uint8)
    cv2.circle(mask, (30, 36), 6, 255, -1)
    return np.clip(picture.astype(int) + shade * (mask > 0), 0, 255).astype(np.uint8), mask


def test_learns_from_known_defects(make_product: Callable[..., Path], tmp_path: Path) -> None:
    """Shown five pictures of dark spots and no synthetic defect, it finds dark spots in others."""
    data = make_product(tmp_path / "weave", "weave")
    tests = sorted((data / "test/good").iterdir())
    for path in tests[:5]:
        for place, picture in zip(("dark", "ground_truth/dark"), _with_spot(path, -80), strict=True):
            target = tmp_path / "known" / place / (f"{path.stem}_mask.png" if "truth" in place else path.name)
            target.parent.mkdir(parents=True, exist_ok=True)
            assert cv2.imwrite(str(target), picture)
    recipe = resolve_recipe("synthetic_defects", (*QUICK, "spoiling.known_share=1.0", "spoiling.most=1"))
    extras = Extras(defects=tmp_path / "known")
    fit(FitRequest(recipe, data, tmp_path / "run", device="cpu", extras=extras))
    run = open_run(tmp_path / "run")
    assert set(run.provenance.recipe["extras"]) == {"defects"}
    score = frame_scorer(run.scorer, run.grid, run.reduction)
    good, dark = np.array([[score(_with_spot(path, shade)[0]).score for shade in (0, -80)] for path in tests[5:]]).T
    assert dark.min() > 1.5 * good.max()
    few = replace(recipe, settings=replace(recipe.settings, train=Descent(steps=2, batch=8)))
    for name, given in (("with", extras), ("without", Extras())):
        fit(FitRequest(few, data, tmp_path / name, device="cpu", extras=given))
    assert (tmp_path / "with/weights.safetensors").read_bytes() != (
        tmp_path / "without/weights.safetensors"
    ).read_bytes()


def test_same_seed_same_weights_and_an_opened_run_scores_the_same(
    make_product: Callable[..., Path], tmp_path: Path
) -> None:
    """Two fits with one seed give the same bits, and so does the run opened from its folder; another seed does not."""
    data = make_product(tmp_path / "weave", "weave", train=12, tests=1)
    recipe = resolve_recipe("synthetic_defects", (*QUICK, "train.steps=4"))
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        fit(FitRequest(recipe, data, tmp_path / name, device="cpu", seed=seed))
    first, again, other = (open_run(tmp_path / name, "joint") for name in "abc")
    tiles = torch.from_numpy(np.stack([first.golden_tiles[0], first.golden_tiles[-1]]))
    with torch.no_grad():
        maps = [run.scorer(tiles)[1].numpy() for run in (first, again, other)]
    np.testing.assert_array_equal(maps[0], maps[1])
    assert (maps[0] != maps[2]).any()
    assert np.isfinite(maps[0]).all()
    assert (maps[0] >= 0).all()


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (("grid.tile_px=68",), "multiple of 8"),
        (("map_cell_px=1",), "out_stride"),
        (("network.widths=[8]",), "widths"),
        (("network.out_stride=3",), "power of two"),
        (("spoiling.clean_share=2.0",), "clean_share"),
        (("loss.focal=-1.0",), "focal"),
        (("contrast=none",), "contrast"),
    ],
)
def test_refuses_settings_that_do_not_fit(overrides: tuple[str, ...], message: str) -> None:
    """Each refusal names the setting."""
    with pytest.raises(UsageError, match=message):
        build_detector(resolve_recipe("synthetic_defects", (*QUICK, *overrides)), "grey", 0)


def test_refuses_known_defects_without_masks(make_product: Callable[..., Path], tmp_path: Path) -> None:
    """A folder of unmarked pictures is refused before any training."""
    data = make_product(tmp_path / "weave", "weave", train=12, tests=1)
    recipe = resolve_recipe("synthetic_defects", QUICK)
    extras = Extras(defects=data / "test/spoilt")
    with pytest.raises(DataError, match="has no mask"):
        fit(FitRequest(recipe, data, tmp_path / "run", device="cpu", extras=extras))
