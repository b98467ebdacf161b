"""A stage: one named thread of the pipeline that is alive only while it makes progress."""

import contextlib
import ctypes
import threading
import time
from collections.abc import Callable

import structlog

log = structlog.get_logger(__name__)
_PR_SET_NAME = 15


class Stage:
    """Runs `work` again and again in a thread until told to stop.

    `work` does one bounded piece (a second at most when there is nothing to do) and returns; each return is progress.
    A stage whose `work` raises is logged by name, keeps the error in `failure` and calls `on_failure`: the service
    then stops, for half a service is worse than none.
    """

    def __init__(self, name: str, work: Callable[[], None], on_failure: Callable[[], None]) -> None:
        self.name = name
        self.failure: BaseException | None = None
        self.progress_mono_ns = time.monotonic_ns()
        self._work = work
        self._on_failure = on_failure
        self._stopping = threading.Event()
        self._thread: threading.Thread | None = None

    @property
    def is_running(self) -> bool:
        """Tell whether the thread was started and has not been told to stop."""
        return self._thread is not None and not self._stopping.is_set()

    def start(self) -> None:
        """Start the thread; idempotent."""
        if self._thread is None:
            self.progress_mono_ns = time.monotonic_ns()
            self._thread = threading.Thread(target=self._run, name=self.name, daemon=True)
            self._thread.start()

    def stop(self, deadline_s: float) -> bool:
        """Let the running piece of work end and join, at most `deadline_s`; tell whether the thread is gone."""
        self._stopping.set()
        if self._thread is None:
            return True
        self._thread.join(max(0.0, deadline_s))
        return not self._thread.is_alive()

    def beat(self) -> None:
        """Note progress inside a long piece of work."""
        self.progress_mono_ns = time.monotonic_ns()

    def _run(self) -> None:
        _show_name(self.name)
        try:
            while not self._stopping.is_set():
                self._work()
                self.beat()
        except BaseException as exc:
            self.failure = exc
            log.critical("stage died", stage=self.name, error=f"{type(exc).__name__}: {exc}", exc_info=exc)
            self._on_failure()


def _show_name(name: str) -> None:
    """Let `top -H` and debuggers show the stage's name, as far as the kernel keeps it (15 bytes); prctl(2)."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(_PR_SET_NAME, name.encode()[:15], 0, 0, 0)
