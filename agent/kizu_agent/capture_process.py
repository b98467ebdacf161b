"""One running capture process, seen from the agent: its socket, its memory, its end.

Frames come through anonymous shared memory (memfd), so a killed run leaves nothing behind in /dev/shm; messages through
a SOCK_SEQPACKET socket (see capture_child.py and docs/decisions/0005).
"""

import contextlib
import json
import mmap
import os
import socket
import subprocess
import sys
import threading
import time
from dataclasses import asdict
from typing import Any

import numpy as np
import structlog

from kizu_agent.camera_settings import CameraConfig
from kizu_agent.cameras.checks import Limits
from kizu_agent.cameras.video import environment
from kizu_agent.capture_feeder import MAX_PACKET
from kizu_agent.redaction import inherited_environment
from kizu_agent.threads import child_environment

log = structlog.get_logger(__name__)

SLOTS = 3
"""Pictures in shared memory: one being written, one being read, one on its way."""
HANG_GRACE_S = 1.8
"""Beyond the read timeout a child is given this long to say something: a loss is known within two seconds of it."""
GRACE_S = 2.0
"""A child may take this long to close its camera, and the kernel to end it."""
START_S = 15.0
"""A child may take this long to start Python and OpenCV on a slow box."""


class CaptureProcess:
    """A running capture process with its ends of socket and memory; it opens nothing before its `order`."""

    def __init__(self, config: CameraConfig) -> None:
        self._config = config
        self._memory = os.memfd_create(f"kizu-{config.name}")
        try:
            self.link, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        except OSError:
            os.close(self._memory)
            raise
        self._map: mmap.mmap | None = None
        self._slot_bytes = 0
        self._link_lock = threading.Lock()
        self.is_ordered = self.is_open = self.is_triggered = self.has_given = False
        self.good_since_mono_s: float | None = None
        """Since when it has been well: its first good picture, or its opening where it waits for a trigger."""
        self.last_word_mono_s = time.monotonic()
        command = [sys.executable, "-m", "kizu_agent.capture_child", str(theirs.fileno()), str(self._memory)]
        try:
            with theirs:
                # A session of its own: Ctrl-C at a terminal is for the service to handle.
                self.process = subprocess.Popen(
                    command,
                    stdin=subprocess.DEVNULL,
                    pass_fds=(theirs.fileno(), self._memory),
                    start_new_session=True,
                    env={**environment(config.read_timeout_s), **inherited_environment(), **child_environment()},
                )
        except OSError:
            self._free()
            raise

    def order(self, limits: Limits) -> None:
        """Have it open the camera; once. From here on it is silent at its own risk."""
        config = self._config
        order = {
            "url": config.source,
            "open_timeout_s": config.open_timeout_s,
            "read_timeout_s": config.read_timeout_s,
            "limits": asdict(limits),
            "trigger": config.trigger,
            "rate": config.rate or 0.0,
            "slots": SLOTS,
            "parent": os.getpid(),
        }
        self.is_ordered, self.last_word_mono_s = True, time.monotonic()
        with contextlib.suppress(OSError):  # a child that is gone already is noticed by `receive`
            self.link.send(json.dumps(order).encode())

    def receive(self, wait_s: float) -> dict[str, Any] | None:
        """Wait for a message; None when none came, `{"kind": "gone"}` when the child has ended."""
        self.link.settimeout(wait_s)
        try:
            packet = self._next_packet()
        except TimeoutError:
            return None
        except OSError:
            packet = b""
        self.last_word_mono_s = time.monotonic()
        message: dict[str, Any] = json.loads(packet) if packet else {"kind": "gone"}
        return message

    def _next_packet(self) -> bytes:
        try:
            return self.link.recv(MAX_PACKET)
        except ConnectionResetError:
            # The child left slots unread that were given back. The kernel says so once, ahead of its last messages.
            return self.link.recv(MAX_PACKET)

    def remap(self, slot_bytes: int) -> None:
        """Map the memory anew after the child has made its slots larger."""
        if self._map is not None:
            self._map.close()
        self._slot_bytes = slot_bytes
        self._map = mmap.mmap(self._memory, slot_bytes * SLOTS, prot=mmap.PROT_READ)

    def copy(self, slot: int, shape: tuple[int, ...]) -> "np.ndarray[Any, np.dtype[np.uint8]]":
        """Copy the picture out of `slot` and give the slot back."""
        assert self._map is not None  # noqa: S101 - the child announces its memory before its first frame
        at = slot * self._slot_bytes
        data = self._map[at : at + int(np.prod(shape))]
        with contextlib.suppress(OSError):  # the child may be gone; the picture is whole
            self.link.send(json.dumps({"release": slot}).encode())
        return np.frombuffer(data, np.uint8).reshape(shape)

    def shoot(self, number: int) -> bool:
        """Ask for a picture for the trigger `number`, from any thread; tell whether the order is on its way."""
        with self._link_lock:  # a socket that is being closed: its number may be another file's a moment later
            try:
                self.link.send(json.dumps({"shoot": number}).encode(), socket.MSG_DONTWAIT)
            except OSError:
                return False
        return True

    def silent_s(self) -> float:
        """Seconds since its last message, or since its order."""
        return time.monotonic() - self.last_word_mono_s

    def is_steady(self, seconds: float) -> bool:
        """Tell whether it has been well for longer than `seconds`."""
        return self.good_since_mono_s is not None and time.monotonic() - self.good_since_mono_s > seconds

    def ask_to_end(self) -> None:
        """Close the conversation: the child ends itself, and whoever waits in `receive` hears that it is gone."""
        with contextlib.suppress(OSError):
            self.link.shutdown(socket.SHUT_RDWR)

    def is_alive(self) -> bool:
        """Tell whether the process is still there; a killed one may be while it waits inside the kernel."""
        return self.process.poll() is None

    def end(self, patience_s: float) -> None:
        """Ask it to end, wait `patience_s`, then kill it; frees everything. Idempotent."""
        self.ask_to_end()
        try:
            self.process.wait(patience_s)
        except subprocess.TimeoutExpired:
            self._kill()
        self._free()

    def _kill(self) -> None:
        self.process.kill()
        try:
            self.process.wait(GRACE_S)
        except subprocess.TimeoutExpired:
            log.error(  # noqa: TRY400 - the trace says nothing that the pid does not
                "capture process cannot be killed: it waits inside the kernel", pid=self.process.pid
            )

    def _free(self) -> None:
        with self._link_lock:
            self.link.close()
        if self._map is not None:
            self._map.close()
        if self._memory >= 0:
            os.close(self._memory)
            self._memory = -1
