"""Generated products with planted defects, and one trial that every detector must stand."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from kizu_agent.inspector import load_inspector
from kizu_agent.settings import EngineConfig
from kizu_contract.pictures import read_picture
from kizu_export.build import Built, build_bundle
from kizu_train.data import open_data
from kizu_train.detectors.base import Extras
from kizu_train.evaluation.evaluate import evaluate
from kizu_train.evaluation.records import Evaluation
from kizu_train.fit import FitRequest, fit
from kizu_train.recipes import resolve_recipe
from kizu_train.runs import Run, open_run

Picture = NDArray[np.uint8]


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def _weave(random: np.random.Generator, side: int, channels: int) -> Picture:
    """A woven surface under changing light: two gratings of random phase, grain, a slope of brightness."""
    y, x = np.mgrid[:side, :side] / 4.0
    phase = random.uniform(0, 2 * np.pi, 2)
    light = random.uniform(-12, 12) + random.uniform(-0.15, 0.15) * np.mgrid[:side, :side][0]
    cloth = 120 + 30 * np.sin(x + phase[0]) + 30 * np.sin(y + phase[1]) + light
    picture = cloth[:, :, None] * np.linspace(1, 0.8, channels) + random.normal(0, 3, (side, side, channels))
    return np.clip(picture, 0, 255).astype(np.uint8)


def _part(random: np.random.Generator, side: int, channels: int) -> Picture:
    """A fixtured part: a ring with four holes on a dark ground, moved by up to two pixels."""
    centre = (side // 2 + int(random.integers(-2, 3)), side // 2 + int(random.integers(-2, 3)))
    drawn = np.full((side, side), 40, np.uint8)
    cv2.circle(drawn, centre, side * 3 // 8, 170, -1, cv2.LINE_AA)
    cv2.circle(drawn, centre, side // 8, 40, -1, cv2.LINE_AA)
    for dx, dy in ((1, 0), (-1, 0), (0, 1), (0, -1)):
        cv2.circle(drawn, (centre[0] + dx * side // 4, centre[1] + dy * side // 4), side // 24, 60, -1, cv2.LINE_AA)
    picture = drawn[:, :, None] * np.linspace(1, 0.8, channels) + random.normal(0, 3, (side, side, channels))
    return np.clip(picture + random.uniform(-6, 6), 0, 255).astype(np.uint8)


def _spoil(picture: Picture, random: np.random.Generator) -> tuple[Picture, NDArray[np.bool_]]:
    """A blot or a scratch well inside the part, darker or brighter than what it covers; and its mask."""
    side = picture.shape[0]
    mask = np.zeros((side, side), np.uint8)
    angle, far = random.uniform(0, 2 * np.pi), side * random.uniform(0.2, 0.3)
    at = (int(side / 2 + far * np.cos(angle)), int(side / 2 + far * np.sin(angle)))
    if random.random() < 0.5:
        cv2.ellipse(mask, at, (side // 12, side // 16), random.uniform(0, 180), 0, 360, 1, -1)
    else:
        turn = random.uniform(0, np.pi)
        to = (int(at[0] + side / 4 * np.cos(turn)), int(at[1] + side / 4 * np.sin(turn)))
        cv2.line(mask, at, to, 1, max(2, side // 24))
    shade = random.choice([-90.0, 90.0])
    spoilt = picture + mask[:, :, None] * shade * (1 if shade < 0 else 0.9)
    return np.clip(spoilt, 0, 255).astype(np.uint8), mask.astype(np.bool_)


@pytest.fixture(scope="session")
def make_product() -> Callable[..., Path]:
    """A function that draws a product in MVTec layout: `kind` weave or part, square pictures of `side` px."""

    def make(
        folder: Path, kind: str = "weave", *, side: int = 64, channels: int = 1, train: int = 30, tests: int = 12
    ) -> Path:
        draw = {"weave": _weave, "part": _part}[kind]
        random = np.random.default_rng(7)
        for index in range(train):
            _write(folder / f"train/good/{index:03}.png", draw(random, side, channels))
        for index in range(tests):
            _write(folder / f"test/good/{index:03}.png", draw(random, side, channels))
            spoilt, mask = _spoil(draw(random, side, channels), random)
            _write(folder / f"test/spoilt/{index:03}.png", spoilt)
            _write(folder / f"ground_truth/spoilt/{index:03}_mask.png", mask.astype(np.uint8)[:, :, None] * 255)
        return folder

    return make


def _write(path: Path, picture: Picture) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    assert cv2.imwrite(str(path), picture[:, :, ::-1])


@dataclass(frozen=True, eq=False)
class Trial:
    """A detector that was trained, exported through all gates, and measured on the agent's own engine."""

    run: Run
    built: Built
    evaluation: Evaluation

    @property
    def image_auroc(self) -> float:
        """Area under the ROC curve of frame scores."""
        return float(self.evaluation.headline()["image_auroc"])

    @property
    def pixel_auroc(self) -> float:
        """Area under the ROC curve of pixels."""
        return float(self.evaluation.headline()["pixel_auroc"])


@pytest.fixture
def stand_trial(tmp_path: Path) -> Callable[..., Trial]:
    """A function that fits `recipe` with `overrides` on `data`, exports it through all gates, evaluates the bundle."""

    def stand(
        recipe: str, data: Path, *overrides: str, extras: Extras | None = None, score: str | None = None
    ) -> Trial:
        out = tmp_path / f"run-{recipe}-{score}"
        resolved = resolve_recipe(recipe, overrides)
        fit(FitRequest(resolved, data, out, device="cpu", extras=extras or Extras()))
        run = open_run(out, score)
        built = build_bundle(run)
        inspector = load_inspector(built.bundle, EngineConfig(threads=1))
        try:
            pictures = open_data(data, run.colour)
            found = evaluate(
                pictures, lambda picture: inspector.inspect([picture])[0], run.thresholds, colour=run.colour
            )
        finally:
            inspector.close()
        return Trial(run, built, found)

    return stand


@pytest.fixture
def border_share() -> Callable[[Run, Path], float]:
    """A function: share of good test pictures whose map has its maximum within an eighth of a side of the border.

    That frame is 44 % of the area, so a detector without a border problem stays near 0.44 on an even surface.
    """

    def share(run: Run, data: Path) -> float:
        from kizu_train.scoring import frame_scorer

        score = frame_scorer(run.scorer, run.grid, run.reduction)
        hits = []
        for test in open_data(data, run.colour).tests:
            if test.is_good:
                cells = score(read_picture(test.path, run.colour)).map
                y, x = np.unravel_index(int(cells.argmax()), cells.shape)
                edge = min(y, x, cells.shape[0] - 1 - y, cells.shape[1] - 1 - x)
                hits.append(edge < cells.shape[0] // 8)
        return float(np.mean(hits))

    return share
