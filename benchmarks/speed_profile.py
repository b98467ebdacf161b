"""Where the graph's time goes, by kind of operator, as onnxruntime's own profiler tells it."""

import json
from collections import Counter
from pathlib import Path

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from kizu_contract.bundle import Bundle

_RUNS = 3


def shares(bundle: Bundle, tiles: NDArray[np.uint8], places: NDArray[np.int64], work: Path) -> dict[str, float]:
    """Share of the time by kind of operator, 0–1, on one CPU thread, the largest first; the first run is left out."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    options.enable_profiling = True
    options.profile_file_prefix = str(work / bundle.manifest.name)
    session = ort.InferenceSession(bundle.scorer, options, providers=["CPUExecutionProvider"])
    feeds = {"tiles": tiles, "position": places}
    for _ in range(1 + _RUNS):
        session.run(None, {name: feeds[name] for name in bundle.manifest.graph.inputs})
    return _by_operator(Path(session.end_profiling()))


def _by_operator(trace: Path) -> dict[str, float]:
    events = json.loads(trace.read_text())
    began = sorted(each["ts"] for each in events if each["name"] == "model_run")[1]
    spent: Counter[str] = Counter()
    for each in events:
        if each.get("cat") == "Node" and each["name"].endswith("_kernel_time") and each["ts"] >= began:
            spent[each["args"]["op_name"]] += each["dur"]
    total = sum(spent.values())
    return {operator: dur / total for operator, dur in spent.most_common()}
