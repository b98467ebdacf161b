"""Scenarios of the disk: power cuts, simulated by copies of a mounted image, and a file system that is full.

They need root and loop mounts; `can_mount` tells whether there are any.
"""

import contextlib
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

from faults.plant import Outcome, Plant, pictures, plant, settle, wait_for

from kizu_agent.outbox import Outbox
from kizu_agent.records import Message, Priority
from kizu_agent.settings import OutboxConfig

_WRITER = """
import random, sys, time
from pathlib import Path
from kizu_agent.settings import OutboxConfig
from kizu_agent.outbox import Outbox
from kizu_agent.records import Message, Priority

say = lambda *words: print(*words, flush=True)
outbox, choice = Outbox(Path(sys.argv[1]), OutboxConfig()), random.Random(int(sys.argv[2]))
next_sync = time.monotonic()
while True:
    priority = choice.choice([Priority.OK] * 8 + [Priority.WARN, Priority.REJECT])
    with outbox.transaction() as transaction:
        seq = transaction.next_seq("cam")
        body = str(seq).encode().ljust(choice.randrange(100, 4000))
        transaction.put([Message("a/b/c/d/result", body, priority=priority)])
    if priority == Priority.REJECT:
        say("promised", seq)
    if choice.random() < 0.05:
        rows = outbox.take(20)
        say("deleting", *[int(row.message.payload) for row in rows])
        outbox.delete([row.id for row in rows])
    if time.monotonic() >= next_sync:
        outbox.sync()
        say("promised", seq)
        next_sync = time.monotonic() + choice.uniform(0.02, 0.2)
    time.sleep(choice.uniform(0, 0.004))
"""
"""An agent's outbox under load: says what it promised to survive a power cut, and what it is about to delete."""


def can_mount() -> bool:
    """Whether this user may mount a file system from a file here."""
    if os.geteuid() != 0 or not shutil.which("mkfs.ext4", path="/usr/sbin:/sbin:/usr/bin"):
        return False
    with contextlib.suppress(OSError, subprocess.CalledProcessError):
        probe = Path(f"/tmp/kizu-mount-{os.getpid()}")  # noqa: S108 - made and removed here
        probe.mkdir()
        try:
            make_image(probe / "image", 4)
            with mounted(probe / "image", probe / "at"):
                return True
        finally:
            shutil.rmtree(probe, ignore_errors=True)
    return False


def make_image(path: Path, mebibytes: int) -> None:
    """Make a file with an empty ext4 in it."""
    with path.open("wb") as file:
        file.truncate(mebibytes * 2**20)
    command = ["mkfs.ext4", "-q", "-F", "-m", "0", str(path)]
    subprocess.run(
        command, check=True, env={**os.environ, "PATH": "/usr/sbin:/sbin:/usr/bin:/bin"}, stdout=subprocess.DEVNULL
    )


@contextlib.contextmanager
def mounted(image: Path, at: Path) -> Iterator[Path]:
    """Mount `image` at the folder `at`; unmounted again, lazily where somebody is still in it."""
    at.mkdir(exist_ok=True)
    subprocess.run(["mount", "-o", "loop", str(image), str(at)], check=True, stderr=subprocess.DEVNULL)
    try:
        yield at
    finally:
        if subprocess.run(["umount", str(at)], check=False, stderr=subprocess.DEVNULL).returncode:
            subprocess.run(["umount", "-l", str(at)], check=False)


def power_cuts(folder: Path, cuts: int = 50, seed: int = 0) -> Outcome:
    """Copy the mounted disk under a running outbox, as a power cut would leave it, and open each copy."""
    choice = random.Random(seed)
    folder.mkdir(parents=True, exist_ok=True)
    image = folder / "disk.img"
    make_image(image, 48)
    worst_s, problems = 0.0, []
    with mounted(image, folder / "disk") as disk, _Writer(disk / "outbox.sqlite3", seed) as writer:
        for cut in range(cuts):
            time.sleep(choice.uniform(0.1, 0.6))
            promised, deleting = writer.freeze()
            snapshot = folder / "cut.img"
            _copy_still(image, snapshot)
            writer.thaw()
            took_s, found, trouble = _open_copy(snapshot, folder / "copy")
            worst_s = max(worst_s, took_s)
            missing = [seq for seq in range(1, promised + 1) if seq not in found and seq not in deleting]
            if trouble or missing:
                problems.append(f"cut {cut}: {trouble or f'{len(missing)} of {promised} promised rows are lost'}")
    return Outcome(
        "power cut (copied disk image)",
        f"{cuts} copies of the mounted image, each mounted and opened",
        committed=promised,
        lost=0 if not problems else None,
        recovered_s=worst_s,
        note="`committed`: rows promised by the last cut; none of those promised before a cut was missing in its copy",
        failed="; ".join(problems[:5]),
    )


class _Writer:
    """The outbox's process, and what it said so far."""

    def __init__(self, path: Path, seed: int) -> None:
        command = [sys.executable, "-c", _WRITER, str(path), str(seed)]
        self._process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        self._lines: list[str] = []
        self._reader = threading.Thread(target=self._read, daemon=True)

    def __enter__(self) -> "_Writer":  # noqa: PYI034 - Self needs Python 3.11
        self._reader.start()
        wait_for(lambda: self._promised() > 0, 20, "the writer's first promise")
        return self

    def __exit__(self, *_: object) -> None:
        self._process.send_signal(signal.SIGCONT)
        self._process.kill()
        self._process.wait(10)
        self._reader.join(10)

    def freeze(self) -> tuple[int, set[int]]:
        """Stop it wherever it is; the newest number that it had promised, and all that it may have deleted."""
        promised = self._promised()  # before: what it promises from here on is not asked for
        self._process.send_signal(signal.SIGSTOP)
        wait_for(lambda: self._state() == "T", 5, "the writer to stop")
        time.sleep(0.02)  # what it said lies in the pipe still
        return promised, {int(seq) for line in self._said("deleting") for seq in line}

    def thaw(self) -> None:
        """Let it go on."""
        self._process.send_signal(signal.SIGCONT)

    def _promised(self) -> int:
        return max((int(line[0]) for line in self._said("promised")), default=0)

    def _said(self, word: str) -> list[list[str]]:
        split = (line.split() for line in list(self._lines))
        return [words[1:] for words in split if words and words[0] == word and len(words) > 1]

    def _state(self) -> str:
        return Path(f"/proc/{self._process.pid}/stat").read_text().rpartition(")")[2].split()[0]

    def _read(self) -> None:
        assert self._process.stdout is not None
        with self._process.stdout as lines:
            for line in lines:
                self._lines.append(line)


def _copy_still(image: Path, snapshot: Path) -> None:
    """Copy what has reached the disk at one moment: again until nothing was written while it was copied."""
    before = b""
    for _ in range(20):
        data = image.read_bytes()
        if data == before:
            snapshot.write_bytes(data)
            return
        before = data
    raise TimeoutError("the image changes all the time: no moment of it can be copied")


def _open_copy(snapshot: Path, at: Path) -> tuple[float, set[int], str]:
    """Mount the copy and open its outbox: seconds that took, the numbers found, and what is wrong (empty: nothing)."""
    with mounted(snapshot, at):
        began = time.monotonic()
        outbox = Outbox(at / "outbox.sqlite3", OutboxConfig())
        try:
            rows = outbox.take(1_000_000)
            took_s = time.monotonic() - began
            trouble = f"moved aside: {outbox.moved_aside}" if outbox.moved_aside else ""
            return took_s, {int(row.message.payload) for row in rows}, trouble
        finally:
            outbox.close()


def full_disk(folder: Path, held_s: float = 6.0) -> Outcome:
    """Fill the state directory's file system under a running agent, wait, and free it again."""
    folder.mkdir(parents=True, exist_ok=True)
    image = folder / "disk.img"
    make_image(image, 32)
    shots = pictures(folder / "pictures")
    camera = f'[[cameras]]\nname = "cam1"\nsource = "folder:{shots}?loop=true&rate=40"\n'
    with (
        mounted(image, folder / "disk") as disk,
        plant(folder, camera, state=disk / "state") as site,
    ):
        return _fill_and_free(disk / "ballast", held_s, site)


def _fill_and_free(ballast: Path, held_s: float, site: Plant) -> Outcome:
    agent, subscriber = site.agent, site.subscriber
    agent.start()  # the gate is shut: the outbox grows until the disk is full
    wait_for(lambda: (agent.metric("outbox_messages") or 0) > 20, 60, "the outbox to grow")
    _fill(ballast)
    began = time.monotonic()
    noticed_s = wait_for(lambda: _fill(ballast) and (agent.metric("held_results") or 0) > 0, 60, "the full disk")
    site.gate.open()
    wait_for(lambda: subscriber.of("cam1/state"), 30, "the state")
    time.sleep(held_s)
    seen = subscriber.of("box/status")[-1].json
    said_so = "held in memory" in (seen["reason"] or "") and seen["state"] == "degraded"
    is_live = subscriber.of("cam1/state")[-1].at > time.monotonic() - 2.0
    full_s = time.monotonic() - began
    ballast.unlink()
    recovered_s = wait_for(lambda: (agent.metric("held_results") or 0) == 0, 30, "the disk's return")
    told = settle(site)
    frames = [heard.json["frame"] for heard in subscriber.results()]
    gaps = len(set(range(min(frames), max(frames) + 1)) - set(frames))
    problems = [] if said_so else ["the status did not say so"]
    problems += [] if is_live else ["the state was not live meanwhile"]
    problems += [f"{gaps} frames have no result"] if gaps else []
    return told.outcome(
        "disk full",
        f"filled for {full_s:.0f} s, then freed",
        problems,
        noticed_s=noticed_s,
        recovered_s=recovered_s,
    )


def _fill(ballast: Path) -> bool:
    """Take what room is left, to the last block."""
    with contextlib.suppress(OSError), ballast.open("ab") as file:
        for size in (2**20, 2**12, 512):
            with contextlib.suppress(OSError):
                while True:
                    file.write(b"\0" * size)
                    file.flush()
    return True


def sync_cost(folder: Path, seconds: float = 5.0, size: int = 1000) -> Outcome:
    """How many commits a second each promise costs: none, ours for ok results and for rejects, and SQLite's FULL."""
    folder.mkdir(parents=True, exist_ok=True)
    rates = {
        "NORMAL, never synced": _commits_per_s(folder / "normal", seconds, size, Priority.OK, sync_every_s=1e9),
        "ok results, synced each second": _commits_per_s(folder / "ok", seconds, size, Priority.OK, sync_every_s=1.0),
        "rejects, each synced": _commits_per_s(folder / "reject", seconds, size, Priority.REJECT, sync_every_s=1e9),
        "FULL": _commits_per_s(folder / "full", seconds, size, Priority.OK, sync_every_s=1e9, is_full=True),
    }
    text = ", ".join(f"{name} {rate:.0f}" for name, rate in rates.items())
    return Outcome("cost of syncing", f"messages of {size} B, commits a second", note=text)


def _commits_per_s(
    folder: Path, seconds: float, size: int, priority: Priority, *, sync_every_s: float, is_full: bool = False
) -> float:
    """Commit one message after the other, taking twenty out after each twenty."""
    outbox = Outbox(folder / "outbox.sqlite3", OutboxConfig())
    if is_full:
        outbox._db.execute("PRAGMA synchronous = FULL")
    began = synced = time.monotonic()
    commits = 0
    while (now := time.monotonic()) < began + seconds:
        outbox.put([Message("a/b/c/d/result", bytes(size), priority=priority)])
        commits += 1
        if now >= synced + sync_every_s:
            outbox.sync()
            synced = now
        if commits % 20 == 0:
            outbox.delete([row.id for row in outbox.take(20)])
    outbox.close()
    return commits / seconds
