"""(a) The bare engine: tiles a second over batches, threads and streams, CPU time of a picture, the roofline."""

from collections.abc import Iterator
from dataclasses import replace
from functools import lru_cache
from typing import NamedTuple

import cv2
import numpy as np
import speed_graph
import speed_peak
import speed_profile
from harness import Row
from numpy.typing import NDArray
from speed_common import ACCURATE, FAST, SIDE, Pace, Request, cut_all, engine_config, paced
from speed_models import pictures_for

from kizu_agent.engine import Engine
from kizu_agent.inspector import load_inspector
from kizu_agent.threads import budget
from kizu_contract.bundle import Bundle
from kizu_contract.manifest import BatchProfile

_AIM_MS = {FAST: 5.0, ACCURATE: 20.0}
_MOST_TILES = 1024
_PICTURES = 8
_OPERATORS = 5
"""So many kinds of operators are named, those that take most of the time."""


def measure(request: Request) -> list[Row]:
    """All rows of this family."""
    cores = speed_peak.cores()
    rows = [row for threads in sorted({1, cores}) for row in _peak_rows(threads)]
    for recipe in request.recipes:
        bundle = request.models.bundle(recipe)
        for provider in request.providers:
            rows += _rows(bundle, f"{recipe}, {provider}", provider, request)
        rows += _picture_rows(bundle, recipe, request)
        rows += _profile_rows(bundle, recipe, request)
    return rows


def _peak_rows(threads: int) -> list[Row]:
    peak, name = _peak(threads), f"machine, {_threads(threads)}"
    return [
        Row(f"{name}: sgemm", peak.flops_per_s / 1e9, "GFLOP/s"),
        Row(f"{name}: copy, read and written", peak.bytes_per_s / 1e9, "GB/s"),
    ]


@lru_cache
def _peak(threads: int) -> speed_peak.Peak:
    return speed_peak.measure(threads)


def _threads(count: int) -> str:
    return "1 thread" if count == 1 else f"{count} threads"


class _Crew(NamedTuple):
    """How many threads score, in so many streams."""

    threads: int
    streams: int

    def __str__(self) -> str:
        if self.threads == 1:
            return "1 thread"
        return f"{self.streams} streams" if self.streams > 1 else f"{self.threads} threads inside operators"


def _crews(provider: str) -> list[_Crew]:
    """One thread, all of them inside each operator, and on the CPU all of them as streams."""
    cores = speed_peak.cores()
    return sorted({_Crew(1, 1), _Crew(cores, 1), _Crew(cores, budget(provider, cores).streams)})


def _rows(bundle: Bundle, name: str, provider: str, request: Request) -> Iterator[Row]:
    tiles, places = _sample(bundle, request)
    best = {}
    for crew in _crews(provider):
        rates = {}
        for batch in _sizes(bundle.manifest.graph.batch, len(tiles) // crew.streams, is_quick=request.is_quick):
            pace = _rate(bundle, batch, provider, crew, tiles, places, request.seconds)
            rates[batch] = pace.rate
            yield Row(f"{name}, {crew}, batch {batch}", pace.rate, "tiles/s")
        best[crew] = max((rate, batch) for batch, rate in rates.items())
    pixels = bundle.manifest.graph.tile_px**2
    for crew, (rate, batch) in best.items():
        yield Row(f"{name}, {crew}, best batch ({batch})", rate * pixels / 1e6, "megapixels/s")
        if provider == "cpu":
            yield from _roofline(bundle, f"{name}, {crew}", batch, rate, _peak(crew.threads))


def _sample(bundle: Bundle, request: Request) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    tiles, places = cut_all(bundle, pictures_for(bundle, 4 if request.is_quick else 16))
    most = min(_MOST_TILES, 4 * bundle.manifest.graph.batch.opt)
    chosen = np.resize(np.arange(len(tiles)), most)
    return np.ascontiguousarray(tiles[chosen]), places[chosen]


def _sizes(profile: BatchProfile, most: int, *, is_quick: bool) -> list[int]:
    """1, half the usual, the usual and the largest batch; all powers of two between where there is time."""
    few = {1, max(1, profile.opt // 2), profile.opt, profile.max}
    doubled = {1 << power for power in range(profile.max.bit_length())}
    sizes = few if is_quick else few | doubled
    return sorted(size for size in sizes if profile.min <= size <= min(profile.max, most))


def _rate(
    bundle: Bundle,
    batch: int,
    provider: str,
    crew: _Crew,
    tiles: NDArray[np.uint8],
    places: NDArray[np.int64],
    seconds: float,
) -> Pace:
    # A profile of one size: whatever else chooses batches has no choice.
    graph = replace(bundle.manifest.graph, batch=BatchProfile(batch, batch, batch))
    turn = crew.streams * batch
    whole = len(tiles) // turn * turn
    with Engine(bundle.scorer, graph, engine_config(provider, crew.threads, crew.streams)) as engine:

        def work() -> int:
            engine.run(tiles[:whole], places[:whole])
            return whole

        work()
        return paced(work, seconds)


def _roofline(bundle: Bundle, name: str, batch: int, rate: float, peak: speed_peak.Peak) -> Iterator[Row]:
    """What the graph costs by our own counting, and how near the engine comes to what the machine could do."""
    cost = speed_graph.count(bundle.scorer, batch)
    took_s = batch / rate
    yield Row(f"{name}: of a tile, counted", cost.flops / batch / 1e6, "MFLOP")
    yield Row(f"{name}: of a tile, moved at most", cost.moved / batch / 1e6, "MB")
    if cost.unknown:
        yield Row(f"{name}: tensors of unknown shape, not counted", float(cost.unknown), "")
    yield Row(f"{name}: share of the sgemm peak", cost.flops / took_s / peak.flops_per_s, "")
    yield Row(f"{name}: share of the operator-wise roofline", cost.seconds(*peak) / took_s, "")


def _profile_rows(bundle: Bundle, recipe: str, request: Request) -> list[Row]:
    tiles, places = _sample(bundle, request)
    batch = bundle.manifest.graph.batch.opt
    shares = speed_profile.shares(bundle, tiles[:batch], places[:batch], request.work)
    name = f"{recipe}, cpu, 1 thread, batch {batch}: share of the time in"
    return [Row(f"{name} {operator}", share, "") for operator, share in list(shares.items())[:_OPERATORS]]


def _picture_rows(bundle: Bundle, recipe: str, request: Request) -> list[Row]:
    """CPU time for one picture of 256 × 256 on one core, from its pixels to its map and score."""
    images = pictures_for(bundle, _PICTURES)
    share = SIDE**2 / (images[0].shape[0] * images[0].shape[1])
    inspector = load_inspector(bundle, engine_config("cpu", 1))
    before = cv2.getNumThreads()
    cv2.setNumThreads(1)

    def work() -> int:
        for image in images:
            inspector.inspect([image])
        return len(images)

    try:
        work()
        pace = paced(work, 2 * request.seconds)
    finally:
        cv2.setNumThreads(before)
        inspector.close()
    name = f"{recipe}, cpu, one core: a picture of 256 × 256"
    return [
        Row(f"{name}, CPU time", share * pace.cpu_s * 1e3, "ms", _AIM_MS.get(recipe), at_most=True),
        Row(f"{name}, wall time", share / pace.rate * 1e3, "ms"),
    ]
