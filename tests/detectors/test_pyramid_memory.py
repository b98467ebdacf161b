"""The memory of raw patches at several scales."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch.nn import functional

from kizu_contract.pictures import read_picture
from kizu_contract.tiles import TileLayout
from kizu_train.detectors.base import TileShape
from kizu_train.detectors.pyramid_memory import PyramidMemoryDetector, PyramidMemorySettings
from kizu_train.errors import UsageError
from kizu_train.nets.pyramid import PatchMemory, Pyramid, spread_matrix
from kizu_train.recipes import resolve_recipe
from kizu_train.runs import open_run

QUICK = (
    "grid.tile_px=64",
    "grid.stride_px=48",
    "pyramid.levels=[0,1,2]",
    "pyramid.lattice_px=[4,4,8]",
    "memory.size=300",
    "memory.candidates=3000",
    "reduction.smooth_sigma_px=2.0",
)


@pytest.mark.parametrize(("kind", "channels"), [("weave", 1), ("part", 3)])
def test_separates_planted_defects(
    make_product: Callable[..., Path],
    stand_trial: Callable[..., Any],
    tmp_path: Path,
    kind: str,
    channels: int,
) -> None:
    """It ranks spoilt pictures above good ones and finds the spots, as a bundle, on surfaces and on parts."""
    data = make_product(tmp_path / kind, kind, channels=channels)
    trial = stand_trial("pyramid_memory", data, *QUICK)
    assert trial.image_auroc > 0.9
    assert trial.pixel_auroc > 0.9
    again = open_run(trial.run.path)
    tiles = torch.from_numpy(trial.run.golden_tiles)
    assert torch.equal(trial.run.scorer(tiles)[1], again.scorer(tiles)[1])


def test_maxima_of_good_pictures_do_not_gather_at_borders(
    make_product: Callable[..., Path],
    stand_trial: Callable[..., Any],
    border_share: Callable[..., float],
    tmp_path: Path,
) -> None:
    """On an even surface about as many maxima lie near a border as its area asks for."""
    data = make_product(tmp_path / "weave", "weave", side=96, tests=24)
    fine = ("pyramid.levels=[0,1]", "pyramid.lattice_px=[4,4]", "memory.size=300", "memory.candidates=3000")
    trial = stand_trial("pyramid_memory", data, "grid.tile_px=64", "grid.stride_px=32", *fine)
    assert border_share(trial.run, data) < 0.75


@pytest.mark.parametrize("size", [2300, 997, 1])  # in groups of 50, in one (a prime), and hardly any
def test_nearest_is_exact(size: int) -> None:
    """The distance is that to the nearest of all words, in every block and group, about zero for a remembered patch."""
    random = torch.Generator().manual_seed(3)
    memory = PatchMemory(20, 2, 1, 1, 4, size)
    patches = torch.rand((max(size, 2), 4), generator=random)
    memory.learn_basis(patches)
    words = memory.of_vectors(patches)[:size]
    memory.remember(words)
    level = torch.rand((2, 1, 20, 20), generator=random)
    wanted = torch.cdist(memory.of_vectors(memory.patches(level).permute(0, 2, 1).reshape(-1, 4)), words).amin(1)
    assert torch.allclose(memory(level).flatten(), wanted, atol=2e-3)
    level[0, 0, :2, :2] = patches[size * 3 // 4].reshape(2, 2)
    assert float(memory(level)[0, 0, 0]) < 1e-5


def test_levels_are_blurred_by_a_gaussian_of_both_sides() -> None:
    """Columns and rows one after the other give what their square kernel gives, borders mirrored."""
    pixels = torch.rand((2, 3, 24, 24), generator=torch.Generator().manual_seed(5))
    line = torch.from_numpy(cv2.getGaussianKernel(5, 1.1).astype(np.float32))
    kernel = (line @ line.T).expand(3, 1, 5, 5)
    mirrored = functional.pad(pixels, (2, 2, 2, 2), mode="reflect")
    wanted = functional.conv2d(mirrored, kernel, stride=2, groups=3)
    assert torch.allclose(Pyramid((1,), 3)(pixels)[0], wanted, atol=1e-6)


def test_scales_that_see_nothing_count_little(
    make_product: Callable[..., Path], stand_trial: Callable[..., Any], tmp_path: Path
) -> None:
    """A scale that is blind to flaws loses to one that sees them, the more the smaller the step."""
    data = make_product(tmp_path / "weave", "weave")
    tensors = _tensors(stand_trial("pyramid_memory", data, *QUICK).run.path)
    picture = read_picture(next(data.glob("train/good/*.png")), "grey")
    weights = {}
    for step in (0.125, 0.5):
        settings = resolve_recipe("pyramid_memory", [*QUICK, f"sight_step={step}"]).settings
        detector = PyramidMemoryDetector(settings, TileShape(64, 1, 4), 0)
        detector.load(tensors)
        blind = detector._memories()[2]
        blind.words[:] = blind.words[:1]
        blind.basis.zero_()
        detector.settle(_One(np.repeat(picture[None], 8, 0)))
        weights[step] = detector.weights
        assert float(detector.weights.sum()) == pytest.approx(1)
    assert weights[0.125].argmin() == weights[0.5].argmin() == 2
    assert float(weights[0.125][2]) < float(weights[0.5][2]) < 1 / 3


class _One:
    """The same few tiles, over and over."""

    def __init__(self, tiles: NDArray[np.uint8]) -> None:
        self.tiles, self.count = tiles, len(tiles)

    def batch(self, _step: int, size: int) -> NDArray[np.uint8]:
        return self.tiles[:size]

    def sweep(self) -> Iterator[NDArray[np.uint8]]:
        yield self.tiles

    def frame_layout(self) -> TileLayout:
        raise NotImplementedError


def _tensors(path: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return load_file(path / "weights.safetensors")


def test_pyramid_and_spread_keep_places() -> None:
    """A bright column stays where it is at every level, and the spread of a level of ones is one everywhere."""
    pixels = torch.zeros(1, 1, 64, 64)
    pixels[..., 40:44] = 1
    for level, shrunk in enumerate(Pyramid((0, 1, 2), 1)(pixels)):
        assert abs(int(shrunk[0, 0, 5].argmax()) * 2**level - 41) <= 2**level
    for level, step in ((0, 4), (1, 2), (2, 1)):
        matrix = spread_matrix(64, level, 8, step, 4)
        assert matrix.shape[0] == 16
        assert np.allclose(matrix.sum(1), 1)


@pytest.mark.parametrize(
    ("setting", "says"),
    [
        ("pyramid.levels=[3,1]", "rising"),
        ("pyramid.lattice_px=[4,8,8]", "one number for each"),
        ("pyramid.lattice_px=[4,8,12,16]", "multiple of 8"),
        ("memory.choice=best", "greedy or random"),
        ("memory.candidates=5", "candidates"),
        ("sight_step=0.0", "sight_step"),
    ],
)
def test_refuses_settings_that_do_not_fit(setting: str, says: str) -> None:
    """A setting out of range is refused with a sentence."""
    with pytest.raises(UsageError, match=says):
        resolve_recipe("pyramid_memory", [setting])


def test_refuses_tiles_smaller_than_its_coarsest_patch() -> None:
    """A level whose patch is larger than the tile cannot be used."""
    with pytest.raises(UsageError, match=r"fewer pyramid\.levels"):
        PyramidMemoryDetector(PyramidMemorySettings(), TileShape(64, 1, 4), 0)
