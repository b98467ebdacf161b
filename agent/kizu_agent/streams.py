"""Batches side by side: each stream is a thread that runs the whole graph on a batch of its own."""

from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from typing import TypeVar

Part = TypeVar("Part")


class Streams:
    """`count` threads that work side by side, the caller's among them; used by one thread at a time.

    Threads are started when they are first needed; `close` ends them.
    """

    def __init__(self, count: int) -> None:
        self.count = count
        self._helpers = ThreadPoolExecutor(count - 1, thread_name_prefix="stream") if count > 1 else None

    def each(self, work: Callable[[Part], None], parts: Sequence[Part]) -> None:
        """Do `work` on each of `parts`, in any order; a single one stays in this thread.

        Raises what `work` raises, once no stream is at work any more; parts that none has begun are left then.
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

        helpers = min(self.count, len(parts)) - 1
        if self._helpers is None or helpers < 1:
            serve()
            return
        others = [self._helpers.submit(serve) for _ in range(helpers)]
        try:
            serve()
        finally:
            wait(others)
        for other in others:
            other.result()

    def close(self) -> None:
        """End the threads; idempotent."""
        if self._helpers is not None:
            self._helpers.shutdown()
