"""TileGrid over pictures of all sizes."""

from itertools import pairwise
from math import gcd

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from kizu_contract.tiles import TileGrid, TileLayout


@st.composite
def grids(draw: st.DrawFn) -> TileGrid:
    tile = draw(st.integers(1, 24))
    return TileGrid(tile, draw(st.integers(1, tile)), draw(st.integers(0, tile - 1)))


@st.composite
def layouts(draw: st.DrawFn) -> TileLayout:
    return draw(grids()).layout(draw(st.integers(1, 60)), draw(st.integers(1, 60)))


def picture_of(layout: TileLayout, channels: int, seed: int = 0) -> NDArray[np.uint8]:
    return np.random.default_rng(seed).integers(0, 256, (layout.height, layout.width, channels), np.uint8)


def tile_origins(layout: TileLayout) -> list[tuple[int, int]]:
    return [(y, x) for y in layout.ys for x in layout.xs]


def stitched_naively(layout: TileLayout, maps: NDArray[np.float32]) -> NDArray[np.float64]:
    """Pixel by pixel sums over tiles: slow, and plainly right."""
    side, margin = layout.grid.tile_px, layout.grid.margin_px
    times = side // maps.shape[-1]
    total = np.zeros((layout.padded_height, layout.padded_width))
    covers = np.zeros_like(total)
    for (y, x), cells in zip(tile_origins(layout), maps, strict=True):
        total[y : y + side, x : x + side] += np.kron(cells, np.ones((times, times)))
        covers[y : y + side, x : x + side] += 1
    assert covers.min() >= 1
    return (total / covers)[margin : margin + layout.height, margin : margin + layout.width]


@given(layouts())
def test_every_pixel_lies_in_a_tile_and_every_tile_in_the_padded_picture(layout: TileLayout) -> None:
    """No pixel is left out and no tile hangs over, whatever the sizes."""
    side, stride = layout.grid.tile_px, layout.grid.stride_px
    for origins, length in ((layout.ys, layout.padded_height), (layout.xs, layout.padded_width)):
        assert origins[0] == 0
        assert origins[-1] == length - side
        assert all(0 < later - earlier <= stride for earlier, later in pairwise(origins))
    assert layout.count == len(tile_origins(layout))


@given(layouts())
def test_all_but_the_last_row_and_column_stand_on_the_stride(layout: TileLayout) -> None:
    """Only the last row and column are shifted inwards."""
    for origins in (layout.ys, layout.xs):
        assert list(origins[:-1]) == [i * layout.grid.stride_px for i in range(len(origins) - 1)]


@given(layouts(), st.sampled_from([1, 3]))
def test_padding_mirrors_without_repeating_the_edge(layout: TileLayout, channels: int) -> None:
    """The padded picture is numpy's `reflect` padding, and holds the picture itself at the margin."""
    picture = picture_of(layout, channels)
    margin = layout.grid.margin_px
    after = (layout.padded_height - layout.height - margin, layout.padded_width - layout.width - margin)
    wanted = np.pad(picture, ((margin, after[0]), (margin, after[1]), (0, 0)), mode="reflect")
    np.testing.assert_array_equal(layout.pad(picture), wanted)


@given(layouts(), st.sampled_from([1, 3]))
def test_tile_i_shows_the_pixels_at_position_i(layout: TileLayout, channels: int) -> None:
    """Tiles come row by row, each the padded picture at its own origin."""
    picture = picture_of(layout, channels)
    padded, side = layout.pad(picture), layout.grid.tile_px
    tiles = layout.cut(picture)
    assert tiles.shape == (layout.count, side, side, channels)
    for (y, x), tile in zip(tile_origins(layout), tiles, strict=True):
        np.testing.assert_array_equal(tile, padded[y : y + side, x : x + side])


@given(layouts(), st.sampled_from([1, 3]))
def test_stitching_a_cut_picture_gives_it_back(layout: TileLayout, channels: int) -> None:
    """With the pixels themselves as maps the picture returns: overlaps are averaged, not summed."""
    picture = picture_of(layout, channels)
    whole = layout.stitch(layout.cut(picture)[..., 0].astype(np.float32))
    assert whole.shape == (layout.height, layout.width)
    assert whole.dtype == np.float32
    assert whole.flags["C_CONTIGUOUS"]
    np.testing.assert_allclose(whole, picture[..., 0], atol=1e-3)


@given(layouts(), st.data())
def test_stitching_cells_equals_stitching_their_pixels(layout: TileLayout, data: st.DataObject) -> None:
    """Maps of m × m pixel cells give what a sum over single pixels gives, on and off the cell lattice."""
    side = layout.grid.tile_px
    cells = data.draw(st.sampled_from([n for n in range(1, side + 1) if side % n == 0]))
    maps = np.random.default_rng(1).random((layout.count, cells, cells), np.float32)
    np.testing.assert_allclose(layout.stitch(maps), stitched_naively(layout, maps), rtol=1e-5)


def test_the_fast_path_on_the_cell_lattice_is_taken_and_right() -> None:
    """Origins that are multiples of the cell side, as the default recipes have them, stitch right as well."""
    layout = TileGrid(32, 16, 8).layout(64, 96)
    assert gcd(8, layout.padded_height, layout.padded_width, *layout.ys, *layout.xs) == 8
    maps = np.random.default_rng(1).random((layout.count, 4, 4), np.float32)
    np.testing.assert_allclose(layout.stitch(maps), stitched_naively(layout, maps), rtol=1e-5)


@given(layouts())
def test_a_constant_map_stays_constant(layout: TileLayout) -> None:
    """Borders are neither darker nor brighter than the inside."""
    maps = np.full((layout.count, 1, 1), 3.25, np.float32)
    np.testing.assert_array_equal(layout.stitch(maps), np.float32(3.25))


def test_a_margin_of_tile_minus_stride_covers_borders_like_the_inside() -> None:
    """With that margin every pixel of a picture on the lattice lies in the same number of tiles."""
    layout = TileGrid(8, 4, 4).layout(32, 24)
    covers = np.zeros((layout.padded_height, layout.padded_width), int)
    for y, x in tile_origins(layout):
        covers[y : y + 8, x : x + 8] += 1
    assert set(covers[4:-4, 4:-4].ravel().tolist()) == {4}


@given(layouts())
def test_cutting_into_a_given_array_fills_it(layout: TileLayout) -> None:
    """`out` receives the very tiles, also where it is a part of a larger batch."""
    picture = picture_of(layout, 3)
    side = layout.grid.tile_px
    batch = np.zeros((layout.count + 2, side, side, 3), np.uint8)
    out = layout.cut(picture, batch[1:-1])
    assert np.shares_memory(out, batch)
    np.testing.assert_array_equal(batch[1:-1], layout.cut(picture))
    assert not batch[0].any()
    assert not batch[-1].any()


@pytest.mark.parametrize("shape", [(2, 4, 4, 1), (1, 4, 4, 3), (3, 1, 4, 4, 1)])
def test_an_array_of_another_form_is_not_cut_into(shape: tuple[int, ...]) -> None:
    """Nothing is spread over an `out` that only looks compatible."""
    with pytest.raises(ValueError, match="do not go into"):
        TileGrid(4, 4).layout(4, 4).cut(np.zeros((4, 4, 1), np.uint8), np.zeros(shape, np.uint8))


@pytest.mark.parametrize("shape", [(1, 0, 0), (1, 3, 3), (2, 4, 4), (1, 4, 2), (4, 4), ()])
def test_maps_of_another_form_are_refused(shape: tuple[int, ...]) -> None:
    """Maps that do not fit the layout raise ValueError."""
    with pytest.raises(ValueError, match="do not fit"):
        TileGrid(4, 4).layout(4, 4).stitch(np.zeros(shape, np.float32))


def test_a_picture_of_another_size_is_refused() -> None:
    """A layout is for one size; any other picture raises ValueError."""
    with pytest.raises(ValueError, match="4 × 5"):
        TileGrid(4, 4).layout(4, 5).cut(np.zeros((5, 4, 1), np.uint8))


@pytest.mark.parametrize(("height", "width"), [(0, 4), (4, 0), (-1, 4)])
def test_an_empty_picture_has_no_layout(height: int, width: int) -> None:
    """Nothing to inspect is an error, not an empty map."""
    with pytest.raises(ValueError, match="nothing to inspect"):
        TileGrid(4, 4).layout(height, width)


@pytest.mark.parametrize(("tile", "stride", "margin"), [(0, 1, 0), (4, 0, 0), (4, 5, 0), (4, 4, -1), (4, 4, 4)])
def test_an_impossible_grid_is_refused(tile: int, stride: int, margin: int) -> None:
    """Tile, stride and margin out of range raise ValueError that names the value."""
    with pytest.raises(ValueError, match="_px is"):
        TileGrid(tile, stride, margin)
