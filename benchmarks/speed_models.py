"""Small throw-away models of the recipes: trained with few steps, since speed does not depend on accuracy.

Each is kept below the work folder under a fingerprint of its recipe and of the code that made it.
"""

import hashlib
import sys
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path

import cv2
import numpy as np
from numpy.typing import NDArray

from kizu_agent.simulation import SimulatedLine
from kizu_contract.bundle import Bundle, read_bundle, write_bundle
from kizu_contract.errors import KizuError
from kizu_contract.pictures import Colour, to_colour
from kizu_export.build import build_bundle
from kizu_train.fit import FitRequest, fit
from kizu_train.recipes import Recipe, list_recipes, resolve_recipe
from kizu_train.runs import open_run
from kizu_train.trials import scaled

_ROOT = Path(__file__).parents[1]
_GOOD = 20
_STEPS = 1e-9
"""Share of a recipe's steps; `scaled` leaves twenty of each table."""
_MEMORY = ("candidates=5000", "tiles=100")
"""A memory is as large as its recipe says, which is what costs time later, but chosen from fewer patches."""
_CHEAPER = {
    "joint": tuple(f"members.pyramid_memory.memory.{each}" for each in _MEMORY),
    "joint_fast": tuple(f"members.pyramid_memory.memory.{each}" for each in _MEMORY),
    "pyramid_memory": tuple(f"memory.{each}" for each in _MEMORY),
}
_SIDES = {"patch_vae_28px": 28, "ae_dense": 28, "anogan_28px": 28}
"""Sides of the pictures of recipes that were published for small ones; the others see 256 px."""
NEEDS_MORE = ("joint_backbone", "doc", "metric_arcface", "metric_l2_softmax")
"""Recipes that need weights or reference pictures."""


class Models:
    """Bundles by recipe, made when they are first asked for; `folder` keeps them."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def bundle(self, recipe: str) -> Bundle:
        """The bundle of `recipe`."""
        return read_bundle(self.path(recipe))

    def path(self, recipe: str, side: int | None = None) -> Path:
        """The bundle's file, trained on pictures of `side` pixels: tiles of some recipes shrink to those."""
        side = side or _SIDES.get(recipe, 256)
        path = self._home(recipe, side) / f"{recipe}.kizu"
        if not path.is_file():
            self._make(recipe, path, side)
        return path

    def run(self, recipe: str) -> Path:
        """The run that it was exported from."""
        return self.path(recipe).with_name("run")

    def try_path(self, recipe: str) -> Path | None:
        """The bundle's file; None, and a line why, where it cannot be made."""
        try:
            return self.path(recipe)
        except KizuError as exc:
            print(f"{recipe}: left out: {exc}", file=sys.stderr)
            return None

    def _make(self, recipe: str, path: Path, side: int) -> None:
        data, run = self._folder / f"good-{side}", path.with_name("run")
        write_good(data, side)
        # A fit that was cut off goes on where it was.
        fit(FitRequest(_short(recipe), data, run, "cpu", resume=run.is_dir()))
        write_bundle(build_bundle(open_run(run), name=recipe.replace("_", "-")).bundle, path)

    def _home(self, recipe: str, side: int) -> Path:
        found = hashlib.sha256(f"{_short(recipe)} {side} {self._code}".encode()).hexdigest()
        return self._folder / f"{recipe}-{found[:12]}"

    @cached_property
    def _code(self) -> str:
        found = hashlib.sha256(Path(__file__).read_bytes())
        for part in ("contract", "train", "export"):
            for file in sorted((_ROOT / part).rglob("*.py")):
                found.update(file.read_bytes())
        return found.hexdigest()


def _short(recipe: str) -> Recipe:
    return scaled(resolve_recipe(recipe, _CHEAPER.get(recipe, ())), _STEPS)


def all_recipes() -> tuple[str, ...]:
    """Recipes that need nothing but good pictures."""
    return tuple(name for name in list_recipes() if name not in NEEDS_MORE)


def line(width: int = 256, height: int = 256) -> SimulatedLine:
    """The simulated line whose pictures all models are of."""
    return SimulatedLine("plates", seed=5, width=width, height=height)


def pictures(colour: Colour, count: int, width: int = 256, height: int = 256) -> list[NDArray[np.uint8]]:
    """So many good pictures of the line that no model has seen, uint8 [H, W, C]."""
    drawn = line(width, height)
    return [to_colour(drawn.draw_with(10_000 + index, None).image, colour) for index in range(count)]


def write_pictures(folder: Path, images: Sequence[NDArray[np.uint8]], suffix: str = ".png") -> Path:
    """Write pictures uint8 [H, W, 1 or 3 (RGB)] as files; gives `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    for index, image in enumerate(images):
        bgr = cv2.cvtColor(image, cv2.COLOR_RGB2BGR) if image.shape[2] == 3 else image
        cv2.imwrite(str(folder / f"{index:05}{suffix}"), bgr)
    return folder


def write_good(folder: Path, side: int) -> None:
    """Write the pictures to learn from, once: small ones are grey, as those of the published experiments."""
    if folder.is_dir():
        return
    drawn = line(side, side) if side >= 32 else line()
    images = [drawn.draw_with(index, None).image for index in range(_GOOD)]
    if side < 32:
        images = [_small(image, side) for image in images]
    new = folder.with_name(f"{folder.name}.new")
    write_pictures(new, images)
    new.rename(folder)


def _small(image: NDArray[np.uint8], side: int) -> NDArray[np.uint8]:
    shrunk = cv2.resize(image, (side, side), interpolation=cv2.INTER_AREA)
    return to_colour(np.asarray(shrunk, np.uint8), "grey")


def pictures_for(bundle: Bundle, count: int) -> list[NDArray[np.uint8]]:
    """Pictures as that model takes them: of 256 × 256, or small ones where it was trained on those."""
    manifest = bundle.manifest
    side = _SIDES.get(str(manifest.provenance.recipe["name"]), 256)
    return pictures(manifest.colour, count) if side == 256 else small_pictures(count, side)


def small_pictures(count: int, side: int) -> list[NDArray[np.uint8]]:
    """Grey pictures of that side, uint8 [side, side, 1], that no model has seen."""
    drawn = line()
    return [_small(drawn.draw_with(20_000 + index, None).image, side) for index in range(count)]
