"""Tiles that shrink to the pictures."""

from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
import pytest

from kizu_train.data import PictureSet, open_data
from kizu_train.fit import FitRequest, fit
from kizu_train.recipes import resolve_recipe
from kizu_train.runs import open_run
from kizu_train.tile_size import fit_tiles


def _pictures(folder: Path, *sizes: tuple[int, int]) -> PictureSet:
    folder.mkdir()
    for index, (height, width) in enumerate(sizes):
        picture = np.random.default_rng(index).integers(0, 255, (height, width), dtype=np.uint8)
        assert cv2.imwrite(str(folder / f"{index:03}.png"), picture)
    return open_data(folder)


@pytest.mark.parametrize(
    ("sizes", "tile", "stride"),
    [
        (((300, 400),) * 3, 256, 192),
        (((160, 400),) * 3, 160, 120),
        (((250, 215),) * 3, 192, 144),
        (((90, 90),) * 3, 128, 96),
        (((90, 90), *((300, 300),) * 19), 256, 192),
    ],
)
def test_tiles_are_no_larger_than_most_pictures(
    tmp_path: Path, sizes: tuple[tuple[int, int], ...], tile: int, stride: int
) -> None:
    """On multiples of 32, never below the recipe's least, strides in proportion; a second time nothing changes."""
    pictures = _pictures(tmp_path / "parts", *sizes)
    found = fit_tiles(resolve_recipe("pyramid_memory"), pictures)
    assert (found.grid.tile_px, found.grid.stride_px) == (tile, stride)
    assert fit_tiles(found, pictures) == found


def test_members_shrink_along_and_others_keep_their_size(tmp_path: Path) -> None:
    """In a joint recipe a member's larger tiles shrink, its smaller windows stay; without a least nothing shrinks."""
    pictures = _pictures(tmp_path / "parts", (160, 160), (160, 170))
    joint = fit_tiles(resolve_recipe("joint"), pictures)
    grids = {name: joint.settings.recipe(name).grid for name in joint.settings.joint.members}
    assert joint.grid.tile_px == grids["pyramid_memory"].tile_px == 160
    assert (grids["synthetic_defects"].tile_px, grids["synthetic_defects"].stride_px) == (128, 128)
    fixed = resolve_recipe("joint", ["data.smallest_tile_px=0"])
    assert fit_tiles(fixed, pictures) is fixed


def test_a_fit_shrinks_and_its_run_says_so(tmp_path: Path, draw_pictures: Callable[..., list[Path]]) -> None:
    """The run's grid is the shrunk one, and it can be gone on with."""
    draw_pictures(tmp_path / "parts", 8)
    side = cv2.imread(str(next((tmp_path / "parts").glob("*.png")))).shape[0]
    settings = ("pyramid.levels=[0]", "pyramid.lattice_px=[4]", "memory={size=100, candidates=400, tiles=20}")
    recipe = resolve_recipe("pyramid_memory", ["data.smallest_tile_px=32", *settings])
    fit(FitRequest(recipe, tmp_path / "parts", tmp_path / "run", "cpu"))
    again = fit(FitRequest(recipe, tmp_path / "parts", tmp_path / "run", "cpu", resume=True))
    assert open_run(tmp_path / "run").grid.tile_px == side // 32 * 32 == again.recipe["grid"]["tile_px"]
