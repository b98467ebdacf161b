"""Batches side by side: each stream is a thread that runs the whole graph on a batch of its own."""

import contextlib
import threading
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import TypeVar

from kizu_agent.errors import EngineError

Part = TypeVar("Part")
_PATIENCE_S = 5.0
"""So long streams that shall begin at a time wait for each other."""


class Streams:
    """`count` threads that work side by side, the caller's among them; used by one thread at a time.

    Threads are started when they are first needed; `close` ends them.
    """

    def __init__(self, count: int) -> None:
        self.count = count
        self._helpers = ThreadPoolExecutor(count - 1, thread_name_prefix="stream") if count > 1 else None

    def each(self, work: Callable[[Part], None], parts: Sequence[Part]) -> None:
        """Do `work` on each of `parts`, in any order; a single one stays in this thread.

        Raises what `work` raises, once no stream is at work any more; parts that none has begun are left then. Raises
        EngineError where the system gives no thread; what it may start later finds no part left.
        """
        left = deque(parts)

        def serve() -> None:
            while True:
                try:
                    part = left.popleft()
                except IndexError:
                    return
                try:
                    work(part)
                except BaseException:
                    left.clear()
                    raise

        others: list[Future[None]] = []
        try:
            others.extend(self._start(serve) for _ in range(min(self.count, len(parts)) - 1))
            serve()
        except BaseException:
            left.clear()
            raise
        finally:
            wait(others)
        # No name here may hold the error, whose trace holds this frame: the engine would live until the cycle is found.
        failed = next(filter(None, (other.exception() for other in others)), None)
        others.clear()
        if failed is not None:
            try:
                raise failed
            finally:
                del failed

    def together(self, work: Callable[[], None]) -> None:
        """Do `work` as often as there are streams: once in each, all at a time, unless one takes seconds to start.

        Raises as `each` does.
        """
        ready = threading.Barrier(self.count)

        def begin(_: int) -> None:
            with contextlib.suppress(threading.BrokenBarrierError):  # one that does not start is no reason to hang
                ready.wait(_PATIENCE_S)
            work()

        self.each(begin, range(self.count))

    def _start(self, serve: Callable[[], None]) -> "Future[None]":
        assert self._helpers is not None  # noqa: S101 - there is more than one stream
        try:
            return self._helpers.submit(serve)
        except RuntimeError as exc:
            raise EngineError(f"no thread for another stream: {exc}") from exc

    def close(self) -> None:
        """End the threads; idempotent."""
        if self._helpers is not None:
            self._helpers.shutdown()
