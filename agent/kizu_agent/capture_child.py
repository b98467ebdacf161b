"""The capture process of one camera: opens it, reads it, hands frames over in shared memory.

Started by capture.py with two file descriptors: a SOCK_SEQPACKET socket for messages (JSON) and a memfd for pixels.
The first message says what to open, so that a password in a URL is never on a command line. Every message is one
packet; slots of the memfd come back as `{"release": slot}`. The end of the socket is the order to end.
"""

import contextlib
import ctypes
import json
import mmap
import os
import select
import signal
import socket
import sys
import time
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kizu_agent.cameras.base import Camera, Picture
from kizu_agent.cameras.checks import Limits, PictureChecks, limits_from
from kizu_agent.cameras.registry import open_camera
from kizu_agent.errors import CameraError
from kizu_contract.errors import PictureError

MAX_PACKET = 64 * 1024
_PR_SET_PDEATHSIG = 1
_IDLE_S = 0.5


class _Gone(Exception):  # noqa: N818 - the parent's end is no error
    """The parent closed its end."""


class _Feeder:
    """The child's end: free slots, pixels, messages."""

    def __init__(self, link: socket.socket, memory: int, slots: int) -> None:
        self._link = link
        self._memory = memory
        self._slots = slots
        self._free = list(range(slots))
        self._slot_bytes = 0
        self._map: mmap.mmap | None = None

    def tell(self, **message: Any) -> None:
        """Send one message; waits while the parent is behind."""
        self._link.send(json.dumps(message).encode())

    def has_free_slot(self, wait_s: float) -> bool:
        """Take what the parent gave back; wait up to `wait_s` for a slot where none is free."""
        self._receive(0)
        if not self._free and wait_s:
            self._receive(wait_s)
        return bool(self._free)

    def store(self, image: NDArray[np.uint8]) -> int | None:
        """Copy `image` into a free slot; None while slots of the old size are still with the parent."""
        if image.nbytes > self._slot_bytes and not self._enlarge(image.nbytes):
            return None
        assert self._map is not None  # noqa: S101 - enlarged above
        slot = self._free.pop()
        self._map.seek(slot * self._slot_bytes)
        self._map.write(np.ascontiguousarray(image).data)
        return slot

    def _enlarge(self, needed: int) -> bool:
        if len(self._free) < self._slots:
            self._receive(_IDLE_S)
            if len(self._free) < self._slots:
                return False
        if self._map is not None:
            self._map.close()
        self._slot_bytes = -(-needed // mmap.PAGESIZE) * mmap.PAGESIZE
        os.ftruncate(self._memory, self._slot_bytes * self._slots)
        self._map = mmap.mmap(self._memory, self._slot_bytes * self._slots)
        self.tell(kind="buffer", slot_bytes=self._slot_bytes)
        return True

    def _receive(self, wait_s: float) -> None:
        if wait_s:
            select.select([self._link], [], [], wait_s)
        while True:
            try:
                packet = self._link.recv(MAX_PACKET, socket.MSG_DONTWAIT)
            except BlockingIOError:
                return
            if not packet:
                raise _Gone
            self._free.append(json.loads(packet)["release"])


class _Loop:
    """Reads the camera and feeds the parent; numbers every picture read, so that gaps show what was dropped."""

    def __init__(self, camera: Camera, feeder: _Feeder, limits: Limits, read_timeout_s: float) -> None:
        self._camera = camera
        self._feeder = feeder
        self._checks = PictureChecks(limits)
        self._read_timeout_s = read_timeout_s
        self._number = 0
        self._drops: Counter[str] = Counter()
        self._unreadable_since_mono_s: float | None = None

    def run(self) -> None:
        """Go on until the camera or the parent ends it (CameraError, _Gone)."""
        camera = self._camera
        camera.open()
        self._feeder.tell(kind="opened", is_live=camera.is_live, is_triggered=camera.is_triggered)
        while True:
            # A camera that waits for its reader is not read ahead; a live one is read and, at worst, dropped.
            if not camera.is_live and not self._feeder.has_free_slot(_IDLE_S):
                self._feeder.tell(kind="idle", drops=self.drops())
                continue
            picture = self._read()
            if picture is None:
                self._feeder.has_free_slot(0)
                self._feeder.tell(kind="idle", drops=self.drops())
                continue
            self._pass_on(picture)
            self._number += 1

    @property
    def frozen(self) -> str | None:
        """Digest of the picture that the camera froze at, None while it moves."""
        return self._checks.frozen

    def drops(self) -> dict[str, int]:
        """Count the pictures that never left this process, by cause."""
        return dict(self._drops + self._checks.drops + Counter(self._camera.drops))

    def _read(self) -> Picture | None:
        """Read a picture; one that cannot be decoded is counted, and many in a row are a loss (CameraError)."""
        try:
            picture = self._camera.read()
        except PictureError as exc:
            self._number += 1
            self._drops["unreadable"] += 1
            now_mono_s = time.monotonic()
            since_mono_s = self._unreadable_since_mono_s = self._unreadable_since_mono_s or now_mono_s
            if self._camera.is_live and now_mono_s - since_mono_s >= self._read_timeout_s:
                raise CameraError("unreadable", f"none of its pictures can be decoded: {exc}") from exc
            return None
        if picture is not None:
            self._unreadable_since_mono_s = None
        return picture

    def _pass_on(self, picture: Picture) -> None:
        """Give a picture that may be judged; of another say why not. A file is judged whatever it shows."""
        captured = {"captured_ns": time.time_ns(), "captured_mono_ns": time.monotonic_ns()}
        doubt = self._checks.look(picture.image) if self._camera.is_live else None
        if doubt is not None:
            self._feeder.has_free_slot(0)
            self._feeder.tell(kind="unfit", **doubt._asdict(), drops=self.drops())
            return
        self._give(picture, captured)

    def _give(self, picture: Picture, captured: dict[str, int]) -> None:
        slot = self._store(picture.image)
        if slot is None:
            self._drops["capture_busy"] += 1
            return
        self._feeder.tell(
            kind="frame",
            slot=slot,
            number=self._number,
            shape=list(picture.image.shape),
            source=picture.source,
            drops=self.drops(),
            **captured,
        )

    def _store(self, image: NDArray[np.uint8]) -> int | None:
        while True:
            slot = self._feeder.store(image) if self._feeder.has_free_slot(0) else None
            if slot is not None or self._camera.is_live:
                return slot
            self._feeder.tell(kind="idle", drops=self.drops())
            self._feeder.has_free_slot(_IDLE_S)


def _die_with_parent() -> None:
    """Let the kernel end this process with the thread that started it, whatever native call it is in."""
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def main(arguments: Sequence[str]) -> int:
    """Run the capture process on the file descriptors of socket and memory given as `arguments`."""
    _die_with_parent()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    link = socket.socket(fileno=int(arguments[0]))
    order = json.loads(link.recv(MAX_PACKET) or b"null")
    # A parent that died before the kernel was told to watch it would leave a camera that hangs at opening for ever.
    if order is None or os.getppid() != order["parent"]:
        return 0
    with contextlib.suppress(_Gone, BrokenPipeError, ConnectionResetError):
        _serve(order, _Feeder(link, int(arguments[1]), order["slots"]))
    return 0


def _serve(order: dict[str, Any], feeder: _Feeder) -> None:
    camera: Camera | None = None
    loop: _Loop | None = None
    try:
        camera = open_camera(order["url"], order["open_timeout_s"], order["read_timeout_s"])
        loop = _Loop(camera, feeder, limits_from(order["limits"]), order["read_timeout_s"])
        loop.run()
    except CameraError as exc:
        drops, frozen = (loop.drops(), loop.frozen) if loop else ({}, None)
        feeder.tell(kind="lost", cause=exc.cause, message=str(exc), drops=drops, frozen=frozen)
    finally:
        if camera is not None:
            camera.close()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
