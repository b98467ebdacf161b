"""Data folders and the hold-out."""

import csv
import shutil
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
import pytest
from hypothesis import event, given
from hypothesis import strategies as st

from kizu_contract.tiles import FrameSize
from kizu_train.data import PictureSet, hold_out, open_data
from kizu_train.errors import DataError

Draw = Callable[..., list[Path]]


def test_plain_folder(good_folder: Path) -> None:
    """A plain folder is all good pictures, grey where each of them is, and has nothing to test on."""
    pictures = open_data(good_folder)
    assert (len(pictures.train), pictures.tests, pictures.colour) == (12, (), "grey")


def test_mvtec_layout(tmp_path: Path, draw_pictures: Draw) -> None:
    """The MVTec layout gives good pictures, test pictures by kind and the mask of each defect that has one."""
    draw_pictures(tmp_path / "train/good", 3, grey=False)
    draw_pictures(tmp_path / "test/good", 1, grey=False)
    draw_pictures(tmp_path / "test/crack", 2, grey=False)
    (tmp_path / "ground_truth/crack").mkdir(parents=True)
    mask = tmp_path / "ground_truth/crack/001_mask.png"
    cv2.imwrite(str(mask), np.zeros((40, 56), np.uint8))
    pictures = open_data(tmp_path)
    assert pictures.colour == "rgb"
    assert len(pictures.train) == 3
    found = [(test.kind, test.is_good, test.mask) for test in pictures.tests]
    assert found == [("crack", False, None), ("crack", False, mask), ("good", True, None)]
    assert open_data(tmp_path, with_tests=False).tests == ()


def test_colour_of_grey_pictures_stored_as_rgb(tmp_path: Path) -> None:
    """Pictures of three equal channels are grey; one coloured pixel makes the set rgb; a wish overrules both."""
    grey = np.repeat(np.arange(48, dtype=np.uint8).reshape(6, 8, 1), 3, axis=2)
    cv2.imwrite(str(tmp_path / "a.png"), grey)
    assert open_data(tmp_path).colour == "grey"
    assert open_data(tmp_path, "rgb").colour == "rgb"
    grey[2, 3] = (0, 0, 200)
    cv2.imwrite(str(tmp_path / "b.png"), grey)
    assert open_data(tmp_path).colour == "rgb"


def test_one_size_is_noted(good_folder: Path) -> None:
    """The size that all good pictures share is known; a single one of another size, and there is none."""
    height, width = np.asarray(cv2.imread(str(good_folder / "000.png"))).shape[:2]
    assert open_data(good_folder).size == FrameSize(height, width)
    cv2.imwrite(str(good_folder / "turned.png"), np.zeros((width, height), np.uint8))
    assert open_data(good_folder).size is None


def test_unreadable_files_are_named_and_left_out(good_folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A damaged file is left out and its name is logged; the others are used."""
    (good_folder / "005.png").write_bytes(b"\x89PNG\r\n\x1a\nno")
    (good_folder / "empty.jpg").touch()
    pictures = open_data(good_folder)
    assert [path.name for path in pictures.unreadable] == ["005.png", "empty.jpg"]
    assert len(pictures.train) == 11
    assert "005.png" in caplog.text
    assert "empty.jpg" in caplog.text


@pytest.mark.parametrize("make", [lambda _: None, Path.mkdir, lambda path: (path / "train/good").mkdir(parents=True)])
def test_nothing_to_use(tmp_path: Path, make: Callable[[Path], None]) -> None:
    """A missing or empty folder is refused by name."""
    make(tmp_path / "parts")
    with pytest.raises(DataError, match="parts"):
        open_data(tmp_path / "parts")


def test_test_pictures_without_a_kind(tmp_path: Path, draw_pictures: Draw) -> None:
    """A test picture that lies in no kind's folder is refused, since nobody knows whether it is good."""
    draw_pictures(tmp_path / "test", 1)
    with pytest.raises(DataError, match="test/good"):
        open_data(tmp_path)


def test_fingerprint(good_folder: Path, tmp_path: Path) -> None:
    """The fingerprint follows names and contents, and nothing else."""
    before = open_data(good_folder).fingerprint
    copy = tmp_path / "copy"
    shutil.copytree(good_folder, copy)
    assert open_data(copy).fingerprint == before
    (copy / "000.png").rename(copy / "zzz.png")
    renamed = open_data(copy).fingerprint
    (copy / "zzz.png").write_bytes((copy / "001.png").read_bytes())
    assert len({before, renamed, open_data(copy).fingerprint}) == 3


def test_groups_of_the_manifest_stay_together(tmp_path: Path, draw_pictures: Draw) -> None:
    """Pictures of one group in manifest.csv are never parted, also where its names begin above the folder."""
    paths = draw_pictures(tmp_path / "train/good", 20)
    with (tmp_path / "manifest.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["image", "group"])
        writer.writerows([f"set/train/good/{path.name}", f"part{i // 4}"] for i, path in enumerate(paths))
    pictures = open_data(tmp_path)
    assert pictures.groups[:5] == ("part0",) * 4 + ("part1",)
    for seed in range(10):
        split = hold_out(pictures, seed)
        groups = dict(zip(pictures.train, pictures.groups, strict=True))
        assert not {groups[path] for path in split.learn} & {groups[path] for path in split.held_out}
        assert len(split.held_out) == 4


def _set(hashes: list[str], groups: list[str | None]) -> PictureSet:
    train = tuple(Path(f"{i:03}.png") for i in range(len(hashes)))
    return PictureSet(Path(), train, (), "grey", "", (), tuple(hashes), tuple(groups))


@given(
    st.lists(st.tuples(st.integers(0, 40), st.one_of(st.none(), st.integers(0, 12))), min_size=2, max_size=60),
    st.integers(0, 99),
)
def test_hold_out_leaks_nothing(keys: list[tuple[int, int | None]], seed: int) -> None:
    """Both sides hold something, no content and no group lies on both, and the same seed parts them alike."""
    pictures = _set([str(content) for content, _ in keys], [None if group is None else str(group) for _, group in keys])
    try:
        split = hold_out(pictures, seed)
    except DataError:
        event("refused: all belong together")
        return
    sides = [[pictures.train.index(path) for path in side] for side in (split.learn, split.held_out)]
    assert all(sides)
    assert sorted(sides[0] + sides[1]) == list(range(len(keys)))
    for values in (pictures.hashes, pictures.groups):
        learn, held_out = ({values[i] for i in side} - {None} for side in sides)
        assert not learn & held_out
    assert hold_out(pictures, seed) == split


@pytest.mark.parametrize(("count", "wanted"), [(2, 1), (8, 4), (12, 5), (36, 7), (766, 153)])
def test_hold_out_size(count: int, wanted: int) -> None:
    """About a fifth is held out, at least 5 where that leaves half to learn from."""
    pictures = _set([str(i) for i in range(count)], [None] * count)
    split = hold_out(pictures, 1)
    assert len(split.held_out) == wanted
    assert hold_out(pictures, 2) != split or count == 2


def test_one_group_cannot_be_parted() -> None:
    """Pictures that all belong together cannot calibrate themselves: refused with the reason."""
    with pytest.raises(DataError, match="must stay together"):
        hold_out(_set(["a", "b", "c"], ["one"] * 3), 0)
