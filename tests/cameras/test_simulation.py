"""The simulated line: repeatable pictures, visible defects, true masks."""

import time
from pathlib import Path

import cv2
import numpy as np
import pytest

from kizu_agent.cameras.pacing import Pacer
from kizu_agent.simulated_defects import DEFECTS
from kizu_agent.simulated_parts import PARTS
from kizu_agent.simulation import LOOKS, SimulatedLine, write_dataset
from kizu_contract.pictures import list_pictures, read_picture

KINDS = [(part, kind) for part, kinds in DEFECTS.items() for kind in kinds]


@pytest.mark.parametrize("part", PARTS)
def test_pictures_do_not_depend_on_order(part: str) -> None:
    """Picture n is the same in every order, in every instance, and unlike every other."""
    first, second = (SimulatedLine(part, 3, 0.5, 96, 64) for _ in range(2))
    forwards = [first.draw(n) for n in range(8)]
    backwards = [second.draw(n) for n in reversed(range(8))][::-1]
    for one, other in zip(forwards, backwards, strict=True):
        assert np.array_equal(one.image, other.image)
        assert np.array_equal(one.mask, other.mask)
        assert one.defect == other.defect
    assert len({drawn.image.tobytes() for drawn in forwards}) == 8
    assert not np.array_equal(forwards[0].image, SimulatedLine(part, 4, 0.5, 96, 64).draw(0).image)


@pytest.mark.parametrize("part", PARTS)
def test_form_of_what_is_drawn(part: str) -> None:
    """Images are RGB of the asked size, masks of 0 and 255, empty exactly on good parts."""
    line = SimulatedLine(part, 1, 0.5, 100, 70)
    for drawn in map(line.draw, range(20)):
        assert (drawn.image.shape, drawn.image.dtype) == ((70, 100, 3), np.uint8)
        assert (drawn.mask.shape, drawn.mask.dtype) == ((70, 100), np.uint8)
        assert set(np.unique(drawn.mask)) <= {0, 255}
        assert bool(drawn.mask.any()) == (drawn.defect is not None)


def test_share_of_defects_is_the_asked_one() -> None:
    """About the asked share of parts is defective, of every kind, and the truth is known without drawing."""
    line = SimulatedLine("gears", 5, 0.2, 64, 64)
    truth = [line.defect_of(n) for n in range(2000)]
    assert 0.17 < sum(kind is not None for kind in truth) / 2000 < 0.23
    assert set(truth) == {None, *DEFECTS["gears"]}
    assert [line.draw(n).defect for n in range(20)] == truth[:20]
    assert not any(SimulatedLine("gears", 5, 0.0, 64, 64).defect_of(n) for n in range(200))


@pytest.mark.parametrize("look", LOOKS)
@pytest.mark.parametrize(("part", "kind"), KINDS)
def test_defects_show_where_the_mask_says(part: str, kind: str, look: str) -> None:
    """A defect changes the picture clearly inside its mask, and nearly all of the change lies there."""
    line = SimulatedLine(part, 2, look=look)
    reach = np.ones((13, 13), np.uint8)
    shown, strayed, areas = [], [], []
    for index in range(12):
        drawn = line.draw_with(index, kind)
        good = line.draw_with(index, None).image.astype(float)
        change = np.abs(drawn.image.astype(float) - good).mean(axis=2)
        near = cv2.dilate(drawn.mask, reach) > 0
        shown.append(np.percentile(change[drawn.mask > 0], 75))
        strayed.append(change[~near].sum() / change.sum())
        areas.append((drawn.mask > 0).mean())
    assert np.median(shown) > 3 * LOOKS[look].noise
    assert max(strayed) < 0.1
    assert 0.0005 < np.median(areas) < 0.05


def test_good_parts_differ_only_moderately() -> None:
    """Good parts of a fixtured line look alike: their spread is far below the contrast of part and tray."""
    line = SimulatedLine("plates", 1)
    pictures = np.stack([line.draw_with(n, None).image for n in range(20)]).astype(float)
    assert 2 < np.median(pictures.std(axis=0)) < 12
    assert pictures.mean(axis=0)[128, 128].mean() > pictures.mean(axis=0)[2, 2].mean() + 60


def test_drawing_is_fast_enough_for_a_line() -> None:
    """A 256 × 256 picture takes some milliseconds; the bound allows for a busy machine."""
    line = SimulatedLine("gears", 1, 0.1)
    took = []
    for index in range(20):
        began = time.perf_counter()
        line.draw(index)
        took.append(time.perf_counter() - began)
    assert min(took) < 0.025


def test_dataset_has_the_mvtec_layout(tmp_path: Path) -> None:
    """A written data set holds the asked pictures, a mask to each defective one, none that a camera would show."""
    line = SimulatedLine("screws", 6, 0.0, 64, 48)
    write_dataset(tmp_path, line, good=5, test_good=2, defective=6)
    pictures = [path.relative_to(tmp_path) for path in list_pictures(tmp_path)]
    assert sum(path.parts[:2] == ("train", "good") for path in pictures) == 5
    assert sum(path.parts[:2] == ("test", "good") for path in pictures) == 2
    defective = [path for path in pictures if path.parts[0] == "test" and path.parts[1] != "good"]
    assert len(defective) == 6
    assert {path.parts[1] for path in defective} == set(DEFECTS["screws"])
    for path in defective:
        mask = read_picture(tmp_path / "ground_truth" / path.parts[1] / f"{path.stem}_mask.png", "grey")
        assert mask.shape == (48, 64, 1)
        assert mask.any()
    trained = {read_picture(path, "rgb").tobytes() for path in list_pictures(tmp_path / "train")}
    assert not trained & {line.draw(n).image.tobytes() for n in range(20)}


def test_pace_does_not_drift() -> None:
    """Pictures keep to their rate although the work between them takes time."""
    pacer = Pacer(50)
    began = time.monotonic()
    for _ in range(26):
        while not pacer.is_due():
            pass
        time.sleep(0.01)
    assert 0.5 <= time.monotonic() - began < 0.8
