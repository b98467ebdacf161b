"""What this machine can do at most: multiplications by its BLAS, bytes copied in memory; with one thread and with all.

Each is measured in a process of its own, since BLAS takes its number of threads at the start.
"""

import json
import os
import subprocess
import sys
from typing import NamedTuple

_SECONDS = 0.6


class Peak(NamedTuple):
    """FLOPs a second of sgemm, and bytes read and written a second by copies larger than every cache."""

    flops_per_s: float
    bytes_per_s: float


_CODE = """
import json, sys, time
from concurrent.futures import ThreadPoolExecutor
import numpy as np
threads, seconds = int(sys.argv[1]), float(sys.argv[2])

def best(work, amount):
    work()
    found, began = 0.0, time.monotonic()
    while not found or time.monotonic() < began + seconds:
        started = time.perf_counter()
        work()
        found = max(found, amount / (time.perf_counter() - started))
    return found

side = 1536
one, other, out = (np.ones((side, side), np.float32) for _ in range(3))
flops = best(lambda: np.matmul(one, other, out=out), 2 * side**3)
bytes_each = 192 * 2**20 // threads
pairs = [(np.ones(bytes_each, np.uint8), np.ones(bytes_each, np.uint8)) for _ in range(threads)]
with ThreadPoolExecutor(threads) as pool:
    moved = best(lambda: list(pool.map(lambda pair: np.copyto(*pair), pairs)), 2 * bytes_each * threads)
print(json.dumps([flops, moved]))
"""


def measure(threads: int) -> Peak:
    """The best of many tries with so many threads."""
    limits = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), str(threads))
    command = [sys.executable, "-c", _CODE, str(threads), str(_SECONDS)]
    done = subprocess.run(command, env={**os.environ, **limits}, check=True, capture_output=True, text=True)
    return Peak(*json.loads(done.stdout))


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0))
