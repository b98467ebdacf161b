"""What cameras do to an agent in a plant, one function each: takes a work folder, gives an `CameraOutcome`.

`SCENARIOS` has them all by name. The camera is simulated where the fault is one of pictures or processes; RTSP faults
are in rtsp_scenarios.py, against a real server.
"""

import contextlib
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from faults.cameras.camera_rig import CameraOutcome, Plant, is_running, rise, wait_until

SIMULATED = "sim:plates?rate=20&width=64&height=64&defects=0&fault=FAULT"


def observe(
    plant: Plant,
    scenario: str,
    done: str,
    *,
    fault: Callable[[], object],
    mend: Callable[[], object],
    is_known: Callable[[dict[str, Any]], bool] | None = None,
    lasts_s: float = 1.5,
    notice_s: float = 40.0,
    recover_s: float = 60.0,
) -> CameraOutcome:
    """Let `fault` happen to a plant that judges, wait until it `is_known` (else: lost), `mend`, wait for a verdict.

    The fault goes on for `lasts_s` once it is known, for all that is to stay quiet and unknown meanwhile.
    """
    _, before = plant.until_judged()
    logged, began = len(plant.log_lines()), time.monotonic()
    fault()
    is_known = is_known or (lambda state: state["condition"] == "lost" and state["verdict"] == "unknown")
    noticed, known = plant.until(is_known, began, notice_s, f"{scenario} to be noticed")
    time.sleep(lasts_s)
    quiet_until = time.monotonic()
    causes = [state["cause"] for _, state in plant.states(noticed)]
    shown = tuple(sorted({state["verdict"] for at, state in plant.states(noticed) if at <= quiet_until}))
    lines = plant.log_lines()[logged:]
    mend()
    mended = time.monotonic()
    recovered, after = plant.until_judged(mended, recover_s)
    # The line of the return is written just before or after the state goes out.
    plant.until(lambda state: state["published_at"] > after["published_at"], mended, recover_s, "a further state")
    counted = plant.states()[-1][1]["counters"]
    return CameraOutcome(
        scenario=scenario,
        done=done,
        cause=causes[-1] if known["condition"] == "lost" else None,
        noticed_s=noticed - began,
        recovered_s=recovered - mended,
        shown=shown,
        losses=rise(before["counters"]["loss_causes"], counted["loss_causes"]),
        drops=rise(before["counters"]["drop_causes"], counted["drop_causes"]),
        logs_on_loss=sum(line["level"] in ("warning", "error", "critical") for line in lines),
        logs_on_return=sum("is back" in line["event"] for line in plant.log_lines()[logged:]),
    )


def _simulated(folder: Path, word: str, done: str, source: str = SIMULATED, **options: float) -> CameraOutcome:
    """The simulated camera's fault `word`, from the moment it stands in the camera's file until it is taken out."""
    with Plant(folder, source, **options) as plant:
        return observe(
            plant, word, done, fault=lambda: plant.fault.write_text(word), mend=lambda: plant.fault.write_text("")
        )


def unplugged(folder: Path) -> CameraOutcome:
    """The connection breaks, and the camera cannot be opened for a while."""
    return _simulated(folder, "unplug", "connection broken, then not to be opened")


def frozen(folder: Path) -> CameraOutcome:
    """The same picture comes again and again, also after opening anew."""
    return _simulated(folder, "freeze", "the same picture again and again", frozen_after_s=1.0)


def black(folder: Path) -> CameraOutcome:
    """Only dark noise comes, as from a capped lens."""
    return _simulated(folder, "black", "dark noise only", black_after_s=1.0)


def white(folder: Path) -> CameraOutcome:
    """Only saturated pictures come."""
    return _simulated(folder, "white", "saturated pictures only", white_after_s=1.0)


def size_changed(folder: Path) -> CameraOutcome:
    """The pictures are suddenly half as large."""
    return _simulated(folder, "size", "pictures of half the size")


def corrupt(folder: Path) -> CameraOutcome:
    """Every picture is a JPEG cut short."""
    return _simulated(folder, "corrupt", "each JPEG cut in half")


def silent(folder: Path) -> CameraOutcome:
    """A free-running camera gives no picture any more."""
    return _simulated(folder, "silent", "no picture any more")


def hanging(folder: Path) -> CameraOutcome:
    """A native call of the driver never comes back, and keeps the interpreter's lock."""
    return _simulated(folder, "hang", "native call that never returns")


def crashed(folder: Path) -> CameraOutcome:
    """The driver's process dies of a segmentation fault at each picture."""
    return _simulated(folder, "crash", "segmentation fault at each picture")


def stopped(folder: Path) -> CameraOutcome:
    """The capture process is stopped (SIGSTOP) and never goes on."""
    with Plant(folder, SIMULATED) as plant:
        return observe(
            plant,
            "stopped",
            "SIGSTOP of the capture process",
            fault=lambda: [os.kill(child.pid, signal.SIGSTOP) for child in plant.captures()],
            mend=lambda: None,
            lasts_s=0.0,
        )


def trigger_idle(folder: Path) -> CameraOutcome:
    """A triggered camera gets no trigger for longer than every timeout."""
    with Plant(folder, f"{SIMULATED}&trigger=true", frozen_after_s=1.0) as plant:
        pids = []

        def begin() -> None:
            pids.extend(child.pid for child in plant.captures())
            plant.fault.write_text("silent")

        outcome = observe(
            plant,
            "idle",
            "no trigger",
            fault=begin,
            mend=lambda: plant.fault.write_text(""),
            is_known=lambda state: (state["condition"], state["verdict"]) == ("idle", "unknown"),
            lasts_s=4.0,
        )
        if [child.pid for child in plant.captures()] != pids:
            raise AssertionError("a camera that waits for its trigger was opened again")
        return outcome


def slow_first_picture(folder: Path) -> CameraOutcome:
    """Opened again after a crash, the camera gives its first picture three read timeouts later."""
    source = SIMULATED.replace("FAULT", "FAULT&first=3")
    with Plant(folder, source) as plant:
        return observe(
            plant,
            "slow first picture",
            "SIGKILL of the capture process, then 3 s until the first picture",
            fault=lambda: [os.kill(child.pid, signal.SIGKILL) for child in plant.captures()],
            mend=lambda: None,
            lasts_s=0.0,
        )


class LeftOver(NamedTuple):
    """Descriptors of shared memory while the run lived, and what was left of it: all but `before` should be 0."""

    before: int
    segments: int
    processes: int
    descriptors: int


def killed_run(folder: Path) -> LeftOver:
    """Kill the agent and its capture process at once, as the out-of-memory killer may, and look what is left."""
    earlier = _segments()
    with Plant(folder, SIMULATED) as plant:
        plant.until_judged()
        pids = [plant.agent.pid, *(child.pid for child in plant.captures())]
        memory = {name for pid in pids for name in _shared_memory(pid).values()}
        before = len([pid for pid in pids if _shared_memory(pid)])
        for pid in pids:
            os.kill(pid, signal.SIGKILL)
        plant.agent.kill()
        wait_until(lambda: not any(map(is_running, pids)), 10, "the processes to be gone")
        holders = [int(path.name) for path in Path("/proc").iterdir() if path.name.isdigit()]
        held = [name for pid in holders for name in _shared_memory(pid).values() if name in memory]
        return LeftOver(before, len(_segments() - earlier), sum(map(is_running, pids)), len(held))


def _segments() -> set[Path]:
    return set(Path("/dev/shm").iterdir())  # noqa: S108 - looked at, not written to


def _shared_memory(pid: int) -> dict[str, tuple[int, int]]:
    """The camera's memory among the descriptors of a process: where it is held → device and inode."""
    found = {}
    for descriptor in Path(f"/proc/{pid}/fd").glob("*"):
        with contextlib.suppress(OSError):
            if "memfd:kizu-cam" in str(descriptor.readlink()):
                held = descriptor.stat()
                found[str(descriptor)] = (held.st_dev, held.st_ino)
    return found


SCENARIOS: dict[str, Callable[[Path], CameraOutcome]] = {
    function.__name__: function
    for function in (
        unplugged,
        frozen,
        black,
        white,
        size_changed,
        corrupt,
        silent,
        hanging,
        crashed,
        stopped,
        trigger_idle,
        slow_first_picture,
    )
}
