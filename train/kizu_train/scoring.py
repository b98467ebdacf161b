"""From a torch scorer to frame scores, through the contract's own cutting, stitching and reduction."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from kizu_contract.errors import PictureError
from kizu_contract.judging import BorderGain, FrameScore, Reduction, reduce_frame
from kizu_contract.tiles import FrameSize, TileGrid
from kizu_train.detectors.base import Detector, Scores, frame_of, inputs_of

ScorePicture = Callable[[NDArray[np.uint8]], FrameScore]
"""Picture uint8 [H, W, C] in the model's colour → its score and map float32 [H, W]."""

_BATCH_PIXELS = 2**19
"""Tiles × T² in a batch: small enough that features stay in a CPU's caches and any GPU's memory."""


def frame_scorer(scorer: nn.Module, grid: TileGrid, reduction: Reduction, device: str = "cpu") -> ScorePicture:
    """A function that scores pictures with `scorer`, computing on `device`.

    It raises PictureError for a picture of a size that the scorer cannot judge.
    """
    module = scorer.to(device)

    def score_all(*batch: Tensor) -> dict[str, Scores]:
        return {"": module(*batch)}

    return lambda picture: _score(score_all, module, picture, grid, reduction, device)[""]


def score_kinds(
    detector: Detector, picture: NDArray[np.uint8], grid: TileGrid, reduction: Reduction
) -> dict[str, FrameScore]:
    """Score `picture` by every kind at once, on the CPU.

    Raises PictureError as `frame_scorer`'s function does.
    """
    return _score(detector.score_all, detector, picture, grid, reduction, "cpu")


def with_border(reduction: Reduction, borders: Mapping[str, BorderGain], kind: str) -> Reduction:
    """The reduction of a kind of score: the recipe's, with what levels that kind's borders."""
    return replace(reduction, border=borders.get(kind))


def check_frame(part: object, height: int, width: int) -> None:
    """Raise PictureError where a detector or scorer knows frames of another size only."""
    frame = frame_of(part)
    if frame is not None and frame != FrameSize(height, width):
        raise PictureError(
            f"the picture has {height} × {width} pixels; this detector learns each place, from pictures of {frame}, "
            "and can judge no others: crop or scale it, or leave it out"
        )


def graph_inputs(
    part: object, tiles: NDArray[np.uint8], position: NDArray[np.int64] | None, device: str = "cpu"
) -> tuple[Tensor, ...]:
    """The tensors that a detector or scorer takes: `tiles`, and their `position` where it asks for it (None: 0)."""
    pixels = torch.from_numpy(tiles).to(device)
    if "position" not in inputs_of(part):
        return (pixels,)
    places = np.zeros(len(tiles), np.int64) if position is None else position
    return pixels, torch.from_numpy(places).to(device)


def _score(
    score_all: Callable[..., dict[str, Scores]],
    part: object,
    picture: NDArray[np.uint8],
    grid: TileGrid,
    reduction: Reduction,
    device: str,
) -> dict[str, FrameScore]:
    height, width = picture.shape[:2]
    check_frame(part, height, width)
    layout = grid.layout(height, width)
    tiles, position = layout.cut(picture), np.arange(layout.count)
    size = max(1, _BATCH_PIXELS // tiles.shape[1] ** 2)
    with torch.inference_mode():
        parts = [
            score_all(*graph_inputs(part, tiles[at : at + size], position[at : at + size], device))
            for at in range(0, len(tiles), size)
        ]
    joined = {kind: _joined([found[kind] for found in parts]) for kind in parts[0]}
    return {kind: reduce_frame(layout, *whole, reduction) for kind, whole in joined.items()}


def _joined(parts: Sequence[Scores]) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    return (
        torch.cat([score for score, _ in parts]).cpu().numpy(),
        torch.cat([cells for _, cells in parts]).cpu().numpy(),
    )
