"""Which values a graph's tensors take: the range that eight bits must span, from tiles that the model is to score."""

import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import onnx
from onnxruntime.quantization.calibrate import CalibrationDataReader, create_calibrator

from kizu_export.graph import to_bytes

Ranges = dict[str, tuple[float, float]]
"""Least and largest value of each tensor, by its name."""


class _Reader(CalibrationDataReader):  # type: ignore[misc]  # onnxruntime has no types
    """Gives the inputs of one batch after the other."""

    def __init__(self, batches: Iterable[dict[str, Any]]) -> None:
        self._batches: Iterator[dict[str, Any]] = iter(batches)

    def get_next(self) -> dict[str, Any] | None:
        return next(self._batches, None)


def measure_ranges(model: onnx.ModelProto, batches: Iterable[dict[str, Any]]) -> Ranges:
    """Run `model` (fp32) on `batches` of its inputs and note the range of every tensor of floats.

    Least and largest value, nothing cut off: what defects excite lies beyond most of what good tiles show, and cutting
    it off would make all defects alike.
    """
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "fp32.onnx"
        path.write_bytes(to_bytes(model))
        calibrator = create_calibrator(path, augmented_model_path=str(Path(folder) / "ranges.onnx"))
        calibrator.collect_data(_Reader(batches))
        found = calibrator.compute_data()
    return {name: (float(data.lowest.item()), float(data.highest.item())) for name, data in found.items()}
