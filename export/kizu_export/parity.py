"""The gate: the engine that ships must compute what torch computed."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from kizu_agent.engine import Engine
from kizu_agent.inspector import relative_deviation
from kizu_agent.settings import EngineConfig
from kizu_contract.manifest import BatchProfile, Graph
from kizu_export.errors import ExportError
from kizu_train.scoring import graph_inputs

TOLERANCE = 1e-4
"""Largest deviation of the fp32 graph from torch, as `kizu_agent.inspector.relative_deviation` measures it.

Lower precisions deviate far more where it does not matter; what they lose is measured (see `lower`).
"""


@dataclass(frozen=True)
class Parity:
    """The largest relative deviation of scores and of maps, over all `batches` that were tried."""

    score: float
    map: float
    batches: tuple[int, ...]


def check_parity(
    scorer: nn.Module,
    graph_bytes: bytes,
    graph: Graph,
    tiles: NDArray[np.uint8],
    position: NDArray[np.int64] | None = None,
) -> Parity:
    """Compare torch's `scorer` with the agent's engine on golden `tiles` uint8 [K, T, T, C], K >= 1.

    A graph that takes positions gets `position` int64 [K], 0 for each tile by default. Compared at batches of 1 and of
    the profile's opt and max. Raises ExportError above the tolerance, with the deviation.
    """
    sizes = tuple(sorted({1, graph.batch.opt, graph.batch.max}))
    places = np.zeros(len(tiles), np.int64) if position is None else position
    found = [
        _deviations(scorer, graph_bytes, graph, *_spread(tiles, places, max(size, len(tiles))), size) for size in sizes
    ]
    parity = Parity(max(score for score, _ in found), max(cells for _, cells in found), sizes)
    if not max(parity.score, parity.map) <= TOLERANCE:
        raise ExportError(
            f"the exported graph deviates from torch by {parity.score:.2g} in scores and {parity.map:.2g} in maps "
            f"(relative; at most {TOLERANCE:g}): it must not ship"
        )
    return parity


def run_torch(
    scorer: nn.Module, tiles: NDArray[np.uint8], batch: int, position: NDArray[np.int64] | None = None
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Score `tiles` with torch in batches: score [N] and map [N, T/m, T/m], float32; `position` int64 [N], None: 0."""
    places = np.zeros(len(tiles), np.int64) if position is None else position
    with torch.no_grad():
        parts = [
            scorer(*graph_inputs(scorer, tiles[at : at + batch].copy(), places[at : at + batch]))
            for at in range(0, len(tiles), batch)
        ]
    return _joined([score for score, _ in parts]), _joined([cells for _, cells in parts])


def _joined(parts: Sequence[torch.Tensor]) -> NDArray[np.float32]:
    return torch.cat(list(parts)).numpy().astype(np.float32)


def _deviations(
    scorer: nn.Module,
    graph_bytes: bytes,
    graph: Graph,
    tiles: NDArray[np.uint8],
    position: NDArray[np.int64],
    batch: int,
) -> tuple[float, float]:
    # A profile of this one size keeps the engine from choosing a better one.
    exact = replace(graph, batch=BatchProfile(1, batch, batch))
    with Engine(graph_bytes, exact, EngineConfig()) as engine:
        score, cells = engine.run(tiles, position)
    wanted_score, wanted_cells = run_torch(scorer, tiles, batch, position)
    return relative_deviation(score, wanted_score), relative_deviation(cells, wanted_cells)


def _spread(
    tiles: NDArray[np.uint8], position: NDArray[np.int64], count: int
) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """Give `count` tiles: the golden ones, then the same rolled ever further, so that none repeats soon."""
    rounds = -(-count // len(tiles))
    rolled = np.concatenate([np.roll(tiles, (3 * i, 5 * i), axis=(1, 2)) for i in range(rounds)])
    return rolled[:count], np.tile(position, rounds)[:count]
