"""What the rooms of scripts/bench speed share: what was asked for, timing, ratios of neighbours."""

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from speed_models import Models

from kizu_agent.engine import Engine
from kizu_agent.settings import EngineConfig
from kizu_contract.bundle import Bundle
from kizu_train.recipes import DEFAULTS

FAST, ACCURATE = DEFAULTS["fast"], DEFAULTS["accurate"]
DEFAULT_RECIPES = (FAST, ACCURATE, "patch_vae")
"""What most users have."""
SIDE = 256
"""The picture that the anchors of the field are told for: 256 × 256."""


@dataclass(frozen=True)
class Request:
    """What to measure: `seconds` for each figure, `work` is a folder that is thrown away."""

    is_quick: bool
    recipes: tuple[str, ...]
    providers: tuple[str, ...]
    models: Models
    work: Path

    @property
    def seconds(self) -> float:
        """How long a rate is measured."""
        return 0.5 if self.is_quick else 1.0

    def pairs(self, recipe: str) -> int:
        """How often two things are measured in turn."""
        return 7 if recipe in DEFAULT_RECIPES and not self.is_quick else 3


class Pace(NamedTuple):
    """`rate` in units a second of wall time, `cpu_s` CPU seconds of the whole process for a unit."""

    rate: float
    cpu_s: float

    @property
    def cores(self) -> float:
        """Cores that were busy."""
        return self.rate * self.cpu_s


def paced(work: Callable[[], int], seconds: float) -> Pace:
    """Repeat `work`, which tells how many units it did, for `seconds`, and at least once."""
    began, cpu_began, done = time.monotonic(), time.process_time(), 0
    while not done or time.monotonic() < began + seconds:
        done += work()
    wall_s, cpu_s = time.monotonic() - began, time.process_time() - cpu_began
    return Pace(done / wall_s, cpu_s / done)


def middle(paces: Sequence[Pace]) -> Pace:
    """The medians."""
    return Pace(statistics.median(pace.rate for pace in paces), statistics.median(pace.cpu_s for pace in paces))


def in_turn(works: Sequence[Callable[[], Pace]], pairs: int) -> list[list[Pace]]:
    """Measure one after the other, and again: a machine that slows down slows neighbours alike. Paces by work."""
    rounds = [[work() for work in works] for _ in range(pairs)]
    return [list(column) for column in zip(*rounds, strict=True)]


def ratio(mine: Sequence[Pace], theirs: Sequence[Pace]) -> float:
    """Median of the ratios of neighbours."""
    return statistics.median(one.rate / other.rate for one, other in zip(mine, theirs, strict=True))


def percentile(values: Sequence[float], percent: int) -> float:
    """The value that so many percent lie at or below; the only one where there is one."""
    return values[0] if len(values) == 1 else statistics.quantiles(values, n=100, method="inclusive")[percent - 1]


def engine_config(provider: str, threads: int = 0, streams: int = 0, cache_dir: Path | None = None) -> EngineConfig:
    """The engine as an agent would be told to use it."""
    return EngineConfig(provider=provider, threads=threads, streams=streams, cache_dir=cache_dir)  # type: ignore[arg-type]


def tuned_engine(bundle: Bundle, provider: str, cache_dir: Path) -> Engine:
    """The bundle's tiled graph at its best: with the batch that is measured to be best here, as agents have it."""
    engine = Engine(bundle.scorer, bundle.manifest.graph, engine_config(provider, cache_dir=cache_dir))
    engine.tune()
    return engine


def cut_all(bundle: Bundle, pictures: Sequence[NDArray[np.uint8]]) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """All tiles of all pictures uint8 [N, T, T, C], and the place of each in its picture's grid int64 [N]."""
    layouts = [bundle.manifest.grid.layout(*picture.shape[:2]) for picture in pictures]
    tiles = [layout.cut(picture) for layout, picture in zip(layouts, pictures, strict=True)]
    return np.concatenate(tiles), np.concatenate([np.arange(layout.count) for layout in layouts])
