"""(b) `kizu-agent score` ÷ bare engine on the same tiles: its scoring path on pictures in memory, and all of it."""

import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from unittest.mock import patch

import numpy as np
from harness import Row
from numpy.typing import NDArray
from speed_common import Pace, Request, cut_all, engine_config, in_turn, middle, paced, ratio
from speed_models import pictures_for, write_pictures

from kizu_agent import score
from kizu_agent.engine import Engine
from kizu_agent.inspector import load_inspector
from kizu_contract.bundle import Bundle

AIM = 0.9
_PICTURES = 16
_COMMAND_S = 8.0


def measure(request: Request) -> list[Row]:
    """All rows of this family."""
    rows = []
    for recipe in request.recipes:
        for provider in request.providers:
            rows += _in_memory(request.models.bundle(recipe), f"{recipe}, {provider}", provider, request)
            rows += _command(recipe, provider, request)
    return rows


def bare_pace(engine: Engine, tiles: NDArray[np.uint8], places: NDArray[np.int64], seconds: float) -> Pace:
    """Tiles a second of the engine alone, given many tiles at a time."""

    def work() -> int:
        engine.run(tiles, places)
        return len(tiles)

    return paced(work, seconds)


def _in_memory(bundle: Bundle, name: str, provider: str, request: Request) -> list[Row]:
    """The command's own path from pictures to lines of JSON, without reading and decoding files."""
    images = pictures_for(bundle, _PICTURES)
    tiles, places = cut_all(bundle, images)
    inspector = load_inspector(bundle, engine_config(provider))
    target = request.work / f"{bundle.manifest.name}.jsonl"
    asked = [score._Asked(Path(str(index)), Path(f"{index}.npy")) for index in range(len(images))]  # noqa: SLF001

    def whole() -> int:
        score._score_all(inspector, asked, str(target), None)  # noqa: SLF001
        return len(tiles)

    with patch.object(score, "_read", lambda _inspector, path: images[int(str(path))]):
        whole()
        works = (
            lambda: bare_pace(inspector.engine, tiles, places, request.seconds),
            lambda: paced(whole, request.seconds),
        )
        bare, mine = in_turn(works, request.pairs(str(bundle.manifest.provenance.recipe["name"])))
    assert len(target.read_text().splitlines()) == len(images)
    inspector.close()
    return [
        Row(f"{name}: bare engine", middle(bare).rate, "tiles/s"),
        Row(f"{name}: bare engine, cores busy", middle(bare).cores, ""),
        Row(f"{name}: score, pictures in memory", middle(mine).rate, "tiles/s"),
        Row(f"{name}: score, pictures in memory, cores busy", middle(mine).cores, ""),
        Row(f"{name}: score ÷ bare engine, pictures in memory", ratio(mine, bare), "", AIM),
    ]


def _command(recipe: str, provider: str, request: Request) -> list[Row]:
    """The command on PNG files: what each further picture takes once it has started."""
    bundle = request.models.bundle(recipe)
    images = pictures_for(bundle, _PICTURES)
    tiles, places = cut_all(bundle, images)
    with Engine(bundle.scorer, bundle.manifest.graph, engine_config(provider)) as engine:
        bare = bare_pace(engine, tiles, places, request.seconds)
    per_picture = len(tiles) / len(images)
    count = 2 + max(20, round(_COMMAND_S * request.seconds * bare.rate / per_picture))
    few = write_pictures(request.work / f"few-{recipe}", images[:2])
    many = write_pictures(request.work / f"many-{recipe}", [images[index % len(images)] for index in range(count)])
    short, long = (_run_s(request.models.path(recipe), folder, provider) for folder in (few, many))
    rate = (count - 2) * per_picture / max(long - short, 1e-3)
    return [
        Row(f"{recipe}, {provider}: score command on 2 PNG files, with its start", short, "s"),
        Row(f"{recipe}, {provider}: score command, each further PNG file", rate, "tiles/s"),
        Row(f"{recipe}, {provider}: score command ÷ bare engine, each further PNG file", rate / bare.rate, ""),
    ]


def _run_s(bundle: Path, folder: Path, provider: str) -> float:
    arguments: Sequence[str] = ("score", str(bundle), str(folder), "--json", "-", "--provider", provider)
    began = time.monotonic()
    subprocess.run([sys.executable, "-m", "kizu_agent", *arguments], check=True, stdout=subprocess.DEVNULL)
    return time.monotonic() - began
