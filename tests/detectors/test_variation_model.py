"""The variation model on a generated part, and the positions it needs, from fit to the agent."""

import json
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch

from kizu_agent.engine import Engine
from kizu_agent.errors import ModelError
from kizu_agent.inspection import inspect_frames
from kizu_agent.inspector import load_inspector, self_test
from kizu_agent.records import Frame, ModelId
from kizu_agent.score import score_command
from kizu_agent.settings import EngineConfig
from kizu_contract.bundle import Bundle, read_bundle, write_bundle
from kizu_contract.pictures import read_picture
from kizu_contract.tiles import FrameSize, TileGrid
from kizu_export.build import build_bundle
from kizu_export.errors import ExportError
from kizu_export.parity import check_parity
from kizu_train.data import open_data
from kizu_train.detectors.base import TileShape
from kizu_train.detectors.variation_model import VariationModelDetector, VariationModelSettings
from kizu_train.errors import DataError, TrainError, UsageError
from kizu_train.evaluation.evaluate import evaluate
from kizu_train.fit import FitRequest, fit
from kizu_train.nets.registration import cut_places, joined, moved_back, shift_between
from kizu_train.recipes import resolve_recipe
from kizu_train.runs import open_run
from kizu_train.scoring import frame_scorer

QUICK = ("grid.tile_px=32", "grid.stride_px=32")


@pytest.fixture(scope="module")
def part(make_product: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A product whose parts lie in a fixture that lets them move by two pixels."""
    return make_product(tmp_path_factory.mktemp("parts") / "part", "part", channels=3, train=24, tests=8)


@pytest.fixture(scope="module")
def fitted(part: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run on it."""
    out = tmp_path_factory.mktemp("fitted") / "run"
    fit(FitRequest(resolve_recipe("variation_model", QUICK), part, out, device="cpu"))
    return out


@pytest.fixture(scope="module")
def bundle(fitted: Path) -> Bundle:
    """That run, exported."""
    return build_bundle(open_run(fitted)).bundle


def test_from_fit_to_the_agent(part: Path, stand_trial: Callable[..., Any], tmp_path: Path) -> None:
    """Planted defects are told apart and found through the bundle, whose graph looks up the place of each tile."""
    trial = stand_trial("variation_model", part, *QUICK)
    assert trial.image_auroc > 0.97
    assert trial.pixel_auroc > 0.95
    bundle = trial.built.bundle
    assert bundle.manifest.graph.inputs == ("tiles", "position")
    assert (bundle.manifest.frame, bundle.manifest.places) == (FrameSize(64, 64), 4)
    assert len(set(bundle.golden.positions().tolist())) > 1
    write_bundle(bundle, tmp_path / "part.kizu")
    assert score_command(tmp_path / "part.kizu", [part / "test/good"], str(tmp_path / "scores.jsonl"), None) == 0
    lines = [json.loads(line) for line in (tmp_path / "scores.jsonl").read_text().splitlines()]
    score = frame_scorer(trial.run.scorer, trial.run.grid, trial.run.reduction)
    for line in lines:
        assert line["score"] == pytest.approx(score(read_picture(Path(line["path"]), "rgb")).score, rel=1e-4)


def test_the_place_matters(fitted: Path) -> None:
    """A good tile that is said to lie elsewhere scores far higher, so the look-up is at work."""
    run = open_run(fitted)
    assert run.golden_position is not None
    tiles, position = torch.from_numpy(run.golden_tiles[:12]), torch.from_numpy(run.golden_position[:12])
    right, wrong = (run.scorer(tiles, place)[0] for place in (position, 3 - position))
    assert wrong.median() > 3 * right.median()


def test_the_self_test_uses_real_places(bundle: Bundle) -> None:
    """Golden tiles pass at their own places and fail at others."""
    moved = replace(bundle, golden=replace(bundle.golden, position=(bundle.golden.positions() + 1) % 4))
    with Engine(bundle.scorer, bundle.manifest.graph, EngineConfig(threads=1)) as engine:
        assert self_test(bundle, engine, 1e-4) < 1e-5
        with pytest.raises(ModelError, match="golden tiles"):
            self_test(moved, engine, 1e-3)


def test_parity_compares_at_the_golden_places(fitted: Path, bundle: Bundle) -> None:
    """A graph whose places were exchanged does not pass the gate, whatever the tiles."""
    run = open_run(fitted)
    exchanged = open_run(fitted).scorer
    exchanged.mean = exchanged.mean.flip(0)
    with pytest.raises(ExportError, match="deviates from torch"):
        check_parity(exchanged, bundle.scorer, bundle.manifest.graph, run.golden_tiles, run.golden_position)


def test_a_run_opened_again_scores_the_same_bits(part: Path, fitted: Path, tmp_path: Path) -> None:
    """Fitting again gives the same numbers, and so does opening again."""
    fit(FitRequest(resolve_recipe("variation_model", QUICK), part, tmp_path / "again", device="cpu"))
    picture = read_picture(part / "test/spoilt/000.png", "rgb")
    found = []
    for path in (fitted, fitted, tmp_path / "again"):
        run = open_run(path)
        found.append(frame_scorer(run.scorer, run.grid, run.reduction)(picture).map)
    assert np.array_equal(found[0], found[1])
    assert np.array_equal(found[0], found[2])


def test_frames_of_another_size_are_refused(part: Path, fitted: Path, bundle: Bundle, tmp_path: Path) -> None:
    """Training's scorer, both evaluations, the score command and the agent say why, and score all other frames."""
    run = open_run(fitted)
    folder = tmp_path / "mixed/test/good"
    folder.mkdir(parents=True)
    good = cv2.imread(str(part / "test/good/000.png"))
    cv2.imwrite(str(folder / "a.png"), good)
    cv2.imwrite(str(folder / "b.png"), good[:, :62])
    found = evaluate(
        open_data(tmp_path / "mixed"),
        frame_scorer(run.scorer, run.grid, run.reduction),
        run.thresholds,
        colour="rgb",
    )
    assert [picture.path for picture in found.pictures] == ["test/good/a.png"]
    assert "64 × 62 pixels" in found.unreadable[0].error
    write_bundle(bundle, tmp_path / "part.kizu")
    assert score_command(tmp_path / "part.kizu", [folder], str(tmp_path / "out.jsonl"), None) == 1
    first, second = (json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines())
    assert "score" in first
    assert "knows each place of frames of 64 × 64" in second["error"]
    inspector = load_inspector(read_bundle(tmp_path / "part.kizu"), EngineConfig(threads=1))
    whole, cropped = good[:, :, ::-1].copy(), good[:, :62, ::-1].copy()
    frames = [_frame(picture) for picture in (cropped, whole)]
    limits = inspector.manifest.thresholds.scores()
    results = inspect_frames(frames, inspector, ModelId("part", "1", "0"), lambda *_: limits, {})
    inspector.close()
    assert results[0].verdict.value == "unknown"
    assert "64 × 62 pixels" in str(results[0].reason)
    assert results[1].verdict.value != "unknown"
    assert results[1].score == pytest.approx(first["score"], rel=1e-4)


def _frame(picture: np.ndarray) -> Frame:
    return Frame("camera", 0, picture, None, time.time_ns(), time.monotonic_ns())


@pytest.mark.parametrize("odd", ["000", "one held out"])
def test_training_pictures_of_another_size_are_refused(part: Path, fitted: Path, tmp_path: Path, odd: str) -> None:
    """The picture is named, whether it is learned from or held out."""
    held_out = json.loads((fitted / "run.json").read_text())["held_out"]
    learned = sorted({path.name for path in (part / "train/good").iterdir()} - {Path(name).name for name in held_out})
    name = learned[0] if odd == "000" else Path(held_out[0]).name
    folder = tmp_path / "parts/train/good"
    folder.mkdir(parents=True)
    for path in (part / "train/good").iterdir():
        picture = cv2.imread(str(path))
        cv2.imwrite(str(folder / path.name), picture[:60] if path.name == name else picture)
    with pytest.raises((DataError, TrainError), match=f"{name}: .*60 × 64 pixels"):
        fit(FitRequest(resolve_recipe("variation_model", QUICK), tmp_path / "parts", tmp_path / "out", device="cpu"))


def test_a_moved_part_is_registered(part: Path, fitted: Path) -> None:
    """A good part moved by three pixels more stays near its score; without the search it would not."""
    run = open_run(fitted)
    score = frame_scorer(run.scorer, run.grid, run.reduction)
    picture = read_picture(part / "test/good/001.png", "rgb")
    moved = np.roll(picture, (2, -2), (0, 1))
    blind = open_run(fitted).scorer
    blind.distance = 1e9 * (blind.distance > 0)  # every shift but none costs too much
    still = frame_scorer(blind, run.grid, run.reduction)
    assert score(moved).score < 1.5 * score(picture).score
    assert still(moved).score > 1.5 * score(moved).score


def test_local_brightness_may_be_left_out(part: Path, tmp_path: Path) -> None:
    """With `local_brightness`, brighter light does not count as a defect."""
    sets = (*QUICK, "variation.local_brightness=true")
    fit(FitRequest(resolve_recipe("variation_model", sets), part, tmp_path / "run", device="cpu"))
    run = open_run(tmp_path / "run")
    score = frame_scorer(run.scorer, run.grid, run.reduction)
    picture = read_picture(part / "test/good/001.png", "rgb")
    brighter = (picture + 30).astype(np.uint8)
    assert score(brighter).score < 1.2 * score(picture).score


def test_places_are_cut_and_joined() -> None:
    """Joining the places of a picture gives it back; an apron shows what lies around each."""
    layout = TileGrid(8, 6).layout(20, 29)
    picture = np.random.default_rng(0).integers(0, 256, (20, 29, 3)).astype(np.float32)
    tiles = layout.cut(picture.astype(np.uint8))
    assert np.array_equal(joined(layout, tiles), picture)
    places = cut_places(layout, picture, 2)
    assert np.array_equal(places[:, 2:-2, 2:-2], tiles)
    assert np.array_equal(places[5 + 1], picture[4:16, 4:16])


def test_registration_finds_a_shift() -> None:
    """A picture moved by a fraction of a pixel is moved back; noise is left where it is."""
    random = np.random.default_rng(3)
    picture = cv2.GaussianBlur(random.normal(128, 60, (80, 96, 1)).astype(np.float32), (0, 0), 3)[:, :, None]
    moved = moved_back(picture, (-2.5, 1.25))
    assert shift_between(picture, moved, 10) == pytest.approx((2.5, -1.25), abs=0.2)
    assert shift_between(picture, moved, 1) == (0.0, 0.0)
    even = np.full_like(picture, 90)
    assert shift_between(even, even, 10) == (0.0, 0.0)


@pytest.mark.parametrize(
    ("override", "why"),
    [
        ("registration.search_px=99", "search_px"),
        ("variation.floor=0.0", "floor"),
        ("variation.tolerance_px=-1.0", "tolerance_px"),
    ],
)
def test_settings_that_make_no_sense(override: str, why: str) -> None:
    """Settings are refused by name."""
    with pytest.raises(UsageError, match=why):
        resolve_recipe("variation_model", [override])


def test_odd_tiles_are_refused() -> None:
    """The search looks at every other pixel."""
    with pytest.raises(UsageError, match="even"):
        VariationModelDetector(VariationModelSettings(), TileShape(15, 1, 5), 0)
