"""The generator of synthetic defects: what it changes it labels, what cannot be seen it does not."""

from itertools import product

import cv2
import numpy as np
import pytest
from numpy.typing import NDArray

from kizu_train.nets.synthetic import Label, Spoiling, spoil
from kizu_train.nets.synthetic_fills import FILLS
from kizu_train.nets.synthetic_nuisance import Nuisance
from kizu_train.nets.synthetic_shapes import LINES, SPOTS

SIDE = 64
SHAPES = LINES | SPOTS
STILL = Nuisance(light=0, focus=0, noise=0, movement=0)


def _tiles(count: int, channels: int = 1) -> NDArray[np.uint8]:
    """Stripes of different phase with a little grain."""
    random = np.random.default_rng(3)
    x = np.mgrid[:SIDE, :SIDE][1][None, :, :, None] / 5 + random.uniform(0, 6, (count, 1, 1, channels))
    return np.clip(120 + 50 * np.sin(x) + random.normal(0, 2, (count, SIDE, SIDE, channels)), 0, 255).astype(np.uint8)


@pytest.mark.parametrize("channels", [1, 3])
def test_same_randomness_same_defects(channels: int) -> None:
    """The same generator state gives the same bits; another gives others."""
    tiles = _tiles(6, channels)
    first, again, other = (spoil(tiles, Spoiling(), np.random.default_rng(seed)) for seed in (1, 1, 2))
    assert first[0].shape == tiles.shape
    assert first[0].dtype == np.uint8
    assert first[1].shape == (6, SIDE, SIDE)
    assert first[1].dtype == np.float32
    np.testing.assert_array_equal(first[0], again[0])
    np.testing.assert_array_equal(first[1], again[1])
    assert (first[0] != other[0]).any()


def test_light_and_noise_are_no_defects() -> None:
    """Good tiles under strong changes of light, focus and noise change, and stay unlabelled."""
    tiles = _tiles(16)
    strong = Spoiling(clean_share=1.0, nuisance=Nuisance(3.0, 3.0, 3.0, 3.0, flips=True))
    seen, labels = spoil(tiles, strong, np.random.default_rng(0))
    assert (labels == 0).all()
    assert (np.abs(seen.astype(int) - tiles).mean((1, 2, 3)) > 2).mean() > 0.5


def test_labels_lie_where_tiles_changed() -> None:
    """Without nuisances, labelled pixels changed clearly and most unlabelled ones not at all."""
    tiles = _tiles(40)
    seen, labels = spoil(tiles, Spoiling(clean_share=0.0, nuisance=STILL), np.random.default_rng(0))
    change = np.abs(seen.astype(int) - tiles)[..., 0]
    assert labels.max() > 0.99
    assert 0.01 < (labels > 0.5).mean() < 0.5
    assert change[labels > 0.5].mean() > 10 * change[labels < 0.05].mean()
    assert (change[labels == 0] == 0).mean() > 0.8


class _Known:
    """Paints the upper left corner black."""

    def paste(
        self, tile: NDArray[np.float32], _random: np.random.Generator
    ) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        mask = np.zeros((SIDE, SIDE), np.float32)
        mask[:9, :9] = 1
        return np.where(mask[:, :, None] > 0, 0, tile), mask


def test_known_defects_take_the_place_of_synthetic_ones() -> None:
    """With a share of 1 nothing else is drawn, and the label is the mask."""
    tiles = _tiles(8)
    settings = Spoiling(clean_share=0.0, known_share=1.0, nuisance=STILL)
    seen, labels = spoil(tiles, settings, np.random.default_rng(0), _Known())
    assert (seen[:, :9, :9] == 0).all()
    np.testing.assert_array_equal(seen[:, 9:], tiles[:, 9:])
    assert (labels[:, :9, :9] == 1).all()
    assert labels[:, 14:].max() < 0.05


def test_a_change_below_the_local_variation_is_not_labelled() -> None:
    """The same faint mark is labelled on an even tile and not on a rough one; grain for other grain is no change."""
    random = np.random.default_rng(0)
    even = np.full((SIDE, SIDE, 1), 120, np.float32)
    coarse = random.normal(0, 40, (16, 16)).astype(np.float32)
    rough = even + cv2.resize(coarse, (SIDE, SIDE))[:, :, None]
    mark = np.zeros((SIDE, SIDE, 1), np.float32)
    mark[28:36, 28:36] = 9
    assert Label().of(even, even + mark)[31, 31] > 0.9
    assert Label().of(rough, rough + mark)[31, 31] < 0.4
    grain = [even + random.normal(0, 6, even.shape).astype(np.float32) for _ in range(2)]
    assert Label().of(*grain).mean() < 0.2


def test_sizes_reach_from_specks_to_half_a_tile() -> None:
    """Shapes cover from a few pixels to a quarter of the tile, all within 0 and 1."""
    random = np.random.default_rng(0)
    drawn = [shape(128, random) for shape in SHAPES.values() for _ in range(60)]
    areas = np.array([mask.sum() for mask in drawn])
    assert all(mask.dtype == np.float32 and mask.min() >= 0 and mask.max() < 1.0001 for mask in drawn)
    assert ((areas > 1) & (areas < 12)).mean() > 0.05
    assert (areas > 128 * 128 / 8).any()


@pytest.mark.parametrize(("shape", "fill"), list(product(SHAPES, FILLS)))
def test_every_shape_takes_every_fill(shape: str, fill: str) -> None:
    """Any pair gives finite tiles, changes something, and nothing far from its shape."""
    tile, donor = _tiles(2, 3).astype(np.float32)
    changed = 0
    for seed in range(4):
        random = np.random.default_rng(seed)
        mask = SHAPES[shape](SIDE, random)
        spoilt = FILLS[fill](tile, mask, donor, random)
        assert spoilt.shape == tile.shape
        assert spoilt.dtype == np.float32
        assert np.isfinite(spoilt).all()
        change = np.abs(spoilt - tile).max(2)
        near = cv2.dilate((mask > 0.002).astype(np.uint8), np.ones((51, 51), np.uint8))
        assert change[near == 0].max(initial=0) < 1
        changed += change.max() > 4
    assert changed >= 2


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: Spoiling(clean_share=1.5), "clean_share"),
        (lambda: Spoiling(most=0), "most"),
        (lambda: Label(visible=0), "visible"),
        (lambda: Nuisance(light=-1), "light"),
    ],
)
def test_settings_check_themselves(build: object, message: str) -> None:
    """Values out of range are refused by name."""
    assert callable(build)
    with pytest.raises(ValueError, match=message):
        build()
