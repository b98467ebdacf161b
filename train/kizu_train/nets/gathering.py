"""Samples of good tiles for detectors that learn from statistics in one pass."""

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from kizu_train.detectors.base import Session, TileSource

_BATCH_PIXELS = 2**19


def batches_of(tiles: TileSource, most: int, session: Session) -> Iterator[Tensor]:
    """Random tiles uint8 [B, T, T, C] on the session's device: as many as a sweep has, at most `most`, at least one.

    Ends early, after the first batch, when the session should stop. A statistic is gathered in seconds, so what a
    checkpoint keeps is only that the run was begun: a resumed fit starts anew and gives the same numbers.
    """
    session.restore()
    first = tiles.batch(0, 1)
    wanted = max(1, min(tiles.count, most))
    size = max(1, min(wanted, _BATCH_PIXELS // first.shape[1] ** 2))
    steps = -(-wanted // size)
    for step in range(steps):
        if step and session.should_stop:
            session.save(step, lambda: {"begun": torch.ones(1)})
            return
        yield torch.from_numpy(tiles.batch(step, size)).to(session.device)
        session.report(step + 1, steps, {"tiles": float((step + 1) * size)})


def sample_tiles(tiles: TileSource, most: int = 256) -> Tensor:
    """About `most` tiles uint8 [K, T, T, C] from all over the pictures, always the same ones."""
    step = max(1, -(-tiles.count // most))
    first, kept = 0, []
    for part in tiles.sweep():
        kept.append(part[(-first) % step :: step])
        first += len(part)
    return torch.from_numpy(np.concatenate(kept))
