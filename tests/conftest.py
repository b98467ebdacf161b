"""For every test: whoever starts a thread or process stops and joins it."""

import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

import hypothesis
import psutil
import pytest

# The same examples in every run, on machines of any speed; `pytest --hypothesis-profile=search` looks for new ones.
hypothesis.settings.register_profile("repeatable", deadline=None, derandomize=True)
hypothesis.settings.register_profile("search", deadline=None, max_examples=1000)
hypothesis.settings.load_profile("repeatable")

Leak = TypeVar("Leak")
GRACE_S = 3.0
"""How long something that was told to stop may take to be gone."""


@pytest.fixture(autouse=True)
def no_leaked_threads() -> Iterator[None]:
    """Fail a test that leaves a thread running."""
    before = set(threading.enumerate())
    yield
    left = _settle(lambda: [thread for thread in threading.enumerate() if thread not in before])
    if left:
        pytest.fail("the test left threads running:\n" + "\n".join(_describe(thread) for thread in left), pytrace=False)


@pytest.fixture(autouse=True)
def no_leaked_processes() -> Iterator[None]:
    """Fail a test that leaves a child process running; kill it, so that the next test starts clean."""
    before = set(_children())
    yield
    left = _settle(lambda: [pid for pid in _children() if pid not in before])
    found = [text for pid in left if (text := _end(pid))]
    if found:
        pytest.fail("the test left child processes:\n" + "\n".join(found), pytrace=False)


def _settle(leaked: Callable[[], list[Leak]]) -> list[Leak]:
    deadline = time.monotonic() + GRACE_S
    while (left := leaked()) and time.monotonic() < deadline:
        time.sleep(0.01)
    return left


def _describe(thread: threading.Thread) -> str:
    frame = sys._current_frames().get(thread.ident or 0)
    return f"{thread!r}\n{''.join(traceback.format_stack(frame, limit=-3)) if frame else ''}"


def _children() -> list[int]:
    # Much faster than psutil, which looks at every process of the machine.
    return [int(pid) for tasks in Path("/proc/self/task").glob("*/children") for pid in tasks.read_text().split()]


def _end(pid: int) -> str | None:
    """Kill the leaked child `pid`; what it was, None for Python's own helper, which lives as long as we do."""
    try:
        process = psutil.Process(pid)
        command = " ".join(process.cmdline()) or process.name()
        if "multiprocessing.resource_tracker" in command:
            return None
        process.kill()
        process.wait(GRACE_S)
    except psutil.NoSuchProcess:
        return None
    return f"{pid}: {command}"
