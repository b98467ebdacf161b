"""Zones: what counts, by which thresholds, from which size on."""

import math

import cv2
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from kizu_agent.camera_settings import CameraConfig, Region, ZoneConfig
from kizu_agent.zones import ZoneMasks, largest_piece, least_area_px, masks_of
from kizu_contract.judging import Thresholds, Verdict

LIMITS = Thresholds(10.0, 20.0)
LEFT = ((0, 0), (19, 0), (19, 29), (0, 29))
RIGHT = ((20, 0), (39, 0), (39, 29), (20, 29))


def zone(name: str = "left", **members: object) -> ZoneConfig:
    return ZoneConfig.model_validate({"name": name, "polygon": LEFT, **members})


def flat(level: float = 1.0) -> NDArray[np.float32]:
    return np.full((30, 40), level, np.float32)


def test_only_what_is_included_counts() -> None:
    """A flaw beside the zone, or in a part that is excluded from it, is not seen."""
    hole = zone("hole", kind="exclude", polygon=((5, 5), (10, 5), (10, 10), (5, 10)))
    masks = ZoneMasks((zone(), hole), None, 30, 40)
    found = flat()
    found[:, 20:] = 99
    found[5:11, 5:11] = 99
    assert masks.judge(found, LIMITS).worst.verdict is Verdict.OK
    found[11, 5] = 15
    judged = masks.judge(found, LIMITS).worst
    assert (judged.verdict, judged.score, judged.area_px, judged.name) == (Verdict.WARN, 15.0, 1, "left")
    assert int(masks.inside.sum()) == 20 * 30 - 36


def test_with_nothing_included_all_but_the_excluded_counts() -> None:
    """Excluding alone leaves the rest, under the name `rest`."""
    masks = ZoneMasks((zone(kind="exclude"),), None, 30, 40)
    found = flat()
    found[3, 3], found[3, 30] = 99, 12
    judged = masks.judge(found, LIMITS).worst
    assert (judged.name, judged.score, judged.verdict) == ("rest", 12.0, Verdict.WARN)


def test_each_zone_has_its_own_thresholds_and_the_worst_stands_for_the_frame() -> None:
    """Worse is the verdict first, then the ratio: a large score in a lenient zone is not the frame's."""
    masks = ZoneMasks((zone(threshold_factor=5.0), zone("right", polygon=RIGHT)), None, 30, 40)
    found = flat()
    found[2, 2], found[2, 30] = 49.0, 25.0
    judged = masks.judge(found, LIMITS)
    assert [(part.name, part.verdict, part.thresholds.reject) for part in judged.zones] == [
        ("left", Verdict.OK, 100.0),
        ("right", Verdict.REJECT, 20.0),
    ]
    assert (judged.worst.name, judged.worst.score, judged.worst.ratio) == ("right", 25.0, 1.25)


@pytest.mark.parametrize(("least", "verdict"), [(0, "reject"), (4, "reject"), (5, "warn"), (9, "warn"), (10, "ok")])
def test_a_flaw_counts_from_its_least_area_on(least: int, verdict: str) -> None:
    """A piece of 9 px at warn, of which 4 px reject: each verdict asks for the area at its own threshold."""
    found = flat()
    found[4:7, 4:7] = 15
    found[4:6, 4:6] = 30
    judged = ZoneMasks((zone(min_area_px=least),), None, 30, 40).judge(found, LIMITS).worst
    assert judged.verdict == verdict
    assert judged.area_px == 9
    assert LIMITS.verdict(judged.score) == judged.verdict


def test_pieces_that_touch_at_corners_are_one() -> None:
    """Eight neighbours, as in AU-PRO; two pieces apart do not add up."""
    found = flat()
    found[2, 2] = found[3, 3] = 30
    judge = ZoneMasks((zone(min_area_px=2),), None, 30, 40).judge
    assert judge(found, LIMITS).worst.verdict is Verdict.REJECT
    found[3, 3], found[9, 9] = 1, 30
    assert judge(found, LIMITS).worst.verdict is Verdict.OK


@given(st.integers(0, 2**32 - 1), st.integers(1, 40))
def test_score_and_verdict_never_contradict(seed: int, least: int) -> None:
    """For any map: the score is the highest level whose pieces are large enough, and the verdict is that score's."""
    noise = np.random.default_rng(seed).gamma(2.0, 4.0, (30, 40)).astype(np.float32)
    found = np.asarray(cv2.GaussianBlur(noise, (5, 5), 1.0), np.float32) * np.float32(1.5)
    judged = ZoneMasks((zone(min_area_px=least),), None, 30, 40).judge(found, LIMITS).worst
    inside = found[:, :20]
    assert judged.verdict is LIMITS.verdict(judged.score)
    for verdict, level in ((Verdict.WARN, LIMITS.warn), (Verdict.REJECT, LIMITS.reject)):
        is_large = largest_piece(inside, level) >= least
        assert (judged.score >= level) is is_large, verdict
    if inside.max() >= LIMITS.warn:
        levels = np.unique(inside.astype(np.float64))
        exact = max((level for level in levels if largest_piece(inside, level) >= least), default=levels[0])
        assert judged.score == pytest.approx(exact, rel=1e-3)


def test_a_map_that_is_no_number_is_unknown() -> None:
    """NaN inside is unknown, and worse than reject; outside it is nobody's business."""
    masks = ZoneMasks((zone(), zone("right", polygon=RIGHT)), None, 30, 40)
    found = flat()
    found[1, 1], found[1, 30] = math.nan, 99
    assert masks.judge(found, LIMITS).worst.verdict is Verdict.UNKNOWN
    assert ZoneMasks((zone("right", polygon=RIGHT),), None, 30, 40).judge(found, LIMITS).worst.verdict is Verdict.REJECT


def test_areas_in_mm2() -> None:
    """2 mm² at 0.1 mm/px are 200 px; the larger of both limits holds."""
    assert least_area_px(zone(min_area_mm2=2.0), 0.1) == 200
    assert least_area_px(zone(min_area_mm2=2.0, min_area_px=300), 0.1) == 300
    assert least_area_px(zone(), 0.1) == 1
    assert least_area_px(zone(min_area_mm2=0.011), 0.1) == 2


def test_zones_lie_in_the_picture_not_in_the_region() -> None:
    """Corners are pixels of the whole picture: with a region they are moved, and outside of it refused."""
    region = Region(x=100, y=50, width=40, height=30)
    inside = zone(polygon=((100, 50), (119, 50), (119, 79), (100, 79)))
    assert np.array_equal(ZoneMasks((inside,), region, 30, 40).inside, ZoneMasks((zone(),), None, 30, 40).inside)
    with pytest.raises(ValueError, match="zone left: lies outside the inspected region of 40 × 30 px"):
        ZoneMasks((zone(),), region, 30, 40)
    with pytest.raises(ValueError, match="zone rest: nothing is left"):
        ZoneMasks((zone(kind="exclude", polygon=((0, 0), (39, 0), (39, 29), (0, 29))),), None, 30, 40)
    with pytest.raises(ValueError, match="nothing is left"):
        ZoneMasks((zone(), zone("hole", kind="exclude")), None, 30, 40)


def test_masks_are_drawn_once() -> None:
    """The same zones and size give the same object: nothing is drawn for each frame."""
    zones = (zone(),)
    assert masks_of(zones, None, 30, 40) is masks_of((zone(),), None, 30, 40)
    assert masks_of(zones, None, 30, 40) is not masks_of(zones, None, 31, 40)


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ({"polygon": ((0, 0), (5, 5))}, "at least 3"),
        ({"polygon": ((0, 0), (5, 5), (9, 9))}, "one line"),
        ({"polygon": ((0, 0), (-5, 5), (9, 9))}, "greater than or equal to 0"),
        ({"kind": "exclude", "min_area_px": 5}, "not judged"),
        ({"threshold_factor": 0.0}, "greater than 0"),
    ],
)
def test_a_zone_that_makes_no_sense_is_refused(members: dict[str, object], message: str) -> None:
    """Each with a word on what is wrong."""
    with pytest.raises(ValueError, match=message):
        zone(**members)


def test_a_camera_refuses_zones_that_share_a_name_or_lack_a_scale() -> None:
    """Results are told by a zone's name, and mm² need mm."""
    base = {"name": "cam", "source": "sim:gears"}
    with pytest.raises(ValueError, match="share a name: left"):
        CameraConfig.model_validate({**base, "zones": [zone(), zone()]})
    with pytest.raises(ValueError, match="mm_per_px"):
        CameraConfig.model_validate({**base, "zones": [zone(min_area_mm2=1.0)]})
