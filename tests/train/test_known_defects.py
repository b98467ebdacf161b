"""Known defects: two layouts, clear refusals, pasted where the mask says."""

from pathlib import Path

import cv2
import numpy as np
import pytest

from kizu_train.errors import DataError
from kizu_train.known_defects import read_known_defects


def _draw(picture: Path, mask: Path | None, *, marked: bool = True, side: int = 80) -> None:
    drawn, marks = np.full((side, side, 3), 100, np.uint8), np.zeros((side, side), np.uint8)
    if marked:
        drawn[30:36, 40:50], marks[30:36, 40:50] = (0, 0, 250), 255
    for path, pixels in ((picture, drawn), (mask, marks)):
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            assert cv2.imwrite(str(path), pixels)


@pytest.mark.parametrize(
    ("given", "picture", "mask"),
    [
        ("", "crack/a.png", "ground_truth/crack/a_mask.png"),
        ("", "crack/a.png", "crack/a_mask.png"),
        ("", "a.png", "a_mask.png"),
        ("", "test/crack/a.png", "ground_truth/crack/a_mask.png"),
        ("test", "test/crack/a.png", "ground_truth/crack/a_mask.png"),
    ],
)
def test_reads_layouts(tmp_path: Path, given: str, picture: str, mask: str) -> None:
    """MVTec's layout, its test folder alone, and masks beside pictures."""
    _draw(tmp_path / picture, tmp_path / mask)
    _draw(tmp_path / given / "good/b.png", None, marked=False)
    known = read_known_defects(tmp_path / given, 3, 64)
    assert len(known.regions) == 1
    assert known.regions[0].mask.sum() == 60
    assert known.regions[0].pixels.shape == (*known.regions[0].mask.shape, 3)


def test_pastes_what_is_marked(tmp_path: Path) -> None:
    """A red mark on grey turns up on darker tiles, under its mask and nowhere else; each time another way."""
    _draw(tmp_path / "a.png", tmp_path / "a_mask.png")
    known = read_known_defects(tmp_path, 3, 64)
    random = np.random.default_rng(0)
    tile = np.full((64, 64, 3), 60, np.float32)
    places = set()
    for _ in range(12):
        spoilt, mask = known.paste(tile, random)
        redness = spoilt[:, :, 0] - spoilt[:, :, 2]
        assert mask.shape == (64, 64)
        assert mask.max() > 0.9
        assert redness[mask > 0.9].min() > 100
        assert redness[cv2.dilate(mask, np.ones((15, 15))) == 0].max() < 1
        places.add(tuple(np.argwhere(mask > 0.5).mean(0).round()))
    assert len(places) > 8


def test_grey_tiles_take_colour_pictures(tmp_path: Path) -> None:
    """A detector on grey tiles reads the same pictures as grey."""
    _draw(tmp_path / "a.png", tmp_path / "a_mask.png")
    spoilt, _ = read_known_defects(tmp_path, 1, 64).paste(np.zeros((64, 64, 1), np.float32), np.random.default_rng(0))
    assert spoilt.shape == (64, 64, 1)


def test_refuses_what_it_cannot_use(tmp_path: Path) -> None:
    """Each refusal names the file and what to do."""
    with pytest.raises(DataError, match="is not a folder"):
        read_known_defects(tmp_path / "none", 3, 64)
    with pytest.raises(DataError, match="holds no pictures"):
        read_known_defects(tmp_path, 3, 64)
    _draw(tmp_path / "a.png", None)
    with pytest.raises(DataError, match=r"a\.png: has no mask"):
        read_known_defects(tmp_path, 3, 64)
    _draw(tmp_path / "a.png", tmp_path / "a_mask.png", marked=False)
    with pytest.raises(DataError, match="no mask marks anything"):
        read_known_defects(tmp_path, 3, 64)
    _draw(tmp_path / "a.png", None, side=40)
    with pytest.raises(DataError, match="80 × 80"):
        read_known_defects(tmp_path, 3, 64)
