"""Whole frames inside the graph: what comes out is what the tile grid says, whatever is shared on the way."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from kizu_contract.manifest import BatchProfile, Graph
from kizu_contract.tiles import TileGrid, TileLayout
from kizu_export import whole_frame
from kizu_export.whole_frame import WholeFrame, forms_of, runs_of
from kizu_train.detectors.base import Scores, TileShape, find_detector
from kizu_train.detectors.patch_vae import PatchVaeSettings
from kizu_train.detectors.raw_gaussian import Patches, RawGaussianSettings
from kizu_train.nets.patch_vae import Network


class Cells(nn.Module):
    """The mean of each cell, weighed by where in the tile it lies; told positions, it adds them."""

    def __init__(self, cells: int, *, is_placed: bool = False) -> None:
        super().__init__()
        self.cells = cells
        self.inputs = ("tiles", "position") if is_placed else ("tiles",)

    def forward(self, tiles: Tensor, position: Tensor | None = None) -> Scores:
        side = tiles.shape[1] // self.cells
        means = tiles.float().reshape(-1, self.cells, side, self.cells, side, tiles.shape[3]).mean((2, 4, 5))
        maps = means * (1 + torch.arange(self.cells**2).reshape(self.cells, self.cells))
        if position is not None:
            maps = maps + position.reshape(-1, 1, 1) * 100
        return maps.amax((1, 2)), maps


@st.composite
def layouts(draw: st.DrawFn) -> tuple[TileLayout, int]:
    """A grid over a frame of any size, and the cells along a tile's side."""
    cells, cell_px = draw(st.integers(1, 4)), draw(st.integers(1, 4))
    side = cells * cell_px
    grid = TileGrid(side, draw(st.integers(1, side)), draw(st.integers(0, side - 1)))
    return grid.layout(draw(st.integers(1, 40)), draw(st.integers(1, 40))), cells


def random_frame(layout: TileLayout, channels: int = 1) -> np.ndarray:
    return np.random.default_rng(layout.count).integers(0, 256, (layout.height, layout.width, channels), np.uint8)


def graph_of(layout: TileLayout, cells: int, channels: int = 1, usual: int = 8) -> Graph:
    side = layout.grid.tile_px
    return Graph(17, "fp32", ("tiles",), side, channels, side // cells, BatchProfile(1, usual, 4096))


def assert_as_in_tiles(scorer: nn.Module, layout: TileLayout, graph: Graph, rtol: float = 1e-5) -> WholeFrame:
    """Compare a whole frame with its tiles, cut and joined by the contract's own code."""
    frame = random_frame(layout, graph.channels)
    module = WholeFrame(scorer, layout, graph, forms_of(scorer, layout.grid)[-1]).eval()
    position = (torch.arange(layout.count),) if "position" in getattr(scorer, "inputs", ()) else ()
    with torch.no_grad():
        score, cells = module(torch.from_numpy(frame))
        wanted_score, maps = scorer(torch.from_numpy(layout.cut(frame)), *position)
    np.testing.assert_allclose(score.numpy(), wanted_score.numpy(), rtol=rtol)
    joined = layout.join(maps.numpy())
    assert cells.shape == joined.shape
    np.testing.assert_allclose(cells.numpy(), joined, rtol=rtol, atol=rtol * joined.mean())
    return module


@given(layouts(), st.integers(1, 3), st.booleans())
def test_any_grid_over_any_frame_is_as_in_tiles(drawn: tuple[TileLayout, int], channels: int, is_placed: bool) -> None:
    """Margins, strides, last rows shifted inwards, frames smaller than a tile: cut and joined as the contract does."""
    layout, cells = drawn
    assert_as_in_tiles(Cells(cells, is_placed=is_placed), layout, graph_of(layout, cells, channels))


@pytest.mark.parametrize(("rows", "most"), [(1, 48), (3, 48), (99, 48), (1, 2)])
def test_parts_change_nothing(rows: int, most: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """However many rows of tiles are scored at a time, the frame is the same, and there are not too many parts."""
    monkeypatch.setattr(whole_frame, "_MOST_PARTS", most)
    layout = TileGrid(8, 4, 4).layout(50, 30)
    calls: list[int] = []

    class Counted(Cells):
        def forward(self, tiles: Tensor, position: Tensor | None = None) -> Scores:
            calls.append(len(tiles))
            return super().forward(tiles, position)

    assert_as_in_tiles(Counted(4), layout, graph_of(layout, 4, usual=rows * len(layout.xs)))
    # The last row and column are shifted here: they are regions of their own. One call more is the comparison's.
    assert sum(calls) == 2 * layout.count
    assert len(calls) - 1 <= 4 * most


@given(layouts())
def test_runs_keep_to_the_stride(drawn: tuple[TileLayout, int]) -> None:
    """All origins are in a run, in order; two runs at most."""
    layout, stride = drawn[0], drawn[0].grid.stride_px
    runs = runs_of(layout.ys, stride)
    assert tuple(run.start + i * stride for run in runs for i in range(run.length)) == layout.ys
    assert [run.first for run in runs] == [0, *(run.length for run in runs[:-1])]
    assert len(runs) <= 2


def vae(network: Network, tile_px: int, cell_px: int, channels: int = 1, kind: str = "m") -> nn.Module:
    settings = PatchVaeSettings(network=network)
    detector = find_detector("patch_vae").build(settings, TileShape(tile_px, channels, cell_px), 3)
    return detector.scorer(kind)


SMALL = Network(widths=(4, 6, 8), latent=3, decoder_start=8, decoder_widths=(6, 4))
PUBLISHED = Network(
    widths=(6, 8), padding="zero", latent=2, decoder_start=1, decoder_widths=(8, 6), mean="sigmoid", variance="sigmoid"
)


@pytest.mark.parametrize(
    ("network", "grid", "cell_px", "size"),
    [
        (SMALL, TileGrid(32, 16, 16), 4, (96, 128)),  # the recipe's grid on its lattice
        (SMALL, TileGrid(32, 16, 16), 4, (101, 75)),  # last row and column off the lattice
        (SMALL, TileGrid(32, 12, 5), 4, (64, 75)),  # tiles of two kinds of origins: two passes a side
        (SMALL, TileGrid(32, 10, 0), 8, (20, 90)),  # narrower than a tile; nothing to share within 40 px
        (PUBLISHED, TileGrid(8, 2, 0), 1, (28, 28)),  # the published experiment
        (Network(**{**vars(SMALL), "dense": (5, 7)}), TileGrid(32, 8, 0), 4, (70, 64)),
    ],
)
@pytest.mark.parametrize("kind", ["m", "l", "d"])
def test_patch_vae_shares_its_encoder_exactly(
    network: Network, grid: TileGrid, cell_px: int, size: tuple[int, int], kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Features of overlapping tiles are computed once, and scores and maps are those of single tiles."""
    monkeypatch.setattr(whole_frame, "_STRIP_PIXELS", 3000)
    layout = grid.layout(*size)
    graph = graph_of(layout, grid.tile_px // cell_px)
    module = assert_as_in_tiles(vae(network, grid.tile_px, cell_px, kind=kind), layout, graph, rtol=1e-4)
    assert module.is_shared == (grid.stride_px != 10)


def test_a_network_that_sees_its_borders_shares_nothing() -> None:
    """A kernel wider than its stride mirrors every tile's own border: such an encoder runs tile by tile."""
    network = Network(**{**vars(SMALL), "kernel": 4})
    layout = TileGrid(32, 16, 16).layout(60, 60)
    scorer = vae(network, 32, 4)
    assert forms_of(scorer, layout.grid) == ("tiles",)
    assert_as_in_tiles(scorer, layout, graph_of(layout, 8), rtol=1e-4)


@pytest.mark.parametrize(
    ("grid", "size", "is_shared"),
    [
        (TileGrid(32, 16, 0), (64, 96), True),
        (TileGrid(32, 20, 6), (61, 77), True),
        (TileGrid(32, 18, 0), (64, 64), False),
        (TileGrid(32, 32, 0), (64, 64), False),
    ],
)
def test_raw_gaussian_shares_its_patches_exactly(grid: TileGrid, size: tuple[int, int], *, is_shared: bool) -> None:
    """Patches lie on the lattice of cells: tiles that do too have those of their overlap in common."""
    settings = RawGaussianSettings(patches=Patches(4, (1, 2, 4)))
    scorer = find_detector("raw_gaussian").build(settings, TileShape(32, 3, 4), 0).scorer("mahalanobis")
    draw = np.random.default_rng(1)
    with torch.no_grad():
        for name, part in scorer.named_buffers():
            if not name.endswith("centre"):
                part.copy_(torch.from_numpy(draw.normal(0, 1, part.shape).astype(np.float32)))
    layout = grid.layout(*size)
    module = assert_as_in_tiles(scorer, layout, graph_of(layout, 8, channels=3), rtol=1e-4)
    assert module.is_shared is is_shared


def test_what_tiles_share_is_computed_once() -> None:
    """At a stride of half a tile the encoder sees each pixel of the frame once, not four times."""
    scorer, layout = vae(SMALL, 32, 4), TileGrid(32, 16, 16).layout(128, 128)
    seen: list[int] = []
    first = scorer.get_submodule("vae.encoder")[1]  # type: ignore[index]  # a Sequential
    first.register_forward_hook(lambda _module, given, _found: seen.append(given[0].numel()))
    with torch.no_grad():
        WholeFrame(scorer, layout, graph_of(layout, 8), "shared")(torch.from_numpy(random_frame(layout)))
    assert sum(seen) == layout.padded_height * layout.padded_width
