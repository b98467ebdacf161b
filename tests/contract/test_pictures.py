"""Pictures from files: one decoding for training and the edge."""

from contextlib import suppress
from pathlib import Path

import cv2
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kizu_contract.errors import PictureError
from kizu_contract.pictures import decode_picture, list_pictures, read_picture, to_colour

RGB = np.random.default_rng(0).integers(0, 256, (5, 7, 3), np.uint8)
GREY = RGB[:, :, :1]


def encoded(picture: np.ndarray, suffix: str = ".png") -> bytes:
    """`picture` as OpenCV would write it: channels in blue, green, red order."""
    return cv2.imencode(suffix, picture)[1].tobytes()


@pytest.mark.parametrize("suffix", [".png", ".bmp", ".tiff"])
def test_a_lossless_picture_comes_back_to_the_bit(tmp_path: Path, suffix: str) -> None:
    """Colour files come as RGB, grey files as one channel."""
    (tmp_path / f"c{suffix}").write_bytes(encoded(RGB[:, :, ::-1], suffix))
    (tmp_path / f"g{suffix}").write_bytes(encoded(GREY, suffix))
    np.testing.assert_array_equal(read_picture(tmp_path / f"c{suffix}", "rgb"), RGB)
    np.testing.assert_array_equal(read_picture(tmp_path / f"g{suffix}", "grey"), GREY)
    np.testing.assert_array_equal(read_picture(tmp_path / f"g{suffix}", "rgb"), GREY.repeat(3, axis=2))


def test_alpha_is_dropped_and_sixteen_bits_become_eight() -> None:
    """Every picture has one or three channels of eight bits."""
    with_alpha = np.dstack([RGB[:, :, ::-1], np.zeros((5, 7), np.uint8)])
    np.testing.assert_array_equal(decode_picture(encoded(with_alpha)), RGB)
    deep = decode_picture(encoded(GREY.astype(np.uint16) * 257))
    assert deep.dtype == np.uint8
    np.testing.assert_array_equal(deep, GREY)


def test_colour_becomes_grey_by_luminance() -> None:
    """Grey is OpenCV's Rec. 601 luminance; a picture already in its colour is not copied."""
    grey = to_colour(RGB, "grey")
    np.testing.assert_allclose(grey[..., 0], RGB @ [0.299, 0.587, 0.114], atol=1)
    assert to_colour(RGB, "rgb") is RGB
    assert to_colour(grey, "grey") is grey


@pytest.mark.parametrize(
    "picture",
    [
        np.zeros((4, 4), np.uint8),
        np.zeros((4, 4, 2), np.uint8),
        np.zeros((4, 4, 4), np.uint8),
        np.zeros((0, 4, 1), np.uint8),
        np.zeros((4, 4, 3), np.uint16),
    ],
)
def test_arrays_of_another_form_are_refused(picture: np.ndarray) -> None:
    """Anything but uint8 [H, W, 1 or 3] raises PictureError."""
    with pytest.raises(PictureError, match="must be uint8"):
        to_colour(picture, "rgb")


def test_what_cannot_be_read_is_named(tmp_path: Path) -> None:
    """Missing, empty, damaged and foreign files raise PictureError that names the file."""
    (tmp_path / "empty.png").touch()
    (tmp_path / "text.png").write_text("no picture")
    (tmp_path / "folder.png").mkdir()
    for name in ("missing.png", "empty.png", "text.png", "folder.png"):
        with pytest.raises(PictureError, match=name):
            read_picture(tmp_path / name, "rgb")


def test_a_huge_file_is_refused_unread(tmp_path: Path) -> None:
    """A file beyond the limit is refused by its size."""
    with (tmp_path / "huge.png").open("wb") as file:
        file.truncate(2**28 + 1)
    with pytest.raises(PictureError, match="at most"):
        read_picture(tmp_path / "huge.png", "rgb")


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(data=st.binary(max_size=100), cut=st.integers(0, 200))
def test_damaged_pictures_raise_our_error_or_decode(data: bytes, cut: int) -> None:
    """Whatever the bytes, decoding gives a picture or PictureError."""
    png = encoded(RGB)
    for damaged in (data, png[:cut] + data + png[cut + len(data) :]):
        with suppress(PictureError):
            assert decode_picture(damaged).dtype == np.uint8


def test_a_jpeg_that_is_cut_short_is_refused() -> None:
    """OpenCV must not fill it up with grey: wherever it is cut, also with zeros after it or a thumbnail before."""
    picture = np.random.default_rng(1).integers(0, 256, (64, 64, 3), np.uint8)
    whole = cv2.imencode(".jpg", picture, [cv2.IMWRITE_JPEG_PROGRESSIVE, 1])[1].tobytes()
    thumbnail = b"\xff\xe1\x00\x06\xff\xd9\xff\xd9"
    headed = whole[:2] + thumbnail + whole[2:]
    for cut in (1, 2, len(headed) // 3, len(headed) // 2, len(headed) - 20):
        for rest in (b"", bytes(500)):
            with pytest.raises(PictureError):
                decode_picture(headed[:-cut] + rest)
    assert np.array_equal(decode_picture(headed + b"more"), decode_picture(whole))


def test_pictures_are_listed_in_one_order(tmp_path: Path) -> None:
    """Sub-folders are searched, hidden and foreign files left out, and the order is that of the relative paths."""
    for name in ("b.png", "a/2.JPG", "a/10.jpeg", "a/.x.png", ".git/c.png", "notes.txt", "d.tiff"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "folder.png").mkdir()
    found = [path.relative_to(tmp_path).as_posix() for path in list_pictures(tmp_path)]
    assert found == ["a/10.jpeg", "a/2.JPG", "b.png", "d.tiff"]


def test_a_folder_that_cannot_be_listed_is_an_error(tmp_path: Path) -> None:
    """A folder that is not there is not taken for one without pictures."""
    with pytest.raises(OSError, match="gone"):
        list_pictures(tmp_path / "gone")
