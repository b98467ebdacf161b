"""From a torch scorer to frame scores, through the contract's own cutting, stitching and reduction."""

from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from kizu_contract.judging import FrameScore, Reduction, reduce_frame, score_frame
from kizu_contract.tiles import TileGrid
from kizu_train.detectors.base import Scores

ScorePicture = Callable[[NDArray[np.uint8]], FrameScore]
"""Picture uint8 [H, W, C] in the model's colour → its score and map float32 [H, W]."""

_BATCH_PIXELS = 2**19
"""Tiles × T² in a batch: small enough that features stay in a CPU's caches and any GPU's memory."""


def frame_scorer(scorer: nn.Module, grid: TileGrid, reduction: Reduction, device: str = "cpu") -> ScorePicture:
    """A function that scores pictures with `scorer`, computing on `device`."""
    module = scorer.to(device)

    def score_tiles(tiles: NDArray[np.uint8]) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        return _in_batches(lambda batch: {"": module(batch)}, tiles, device)[""]

    return lambda picture: score_frame(picture, grid, reduction, score_tiles)


def score_kinds(
    score_all: Callable[[Tensor], dict[str, Scores]], picture: NDArray[np.uint8], grid: TileGrid, reduction: Reduction
) -> dict[str, float]:
    """The frame score of `picture` by every kind at once, on the CPU."""
    layout = grid.layout(*picture.shape[:2])
    found = _in_batches(score_all, layout.cut(picture), "cpu")
    return {kind: reduce_frame(layout, scores, maps, reduction).score for kind, (scores, maps) in found.items()}


def _in_batches(
    score_all: Callable[[Tensor], dict[str, Scores]], tiles: NDArray[np.uint8], device: str
) -> dict[str, tuple[NDArray[np.float32], NDArray[np.float32]]]:
    size = max(1, _BATCH_PIXELS // tiles.shape[1] ** 2)
    with torch.inference_mode():
        parts = [score_all(torch.from_numpy(tiles[i : i + size]).to(device)) for i in range(0, len(tiles), size)]
    return {
        kind: (
            torch.cat([part[kind][0] for part in parts]).cpu().numpy(),
            torch.cat([part[kind][1] for part in parts]).cpu().numpy(),
        )
        for kind in parts[0]
    }
