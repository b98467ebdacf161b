"""Scenarios of processes: what is stopped or hangs is noticed and cut; clocks that jump; a long run."""

import contextlib
import ctypes
import math
import os
import signal
import socket
import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil
from faults.plant import Agent, Outcome, Plant, Subscriber, longest_pause_s, pictures, plant, settle, wait_for

_PTRACE_SEIZE, _PTRACE_INTERRUPT, _WALL = 0x4206, 0x4207, 0x40000000
_WALL_CLOCK = """
import pathlib, time

_file, _time, _time_ns = pathlib.Path({offset!r}), time.time, time.time_ns


def _offset():
    return int(_file.read_text() or 0)


time.time = lambda: _time() + _offset()
time.time_ns = lambda: _time_ns() + _offset() * 10**9
"""
"""A clock that steps when the scenario says so, for every Python process that is started with it. The machine's own
clock is not ours to set, and libfaketime breaks clock_nanosleep on the monotonic clock."""
_WARM = 40
"""Results that come before anything is done to the agent."""


def _camera(folder: Path, rate: float = 30.0, more: str = "") -> str:
    shots = pictures(folder / "pictures")
    return f'[[cameras]]\nname = "cam1"\nsource = "folder:{shots}?loop=true&rate={rate}"\n{more}'


@contextlib.contextmanager
def _running(folder: Path, cameras: str, **environment: str) -> Iterator[Plant]:
    """A plant whose agent gives results."""
    with plant(folder, cameras) as site:
        site.begin(_WARM, **environment)
        yield site


def _verdict(subscriber: Subscriber) -> str:
    states = subscriber.of("cam1/state")
    return str(states[-1].json["verdict"]) if states else ""


def stopped_capture(folder: Path) -> Outcome:
    """SIGSTOP of the capture process: it looks like a native call that hangs."""
    camera = _camera(folder, more="read_timeout_s = 1.0\nstale_after_s = 1.0\n")
    with _running(folder, camera) as site:
        agent, subscriber = site.agent, site.subscriber
        (child,) = agent.captures()
        os.kill(child, signal.SIGSTOP)
        unknown_s = wait_for(lambda: _verdict(subscriber) == "unknown", 20, "the state unknown")
        noticed_s = unknown_s + wait_for(lambda: child not in agent.children(), 20, "its end")
        seen = len(subscriber.results())
        recovered_s = wait_for(lambda: len(subscriber.results()) > seen, 30, "new results")
        states = [heard.json for heard in subscriber.of("cam1/state")]
        problems = [] if any(state["cause"] == "hang" for state in states) else ["its cause was not `hang`"]
        return settle(site).outcome(
            "SIGSTOP of a capture process",
            "once",
            problems,
            noticed_s=noticed_s,
            recovered_s=recovered_s,
            note=f"state unknown after {unknown_s:.1f} s, with stale_after_s = read_timeout_s = 1",
        )


def stopped_broker(folder: Path) -> Outcome:
    """SIGSTOP of the broker: connections stay open and nobody answers."""
    with _running(folder, _camera(folder)) as site:
        agent = site.agent
        assert site.broker.process is not None
        site.broker.process.send_signal(signal.SIGSTOP)
        noticed_s = wait_for(lambda: agent.metric("broker_connected") == 0, 60, "the loss")
        site.broker.process.send_signal(signal.SIGCONT)
        recovered_s = wait_for(lambda: agent.metric("broker_connected") == 1, 60, "the return")
        wait_for(lambda: (agent.metric("outbox_messages") or 99) < 30, 60, "the backlog's end")
        return settle(site).outcome(
            "SIGSTOP of the broker",
            "once",
            [],
            noticed_s=noticed_s,
            recovered_s=recovered_s,
            note="with mqtt.keepalive_s = 5",
        )


class _Systemd:
    """The end of systemd's that the watchdog speaks to."""

    def __init__(self, folder: Path, watchdog_s: float) -> None:
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.bind(str(folder / "notify"))
        self._socket.settimeout(0.05)
        self.environment = {"NOTIFY_SOCKET": str(folder / "notify"), "WATCHDOG_USEC": str(round(watchdog_s * 1e6))}
        self._limit_s = watchdog_s
        self._fed_at = time.monotonic()

    def is_starving(self) -> bool:
        """Whether the last feed is longer ago than the limit."""
        with contextlib.suppress(TimeoutError):
            while b"WATCHDOG=1" in self._socket.recv(4096):
                self._fed_at = time.monotonic()
        return time.monotonic() - self._fed_at > self._limit_s

    def close(self) -> None:
        """Stop listening."""
        self._socket.close()


def stopped_agent(folder: Path) -> Outcome:
    """SIGSTOP of the agent: only systemd's watchdog can notice; what it does then is done here."""
    folder.mkdir(parents=True, exist_ok=True)
    systemd = _Systemd(folder, 4.0)
    try:
        with _running(folder, _camera(folder), **systemd.environment) as site:
            agent, subscriber = site.agent, site.subscriber
            assert agent.process is not None
            wait_for(lambda: not systemd.is_starving(), 10, "the first feed")
            agent.process.send_signal(signal.SIGSTOP)
            noticed_s = wait_for(systemd.is_starving, 30, "the watchdog")
            agent.kill()
            agent.start(**systemd.environment)
            seen = len(subscriber.results())
            recovered_s = wait_for(lambda: len(subscriber.results()) > seen, 30, "new results")
            return settle(site).outcome(
                "SIGSTOP of the agent",
                "once, killed and started again by the watchdog",
                [],
                noticed_s=noticed_s,
                recovered_s=recovered_s,
                note="WatchdogSec 4 s here, 30 s in the unit",
            )
    finally:
        systemd.close()


def held_thread(folder: Path, thread: str, limit_s: float) -> Outcome:
    """Hold one thread of the agent, as a native call that never returns would: the service names it and ends with 1."""
    with _running(folder, _camera(folder)) as site:
        agent, subscriber = site.agent, site.subscriber
        assert agent.process is not None
        try:
            held = _hold(agent.process.pid, thread)
        except OSError as exc:
            return Outcome(f"thread `{thread}` held", "not at all", failed=str(exc))
        noticed_s = wait_for(lambda: _is_gone(agent, held), limit_s + 40, "the service's end")
        code = agent.process.returncode
        named = any(thread in str(event.get("stuck", "")) for event in agent.log_events())
        seen = len(subscriber.results())
        agent.start()
        recovered_s = wait_for(lambda: len(subscriber.results()) > seen, 30, "new results")
        problems = [] if code == 1 else [f"it ended with {code}"]
        problems += [] if named else ["the log does not name it"]
        return settle(site).outcome(
            f"thread `{thread}` held",
            "once, by ptrace",
            problems,
            noticed_s=noticed_s,
            recovered_s=recovered_s,
            note="counted from the hold to the process's end, with the time to stop in order",
        )


def _hold(pid: int, name: str) -> int:
    """Stop one thread until its process ends; its id. Raises OSError that says what was in the way."""
    threads = {(task / "comm").read_text().strip(): int(task.name) for task in Path(f"/proc/{pid}/task").iterdir()}
    # The kernel keeps fifteen letters of a name.
    found = threads.get(name[:15])
    if found is None:
        raise OSError(f"no thread has this name: {sorted(threads)}")
    libc = ctypes.CDLL(None, use_errno=True)
    libc.ptrace.argtypes = [ctypes.c_long, ctypes.c_long, ctypes.c_void_p, ctypes.c_void_p]
    for request in (_PTRACE_SEIZE, _PTRACE_INTERRUPT):
        if libc.ptrace(request, found, None, None) != 0:
            raise OSError(f"ptrace is not allowed here: {os.strerror(ctypes.get_errno())}")
    return found


def _is_gone(agent: Agent, held: int) -> bool:
    """Whether the process has ended; a thread that we hold must be let go of by us, dead or not."""
    assert agent.process is not None
    with contextlib.suppress(ChildProcessError):
        os.waitpid(held, os.WNOHANG | _WALL)
    return agent.process.poll() is not None


def clock_steps(folder: Path) -> Outcome:
    """The wall clock jumps an hour ahead, then two back: nothing changes but timestamps."""
    folder.mkdir(parents=True, exist_ok=True)
    offset = folder / "offset"
    offset.write_text("0")
    (folder / "site").mkdir()
    (folder / "site" / "sitecustomize.py").write_text(_WALL_CLOCK.format(offset=str(offset)))
    path = os.pathsep.join(filter(None, (str(folder / "site"), os.environ.get("PYTHONPATH"))))
    with _running(folder, _camera(folder), PYTHONPATH=path) as site:
        agent, subscriber = site.agent, site.subscriber
        stamps = []
        for shift in ("3600", "-3600", "0"):
            offset.write_text(shift)
            time.sleep(3.0)
            stamps.append(subscriber.results()[-1].json["captured_at"])
        pause_s = longest_pause_s(subscriber.results())
        states = [heard.json for heard in subscriber.of("cam1/state")]
        doubts = sum(state["verdict"] == "unknown" for state in states[states.index(_first_known(states)) :])
        losses = agent.metric("camera_losses_total")
        told = settle(site)
    problems = [f"results paused for {pause_s:.1f} s"] if pause_s > 1.5 else []
    problems += [f"the state became unknown {doubts} times"] if doubts else []
    problems += [f"the camera was lost {losses:g} times"] if losses else []
    problems += [] if stamps[0] > stamps[2] > stamps[1] else [f"timestamps did not follow: {stamps}"]
    return told.outcome(
        "wall clock jumps ± 1 hour",
        "3 steps under load",
        problems,
        note=f"longest pause between two results {pause_s:.2f} s",
    )


def _first_known(states: Sequence[dict[str, object]]) -> dict[str, object]:
    return next(state for state in states if state["verdict"] != "unknown")


@dataclass(frozen=True)
class Slope:
    """A straight line's rise per hour, and the half width of its 95 % confidence interval."""

    per_hour: float
    half_width: float

    @property
    def is_flat(self) -> bool:
        """Whether a rise cannot be told from none."""
        return self.per_hour - self.half_width <= 0


def slope_of(times_s: Sequence[float], values: Sequence[float], blocks: int = 20) -> Slope:
    """Fit a line to the means of `blocks` stretches: neighbours are alike, block means much less so."""
    size = len(times_s) // blocks
    cut = [(times_s[i * size : (i + 1) * size], values[i * size : (i + 1) * size]) for i in range(blocks)]
    xs = [statistics.fmean(part) for part, _ in cut]
    ys = [statistics.fmean(part) for _, part in cut]
    rise, start = statistics.linear_regression(xs, ys)
    spread = sum((x - statistics.fmean(xs)) ** 2 for x in xs)
    errors = sum((y - start - rise * x) ** 2 for x, y in zip(xs, ys, strict=True))
    deviation = math.sqrt(errors / (blocks - 2) / spread)
    return Slope(rise * 3600, 2.1 * deviation * 3600)  # Student's t for 18 degrees of freedom


def soak(folder: Path, frames: int = 500_000, cameras: int = 2) -> tuple[Outcome, dict[str, Slope]]:
    """Run at full speed for a long time: memory, files, threads and shared memory must not grow."""
    shots = pictures(folder / "pictures", count=200)
    text = "".join(
        f'[[cameras]]\nname = "cam{number}"\nsource = "folder:{shots}?loop=true"\nheatmap = {{ when = "reject" }}\n'
        for number in range(1, cameras + 1)
    )
    samples: list[tuple[float, ...]] = []
    with _running(folder, text) as site:
        agent, subscriber = site.agent, site.subscriber
        began = time.monotonic()
        while (done := agent.metric("inspected_frames_total") or 0) < frames:
            if done > frames / 10:  # the first tenth warms up
                samples.append((time.monotonic(), *_usage(agent)))
            subscriber.messages.clear()  # this process must not swap
            time.sleep(min(1.0, frames / 50_000))
        took_s = time.monotonic() - began
        losses = agent.metric("outbox_losses_total") or 0
        code = agent.stop(60)
    times = [sample[0] for sample in samples]
    names = ("memory of its own, KiB", "RSS, KiB", "open files", "threads", "shared memory, KiB")
    slopes = {name: slope_of(times, [sample[i + 1] for sample in samples]) for i, name in enumerate(names)}
    grows = [
        f"{name} grows by {slope.per_hour:.1f} ± {slope.half_width:.1f} an hour"
        for name, slope in slopes.items()
        if name in _NOISE and not slope.is_flat and slope.per_hour * took_s / 3600 > _NOISE[name]
    ]
    problems = grows + ([f"the stop gave {code}"] if code else []) + ([f"{losses:g} messages lost"] if losses else [])
    return (
        Outcome(
            "soak",
            f"{done:.0f} frames of {cameras} cameras in {took_s:.0f} s",
            note="; ".join(_in_mib(name, samples[-1][i], slopes[name]) for i, name in enumerate(names[:2], 1)),
            failed="; ".join(problems),
        ),
        slopes,
    )


_NOISE = {"memory of its own, KiB": 2048.0, "open files": 1.0, "threads": 1.0, "shared memory, KiB": 64.0}
"""A rise over the whole run that is no leak. RSS is told and not judged: it counts pages of libraries too, which come
in when they are first touched and go when another process needs the room."""


def _in_mib(name: str, last_kib: float, slope: Slope) -> str:
    rise = f"{slope.per_hour / 1024:+.2f} ± {slope.half_width / 1024:.2f} MiB/h"
    return f"{name.removesuffix(', KiB')} {last_kib / 1024:.0f} MiB, {rise}"


def _usage(agent: Agent) -> tuple[float, float, float, float, float]:
    """Memory of its own, RSS, open files, threads and shared memory of the agent and its children together."""
    assert agent.process is not None
    family = [psutil.Process(pid) for pid in (agent.process.pid, *agent.children())]
    return (
        sum(_own_kib(process.pid) for process in family),
        sum(process.memory_info().rss for process in family) / 1024,
        float(sum(process.num_fds() for process in family)),
        float(sum(process.num_threads() for process in family)),
        _shared_bytes(agent.process.pid) / 1024,
    )


def _own_kib(pid: int) -> float:
    """Memory that is no file's: proc(5), RssAnon."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return float(next(line for line in lines if line.startswith("RssAnon")).split()[1])


def _shared_bytes(pid: int) -> int:
    """Bytes of the agent's anonymous shared memory, and of anything of its user's in /dev/shm."""
    total = sum(path.stat().st_size for path in Path("/dev/shm").iterdir() if path.is_file())  # noqa: S108 - read only
    for handle in Path(f"/proc/{pid}/fd").iterdir():
        with contextlib.suppress(OSError):
            if str(handle.readlink()).startswith("/memfd:"):
                total += handle.stat().st_size
    return total
