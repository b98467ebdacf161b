"""Which processes are children of one."""

import contextlib
from pathlib import Path


def children_of(process: int | str) -> list[int]:
    """The child processes of `process`, a number or `self`; much faster than psutil, which looks at every process."""
    pids: list[int] = []
    for task in Path(f"/proc/{process}/task").glob("*/children"):
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # a thread that has just ended
            pids += [int(pid) for pid in task.read_text().split()]
    return pids
