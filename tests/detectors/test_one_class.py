"""Deep One-Class, metric and geometric learning on generated products, and the localiser on top of them."""

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from kizu_train.detectors.base import Detector, Extras
from kizu_train.errors import DataError, UsageError
from kizu_train.fit import FitRequest, FitSession, fit
from kizu_train.nets.backbones import wanted_shapes
from kizu_train.recipes import list_recipes, parse_recipe, resolve_recipe
from kizu_train.runs import build_detector, open_run, read_record

QUICK = (
    "grid.tile_px=16",
    "grid.stride_px=8",
    "grid.margin_px=8",
    "network.widths=[16,32]",
    "network.size=32",
    "lof.references=300",
    "lof.neighbours=10",
    "train.steps=150",
    "train.batch=16",
    "localiser.unet.widths=[8,16]",
    "localiser.train.steps=120",
    "localiser.train.batch=16",
    "reduction.smooth_sigma_px=2.0",
)
RECIPES = ("doc", "metric_l2_softmax", "metric_arcface", "geometric")


@pytest.fixture
def references(tmp_path: Path) -> Path:
    """Three classes of other things: blots on cloth-like ground, stripes, noise."""
    draw = np.random.default_rng(4)
    y, x = np.mgrid[:48, :48]
    for index in range(6):
        cloth = 120 + 30 * np.sin(x / 4 + draw.uniform(0, 6)) + 30 * np.sin(y / 4 + draw.uniform(0, 6))
        blots = np.asarray(cv2.GaussianBlur(draw.normal(0, 1, (48, 48)), (0, 0), 3))
        things = {
            "blots": np.where(np.abs(blots) > 0.13, cloth + 90 * np.sign(blots), cloth),
            "stripes": 128 + 90 * np.sign(np.sin((x + y * draw.uniform(-1, 1)) / 3)),
            "noise": draw.normal(128, 60, (48, 48)),
        }
        for name, picture in things.items():
            (tmp_path / "others" / name).mkdir(parents=True, exist_ok=True)
            cv2.imwrite(str(tmp_path / "others" / name / f"{index}.png"), np.clip(picture, 0, 255).astype(np.uint8))
    return tmp_path / "others"


@pytest.mark.parametrize("recipe", ["doc", "metric_l2_softmax", "metric_arcface"])
def test_learns_from_other_things(
    recipe: str, make_product: Callable[..., Path], stand_trial: Callable[..., Any], references: Path, tmp_path: Path
) -> None:
    """With classes of other things it ranks spoilt pictures above good ones, as a bundle."""
    data = make_product(tmp_path / "weave", "weave", train=20)
    trial = stand_trial(recipe, data, *QUICK, extras=Extras(references=references))
    assert trial.image_auroc > 0.9
    assert trial.pixel_auroc > 0.8
    assert trial.run.provenance.recipe["extras"].keys() == {"references"}


def test_geometric_needs_nothing_but_good_pictures(
    make_product: Callable[..., Path],
    stand_trial: Callable[..., Any],
    border_share: Callable[..., float],
    tmp_path: Path,
) -> None:
    """Alone it ranks spoilt pictures above good ones, and finds the spots, as a bundle; borders do not stand out."""
    data = make_product(tmp_path / "weave", "weave", train=20)
    trial = stand_trial("geometric", data, *QUICK, "grid.margin_px=0")
    assert trial.image_auroc > 0.9
    assert trial.pixel_auroc > 0.95
    assert border_share(trial.run, data) < 0.75


def _letter(draw: np.random.Generator, side: int, *, is_good: bool) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """An F, which looks different in every turn, or an O, which does not."""
    picture = np.full((side, side), 60.0)
    y, x = (int(by) for by in draw.integers(2, 5, 2))
    if is_good:
        picture[y : y + 10, x : x + 2] = picture[y : y + 2, x : x + 7] = picture[y + 5 : y + 7, x : x + 5] = 200
    else:
        cv2.circle(picture, (x + 5, y + 5), 4, 200, 2)
    return np.clip(picture + draw.normal(0, 4, picture.shape), 0, 255).astype(np.uint8)


def test_score_of_transforms_knows_which_way_up_things_are(stand_trial: Callable[..., Any], tmp_path: Path) -> None:
    """The other kind of score passes all gates too, and tells whole things apart, as in the source."""
    draw = np.random.default_rng(2)
    for folder, count in (("train/good", 20), ("test/good", 10), ("test/other", 10)):
        (tmp_path / "letters" / folder).mkdir(parents=True)
        for index in range(count):
            letter = _letter(draw, 16, is_good=folder != "test/other")
            cv2.imwrite(str(tmp_path / "letters" / folder / f"{index}.png"), letter)
    whole = (
        "score_transforms=true",
        "grid.stride_px=16",
        "grid.margin_px=0",
        "reduction.kind=tile_max",
        "localiser.enabled=false",
    )
    trial = stand_trial("geometric", tmp_path / "letters", *QUICK, *whole, "train.steps=120", score="transforms")
    assert trial.run.score == "transforms"
    assert trial.image_auroc > 0.9


@pytest.mark.parametrize("recipe", RECIPES)
def test_recipes_say_when_to_use_them(recipe: str) -> None:
    """Each is listed with one line."""
    assert len(list_recipes()[recipe]) > 20
    assert resolve_recipe(recipe).score == ("distance" if recipe == "geometric" else "lof")


TINY = (*QUICK, "train.steps=12", "localiser.train.steps=12", "localiser.enabled=true")


def build_detector_of(run: Path) -> Detector:
    """The detector of a run, with what it learned."""
    record = read_record(run)
    detector = build_detector(parse_recipe(record.recipe), record.colour, record.seed)
    detector.load(_weights(run))
    return detector


def _weights(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "weights.safetensors")


def test_runs_open_with_the_same_bits_and_repeat(make_product: Callable[..., Path], tmp_path: Path) -> None:
    """One seed gives one set of weights, an opened run scores as recorded; another seed gives others."""
    data = make_product(tmp_path / "part", "part", train=8, tests=1)
    recipe = resolve_recipe("geometric", TINY)
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        fit(FitRequest(recipe, data, tmp_path / name, device="cpu", seed=seed))
    a, b, c = (_weights(tmp_path / name) for name in "abc")
    assert a.keys() == b.keys()
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert not torch.equal(a["lof.references"], c["lof.references"])
    first, again = open_run(tmp_path / "a"), open_run(tmp_path / "b")
    tiles = torch.from_numpy(first.golden_tiles)
    with torch.no_grad():
        assert torch.equal(first.scorer(tiles)[0], again.scorer(tiles)[0])
        assert torch.equal(first.scorer(tiles)[1], again.scorer(tiles)[1])
        for kind in ("distance", "lof"):
            wanted = open_run(tmp_path / "a", kind).scorer(tiles)
            found = build_detector_of(tmp_path / "a").score_all(tiles)[kind]
            assert torch.equal(wanted[0], found[0])
            assert torch.allclose(wanted[1], found[1], rtol=1e-5)
        alone = torch.cat([first.scorer(tiles[i : i + 1])[0] for i in range(len(tiles))])
        assert torch.allclose(alone, first.scorer(tiles)[0], rtol=1e-4)


@pytest.mark.parametrize("stop_at", [5, 12, 17])
def test_stops_and_resumes_in_either_phase(
    stop_at: int, make_product: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped in either training or between, it leaves a usable run; resumed, it gives the uninterrupted weights."""
    data = make_product(tmp_path / "weave", "weave", train=8, tests=1)
    recipe = resolve_recipe("doc", TINY)
    fit(FitRequest(recipe, data, tmp_path / "whole", device="cpu"))
    asked = threading.Event()
    save = FitSession.save

    def save_until(session: FitSession, step: int, tensors: Callable[[], dict[str, torch.Tensor]]) -> None:
        if step == stop_at:
            asked.set()
        save(session, step, tensors)

    with monkeypatch.context() as patch:
        patch.setattr(FitSession, "save", save_until)
        patch.setattr("kizu_train.fit.FitSession.should_stop", property(lambda self: _note(self, asked.is_set())))
        assert fit(FitRequest(recipe, data, tmp_path / "run", device="cpu")).stopped_early
    assert open_run(tmp_path / "run").stopped_early
    record = fit(FitRequest(recipe, data, tmp_path / "run", device="cpu", resume=True))
    assert not record.stopped_early
    whole, resumed = _weights(tmp_path / "whole"), _weights(tmp_path / "run")
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


def _note(session: FitSession, is_asked: bool) -> bool:
    session.was_stopped = session.was_stopped or is_asked
    return session.was_stopped


def test_builds_on_a_backbone(
    make_product: Callable[..., Path], stand_trial: Callable[..., Any], tmp_path: Path
) -> None:
    """Weights from a file come to stay as they are, are found again in an opened run, and pass all gates."""
    data = make_product(tmp_path / "weave", "weave", train=6, tests=1)
    weights = {f"features.{name}": tensor for name, tensor in _squeezenet().items()}
    save_file(weights, tmp_path / "squeezenet.safetensors")
    wide = ("grid.tile_px=32", "grid.stride_px=32", "localiser.enabled=false", "train.steps=10", "train.batch=4")
    extras = Extras(backbone=tmp_path / "squeezenet.safetensors")
    trial = stand_trial("doc", data, *QUICK, *wide, extras=extras)
    learned = _weights(trial.run.path)
    kept = learned["embedding.body.backbone.features.3.squeeze.weight"]
    assert torch.equal(kept, weights["features.3.squeeze.weight"])
    assert bytes(learned["architecture"].tolist()) == b"squeezenet1_1"


def _squeezenet() -> dict[str, torch.Tensor]:
    """Random weights in the shapes of SqueezeNet 1.1, without the leading `features.`."""
    draw = torch.Generator().manual_seed(0)
    shapes = {name.removeprefix("features."): shape for name, shape in wanted_shapes("squeezenet1_1").items()}
    return {name: 0.1 * torch.randn(shape, generator=draw) for name, shape in shapes.items()}


def test_refuses_what_does_not_fit(make_product: Callable[..., Path], tmp_path: Path) -> None:
    """References without classes, tiles that the localiser cannot halve, extras without use: each with a sentence."""
    data = make_product(tmp_path / "weave", "weave", train=4, tests=1)
    (tmp_path / "none").mkdir()
    with pytest.raises(DataError, match="at least two sub-folders"):
        fit(FitRequest(resolve_recipe("doc", TINY), data, tmp_path / "a", extras=Extras(references=tmp_path / "none")))
    odd = resolve_recipe("geometric", (*TINY, "grid.tile_px=18", "map_cell_px=2"))
    with pytest.raises(UsageError, match="multiple of"):
        fit(FitRequest(odd, data, tmp_path / "b"))
    with pytest.raises(UsageError, match="no use"):
        fit(FitRequest(resolve_recipe("geometric", TINY), data, tmp_path / "c", extras=Extras(references=tmp_path)))
