"""The picture people read."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kizu_contract.heatmap import overlay, shrink_by_maximum
from kizu_contract.judging import Thresholds

LIMITS = Thresholds(warn=1.0, reject=2.0)


@given(
    st.integers(1, 50), st.integers(1, 50), st.sampled_from([1, 3]), st.none() | st.integers(1, 70), st.floats(-1, 9)
)
def test_a_heatmap_keeps_the_proportions(
    height: int, width: int, channels: int, wanted: int | None, level: float
) -> None:
    """An overlay is RGB, at most as wide as asked and never larger than the picture, down to one pixel."""
    picture = np.full((height, width, channels), 128, np.uint8)
    image = overlay(picture, np.full((height, width), level, np.float32), LIMITS, wanted)
    assert image.dtype == np.uint8
    assert image.shape[1] == min(width, wanted or width)
    assert image.shape[0] == max(1, round(height * image.shape[1] / width))
    assert image.shape[2] == 3


@given(st.integers(1, 60), st.integers(1, 60), st.data())
def test_a_one_pixel_defect_survives_every_shrinking(height: int, width: int, data: st.DataObject) -> None:
    """Wherever a single hot pixel lies, the shrunk map shows it at its place and nowhere far from it."""
    size = (data.draw(st.integers(1, width)), data.draw(st.integers(1, height)))
    y, x = data.draw(st.integers(0, height - 1)), data.draw(st.integers(0, width - 1))
    hot = np.zeros((height, width), np.float32)
    hot[y, x] = 5
    small = shrink_by_maximum(hot, size)
    assert small.shape == (size[1], size[0])
    assert small.max() == 5
    for row, column in np.argwhere(small):
        assert abs((row + 0.5) * height / size[1] - y - 0.5) <= height / size[1] + 1
        assert abs((column + 0.5) * width / size[0] - x - 0.5) <= width / size[0] + 1


@given(st.integers(1, 40), st.integers(1, 40), st.data())
def test_no_cell_is_below_its_maximum(height: int, width: int, data: st.DataObject) -> None:
    """Each pixel of the shrunk map is at least the largest value of the cell it stands for."""
    size = (data.draw(st.integers(1, width)), data.draw(st.integers(1, height)))
    frame_map = np.random.default_rng(0).random((height, width), np.float32)
    small = shrink_by_maximum(frame_map, size)
    for row in range(size[1]):
        for column in range(size[0]):
            rows = slice(row * height // size[1], (row + 1) * height // size[1])
            columns = slice(column * width // size[0], (column + 1) * width // size[0])
            assert small[row, column] >= frame_map[rows, columns].max()


def test_colours_mean_the_same_in_every_picture() -> None:
    """Nothing below half the warn limit, yellow at the reject limit, deep red from twice that on."""
    grey = np.full((1, 1, 1), 100, np.uint8)

    def colour(level: float) -> tuple[int, int, int]:
        red, green, blue = overlay(grey, np.full((1, 1), level, np.float32), LIMITS)[0, 0].tolist()
        return red, green, blue

    assert colour(0.0) == colour(0.5) == (100, 100, 100)
    red, green, blue = colour(2.0)
    assert min(red, green) > 150
    assert blue < 90
    red, green, blue = colour(4.0)
    assert red > 1.5 * max(green, blue)
    assert colour(4.0) == colour(1e30) == colour(np.inf)


def test_a_map_that_is_not_a_number_shows_in_the_strongest_colour() -> None:
    """NaN never looks harmless, also after shrinking."""
    picture = np.full((40, 40, 1), 100, np.uint8)
    broken = np.zeros((40, 40), np.float32)
    broken[20, 20] = np.nan
    hottest = overlay(picture[:1, :1], np.full((1, 1), 1e9, np.float32), LIMITS)[0, 0]
    np.testing.assert_array_equal(overlay(picture, broken, LIMITS)[20, 20], hottest)
    assert (overlay(picture, broken, LIMITS, width=10) == hottest).all(axis=2).any()


def test_a_good_part_shows_no_red_spot() -> None:
    """The scale is fixed by the thresholds: the maximum of a good map is not painted."""
    picture = np.random.default_rng(0).integers(0, 256, (16, 16, 3), np.uint8)
    quiet = np.random.default_rng(1).random((16, 16), np.float32) * np.float32(0.4)
    np.testing.assert_array_equal(overlay(picture, quiet, LIMITS), picture)


@pytest.mark.parametrize("limits", [Thresholds(1e-300, 1e-300), Thresholds(1e-9, 1e300), Thresholds(3.0, 3.0)])
def test_extreme_thresholds_still_give_a_picture(limits: Thresholds) -> None:
    """No limit that Thresholds accepts makes drawing fail."""
    frame_map = np.array([[0, 1e-38, 1, 3e38]], np.float32)
    assert overlay(np.zeros((1, 4, 1), np.uint8), frame_map, limits).shape == (1, 4, 3)
