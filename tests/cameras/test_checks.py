"""What a live camera's pictures must keep to before they are judged."""

import dataclasses
import time
from collections.abc import Callable

import numpy as np
import pytest
from numpy.typing import NDArray

from kizu_agent.cameras import checks
from kizu_agent.cameras.checks import Limits, PictureChecks, digest
from kizu_agent.errors import CameraError

Image = NDArray[np.uint8]
LIMITS = Limits(frozen_after_s=10, black_after_s=2, white_after_s=2)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    """Set what the time is."""
    now = [100.0]
    monkeypatch.setattr(checks.time, "monotonic", lambda: now[0])
    return lambda seconds: now.__setitem__(0, 100.0 + seconds)


def picture(number: int, height: int = 120, width: int = 160) -> Image:
    """A picture unlike any of another number."""
    return np.random.default_rng(number).integers(0, 256, (height, width, 3), np.uint8)


def dark(number: int, level: int = 16) -> Image:
    """Noise of a covered sensor, up to `level`."""
    return np.random.default_rng(number).integers(0, level + 1, (120, 160, 3), np.uint8)


def test_pictures_that_differ_pass() -> None:
    """Nothing is doubted about a camera that lives."""
    looked = PictureChecks(LIMITS)
    assert [looked.look(picture(number)) for number in range(5)] == [None] * 5
    assert looked.drops == {}


def test_same_picture_for_long_is_frozen(clock: Callable[[float], None]) -> None:
    """Pictures equal bit by bit pass for frozen_after_s, then the camera is lost; one bit of difference starts anew."""
    looked = PictureChecks(LIMITS)
    assert looked.look(picture(1)) is None
    clock(9)
    assert looked.look(picture(1)) is None
    changed = picture(1)
    changed[-1, -1, -1] ^= 1
    clock(10)
    assert looked.look(changed) is None
    clock(19)
    assert looked.look(changed) is None
    clock(20)
    with pytest.raises(CameraError) as caught:
        looked.look(changed)
    assert caught.value.cause == "frozen"
    assert (looked.frozen, looked.drops) == (digest(changed), {"frozen": 1})


def test_camera_opened_again_is_frozen_until_its_picture_changes(clock: Callable[[float], None]) -> None:
    """The picture at which an earlier process saw it frozen is refused at once; another one ends that."""
    looked = PictureChecks(dataclasses.replace(LIMITS, frozen=digest(picture(1))))
    doubt = looked.look(picture(1))
    assert doubt is not None
    assert (doubt.cause, doubt.is_loss) == ("frozen", False)
    clock(10)
    with pytest.raises(CameraError):
        looked.look(picture(1))
    assert looked.look(picture(2)) is None
    assert looked.frozen is None
    assert looked.look(picture(1)) is None


def test_frozen_is_not_looked_for_when_off(clock: Callable[[float], None]) -> None:
    """With frozen_after_s = 0 a camera may stand still for ever."""
    looked = PictureChecks(Limits())
    for hour in range(3):
        clock(3600 * hour)
        assert looked.look(picture(1)) is None


@pytest.mark.parametrize(("tone", "flip"), [("black", 0), ("white", 255)])
def test_pictures_without_light_are_refused_once_they_last(
    clock: Callable[[float], None], tone: str, flip: int
) -> None:
    """Noise at either end of the scale is judged for a moment, then dropped and a loss, until a good picture comes."""

    def blind(number: int) -> Image:
        return dark(number, level=4) ^ np.uint8(flip)

    looked = PictureChecks(LIMITS)
    assert looked.look(picture(1)) is None
    clock(1)
    assert looked.look(blind(2)) is None
    clock(2.9)
    assert looked.look(blind(3)) is None
    clock(3)
    doubt = looked.look(blind(4))
    assert doubt is not None
    assert (doubt.cause, doubt.is_loss) == (tone, True)
    clock(4)
    assert looked.look(blind(5)) is not None
    assert looked.look(picture(6)) is None
    clock(5)
    assert looked.look(blind(7)) is None
    assert looked.drops == {tone: 2}


def test_camera_never_begins_with_a_dark_picture(clock: Callable[[float], None]) -> None:
    """Until the first good picture dark ones are dropped; a loss they are only once they last."""
    looked = PictureChecks(LIMITS)
    doubts = []
    for second in (0, 1, 2):
        clock(second)
        doubts.append(looked.look(dark(second)))
    assert [doubt is not None and doubt.is_loss for doubt in doubts] == [False, False, True]
    assert looked.look(picture(1)) is None
    assert looked.drops == {"black": 3}


def test_one_blindness_does_not_end_another(clock: Callable[[float], None]) -> None:
    """Whoever switches a lamp full on in a camera that was lost in the dark has not brought it back."""
    looked = PictureChecks(LIMITS)
    assert looked.look(picture(1)) is None
    for second, number in ((0, 2), (2, 3)):
        clock(second)
        looked.look(dark(number))
    doubt = looked.look(dark(4, level=4) ^ np.uint8(255))
    assert doubt is not None
    assert (doubt.cause, doubt.is_loss) == ("white", False)


def test_camera_in_the_dark_is_opened_again_once_a_minute(clock: Callable[[float], None]) -> None:
    """A stuck driver may give empty buffers for ever: after a minute the child gives up, so that it is opened anew."""
    looked = PictureChecks(LIMITS)
    looked.look(dark(1))
    clock(checks.REOPEN_S + 1)
    assert looked.look(dark(2)) is not None
    clock(checks.REOPEN_S + 2)
    with pytest.raises(CameraError) as caught:
        looked.look(dark(3))
    assert caught.value.cause == "black"


@pytest.mark.parametrize(
    ("image", "is_doubted"),
    [
        (dark(1), True),
        (dark(1, level=40), False),
        (np.where(np.arange(160)[None, :, None] < 2, np.uint8(90), dark(1)), False),
        (np.where(np.arange(960)[:, None, None] % 100 == 5, np.uint8(90), np.zeros((960, 960, 3), np.uint8)), False),
        (np.full((120, 160, 1), 3, np.uint8), True),
    ],
    ids=["noise", "dim", "a bright line", "lines between the samples", "grey"],
)
def test_only_pictures_that_show_nothing_are_dark(image: Image, is_doubted: bool) -> None:
    """A dim picture, or a dark one with something narrow in it, is one to judge."""
    assert (PictureChecks(LIMITS).look(image) is not None) == is_doubted


def test_hot_pixels_do_not_make_light() -> None:
    """Some bright pixels of a covered sensor do not hide that it is covered."""
    image = dark(1)
    image[::40, ::40] = 255
    assert PictureChecks(LIMITS).look(image) is not None


def test_light_is_not_looked_at_when_off() -> None:
    """With black_after_s and white_after_s = 0 pictures of any light pass."""
    looked = PictureChecks(Limits(frozen_after_s=10))
    assert looked.look(dark(1)) is None
    assert looked.look(dark(1) ^ np.uint8(255)) is None


def test_another_size_is_a_loss() -> None:
    """The first size holds; a given one holds from the first picture on. Width and height are not mixed up."""
    looked = PictureChecks(LIMITS)
    assert looked.look(picture(1)) is None
    for checked, image in ((looked, picture(2, 160, 120)), (PictureChecks(Limits(size=(320, 240))), picture(1))):
        with pytest.raises(CameraError) as caught:
            checked.look(image)
        assert caught.value.cause == "size_changed"
        assert checked.drops["size_changed"] == 1
    assert PictureChecks(Limits(size=(160, 120))).look(picture(1)) is None


def test_looking_costs_little_of_a_large_picture() -> None:
    """A picture of 1920 × 1200 that lives takes a small part of a frame time; the bound allows for a busy machine."""
    looked = PictureChecks(LIMITS)
    images = [picture(number, 1200, 1920) for number in range(3)]
    took = []
    for turn in range(12):
        began = time.perf_counter()
        looked.look(images[turn % 3])
        took.append(time.perf_counter() - began)
    assert min(took) < 0.005
