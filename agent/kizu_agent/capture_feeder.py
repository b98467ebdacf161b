"""The capture process's end of socket and memory: free slots, pixels, messages, and triggers that wait."""

import json
import mmap
import os
import select
import socket
from collections import deque
from typing import Any

import numpy as np
from numpy.typing import NDArray

MAX_PACKET = 64 * 1024
IDLE_S = 0.5
"""A process that waits says so at least this often."""


class Gone(Exception):  # noqa: N818 - the parent's end is no error
    """The parent closed its end."""


class Feeder:
    """The child's end: free slots, pixels, messages."""

    def __init__(self, link: socket.socket, memory: int, slots: int) -> None:
        self._link = link
        self._memory = memory
        self._slots = slots
        self._free = list(range(slots))
        self._slot_bytes = 0
        self._map: mmap.mmap | None = None
        self._orders: deque[int] = deque()

    def tell(self, **message: Any) -> None:
        """Send one message; waits while the parent is behind."""
        self._link.send(json.dumps(message).encode())

    def has_free_slot(self, wait_s: float) -> bool:
        """Take what the parent gave back; wait up to `wait_s` for a slot where none is free."""
        self._receive(0)
        if not self._free and wait_s:
            self._receive(wait_s)
        return bool(self._free)

    def orders(self, wait_s: float = 0.0) -> list[int]:
        """Numbers of the triggers that wait for a picture, the oldest first; wait up to `wait_s` for one."""
        self._receive(0)
        if not self._orders and wait_s:
            self._receive(wait_s)
        return list(self._orders)

    def close_orders(self, count: int) -> None:
        """The oldest `count` triggers wait no more."""
        for _ in range(count):
            self._orders.popleft()

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
            self._receive(IDLE_S)
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
                raise Gone
            message = json.loads(packet)
            if "shoot" in message:
                self._orders.append(message["shoot"])
            else:
                self._free.append(message["release"])
