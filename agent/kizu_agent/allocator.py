"""What the C library's allocator is told (mallopt(3)); another library than glibc is left as it is."""

import contextlib
import ctypes

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_ARENA_MAX = -1, -3, -8
_LARGEST_KEPT = 32 * 2**20
"""glibc takes no more; a larger block comes from the kernel and goes back to it each time."""


def share_pools() -> None:
    """Have all threads take memory from two pools.

    By default each has its own, and what lies free in one is of no use to another: the process grows for days.
    """
    _tell(_M_ARENA_MAX, 2)


def keep_what_is_freed() -> None:
    """Keep the memory of a picture for the next one.

    Given back, it comes anew page by page: for a frame of 1920 × 1200 that took as long as decoding its JPEG file.
    """
    _tell(_M_MMAP_THRESHOLD, _LARGEST_KEPT)
    _tell(_M_TRIM_THRESHOLD, 2 * _LARGEST_KEPT)


def _tell(parameter: int, value: int) -> None:
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).mallopt(parameter, value)
