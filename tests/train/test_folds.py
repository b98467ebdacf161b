"""Thresholds from all good pictures: each scored by a detector that never saw it."""

import csv
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kizu_train.__main__ import main
from kizu_train.data import fold_out, open_data
from kizu_train.detectors.base import Extras
from kizu_train.errors import DataError
from kizu_train.fit import FitRequest, fit
from kizu_train.folds import score_folds
from kizu_train.held_out import score_held_out
from kizu_train.recipes import resolve_recipe
from kizu_train.runs import open_run
from kizu_train.tile_pool import TilePool

Draw = Callable[..., list[Path]]


def test_every_picture_is_held_out_once(tmp_path: Path, draw_pictures: Draw) -> None:
    """Folds are of about one size, groups stay together, and the same seed gives the same ones."""
    paths = draw_pictures(tmp_path / "train/good", 20)
    with (tmp_path / "manifest.csv").open("w", newline="") as file:
        csv.writer(file).writerows(
            [["image", "group"], *([f"train/good/{path.name}", f"part{i // 2}"] for i, path in enumerate(paths))]
        )
    pictures = open_data(tmp_path)
    splits = fold_out(pictures, 3, 5)
    assert sorted(path for split in splits for path in split.held_out) == sorted(pictures.train)
    assert [len(split.held_out) for split in splits] == [4] * 5
    groups = dict(zip(pictures.train, pictures.groups, strict=True))
    for split in splits:
        assert not {groups[path] for path in split.learn} & {groups[path] for path in split.held_out}
        assert len(split.learn) == 16
    assert fold_out(pictures, 3, 5) == splits
    assert fold_out(pictures, 4, 5) != splits


@pytest.mark.parametrize("count", [1, 13])
def test_more_folds_than_pictures_are_refused(good_folder: Path, count: int) -> None:
    """With what can be taken instead."""
    with pytest.raises(DataError, match=rf"{count} folds of 12 .* take 2 to 12"):
        fold_out(open_data(good_folder), 0, count)


def test_no_picture_is_scored_by_what_learned_from_it(
    good_folder: Path, quick: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What each detector learns from and what it scores share no picture, and the scores are finite and all there."""
    learned: list[set[Path]] = []
    scored_by: list[set[Path]] = []

    class Spied(TilePool):
        def __init__(self, paths: Sequence[Path], *others: Any) -> None:
            learned.append(set(paths))
            super().__init__(paths, *others)

    def spied(paths: Sequence[Path], *others: Any) -> Any:
        scored_by.append(set(paths))
        return score_held_out(paths, *others)

    monkeypatch.setattr("kizu_train.folds.TilePool", Spied)
    monkeypatch.setattr("kizu_train.folds.score_held_out", spied)
    recipe = resolve_recipe("patch_vae", quick)
    scored = score_folds(open_data(good_folder), recipe, Extras(), 0, "cpu", 3)
    assert sorted(scored.paths) == sorted(good_folder.iterdir())
    assert len(learned) == len(scored_by) == 3
    assert all(not own & others and len(own | others) == 12 for own, others in zip(learned, scored_by, strict=True))
    assert all(len(values) == 12 and np.isfinite(values).all() for values in scored.scores.values())


def test_thresholds_come_from_all_pictures(good_folder: Path, tmp_path: Path, quick: tuple[str, ...]) -> None:
    """The calibration counts them all, the weights are those of a fit without folds, and the run says so."""
    recipe = resolve_recipe("patch_vae", quick)
    runs = {}
    for folds in (0, 4):
        fit(FitRequest(recipe, good_folder, tmp_path / str(folds), "cpu", folds=folds))
        runs[folds] = open_run(tmp_path / str(folds))
    assert (runs[0].calibration.frames, runs[4].calibration.frames) == (5, 12)
    assert runs[4].provenance.metrics["folds"] == 4
    assert "folds" not in runs[0].provenance.metrics
    assert runs[4].provenance.train_pictures == runs[0].provenance.train_pictures == 7
    tiles = runs[0].golden_tiles
    assert np.array_equal(tiles, runs[4].golden_tiles)


def test_the_command_says_where_the_thresholds_come_from(
    good_folder: Path, tmp_path: Path, quick: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    """With folds it counts them; without, and with few pictures, it names them as a way."""
    sets = [f"--set={item}" for item in quick]
    given = ["fit", "patch_vae", "--data", str(good_folder), "--device", "cpu", *sets]
    assert main([*given, "--out", str(tmp_path / "plain")]) == 0
    assert "--folds 5" in capsys.readouterr().out
    assert main([*given, "--out", str(tmp_path / "folded"), "--folds", "3"]) == 0
    out = capsys.readouterr().out
    assert "calibrated on all 12 in 3 folds" in out
    assert "--folds" not in out
    assert main(["fit", "auto", "--data", str(good_folder), "--out", str(tmp_path / "auto"), "--folds", "3"]) == 2
