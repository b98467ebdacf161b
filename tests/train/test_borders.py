"""What good maps show at their borders is measured and taken off."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from kizu_contract.judging import Reduction, reduce_frame
from kizu_contract.pictures import read_picture
from kizu_contract.tiles import TileGrid
from kizu_train.borders import border_gain
from kizu_train.fit import FitRequest, fit
from kizu_train.recipes import resolve_recipe
from kizu_train.runs import open_run
from kizu_train.scoring import frame_scorer


def _maps(count: int, side: int, rise: float) -> list[np.ndarray]:
    """Noise whose tail is `rise` times higher within eight pixels of the border."""
    random = np.random.default_rng(5)
    distance = np.minimum(np.arange(side), np.arange(side)[::-1])
    scale = np.where(np.minimum(distance[:, None], distance[None, :]) < 8, rise, 1.0)
    return [(random.exponential(1, (side, side)) * scale).astype(np.float32) for _ in range(count)]


def test_a_rise_at_borders_is_found_and_taken_off() -> None:
    """The gain is the ratio of the tails, ends where the rise ends, and brings maxima back to chance."""
    found = border_gain(_maps(40, 64, 2.0))
    assert found is not None
    assert found.gains[0] == pytest.approx(2, rel=0.1)
    assert 2 <= len(found.gains) <= 3
    layout = TileGrid(64, 64).layout(64, 64)
    at_border = 0
    for cells in _maps(100, 64, 2.0):
        level = reduce_frame(layout, np.zeros(1), cells[None], Reduction("max", 0.0, found)).map
        y, x = np.unravel_index(int(level.argmax()), level.shape)
        at_border += min(y, x, 63 - y, 63 - x) < 8
    assert 20 < at_border < 65


def test_level_or_lower_borders_are_left_alone() -> None:
    """No gain where borders are as high as the middle, or lower: nothing is ever amplified."""
    for rise in (1.0, 0.5):
        found = border_gain(_maps(60, 64, rise))
        assert found is None or max(found.gains) < 1.06


def test_maps_too_small_or_empty_have_no_gain() -> None:
    """A map of a few pixels, or of zeros, has no borders to speak of."""
    assert border_gain([np.ones((8, 8), np.float32)]) is None
    assert border_gain([np.zeros((64, 64), np.float32)]) is None


def test_a_run_is_calibrated_on_levelled_scores(tmp_path: Path, draw_pictures: Callable[..., list[Path]]) -> None:
    """Lowest and highest calibrated score are those that the run's own levelled reduction gives held-out pictures."""
    draw_pictures(tmp_path / "parts", 12, size=(96, 96))
    recipe = resolve_recipe("raw_gaussian", ["grid={tile_px=64, stride_px=32, margin_px=0}"])
    record = fit(FitRequest(recipe, tmp_path / "parts", tmp_path / "run", "cpu"))
    run = open_run(tmp_path / "run")
    score = frame_scorer(run.scorer, run.grid, run.reduction)
    with torch.inference_mode():
        scores = [score(read_picture(tmp_path / "parts" / name, run.colour)).score for name in record.held_out]
    ends = [run.calibration.quantiles[0][1], run.calibration.quantiles[-1][1]]
    assert ends == pytest.approx([min(scores), max(scores)], rel=1e-5)
    assert run.reduction.border is not None
