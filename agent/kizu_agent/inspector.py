"""Frames to scores: colour, tiles, one batched pass through the engine, maps. Pure: no threads, no clocks."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate

import numpy as np
from numpy.typing import NDArray

from kizu_agent.batch_sizes import candidates
from kizu_agent.errors import EngineError, ModelError
from kizu_agent.frame_engine import AnyEngine, FrameEngine, open_engine
from kizu_agent.settings import EngineConfig
from kizu_contract.bundle import Bundle
from kizu_contract.errors import PictureError
from kizu_contract.golden import golden_frame
from kizu_contract.judging import FrameScore, reduce_frame, reduce_joined
from kizu_contract.pictures import to_colour
from kizu_contract.tiles import TileGrid, TileLayout

_GREY_SPREAD = 16
"""Channels of a grey picture may differ by so many levels after a lossy format."""
_BUFFER_BYTES = 8 * 2**20
"""Tiles held at a time: large enough to fill batches, small enough to stay near the caches."""
_MOST_BUFFERS = 4
"""So many times that may be held where many streams take large batches."""
_OWN_TOLERANCE = {"fp32": 0.0, "fp16": 2e-2, "int8": 1e-1}
"""Deviations from golden numbers that a precision makes by itself: another processor rounds a value the other way."""


class Inspector:
    """Scores pictures with one bundle's graph; used by one thread at a time."""

    def __init__(self, bundle: Bundle, engine: AnyEngine) -> None:
        self.manifest = bundle.manifest
        self.engine = engine
        self._is_of_colour = is_of_colour(bundle.golden.tiles)
        graph = bundle.manifest.graph
        tile_shape = (graph.tile_px, graph.tile_px, graph.channels)
        # Room for whatever batch is measured while it serves, and as far as memory goes for one in each stream.
        largest, usual = max(*candidates(graph), engine.batch.size), _BUFFER_BYTES // int(np.prod(tile_shape))
        self._room = max(largest, usual, min(largest * engine.streams, _MOST_BUFFERS * usual))
        self._tiles = np.empty((self._room, *tile_shape), np.uint8)
        self._places = np.empty(self._room, np.int64)

    def inspect(self, pictures: Sequence[NDArray[np.uint8]]) -> list[FrameScore]:
        """Score `pictures` uint8 [H, W, 1 or 3 (RGB)] of any sizes; their tiles share batches.

        Those of the size that the bundle's frame graph takes go through it whole, one by one. Holds one buffer of tiles
        and the maps of the pictures whose tiles are in it. Raises PictureError for a picture of another form or of a
        size that the model cannot judge (none is scored then), and EngineError when the graph fails.
        """
        scores: list[FrameScore] = []
        queue: list[_Piece] = []
        held = 0
        for picture in pictures:
            own = to_colour(picture, self.manifest.colour)
            whole = self._whole(own)
            if whole is not None:
                scores += [*self._score(queue), whole]
                queue, held = [], 0
                continue
            for piece in self._pieces(own):
                if held + piece.part.count > self._room:
                    scores += self._score(queue)
                    queue, held = [], 0
                queue.append(piece)
                held += piece.part.count
        return scores + self._score(queue)

    @property
    def busy_bytes(self) -> int:
        """Bytes of pixels of the tiles that give every stream of the engine a batch."""
        return self._tiles[: self.engine.batch.size * self.engine.streams].nbytes

    def misfit(self, picture: NDArray[np.uint8]) -> str | None:
        """Why the model cannot judge a camera's `picture` uint8 [H, W, C]; None where it can.

        A grey camera before a model of colour pictures is one: repeated grey values are a colour it never saw. A model
        of three channels that was trained on grey pictures takes a grey camera as well as a colour one, and so does a
        model of one channel: they were trained on the very conversion (`to_colour`) that happens here.
        """
        if self._is_of_colour and picture.ndim == 3 and picture.shape[2] == 1:
            return (
                f"the camera gives grey pictures; model {self.manifest.name} was trained on colour pictures and sees "
                "colours here that it never saw: train on pictures of this camera"
            )
        return self.manifest.misfit(*picture.shape[:2])

    def close(self) -> None:
        """Close the engine; idempotent."""
        self.engine.close()

    def _whole(self, picture: NDArray[np.uint8]) -> FrameScore | None:
        """Score `picture` by the frame graph; None where there is none for it."""
        found = self.engine.run_frame(picture) if isinstance(self.engine, FrameEngine) else None
        if found is None:
            return None
        layout = self.manifest.grid.layout(*picture.shape[:2])
        return reduce_joined(layout, *found, self.manifest.reduction)

    def _pieces(self, picture: NDArray[np.uint8]) -> Iterator["_Piece"]:
        """Divide a picture's grid into rows of tiles, as many as the buffer takes; a wider row into parts."""
        height, width = picture.shape[:2]
        why = self.manifest.misfit(height, width)
        if why is not None:
            raise PictureError(why)
        layout = self.manifest.grid.layout(height, width)
        padded, frame, columns = layout.pad(picture), _Frame(layout), len(layout.xs)
        rows = max(1, self._room // columns)
        for top in range(0, len(layout.ys), rows):
            for left in range(0, columns, self._room):
                ys, xs = layout.ys[top : top + rows], layout.xs[left : left + self._room]
                yield _Piece(frame, padded, _part(layout, ys, xs), first=top * columns + left)

    def _score(self, queue: Sequence["_Piece"]) -> list[FrameScore]:
        """Score the tiles of `queue` in one go; returns every frame that is complete with them."""
        if not queue:
            return []
        ends = list(accumulate(piece.part.count for piece in queue))
        slices = [slice(end - piece.part.count, end) for piece, end in zip(queue, ends, strict=True)]
        for piece, at in zip(queue, slices, strict=True):
            piece.part.cut(piece.padded, self._tiles[at])
            self._places[at] = np.arange(piece.first, piece.first + piece.part.count)
        score, cells = self.engine.run(self._tiles[: ends[-1]], self._places[: ends[-1]])
        done: list[FrameScore] = []
        for piece, at in zip(queue, slices, strict=True):
            whole = piece.frame.add(score[at], cells[at])
            if whole is not None:
                done.append(reduce_frame(piece.frame.layout, *whole, self.manifest.reduction))
        return done


def is_of_colour(tiles: NDArray[np.uint8]) -> bool:
    """Tell whether golden tiles uint8 [K, T, T, C] are of colour pictures: the manifest does not say.

    Grey pictures in three channels have the same value in each, but for what a lossy format adds.
    """
    return tiles.shape[3] == 3 and int((tiles.max(axis=3) - tiles.min(axis=3)).max()) > _GREY_SPREAD


def load_inspector(bundle: Bundle, config: EngineConfig, on_build: Callable[[], None] = lambda: None) -> Inspector:
    """Open `bundle`'s graph on the configured engine; `on_build` as in Engine. Raises EngineError."""
    return Inspector(bundle, open_engine(bundle, config, on_build))


def self_test(bundle: Bundle, engine: AnyEngine, tolerance: float) -> float:
    """Run the golden tiles; returns the largest relative deviation of scores and maps (see `relative_deviation`).

    A frame graph must give for a frame of golden tiles what the tiled graph gives, which those tiles have just proven.

    Raises ModelError when it is above `tolerance`, or what the graph's lower precision makes of it where that is more,
    or a number is not finite; EngineError when the graph fails.
    """
    golden = bundle.golden
    between_graphs = tolerance  # both run here and now: no other processor's rounding stands between them
    tolerance = max(tolerance, _OWN_TOLERANCE[bundle.manifest.graph.precision])
    score, cells = engine.run(golden.tiles, golden.positions())
    worst = max(relative_deviation(score, golden.score), relative_deviation(cells, golden.map))
    if not worst <= tolerance:
        raise ModelError(
            f"the golden tiles' scores deviate by {worst:.2g} on {engine.provider}; at most {tolerance:.2g} is "
            "allowed: the graph computes something else here than where it was exported"
        )
    if not isinstance(engine, FrameEngine):
        return worst
    apart = frame_deviation(bundle, engine, golden_frame(golden.tiles, engine.size.height, engine.size.width))
    if not apart <= between_graphs:
        raise ModelError(
            f"the frame graph deviates by {apart:.2g} from the tiled one on {engine.provider}; at most "
            f"{between_graphs:.2g} is allowed: export the model anew, or without a frame graph (--frame none)"
        )
    return max(worst, apart)


def frame_deviation(bundle: Bundle, engine: FrameEngine, frame: NDArray[np.uint8]) -> float:
    """How far the frame graph is off the tiled graph for `frame` uint8 [H, W, C] of its size (relative).

    Scores and joined maps are compared. Raises EngineError, also where the device lacks the memory to compare.
    """
    layout = bundle.manifest.grid.layout(*frame.shape[:2])
    found = engine.run_frame(frame)
    if found is None:
        raise EngineError(f"the frame graph cannot run: {engine.memory_problem}")
    score, cells = engine.run(layout.cut(frame), np.arange(layout.count))
    return max(relative_deviation(found[0], score), relative_deviation(found[1], layout.join(cells)))


def relative_deviation(got: NDArray[np.float32], wanted: NDArray[np.float32]) -> float:
    """Return the largest |got − wanted| / max(|wanted|, mean |wanted|); infinity when a number of `got` is not finite.

    The mean in the denominator keeps values near zero, of which a map is full, from counting rounding as deviation.
    """
    if not np.isfinite(got).all():
        return float("inf")
    size = np.abs(wanted.astype(np.float64))
    scale = np.maximum(size, max(size.mean(), np.finfo(np.float32).tiny))
    return float((np.abs(got.astype(np.float64) - wanted) / scale).max())


class _Frame:
    """A picture on its way: gathers the outputs of its pieces, which come in order."""

    def __init__(self, layout: TileLayout) -> None:
        self.layout = layout
        self._outputs: list[tuple[NDArray[np.float32], NDArray[np.float32]]] = []

    def add(
        self, score: NDArray[np.float32], cells: NDArray[np.float32]
    ) -> tuple[NDArray[np.float32], NDArray[np.float32]] | None:
        """Add the outputs of the next piece; returns the picture's [N] and [N, T/m, T/m] with the last one."""
        self._outputs.append((score, cells))
        if sum(len(part) for part, _ in self._outputs) < self.layout.count:
            return None
        if len(self._outputs) == 1:
            return score, cells
        scores, maps = zip(*self._outputs, strict=True)
        return np.concatenate(scores), np.concatenate(maps)


@dataclass(frozen=True, eq=False)
class _Piece:
    """A part of a frame's grid, over its `padded` pixels; `first` is the grid index of the part's first tile."""

    frame: _Frame
    padded: NDArray[np.uint8]
    part: TileLayout
    first: int


def _part(layout: TileLayout, ys: tuple[int, ...], xs: tuple[int, ...]) -> TileLayout:
    """Some rows and columns of `layout`, laid over its padded picture."""
    grid = TileGrid(layout.grid.tile_px, layout.grid.stride_px)
    high, wide = layout.padded_height, layout.padded_width
    return TileLayout(grid, high, wide, high, wide, ys, xs)
