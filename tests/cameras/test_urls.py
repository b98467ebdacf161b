"""Camera URLs: what is refused, with which words, and what is never shown."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from kizu_agent.camera_settings import CameraConfig
from kizu_agent.cameras.registry import check_url, open_camera
from kizu_agent.cameras.urls import redact
from kizu_agent.errors import CameraError
from kizu_agent.simulation import SimulatorSettings, read_url


@pytest.mark.parametrize(
    "url",
    [
        "sim:gears",
        "sim:plates?rate=0&seed=3&defects=1&width=64&height=48&count=5&severity=0.5&look=dim",
        "sim:gears?trigger=true&first=2.5&fault=/run/kizu/fault",
        "folder:/srv/a%20b?loop=true&rate=2.5",
        "folder:relative/path",
        "video:/srv/film.mp4?loop=false",
        "rtsp://user:pa/ss@camera.local:8554/live?channel=1&subtype=0",
        "rtsps://10.0.0.1/x",
        "v4l2:/dev/v4l/by-id/usb-1?width=1280&height=720&fps=29.97&fourcc=MJPG",
    ],
)
def test_sound_urls_pass(url: str) -> None:
    """Every documented form of URL is taken, without opening anything."""
    check_url(url)


@pytest.mark.parametrize(
    ("url", "why"),
    [
        ("http://camera/x", "no camera 'http'"),
        ("sim:bolts", "there are gears, plates, screws"),
        ("sim:gears?speed=3", "unknown setting 'speed'; known are count, defects, fault, first, height"),
        ("sim:gears?rate=-1", "rate=-1: must be"),
        ("sim:gears?rate=fast", "rate=fast: must be"),
        ("sim:gears?rate=nan", "must be a number"),
        ("sim:gears?defects=1.5", "must lie between 0 and 1"),
        ("sim:gears?width=10", "must be a whole number from 32"),
        ("sim:gears?seed=1&seed=2", "given twice"),
        ("sim:gears?look=pink", "must be one of dim, noisy, standard"),
        ("folder:/x?loop=yes", "must be true or false"),
        ("folder:/x?speed=1", "known are loop, rate"),
        ("folder:?loop=true", "names no path"),
        ("video:/x?fps=3", "known are loop, rate"),
        ("rtsp:/camera/x", "must be like rtsp://"),
        ("rtsp:///x", "must be like rtsp://"),
        ("rtsp://camera/with a blank", "must be like rtsp://"),
        ("v4l2:/dev/video0?size=3", "known are fourcc, fps, height, width"),
        ("v4l2:/dev/video0?fourcc=MJPEG", "must be four characters"),
        ("v4l2:/dev/video0?fps=0.2", "must lie between 1 and"),
    ],
)
def test_unsound_urls_are_refused_with_reason(url: str, why: str) -> None:
    """A URL that makes no sense says what is wrong and what would be right."""
    with pytest.raises(CameraError) as caught:
        check_url(url)
    assert caught.value.cause == "invalid"
    assert why in str(caught.value)


def test_settings_arrive() -> None:
    """Settings of a simulated camera mean what their names say; live is what has a rate."""
    assert read_url("sim:gears?rate=2.5&seed=9&count=3") == SimulatorSettings("gears", 2.5, 9, count=3)
    assert open_camera("sim:gears?rate=5", 1, 1).is_live
    assert not open_camera("sim:gears?rate=0", 1, 1).is_live
    assert not open_camera("folder:/x", 1, 1).is_live
    assert open_camera("rtsp://host/x", 1, 1).is_live


@given(
    st.text(st.characters(min_codepoint=33, max_codepoint=126), min_size=1, max_size=12).map(lambda text: f"Q{text}Z")
)
def test_passwords_are_redacted(password: str) -> None:
    """A password in a URL inside any text disappears, also one with characters that should have been escaped."""
    text = redact(f"cannot open rtsp://user:{password}@camera.local/live now")
    assert text == "cannot open rtsp://***@camera.local/live now"


@pytest.mark.parametrize("url", ["rtsp:user:hush@camera/x", "rtsp:/user:hush@camera/x", "rtsp://user:a hush@camera"])
def test_passwords_of_mistaken_urls_are_not_told(url: str) -> None:
    """An error about a URL written wrongly does not tell the password in it."""
    with pytest.raises(CameraError) as caught:
        check_url(url)
    assert "hush" not in str(caught.value)
    assert "camera" in str(caught.value)


@pytest.mark.parametrize(
    ("url", "why"),
    [("sim:bolts", "no part 'bolts'"), ("folder:", "names no path"), ("rtsp:user:hush@host/x", "must be like")],
)
def test_configuration_names_unsound_urls(url: str, why: str) -> None:
    """A URL that makes no sense is an error of the configuration, at its key, without its password."""
    with pytest.raises(ValidationError) as caught:
        CameraConfig(name="cam", source=url)
    (problem,) = caught.value.errors(include_url=False, include_input=False)
    assert problem["loc"] == ("source",)
    assert why in problem["msg"]
    assert "hush" not in problem["msg"]


def test_passwords_in_queries_are_redacted() -> None:
    """Cameras that take the password as a setting do not show it either."""
    text = redact("rtsp://camera/live?user=admin&password=hush&channel=1 and rtsp://camera/user=a_password=hush_x")
    assert "hush" not in text
    assert "admin" not in text
    assert "channel=1" in text
