"""(c) The agent from a `folder:` camera to the broker and back to a subscriber, against the bare engine in one run.

Both use the same bundle, pictures, engine settings and cores, in turn. What the agent does besides scoring (a process
that reads and decodes PNG files, copies, tiles, maps, verdicts, JSON, a database, the broker) shares the cores with the
engine, and so do broker and subscriber, which on a line are other machines.
"""

import statistics
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from harness import Row
from numpy.typing import NDArray
from service import Service, Subscriber, broker
from speed_common import Pace, Request, cut_all, engine_config, middle, ratio
from speed_models import Models, pictures_for, write_pictures
from speed_score import bare_pace

from kizu_agent.engine import Engine
from kizu_contract.bundle import read_bundle

AIM = 0.95
_PICTURES = 40
_WARM_RESULTS = 12


@dataclass(frozen=True)
class Line:
    """What both get: a bundle's file, its pictures as files and as `tiles`, on a provider."""

    bundle: Path
    pictures: Path
    tiles: NDArray[np.uint8]
    places: NDArray[np.int64]
    count: int
    provider: str

    @property
    def tiles_each(self) -> float:
        """Tiles of a picture."""
        return len(self.tiles) / self.count


def measure(request: Request) -> list[Row]:
    """All rows of this family."""
    rows = []
    seconds = 3.0 if request.is_quick else 5.0
    with broker(request.work / "broker") as port:
        for recipe in request.recipes:
            for provider in request.providers:
                work = request.work / f"agent-{recipe}-{provider}"
                line = prepare(request.models, recipe, provider, work)
                rows += compare(line, f"{recipe}, {provider}", port, work, request.pairs(recipe), seconds)
    return rows


def prepare(models: Models, recipe: str, provider: str, work: Path) -> Line:
    """Make the model, write its pictures below `work` and cut them."""
    bundle = models.bundle(recipe)
    images = pictures_for(bundle, _PICTURES)
    folder = write_pictures(work / "pictures", images)
    return Line(models.path(recipe), folder, *cut_all(bundle, images), len(images), provider)


def compare(line: Line, name: str, port: int, work: Path, pairs: int, seconds: float) -> list[Row]:
    """Measure both in turn, `seconds` each."""
    bare, agent = [], []
    for number in range(pairs):
        bare.append(_bare(line, seconds))
        agent.append(_agent(line, work / f"agent{number}", port, seconds))
    ratios = sorted(mine.rate / theirs.rate for theirs, mine in zip(bare, agent, strict=True))
    return [
        Row(f"{name}: bare engine", middle(bare).rate, "tiles/s"),
        Row(f"{name}: bare engine, cores busy", middle(bare).cores, ""),
        Row(f"{name}: agent, folder to subscriber", middle(agent).rate, "tiles/s"),
        Row(f"{name}: agent with its capture process, cores busy", middle(agent).cores, ""),
        Row(f"{name}: agent ÷ bare engine, median of pairs", ratio(agent, bare), "", AIM),
        Row(f"{name}: agent ÷ bare engine, worst pair", ratios[0], ""),
        Row(f"{name}: agent ÷ bare engine, best pair", ratios[-1], ""),
        Row(f"{name}: CPU time a tile, agent ÷ bare engine", middle(agent).cpu_s / middle(bare).cpu_s, ""),
        Row(f"{name}: tiles a frame", line.tiles_each, "tiles"),
    ]


def _bare(line: Line, seconds: float) -> Pace:
    bundle = read_bundle(line.bundle)
    with Engine(bundle.scorer, bundle.manifest.graph, engine_config(line.provider)) as engine:
        return bare_pace(engine, line.tiles, line.places, seconds)


def _agent(line: Line, work: Path, port: int, seconds: float) -> Pace:
    """Tiles a second at the subscriber, once the line runs; CPU of agent and capture process."""
    cameras = f'[[cameras]]\nname = "cam1"\nsource = "folder:{line.pictures}?loop=true"\n'
    more = f'[engine]\nprovider = "{line.provider}"\n'
    with (
        Subscriber(port, f"bench/{work.name}/cam1/result") as subscriber,
        Service(work, port, line.bundle, cameras, more) as service,
    ):
        service.await_results(subscriber, _WARM_RESULTS)
        cpu_began, began = service.cpu_s(), time.monotonic()
        time.sleep(seconds)
        ended, cpu_ended = time.monotonic(), service.cpu_s()
        rate = _steady_rate([arrival.at for arrival in subscriber.between(began, ended)]) * line.tiles_each
    return Pace(rate, (cpu_ended - cpu_began) / (ended - began) / rate)


def _steady_rate(at: list[float]) -> float:
    """Arrivals a second. Frames are inspected some at a time and their results come together: whole heaps count."""
    gaps = np.diff(at)
    edge = statistics.fmean(gaps)
    heaps = [0, *(index + 1 for index, gap in enumerate(gaps) if gap > edge)]
    if len(heaps) < 3:
        return (len(at) - 1) / (at[-1] - at[0])
    return (heaps[-1] - heaps[0]) / (at[heaps[-1]] - at[heaps[0]])
