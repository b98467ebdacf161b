"""Detectors joined in one graph: windows, scales, learning in turn, stopping and going on."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from kizu_contract.judging import Reduction, reduce_frame
from kizu_contract.tiles import TileGrid
from kizu_train.data import open_data
from kizu_train.detectors.base import Extras
from kizu_train.detectors.joint import JointDetector
from kizu_train.errors import UsageError
from kizu_train.fit import FitRequest, fit
from kizu_train.nets.windows import CutWindows, JoinWindows
from kizu_train.recipes import Recipe, parse_recipe, resolve_recipe
from kizu_train.runs import build_detector, open_run
from kizu_train.tile_pool import TilePool

SMALL_VAE = {
    "network": {"widths": [8, 16], "decoder_start": 16, "decoder_widths": [8], "latent": 4},
    "reduction": {"smooth_sigma_px": 2.0},
}
QUICK = (
    "grid={tile_px=64, stride_px=48, margin_px=0}",
    "members.pyramid_memory.grid={tile_px=64, stride_px=48, margin_px=0}",
    "members.pyramid_memory.pyramid={levels=[0, 1], lattice_px=[4, 4]}",
    "members.pyramid_memory.memory={size=300, candidates=3000}",
    "members.pyramid_memory.reduction.smooth_sigma_px=2.0",
    "members.synthetic_defects.grid={tile_px=32, stride_px=32, margin_px=0}",
    "members.synthetic_defects.train={steps=40, batch=8}",
    "members.synthetic_defects.network.widths=[8, 16, 24]",
    "members.synthetic_defects.reduction.smooth_sigma_px=2.0",
)


def _twins(steps: int = 12, **joint: object) -> Recipe:
    """Two small VAEs, one on half the tile."""
    small = {"detector": "patch_vae", **SMALL_VAE, "train": {"steps": steps, "batch": 8}}
    whole = {"tile_px": 16, "stride_px": 16, "margin_px": 0}
    return parse_recipe(
        {
            "detector": "joint",
            "score": "joint",
            "grid": whole,
            "joint": {"members": ["half", "whole"], **joint},
            "members": {
                "half": small | {"grid": whole | {"tile_px": 8, "stride_px": 4}},
                "whole": small | {"grid": whole},
            },
        }
    )


class Memory:
    """A session that keeps every checkpoint and stops after so many looks."""

    extras, device, seed = Extras(), "cpu", 3

    def __init__(self, saved: tuple[int, dict[str, Tensor]] | None = None, looks: int = 10**9) -> None:
        self.saved, self.looks = saved, looks
        self.reported: list[tuple[int, int]] = []

    @property
    def should_stop(self) -> bool:
        self.looks -= 1
        return self.looks < 0

    def restore(self) -> tuple[int, dict[str, Tensor]] | None:
        return self.saved

    def save(self, step: int, tensors: Callable[[], dict[str, Tensor]]) -> None:
        self.saved = step, {name: part.detach().clone() for name, part in tensors().items()}

    def report(self, step: int, steps: int, losses: Mapping[str, float]) -> None:
        assert losses
        self.reported.append((step, steps))


@pytest.fixture
def weave(make_product: Callable[..., Path], tmp_path: Path) -> Path:
    return make_product(tmp_path / "weave", "weave", side=48, train=12, tests=2)


def _pool(data: Path, recipe: Recipe) -> TilePool:
    return TilePool(open_data(data).train, recipe.grid, "grey", 0, 64)


@pytest.mark.parametrize(
    ("tile_px", "side", "stride", "cell"), [(32, 16, 8, 4), (32, 16, 16, 4), (40, 16, 12, 2), (16, 16, 16, 4)]
)
def test_windows_are_the_grids_own(tile_px: int, side: int, stride: int, cell: int) -> None:
    """Cutting and joining by matrices gives what the contract's layout and smoothing give, also off the lattice."""
    random = np.random.default_rng(2)
    grid = TileGrid(side, stride)
    layout = grid.layout(tile_px, tile_px)
    tiles = random.integers(0, 256, (3, tile_px, tile_px, 1), np.uint8)
    cut = CutWindows(tile_px, grid)(torch.from_numpy(tiles)).numpy()
    assert np.array_equal(cut, np.concatenate([layout.cut(tile) for tile in tiles]))
    maps = random.random((3 * layout.count, side // cell, side // cell), np.float32)
    found = JoinWindows(tile_px, grid, cell, 4, 1.5)(torch.from_numpy(maps)).numpy()
    for index in range(3):
        own = maps[index * layout.count : (index + 1) * layout.count]
        whole = reduce_frame(layout, np.zeros(layout.count, np.float32), own, Reduction("max", 1.5)).map
        wanted = whole.reshape(tile_px // 4, 4, tile_px // 4, 4).mean((1, 3))
        assert np.allclose(found[index], wanted, atol=1e-5)


def test_the_recipe_separates_planted_defects(
    make_product: Callable[..., Path], stand_trial: Callable[..., Any], tmp_path: Path
) -> None:
    """U-Net and memory, joined, find spoilt pictures as a bundle, and both take part."""
    data = make_product(tmp_path / "weave", "weave", tests=8)
    trial = stand_trial("joint", data, *QUICK)
    assert trial.image_auroc > 0.9
    assert trial.pixel_auroc > 0.9
    assert trial.run.score_kinds == ("joint", "synthetic_defects", "pyramid_memory")
    tiles = torch.from_numpy(trial.run.golden_tiles[-6:])
    joint, *alone = (open_run(trial.run.path, kind).scorer(tiles)[1] for kind in trial.run.score_kinds)
    assert all(torch.corrcoef(torch.stack([joint.flatten(), part.flatten()]))[0, 1] > 0.2 for part in alone)
    single = torch.cat([trial.run.scorer(tile[None])[1] for tile in tiles])
    assert torch.allclose(single, joint, rtol=1e-4, atol=1e-5)


def test_scales_are_those_of_unlearned_good_tiles(weave: Path) -> None:
    """After settling, each member's map reaches 1 at the asked quantile of good tiles' maxima."""
    recipe = _twins(quantile=1.0)
    detector = build_detector(recipe, "grey", 0)
    assert isinstance(detector, JointDetector)
    pool = _pool(weave, recipe)
    detector.fit(pool, Memory())
    detector.settle(pool)
    tiles = torch.from_numpy(np.concatenate(list(pool.sweep())))
    with torch.no_grad():
        found = detector.score_all(tiles)
    for index, name in enumerate(("half", "whole")):
        top = (found[name][0].max() - detector.location[index]) / detector.scale[index]
        assert float(top) == pytest.approx(1.0, abs=1e-4)
        assert float(found[name][1].median()) == pytest.approx(float(detector.location[index]), rel=0.1)
    parts = [
        torch.relu(found[name][1] - detector.location[i]) / detector.scale[i]
        for i, name in enumerate(("half", "whole"))
    ]
    assert torch.allclose(found["joint"][1], parts[0] + parts[1], rtol=1e-4, atol=1e-5)


def test_members_settle_too(weave: Path, tmp_path: Path) -> None:
    """A member that weighs its scales by held-out tiles does so among others as it does alone."""
    pyramid = {
        "detector": "pyramid_memory",
        "score": "distance",
        "pyramid": {"levels": [0, 1], "lattice_px": [4, 4], "patch_px": 4},
        "memory": {"size": 50, "candidates": 400},
        "grid": {"tile_px": 16, "stride_px": 16, "margin_px": 0},
    }
    raw = _twins().to_dict()
    raw["joint"]["members"] = ["half", "scales"]
    raw["members"] = {"half": raw["members"]["half"], "scales": pyramid}
    fit(FitRequest(parse_recipe(raw), weave, tmp_path / "run", device="cpu"))
    scales = open_run(tmp_path / "run", "scales").scorer.scorer
    assert all(gain != pytest.approx(0.5**0.5) for gain in scales.gains), "gains of two scales that never settled"
    assert all(location > 0 for location in scales.locations)


@pytest.mark.parametrize("looks", [6, 14, 20])
def test_stopped_and_gone_on_gives_the_same_bits(weave: Path, looks: int) -> None:
    """Wherever a fit is stopped, in a member or between two, going on ends at the weights of an uninterrupted one."""
    recipe = _twins()
    pool = _pool(weave, recipe)
    whole = build_detector(recipe, "grey", 3)
    memory = Memory()
    whole.fit(pool, memory)
    assert [step for step, _ in memory.reported] == sorted(step for step, _ in memory.reported)
    stopped = build_detector(recipe, "grey", 3)
    first = Memory(looks=looks)
    stopped.fit(pool, first)
    for scores, maps in stopped.score_all(torch.zeros((2, 16, 16, 1), dtype=torch.uint8)).values():
        assert torch.isfinite(scores).all()
        assert maps.shape == (2, 4, 4)
    again = build_detector(recipe, "grey", 3)
    again.fit(pool, Memory(first.saved))
    wanted, found = whole.tensors(), again.tensors()
    assert wanted.keys() == found.keys()
    assert all(torch.equal(wanted[name], found[name]) for name in wanted)


def test_a_member_never_reached_stays_out(weave: Path, tmp_path: Path) -> None:
    """A fit that ends within the first member leaves a run whose joint score is that member's alone."""
    recipe = _twins(steps=100_000)
    fit(FitRequest(recipe, weave, tmp_path / "run", "cpu", stop_after_s=0.5))
    tiles = torch.from_numpy(open_run(tmp_path / "run").golden_tiles)
    joint, first, second = (open_run(tmp_path / "run", kind).scorer(tiles)[1] for kind in ("joint", "half", "whole"))
    assert not second.any()
    assert first.any()
    assert joint.max() > 0


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        (("joint.members=['synthetic_defects']",), "at least two"),
        (("joint.members=['patch_vae', 'patch_vae']",), "different recipes"),
        (("joint.members=['synthetic_defects', 'nope']",), "'nope' is no recipe"),
        (("joint.weights=[1.0]",), "one number above 0 for each"),
        (("members.other.score='m'",), "other is no member"),
        (("members.synthetic_defects.grid.tile_px=512",), "tiles of 512 px"),
        (("members.synthetic_defects.score=x",), "no score 'x'"),
        (("members.synthetic_defects.train.stepz=3",), "train.steps"),
    ],
)
def test_what_does_not_fit_is_refused(changes: tuple[str, ...], why: str) -> None:
    """Wrong members, weights and settings are refused with a sentence."""
    with pytest.raises(UsageError, match=why):
        build_detector(resolve_recipe("joint", changes), "grey", 0)


def test_an_extra_that_no_member_uses_is_refused(weave: Path, tmp_path: Path) -> None:
    """A backbone for members that take none is refused, not ignored."""
    file = tmp_path / "weights.pth"
    file.write_bytes(b"")
    request = FitRequest(_twins(), weave, tmp_path / "run", "cpu", extras=Extras(backbone=file))
    with pytest.raises(UsageError, match="none of half, whole has use for it"):
        fit(request)
