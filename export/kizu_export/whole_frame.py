"""A scorer of tiles as a module of whole frames: cuts, scores and joins inside, exactly as the tile grid says.

Letters: H, W frame sides; T tile side; S stride; C channels; N tiles = R rows × K columns; k map cells along a tile's
side; u pixels a side of one value of the joined map. The loops below run while the graph is traced: what they write is
a graph without loops, in parts of a usual batch each, so that features stay in a CPU's caches.
"""

from collections.abc import Sequence
from itertools import pairwise
from math import gcd
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from kizu_contract.manifest import Graph
from kizu_contract.tiles import TileGrid, TileLayout
from kizu_train.detectors.base import Scores, SharesOverlap, inputs_of

Form = Literal["tiles", "shared"]
_MOST_PARTS = 48
"""Parts of a graph: each repeats the scorer's nodes, and every node takes time to load."""
_STRIP_PIXELS = 2**17
"""Pixels over which features are shared at a time: rows of tiles at its edge are computed twice."""


class Series(NamedTuple):
    """Tiles that begin every S pixels from `start` on; `first` is the row or column of the first of them."""

    start: int
    first: int
    length: int


class WholeFrame(nn.Module):
    """`frame` uint8 [H, W, C] → score [N] and the joined map [H'/u, W'/u] (see `TileLayout.join`), float32."""

    def __init__(self, scorer: nn.Module, layout: TileLayout, graph: Graph, form: Form) -> None:
        super().__init__()
        self.scorer, self.layout, self.graph = scorer, layout, graph
        grid = layout.grid
        self.side, self.stride = grid.tile_px, grid.stride_px
        self.is_shared = form == "shared"
        rows = max(-(-graph.batch.opt // len(layout.xs)), -(-len(layout.ys) // _MOST_PARTS))
        self.part_rows = rows
        strip = _STRIP_PIXELS // (self.stride * layout.padded_width) // rows * rows
        self.strip_rows = max(rows, strip) if self.is_shared else rows

    def forward(self, frame: Tensor) -> tuple[Tensor, Tensor]:
        """Score one frame."""
        # The cast comes first: TensorRT takes uint8 for an input and nothing else.
        padded = self._padded(frame.to(torch.float32))
        down, across = runs_of(self.layout.ys, self.stride), runs_of(self.layout.xs, self.stride)
        rows = [_cat([self._region(padded, y, x) for x in across], 1) for y in down]
        score, cells = _cat(rows, 0)
        return score.reshape(-1), self._joined(cells)

    def _region(self, padded: Tensor, down: Series, across: Series) -> Scores:
        """Score [n, n'] and maps [n, n', k, k] of tiles that lie regularly."""
        found = []
        for first in range(0, down.length, self.strip_rows):
            rows = min(self.strip_rows, down.length - first)
            top = down.start + first * self.stride
            block = padded[top : top + self._span(rows), across.start : across.start + self._span(across.length)]
            found += self._strip(block, Series(top, down.first + first, rows), across)
        return _cat(found, 0)

    def _strip(self, block: Tensor, down: Series, across: Series) -> list[Scores]:
        """Score the tiles of `block` [h, w, C], a few rows at a time."""
        shared = self.scorer.share(block, self.stride) if self.is_shared else ()  # type: ignore[operator]
        found = []
        for first in range(0, down.length, self.part_rows):
            rows = min(self.part_rows, down.length - first)
            top = first * self.stride
            tiles = self._cut(block[top : top + self._span(rows)], rows, across.length)
            part = slice(first * across.length, (first + rows) * across.length)
            if self.is_shared:
                score, cells = self.scorer.score_shared(tiles, *(one[part] for one in shared))  # type: ignore[operator]
            else:
                score, cells = self.scorer(tiles, *self._places(Series(0, down.first + first, rows), across))
            shape = (rows, across.length)
            found.append((score.float().reshape(shape), cells.float().reshape(*shape, *map(int, cells.shape[1:]))))
        return found

    def _span(self, count: int) -> int:
        return (count - 1) * self.stride + self.side

    def _cut(self, block: Tensor, rows: int, columns: int) -> Tensor:
        """Cut `block` [h, w, C] into its tiles [rows · columns, T, T, C]."""
        side, channels = self.side, int(block.shape[2])
        # Columns are gathered in pieces as wide as tiles and stride allow: few large copies.
        piece = gcd(self.stride, side)
        if rows > 1 and self.stride < side:
            block = block.index_select(0, _places(rows, self.stride, side))
        block = block.reshape(rows * side, -1, piece * channels)
        if columns > 1 and self.stride < side:
            block = block.index_select(1, _places(columns, self.stride // piece, side // piece))
        apart = block.reshape(rows, side, columns, side * channels).permute(0, 2, 1, 3)
        return apart.reshape(rows * columns, side, side, channels)

    def _places(self, down: Series, across: Series) -> tuple[Tensor, ...]:
        """The position of each tile, for scorers that take it."""
        if "position" not in inputs_of(self.scorer):
            return ()
        rows, columns = (torch.arange(run.first, run.first + run.length) for run in (down, across))
        return ((rows[:, None] * len(self.layout.xs) + columns).reshape(-1),)

    def _padded(self, frame: Tensor) -> Tensor:
        """Mirror [H, W, C] outwards to the padded size, repeatedly where it is narrow."""
        layout, margin = self.layout, self.layout.grid.margin_px
        after = (layout.padded_height - layout.height - margin, layout.padded_width - layout.width - margin)
        if margin == 0 and after == (0, 0):
            return frame
        if max(margin, after[0]) < layout.height and max(margin, after[1]) < layout.width:
            planes = functional.pad(frame.permute(2, 0, 1)[None], (margin, after[1], margin, after[0]), "reflect")
            return planes[0].permute(1, 2, 0)
        for axis, (length, more) in enumerate(zip((layout.height, layout.width), after, strict=True)):
            frame = frame.index_select(axis, torch.from_numpy(np.pad(np.arange(length), (margin, more), "reflect")))
        return frame

    def _joined(self, cells: Tensor) -> Tensor:
        """Maps [R, K, k, k] → their averages where tiles overlap [H'/u, W'/u]."""
        layout, count = self.layout, int(cells.shape[-1])
        unit = layout.unit_px(self.side // count)
        times = self.side // count // unit
        high, wide = layout.padded_height // unit, layout.padded_width // unit
        ys, xs = ([start // unit for start in starts] for starts in (layout.ys, layout.xs))
        stride = max(1, self.stride // unit)  # less than a unit only where there is one tile
        columns = _enlarged(cells.permute(1, 3, 0, 2).reshape(len(xs), count, -1), times)  # [K, T/u, R · k]
        strips = _overlapped(columns, xs, stride, wide).reshape(wide, len(ys), count).permute(1, 2, 0)
        whole = _overlapped(_enlarged(strips, times), ys, stride, high)
        return whole / _cover(ys, self.side // unit, high)[:, None] / _cover(xs, self.side // unit, wide)


def forms_of(scorer: nn.Module, grid: TileGrid) -> tuple[Form, ...]:
    """The forms that `scorer` can take on tiles of `grid`: `shared` where those have something in common."""
    can_share = isinstance(scorer, SharesOverlap) and scorer.can_share(grid.stride_px)
    return ("tiles", "shared") if can_share else ("tiles",)


def runs_of(starts: Sequence[int], stride: int) -> list[Series]:
    """Origins as runs of one stride: all of them, or all but the last, which was shifted inwards."""
    breaks = [0, *(i for i in range(1, len(starts)) if starts[i] - starts[i - 1] != stride), len(starts)]
    return [Series(starts[first], first, end - first) for first, end in pairwise(breaks)]


def _cat(parts: Sequence[Scores], axis: int) -> Scores:
    if len(parts) == 1:
        return parts[0]
    return torch.cat([score for score, _ in parts], axis), torch.cat([cells for _, cells in parts], axis)


def _places(count: int, stride: int, side: int) -> Tensor:
    return (torch.arange(count)[:, None] * stride + torch.arange(side)).reshape(-1)


def _enlarged(values: Tensor, times: int) -> Tensor:
    """Repeat each value of the middle axis, [n, k, m] → [n, k · times, m]."""
    if times == 1:
        return values
    count, cells, rest = (int(size) for size in values.shape)
    return values[:, :, None].expand(count, cells, times, rest).reshape(count, cells * times, rest)


def _overlapped(values: Tensor, starts: Sequence[int], stride: int, length: int) -> Tensor:
    """Add up `values` [n, k, m], each laid at its start along an axis of `length`: [length, m].

    Every q-th one is laid side by side at once, q so large that those do not overlap.
    """
    total: Tensor | None = None
    # While a module is traced, sizes are tensors: as integers they are constants of the graph.
    span, rest = (int(size) for size in values.shape[1:])
    for run in runs_of(starts, stride):
        every = min(-(-span // stride), run.length)
        for offset in range(every):
            chosen = values[run.first + offset : run.first + run.length : every]
            if every > 1 and len(chosen) > 1:
                chosen = functional.pad(chosen, (0, 0, 0, every * stride - span))
            line = chosen.reshape(-1, rest)
            before = run.start + offset * stride
            line = line[: length - before]
            laid = functional.pad(line, (0, 0, before, length - before - len(line)))
            total = laid if total is None else total + laid
    assert total is not None  # noqa: S101  # a layout has a tile
    return total


def _cover(starts: Sequence[int], span: int, length: int) -> Tensor:
    cover = np.zeros(length, np.float32)
    for start in starts:
        cover[start : start + span] += 1
    return torch.from_numpy(cover)
