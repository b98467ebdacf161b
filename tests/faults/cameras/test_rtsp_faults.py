"""A network camera plays, stalls, dies and comes back otherwise: against a real RTSP server."""

import sys
from pathlib import Path

import pytest

if not sys.platform.startswith("linux"):
    pytest.skip("captures need Linux", allow_module_level=True)

from faults.cameras import rtsp_scenarios

pytestmark = pytest.mark.slow

CAUSES = {
    "rtsp_stalled": ("lost", "timeout"),
    "rtsp_killed": ("unreachable", "lost"),
    "rtsp_wrong_path": ("not_found",),
    "rtsp_wrong_password": ("unauthorised",),
    "rtsp_other_size": ("size_changed",),
    "rtsp_slow_first_picture": ("lost", "unreachable"),
}
"""Scenario → causes that the state may name in the end."""


IN_TESTS = ("rtsp_stalled", "rtsp_killed", "rtsp_wrong_password", "rtsp_other_size")
"""The others are tried by scripts/bench faults."""


@pytest.fixture(autouse=True)
def _server() -> None:
    missing = rtsp_scenarios.what_is_missing()
    if missing:
        pytest.skip(missing)


@pytest.mark.parametrize("codec", ["jpeg", "h264"])
def test_stream_is_judged(codec: str, tmp_path: Path) -> None:
    """Pictures of a real server are judged, and a stream that goes on is never lost."""
    seconds, losses = rtsp_scenarios.rtsp_plays(tmp_path, codec)
    assert losses == 0
    assert seconds < 60


@pytest.mark.parametrize("name", IN_TESTS)
def test_fault_is_named_counted_logged_once_and_recovered_from(name: str, tmp_path: Path) -> None:
    """Whatever the server does, one loss is counted and told, unknown is shown, and the stream comes back by itself."""
    outcome = rtsp_scenarios.SCENARIOS[name](tmp_path)
    assert outcome.cause in CAUSES[name]
    assert sum(outcome.losses.values()) == 1
    assert outcome.shown == ("unknown",)
    assert (outcome.logs_on_loss, outcome.logs_on_return) == (1, 1)
    assert 0 < outcome.noticed_s < 30
    assert 0 < outcome.recovered_s < 60
    if name == "rtsp_other_size":
        assert outcome.drops["size_changed"] > 0
