"""The capture process of one camera: opens it, reads it, hands frames over in shared memory.

Started by capture.py with two file descriptors: a SOCK_SEQPACKET socket for messages (JSON) and a memfd for pixels.
The first message says what to open, so that a password in a URL is never on a command line. Every message is one
packet; slots of the memfd come back as `{"release": slot}`, and `{"shoot": number}` asks for a picture where commands
trigger the camera. The end of the socket is the order to end.
"""

import contextlib
import ctypes
import json
import os
import signal
import socket
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kizu_agent.allocator import keep_what_is_freed
from kizu_agent.cameras.base import Camera, Picture
from kizu_agent.cameras.checks import PictureChecks, limits_from
from kizu_agent.cameras.pacing import Limiter
from kizu_agent.cameras.registry import open_camera
from kizu_agent.capture_feeder import IDLE_S, MAX_PACKET, Feeder, Gone
from kizu_agent.errors import CameraError
from kizu_agent.threads import limit
from kizu_contract.errors import PictureError

_PR_SET_PDEATHSIG = 1
_PAUSE_S = 0.005
"""Between two looks at a camera that has no picture yet for a trigger."""


class _Loop:
    """Reads the camera and feeds the parent; numbers every picture read, so that gaps show what was dropped."""

    def __init__(self, camera: Camera, feeder: Feeder, order: dict[str, Any]) -> None:
        self._camera = camera
        self._feeder = feeder
        self._checks = PictureChecks(limits_from(order["limits"]))
        self._read_timeout_s: float = order["read_timeout_s"]
        self._trigger: str = order["trigger"]
        self._limiter = Limiter(order["rate"])
        self._number = 0
        self._drops: Counter[str] = Counter()
        self._unreadable_since_mono_s: float | None = None
        self._next_word_mono_s = 0.0
        # Where commands make the pictures: look at the first ones, and after one that shows nothing, until one is fit.
        self._is_doubtful = camera.is_live

    def run(self) -> None:
        """Go on until the camera or the parent ends it (CameraError, Gone)."""
        camera = self._camera
        camera.open()
        is_triggered = camera.is_triggered or self._trigger != "free"
        self._feeder.tell(kind="opened", is_live=camera.is_live, is_triggered=is_triggered)
        turn = self._turn()
        while True:
            turn()

    def _turn(self) -> Callable[[], None]:
        if self._trigger != "mqtt":
            return self._read_on
        return self._shoot if self._camera.is_on_demand else self._shoot_live

    def _read_on(self) -> None:
        """Take what the camera gives by itself."""
        # A camera that waits for its reader is not read ahead; a live one is read and, at worst, dropped.
        if not self._camera.is_live and not self._feeder.has_free_slot(IDLE_S):
            self._say_idle()
        elif self._limiter.wait_s > 0:
            self._hold_back()
        elif (picture := self._read()) is None:
            self._feeder.has_free_slot(0)
            self._say_idle()
        else:
            self._limiter.count()
            self._pass_on(picture)
            self._number += 1

    def _hold_back(self) -> None:
        """The rate is used up: a file waits, a live camera's picture goes by undecoded."""
        if not self._camera.is_live:
            time.sleep(min(IDLE_S, self._limiter.wait_s))
        elif self._camera.skip():
            self._drops["rate"] += 1
            self._number += 1
        self._feeder.has_free_slot(0)
        self._say_idle()

    def _shoot(self) -> None:
        """Make a picture for the oldest trigger."""
        numbers = self._feeder.orders(IDLE_S)[:1]
        if not numbers:
            self._look_again()
            return
        deadline_mono_s = time.monotonic() + self._read_timeout_s
        while (picture := self._read()) is None:
            if time.monotonic() > deadline_mono_s:
                self._feeder.close_orders(1)
                self._miss(numbers, "no_picture")
                return
            self._say_idle()
            time.sleep(_PAUSE_S)
        self._feeder.close_orders(1)
        self._pass_on(picture, numbers)
        self._number += 1

    def _shoot_live(self) -> None:
        """Take the first picture of a live camera that is read after the triggers came; let the others go by.

        Its buffer is kept empty meanwhile: else that picture would be an old one.
        """
        numbers = self._feeder.orders()
        if not numbers and not self._is_doubtful:
            self._number += self._camera.skip()
            self._say_idle()
            return
        if not numbers:
            self._look_again()
            return
        picture = self._read()
        if picture is None:
            self._say_idle()
            return
        self._feeder.close_orders(len(numbers))
        self._pass_on(picture, numbers)
        self._number += 1

    def _look_again(self) -> None:
        """Nobody asks: see whether a camera that showed nothing shows something again."""
        self._say_idle()
        if not self._is_doubtful or (picture := self._read()) is None:
            return
        self._number += 1
        doubt = self._checks.look(picture.image)
        if doubt is None:
            self._is_doubtful = False
            self._feeder.tell(kind="fit", drops=self.drops())
        else:
            self._feeder.tell(kind="unfit", **doubt._asdict(), drops=self.drops())

    def _say_idle(self) -> None:
        """Show life, now and then: a camera may give a thousand pictures a second."""
        if time.monotonic() >= self._next_word_mono_s:
            self._next_word_mono_s = time.monotonic() + IDLE_S / 2
            self._feeder.tell(kind="idle", drops=self.drops())

    def _miss(self, numbers: Sequence[int], cause: str) -> None:
        for number in numbers:
            self._feeder.tell(kind="missed", trigger=number, cause=cause, drops=self.drops())

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

    def _pass_on(self, picture: Picture, triggers: Sequence[int] = ()) -> None:
        """Give a picture that may be judged, once for each trigger; of another say why not.

        A file is judged whatever it shows.
        """
        captured = {"captured_ns": time.time_ns(), "captured_mono_ns": time.monotonic_ns()}
        doubt = self._checks.look(picture.image) if self._camera.is_live else None
        self._is_doubtful = doubt is not None
        if doubt is not None:
            self._feeder.has_free_slot(0)
            self._feeder.tell(kind="unfit", **doubt._asdict(), drops=self.drops())
            self._miss(triggers, doubt.cause)
            return
        for number in triggers or (None,):
            self._give(picture, captured, number)

    def _give(self, picture: Picture, captured: dict[str, int], trigger: int | None) -> None:
        slot = self._store(picture.image, may_drop=self._camera.is_live and trigger is None)
        if slot is None:
            self._drops["capture_busy"] += 1
            return
        self._feeder.tell(
            kind="frame",
            slot=slot,
            number=self._number,
            shape=list(picture.image.shape),
            source=picture.source,
            trigger=trigger,
            drops=self.drops(),
            **captured,
        )

    def _store(self, image: NDArray[np.uint8], *, may_drop: bool) -> int | None:
        while True:
            slot = self._feeder.store(image) if self._feeder.has_free_slot(0) else None
            if slot is not None or may_drop:
                return slot
            self._say_idle()
            self._feeder.has_free_slot(IDLE_S)


def _die_with_parent() -> None:
    """Let the kernel end this process with the thread that started it, whatever native call it is in."""
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def main(arguments: Sequence[str]) -> int:
    """Run the capture process on the file descriptors of socket and memory given as `arguments`."""
    _die_with_parent()
    limit()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    link = socket.socket(fileno=int(arguments[0]))
    order = json.loads(link.recv(MAX_PACKET) or b"null")
    # A parent that died before the kernel was told to watch it would leave a camera that hangs at opening for ever.
    if order is None or os.getppid() != order["parent"]:
        return 0
    with contextlib.suppress(Gone, BrokenPipeError, ConnectionResetError):
        _serve(order, Feeder(link, int(arguments[1]), order["slots"]))
    return 0


def _serve(order: dict[str, Any], feeder: Feeder) -> None:
    camera: Camera | None = None
    loop: _Loop | None = None
    try:
        is_line_triggered = order["trigger"] == "line"
        camera = open_camera(
            order["url"], order["open_timeout_s"], order["read_timeout_s"], is_line_triggered=is_line_triggered
        )
        if not camera.is_drawn:
            keep_what_is_freed()
        loop = _Loop(camera, feeder, order)
        loop.run()
    except CameraError as exc:
        drops, frozen = (loop.drops(), loop.frozen) if loop else ({}, None)
        feeder.tell(kind="lost", cause=exc.cause, message=str(exc), drops=drops, frozen=frozen)
    finally:
        if camera is not None:
            camera.close()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
