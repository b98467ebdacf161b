"""(c) The agent from a `folder:` camera to the broker and back to a subscriber, against the bare engine in one run.

Both use the same bundle, pictures, engine settings and cores, in turn. What the agent does besides scoring (a process
that reads and decodes files, copies, tiles, maps, verdicts, JSON, a database, the broker) shares the cores with the
engine, and so do broker and subscriber, which on a line are other machines.

Pictures of 256 × 256 are PNG files and mostly one tile: all that a frame costs weighs on that. The defaults are
measured on frames of 1920 × 1200 as well, a line camera's: as JPEG files, which must be decoded as a network camera's
are, and as uncompressed ones (BMP), as a camera on a frame grabber gives them.
"""

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from harness import Row
from numpy.typing import NDArray
from service import Service, Subscriber, broker
from speed_common import ACCURATE, FAST, Pace, Request, cut_all, middle, ratio, tuned_engine
from speed_models import pictures, pictures_for, write_pictures
from speed_score import bare_pace

from kizu_contract.bundle import Bundle, read_bundle

AIM = 0.95
PICTURES, _FRAMES = 40, 8
_LARGE = (1920, 1200)
_KINDS = {"JPEG": ".jpg", "uncompressed": ".bmp"}
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
                work, name = request.work / f"agent-{recipe}-{provider}", f"{recipe}, {provider}"
                pairs, path, bundle = request.pairs(recipe), request.models.path(recipe), request.models.bundle(recipe)
                small = prepare(path, bundle, pictures_for(bundle, PICTURES), ".png", provider, work / "small")
                rows += compare(small, name, port, work, pairs, seconds)
                if recipe in (FAST, ACCURATE):
                    images = pictures(bundle.manifest.colour, _FRAMES, *_LARGE)
                    for kind, suffix in _KINDS.items():
                        large = prepare(path, bundle, images, suffix, provider, work / f"large-{kind}")
                        named = f"{name}, frames of {_LARGE[0]} × {_LARGE[1]}, {kind}"
                        rows += compare(large, named, port, work / f"frames-{kind}", pairs, 2 * seconds)
    return rows


def prepare(
    path: Path, bundle: Bundle, images: Sequence[NDArray[np.uint8]], suffix: str, provider: str, folder: Path
) -> Line:
    """Write `images` as files into `folder`, and cut them as `bundle`, which lies at `path`, would."""
    return Line(path, write_pictures(folder, images, suffix), *cut_all(bundle, images), len(images), provider)


def compare(line: Line, name: str, port: int, work: Path, pairs: int, seconds: float) -> list[Row]:
    """Measure both in turn, `seconds` each."""
    bare, agent = [], []
    for number in range(pairs):
        bare.append(_bare(line, work / "engines", seconds))
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


def _bare(line: Line, cache_dir: Path, seconds: float) -> Pace:
    with tuned_engine(read_bundle(line.bundle), line.provider, cache_dir) as engine:
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
