"""What a network camera does to an agent, against a real RTSP server: GStreamer's, in rtsp_server.py."""

import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType

from faults.cameras.camera_rig import CameraOutcome, Plant, Process, answers, wait_until
from faults.cameras.camera_scenarios import observe
from faults.plant import free_port

SYSTEM_PYTHON = "/usr/bin/python3"
PACKAGES = (
    "python3-gi gir1.2-gst-rtsp-server-1.0 gstreamer1.0-plugins-base gstreamer1.0-plugins-good gstreamer1.0-plugins-bad"
)
_NEEDED = (
    "import gi; gi.require_version('Gst', '1.0'); gi.require_version('GstRtspServer', '1.0')\n"
    "from gi.repository import Gst, GstRtspServer\nGst.init(None)\n"
    "names = 'videotestsrc jpegenc rtpjpegpay openh264enc rtph264pay'.split()\n"
    "raise SystemExit(' '.join(name for name in names if Gst.ElementFactory.find(name) is None) or 0)"
)


def what_is_missing() -> str | None:
    """What keeps the server from running here, and what to install; None where nothing does."""
    try:
        tried = subprocess.run([SYSTEM_PYTHON, "-c", _NEEDED], capture_output=True, text=True, timeout=60, check=False)
    except OSError as exc:
        return f"the RTSP scenarios need {SYSTEM_PYTHON}: {exc.strerror}"
    if tried.returncode == 0:
        return None
    return f"the RTSP scenarios need a real server; run: apt-get install {PACKAGES}\n{tried.stderr[-500:]}"


class RtspServer:
    """The server on its port, again and again with other settings; a context manager."""

    def __init__(self, folder: Path, **settings: str) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.port = free_port()
        self._log = folder / "rtsp.log"
        self._process: Process | None = None
        self.start(**settings)

    def start(self, **settings: str) -> None:
        """Start it afresh on the same port; returns when it takes connections."""
        self.kill()
        script = Path(__file__).with_name("rtsp_server.py")
        pairs = [f"{key}={value}" for key, value in settings.items()]
        self._process = Process([SYSTEM_PYTHON, str(script), str(self.port), *pairs], self._log)
        wait_until(lambda: answers(self.port), 30, f"the RTSP server: {self._log.read_text()}")

    def signal(self, number: signal.Signals) -> None:
        """Send it a signal."""
        if self._process is not None:
            self._process.signal(number)

    def kill(self) -> None:
        """Kill it with SIGKILL. Idempotent."""
        if self._process is not None:
            self._process.kill()
            self._process = None

    def __enter__(self) -> "RtspServer":  # noqa: PYI034 - Self came with Python 3.11
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.kill()


def _plant(folder: Path, server: RtspServer, user: str = "") -> Plant:
    # The server takes two seconds to open a stream on a quiet machine.
    options = {"stale_after_s": 2.0, "read_timeout_s": 2.0, "open_timeout_s": 10.0, "unauthorised_retry_s": 2.0}
    return Plant(folder / "plant", f"rtsp://{user}127.0.0.1:{server.port}/live", **options)


def rtsp_plays(folder: Path, codec: str = "jpeg") -> tuple[float, int]:
    """Nothing goes wrong: seconds from the agent's start to the first verdict, and losses in five seconds after it."""
    began = time.monotonic()
    with RtspServer(folder, codec=codec) as server, _plant(folder, server) as plant:
        judged, _ = plant.until_judged()
        time.sleep(5.0)
        _, state = plant.until_judged(time.monotonic())
        return judged - began, state["counters"]["losses"]


def rtsp_stalled(folder: Path) -> CameraOutcome:
    """The camera's process stops (SIGSTOP) with its connection open, and goes on later."""
    with RtspServer(folder) as server, _plant(folder, server) as plant:
        return observe(
            plant,
            "rtsp stalled",
            "SIGSTOP of the RTSP server, SIGCONT later",
            fault=lambda: server.signal(signal.SIGSTOP),
            mend=lambda: server.signal(signal.SIGCONT),
            lasts_s=3.0,
        )


def _restarted(folder: Path, scenario: str, done: str, cause: str | None, **settings: str) -> CameraOutcome:
    """Start the server with other `settings` (none: kill it) until the state names `cause`, then again as before."""
    usual = {"user": "me", "password": "right"}
    with RtspServer(folder, **usual) as server, _plant(folder, server, "me:right@") as plant:
        return observe(
            plant,
            scenario,
            done,
            fault=lambda: server.start(**{**usual, **settings}) if settings else server.kill(),
            mend=lambda: server.start(**usual),
            is_known=lambda state: state["condition"] == "lost" and cause in (None, state["cause"]),
            lasts_s=3.0,
        )


def rtsp_killed(folder: Path) -> CameraOutcome:
    """The camera loses its power, and has it again."""
    return _restarted(folder, "rtsp killed", "SIGKILL of the RTSP server, started again later", None)


def rtsp_wrong_path(folder: Path) -> CameraOutcome:
    """The camera comes back with its stream under another path."""
    return _restarted(folder, "rtsp wrong path", "server restarted with another path", "not_found", path="/other")


def rtsp_wrong_password(folder: Path) -> CameraOutcome:
    """The camera comes back with another password."""
    done = "server restarted with another password"
    return _restarted(folder, "rtsp wrong password", done, "unauthorised", password="other")  # noqa: S106


def rtsp_other_size(folder: Path) -> CameraOutcome:
    """The camera comes back from its restart with another size."""
    done = "server restarted with pictures of 320 × 240"
    return _restarted(folder, "rtsp other size", done, "size_changed", width="320", height="240")


def rtsp_slow_first_picture(folder: Path) -> CameraOutcome:
    """Restarted, the camera needs longer for its first picture than it may need between two."""
    with RtspServer(folder) as server, _plant(folder, server) as plant:
        return observe(
            plant,
            "rtsp slow first picture",
            "server restarted, first picture 5 s after the client came; read_timeout_s 2",
            fault=lambda: server.start(first="5"),
            mend=lambda: None,
            lasts_s=0.0,
        )


SCENARIOS: dict[str, Callable[[Path], CameraOutcome]] = {
    function.__name__: function
    for function in (
        rtsp_stalled,
        rtsp_killed,
        rtsp_wrong_path,
        rtsp_wrong_password,
        rtsp_other_size,
        rtsp_slow_first_picture,
    )
}
