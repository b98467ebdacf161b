"""Restoration from high frequencies on generated products."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch

from kizu_train.detectors.restore import Defects, Planting, RestoreDetector
from kizu_train.errors import UsageError
from kizu_train.nets.restoration import Comparison, HighFrequencies, HighPass, RestorationMap
from kizu_train.recipes import resolve_recipe
from kizu_train.runs import build_detector, open_run

QUICK = (
    "grid.tile_px=32",
    "grid.stride_px=16",
    "grid.margin_px=16",
    "network.widths=[12,16,24]",
    "compare.scales=3",
    "compare.mean_px=9",
)


def _detector(*overrides: str, seed: int = 0) -> RestoreDetector:
    detector = build_detector(resolve_recipe("restore", (*QUICK, *overrides)), "rgb", seed)
    assert isinstance(detector, RestoreDetector)
    return detector


def _tiles(count: int = 6) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(0).integers(0, 256, (count, 32, 32, 3), dtype=np.uint8))


def test_separates_planted_defects(
    make_product: Callable[..., Path],
    stand_trial: Callable[..., Any],
    border_share: Callable[..., float],
    tmp_path: Path,
) -> None:
    """It ranks spoilt pictures above good ones and finds the spots, as a bundle; an opened run scores the same bits."""
    data = make_product(tmp_path / "weave", "weave")
    trial = stand_trial("restore", data, *QUICK, "train.steps=90")
    assert trial.image_auroc > 0.9
    assert trial.pixel_auroc > 0.9
    assert border_share(trial.run, data) <= 0.75
    tiles = torch.from_numpy(trial.run.golden_tiles)
    with torch.no_grad():
        assert torch.equal(trial.run.scorer(tiles)[1], open_run(trial.run.path).scorer(tiles)[1])


def test_borders_are_treated_like_the_middle() -> None:
    """A flat tile gives a flat map up to its edges: nothing is filled with zeros on the way."""
    flat = torch.full((1, 32, 32, 3), 90, dtype=torch.uint8)
    with torch.no_grad():
        for _, cells in _detector().score_all(flat).values():
            torch.testing.assert_close(cells, cells[:, :1, :1].expand_as(cells), rtol=1e-4, atol=1e-6)


def test_high_pass_filters() -> None:
    """Each is what OpenCV computes, and none lets a constant through: colours must be known, not seen."""
    tiles = torch.rand((2, 3, 32, 32), generator=torch.Generator().manual_seed(0))
    grey = tiles.mean(1).numpy()
    border = cv2.BORDER_REFLECT_101
    for n in range(2):
        seen = HighFrequencies(HighPass(), 32, 3)(tiles)[n, 0].numpy()
        blurred = cv2.GaussianBlur(grey[n], (11, 11), 1.6, borderType=border)
        np.testing.assert_allclose(seen, grey[n] - blurred, atol=1e-5)
        laplacian = cv2.Laplacian(grey[n], cv2.CV_32F, borderType=border)
        np.testing.assert_allclose(HighFrequencies(HighPass("laplacian"), 32, 3)(tiles)[n, 0], laplacian, atol=1e-5)
        down, across = (cv2.Sobel(grey[n], cv2.CV_32F, *way, borderType=border) / -4 for way in ((0, 1), (1, 0)))
        np.testing.assert_allclose(HighFrequencies(HighPass("sobel"), 32, 3)(tiles)[n], [down, across], atol=1e-5)
    for kind in ("blur", "laplacian", "sobel"):
        filtered = HighFrequencies(HighPass(kind, colour=True), 32, 3)
        assert filtered(tiles).shape[1] == filtered.channels
        torch.testing.assert_close(filtered(tiles + 0.2), filtered(tiles), atol=1e-5, rtol=0)


def _spoilt(detector: Any, tiles: torch.Tensor) -> torch.Tensor:
    """What the network is shown of `tiles` in training, by the same draw each time."""
    _, spoilt = Planting(detector.spoiling)(tiles.numpy(), torch.Generator().manual_seed(1))
    return torch.from_numpy(np.asarray(spoilt))


def test_spoils_the_input_only() -> None:
    """Of the asked share of tiles the network sees a spoilt copy; the target of its loss is the clean tile."""
    detector = _detector("defects.share=0.5")
    tiles = torch.full((64, 32, 32, 3), 128, dtype=torch.uint8) + _tiles(64) // 64
    spoilt = _spoilt(detector, tiles)
    assert 16 < (spoilt != tiles).flatten(1).any(1).sum() < 48
    assert torch.equal(spoilt, _spoilt(detector, tiles))
    loss, shown = detector._loss(tiles, spoilt, torch.Generator())
    pixels = [part.permute(0, 3, 1, 2) / 255 for part in (tiles, spoilt)]
    assert shown["l2"].item() == pytest.approx(
        ((detector.restorer(pixels[1]) - pixels[0]) ** 2).mean().item(), rel=1e-4
    )
    assert loss.item() == pytest.approx((shown["l2"] + shown["ssim"]).item(), rel=1e-5)
    clean = _detector("defects.share=0.0")
    assert torch.equal(_spoilt(clean, tiles), tiles)


def test_kinds_of_score() -> None:
    """`both` is gradients plus weighted colours; the score is the map's maximum; scorers agree with one pass."""
    detector = _detector("compare.colour=0.5")
    tiles = _tiles()
    with torch.no_grad():
        found = detector.score_all(tiles)
        for kind in detector.score_kinds:
            score, cells = detector.scorer(kind)(tiles)
            assert torch.equal(cells, found[kind][1])
            assert torch.equal(score, cells.amax((1, 2)))
            assert cells.min() >= 0
    torch.testing.assert_close(found["both"][1], found["gms"][1] + 0.5 * found["colour"][1])


def test_map_shows_where_and_what() -> None:
    """A line that was not restored shows in `gms` around it; a tint in `colour` and not in `gms`; else nothing."""
    tiles = torch.full((1, 3, 64, 64), 0.5)
    line, tint = tiles.clone(), tiles.clone()
    line[:, :, 20:22, 10:50] = 0.9
    tint[:, 0] += 0.1
    measure = RestorationMap(Comparison(), 64)
    assert all(found.abs().max() < 1e-7 for found in measure(tiles, tiles).values())
    seen = measure(line, tiles)["gms"][0]
    assert seen[21, 30] > 10 * seen[60, 30]
    tinted = measure(tint, tiles)
    assert tinted["gms"].max() < 1e-6
    torch.testing.assert_close(tinted["colour"], torch.full((1, 64, 64), 0.1 / 3))


def test_seed_decides_the_weights() -> None:
    """The same seed gives the same first weights, another seed others."""
    first, again, other = (_detector(seed=seed).tensors() for seed in (1, 1, 2))
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert any(not torch.equal(first[name], other[name]) for name in first)


def test_impossible_settings_are_refused() -> None:
    """Windows without a middle, no loss at all, odd shares, and tiles too small for the windows."""
    for build, why in (
        (lambda: Comparison(mean_px=20), "odd mean_px"),
        (lambda: Comparison(l2=0, ssim=0), "l2 or ssim"),
        (lambda: HighPass(sigma_px=0.0), "sigma_px"),
        (lambda: Defects(share=2), "share"),
    ):
        with pytest.raises(ValueError, match=why):
            build()
    with pytest.raises(UsageError, match="means over 99 px"):
        _detector("compare.mean_px=99")
    with pytest.raises(UsageError, match="multiple of 16"):
        _detector("grid.tile_px=24", "compare.scales=4")
