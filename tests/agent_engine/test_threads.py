"""One budget of threads: the engine has the cores, everything else its share, in every process."""

import math
import os
import subprocess
import sys
from pathlib import Path

import pytest

from kizu_agent import threads
from kizu_agent.camera_settings import CameraConfig
from kizu_agent.cameras.checks import Limits
from kizu_agent.capture_process import CaptureProcess
from kizu_agent.threads import available_cores, budget


@pytest.fixture
def eight_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(threads, "available_cores", lambda: 8)


@pytest.mark.usefixtures("eight_cores")
@pytest.mark.parametrize(
    ("provider", "wanted", "engine", "opencv"),
    [("cpu", 0, 8, 1), ("cpu", 3, 3, 1), ("openvino", 0, 8, 1), ("cuda", 0, 8, 4), ("tensorrt", 2, 2, 4)],
)
def test_cores_are_divided(provider: str, wanted: int, engine: int, opencv: int) -> None:
    """On the CPU the engine has every core and OpenCV none beside it; beside a GPU OpenCV has some."""
    share = budget(provider, wanted)
    assert (share.cores, share.engine, share.opencv, share.blas) == (8, engine, opencv, 1)


@pytest.mark.usefixtures("eight_cores")
@pytest.mark.parametrize(
    ("provider", "threads", "streams", "share"),
    [
        ("cpu", 0, 0, (8, 1)),
        ("cpu", 3, 0, (3, 1)),
        ("cpu", 16, 0, (8, 9)),
        ("cpu", 0, 1, (1, 8)),
        ("cpu", 0, 3, (3, 6)),
        ("cpu", 2, 5, (2, 1)),
        ("openvino", 0, 0, (1, 8)),
        ("cuda", 0, 4, (1, 8)),
    ],
)
def test_threads_are_streams_on_the_cpu(provider: str, threads: int, streams: int, share: tuple[int, int]) -> None:
    """Streams and the threads that help inside operators are never more than the engine's threads together."""
    found = budget(provider, threads, streams)
    assert (found.streams, found.operator) == share
    assert found.streams + found.operator - 1 == found.engine


@pytest.mark.parametrize(
    ("inner", "outer", "cores"),
    [("max 100000", "max 100000", math.inf), ("150000 100000", "max 100000", 1.5), ("max 100000", "50000 100000", 0.5)],
)
def test_a_quota_counts_as_cores(tmp_path: Path, inner: str, outer: str, cores: float) -> None:
    """The least of the quotas of this group and of those above it holds (cgroup v2)."""
    group = tmp_path / "system.slice" / "kizu.service"
    group.mkdir(parents=True)
    (group / "cpu.max").write_text(f"{inner}\n")
    (group.parent / "cpu.max").write_text(f"{outer}\n")
    (tmp_path / "cgroup").write_text("0::/system.slice/kizu.service\n")
    assert threads._quota(tmp_path / "cgroup", tmp_path) == cores


@pytest.mark.parametrize("quota", [0.5, 1.5])
def test_a_part_of_a_core_is_one(monkeypatch: pytest.MonkeyPatch, quota: float) -> None:
    """Half a core still takes a thread; the quota never gives more cores than there are."""
    monkeypatch.setattr(threads, "_quota", lambda *_: quota)
    assert available_cores() == min(math.ceil(quota), len(os.sched_getaffinity(0)))


def test_no_quota_leaves_the_affinity() -> None:
    """Without cgroups, or with files of another form, the cores are those that the scheduler grants."""
    nothing = Path("/nonexistent")
    assert threads._quota(nothing, nothing) == math.inf
    assert 1 <= available_cores() <= len(os.sched_getaffinity(0))


def test_a_process_is_held_to_its_share() -> None:
    """After `limit` OpenCV and BLAS have one thread each: importing both adds none to the process."""
    script = (
        "from kizu_agent.threads import limit\nlimit()\nimport os, cv2, numpy\n"
        "numpy.ones((300, 300)) @ numpy.ones((300, 300))\n"
        "cv2.GaussianBlur(numpy.zeros((2000, 2000), numpy.float32), (0, 0), 4)\n"
        "print(cv2.getNumThreads(), len(os.listdir('/proc/self/task')))"
    )
    environment = {name: value for name, value in os.environ.items() if "_NUM_THREADS" not in name}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, check=True, text=True)
    assert done.stdout.split() == ["1", "1"]


def test_a_capture_process_takes_no_cores_for_idle_threads() -> None:
    """Sixteen cameras on sixteen cores must not have 256 threads of BLAS and as many of OpenCV."""
    child = CaptureProcess(CameraConfig(name="cam", source="sim:gears?rate=50&width=64&height=48"))
    child.order(Limits())
    try:
        while (message := child.receive(20.0)) is not None and message["kind"] not in ("frame", "gone"):
            pass
        assert message is not None
        assert message["kind"] == "frame"
        environment = Path(f"/proc/{child.process.pid}/environ").read_bytes().split(b"\0")
        assert b"OPENBLAS_NUM_THREADS=1" in environment
        assert len(list(Path(f"/proc/{child.process.pid}/task").iterdir())) == 1
    finally:
        child.end(5.0)
