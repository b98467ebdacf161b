"""Random tiles and sweeps from pictures in memory."""

from pathlib import Path

import cv2
import numpy as np
import pytest

from kizu_contract.tiles import TileGrid
from kizu_train.tile_pool import TilePool


def _numbered(path: Path, height: int, width: int, blue: int) -> Path:
    """A picture whose red and green say where a pixel lies, and whose blue says which picture it is."""
    y, x = np.mgrid[:height, :width]
    cv2.imwrite(str(path), np.stack([np.full_like(x, blue), x, y], axis=2).astype(np.uint8))
    return path


@pytest.mark.parametrize("margin", [0, 5])
def test_random_tiles_are_cuts_of_the_pictures(tmp_path: Path, margin: int) -> None:
    """A random tile holds one picture's own pixels in their order, and every pixel of every picture comes up."""
    sizes = [(20, 31), (8, 8), (9, 40)]
    paths = [_numbered(tmp_path / f"{i}.png", *size, blue=i) for i, size in enumerate(sizes)]
    tiles = TilePool(paths, TileGrid(8, 5, margin), "rgb", seed=3, cache_mb=1).batch(0, 4000)
    assert tiles.shape == (4000, 8, 8, 3)
    assert (tiles[..., 2] == tiles[:, :1, :1, 2]).all()
    steps = np.abs(np.diff(tiles[..., 1].astype(int), axis=2))
    assert steps.max() == 1
    seen = {tuple(pixel) for pixel in tiles.reshape(-1, 3).tolist()}
    assert seen == {(y, x, i) for i, (height, width) in enumerate(sizes) for y in range(height) for x in range(width)}


def test_batches_depend_on_seed_and_step_alone(tmp_path: Path) -> None:
    """Step 7 gives the same tiles whatever was asked before; another step or seed gives others."""
    paths = [_numbered(tmp_path / f"{i}.png", 30, 30, blue=i) for i in range(3)]

    def pool(seed: int) -> TilePool:
        return TilePool(paths, TileGrid(8, 4), "rgb", seed, cache_mb=1)

    used = pool(1)
    used.batch(3, 16)
    first = used.batch(7, 16)
    assert np.array_equal(first, pool(1).batch(7, 16))
    assert not np.array_equal(first, used.batch(8, 16))
    assert not np.array_equal(first, pool(2).batch(7, 16))


def test_pictures_share_tiles_by_size(tmp_path: Path) -> None:
    """A picture with nine times the tiles is drawn nine times as often."""
    paths = [_numbered(tmp_path / "0.png", 8, 8, blue=0), _numbered(tmp_path / "1.png", 24, 24, blue=1)]
    pool = TilePool(paths, TileGrid(8, 8), "rgb", 0, cache_mb=1)
    assert pool.count == 10
    assert pool.batch(0, 5000)[:, 0, 0, 2].mean() == pytest.approx(0.9, abs=0.03)


def test_large_sets_take_turns(tmp_path: Path) -> None:
    """Pictures beyond the memory bound are dealt into shards; each comes up in its turn, and again."""
    paths = [_numbered(tmp_path / f"{i}.png", 250, 250, blue=i * 20) for i in range(10)]
    pool = TilePool(paths, TileGrid(16, 8), "rgb", 0, cache_mb=1)
    turns = [set(pool.batch(step, 500)[:, 0, 0, 2].tolist()) for step in range(0, 1000, 200)]
    assert max(map(len, turns)) <= 5
    assert set().union(*turns) == set(range(0, 200, 20))
    assert np.array_equal(pool.batch(1, 9), TilePool(paths, TileGrid(16, 8), "rgb", 0, cache_mb=1).batch(1, 9))


def test_sweep_gives_the_grid(tmp_path: Path) -> None:
    """A sweep gives exactly the tiles that scoring cuts."""
    path = _numbered(tmp_path / "0.png", 21, 30, blue=1)
    grid = TileGrid(8, 4, 2)
    pool = TilePool([path], grid, "rgb", 0, cache_mb=1)
    (tiles,) = pool.sweep()
    picture = cv2.cvtColor(cv2.imread(str(path)), cv2.COLOR_BGR2RGB)
    assert np.array_equal(tiles, grid.layout(21, 30).cut(picture))
    assert pool.count == len(tiles)
