"""The second graph of a bundle, which takes frames of one size whole: exported, held against the tiled one, timed.

Both run on the agent's own engine, so what is measured is what a line would see. See docs/decisions/0024.
"""

import re
import time
from dataclasses import dataclass, replace
from statistics import median
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray
from torch import nn

from kizu_agent.frame_engine import FrameEngine, frame_shapes
from kizu_agent.inspector import Inspector, frame_deviation
from kizu_agent.settings import EngineConfig
from kizu_contract.bundle import Bundle
from kizu_contract.golden import golden_frame
from kizu_contract.manifest import FrameGraph
from kizu_contract.tiles import FrameSize
from kizu_export.checks import check_graph
from kizu_export.errors import ExportError, UsageError
from kizu_export.graph import export_frame_graph, finish_frame_model, to_bytes
from kizu_export.precision import to_half
from kizu_export.products import as_products
from kizu_export.whole_frame import Form, WholeFrame, forms_of
from kizu_train.detectors.base import frame_of
from kizu_train.runs import Run

FrameChoice = FrameSize | Literal["auto", "none"]
"""What `--frame` asks for."""
TOLERANCES = {"fp32": 1e-4, "fp16": 5e-4}
"""Largest deviation from the tiled graph, as `kizu_agent.inspector.relative_deviation` measures it. Agents refuse a
model above 1e-3 by default: what was exported must pass there, on other processors."""
_LEAST_PAIRS, _MOST_PAIRS, _ENOUGH_S = 7, 50, 1.0
_WORTH = 1.03
"""A smaller gain is within the noise of its measurement, and a second graph costs its bytes."""


@dataclass(frozen=True)
class FrameReport:
    """What became of a frame graph: `deviation` from the tiled one, and `record.speedup` over it; kept or not."""

    record: FrameGraph
    deviation: float
    is_kept: bool


def frame_choice(text: str) -> FrameChoice:
    """Read HxW (height and width in pixels), auto or none. Raises ValueError."""
    if text == "auto":
        return "auto"
    if text == "none":
        return "none"
    sides = re.fullmatch(r"([0-9]{1,5})x([0-9]{1,5})", text)
    if sides is None:
        raise ValueError(f"{text!r} is no frame size; write height x width in pixels, such as 1200x1920, auto or none")
    return FrameSize(int(sides[1]), int(sides[2]))


def frame_size(choice: FrameChoice, run: Run, precision: str) -> FrameSize | None:
    """The size that `choice` means for `run`; None for none. Raises UsageError where it is not known or possible."""
    if choice != "none" and precision not in TOLERANCES:
        raise UsageError(f"--frame: not offered for {precision}; use --frame none")
    only = frame_of(run.scorer)
    found = (only or run.picture_size) if choice == "auto" else None if choice == "none" else choice
    if choice == "auto" and found is None:
        raise UsageError(
            "--frame auto: the training pictures have different sizes, or the run does not tell; give --frame HxW, "
            "the size of the camera's frames"
        )
    if only is not None and found not in (None, only):
        raise UsageError(f"--frame {found}: this detector knows frames of {only} only; use --frame auto")
    return found


def with_frame_graph(
    bundle: Bundle, scorer: nn.Module, size: FrameSize, *, is_forced: bool = False
) -> tuple[Bundle, FrameReport]:
    """Give `bundle` a graph of whole frames of `size` where that is faster than its tiled one, or `is_forced`.

    Of the forms that the scorer can take it is the fastest: sharing saves arithmetic and costs locality. Raises
    ExportError when a graph is refused or gives other numbers than the tiled one, above the tolerance.
    """
    trials = [_trial(bundle, scorer, size, form) for form in forms_of(scorer, bundle.manifest.grid)]
    best = max(trials, key=lambda trial: trial.record.speedup)
    is_kept = is_forced or best.record.speedup >= _WORTH
    return best.bundle if is_kept else bundle, FrameReport(best.record, best.deviation, is_kept)


class _Trial(NamedTuple):
    """A bundle with a frame graph, which passed its gate and was timed."""

    bundle: Bundle
    record: FrameGraph
    deviation: float


def _trial(bundle: Bundle, scorer: nn.Module, size: FrameSize, form: Form) -> _Trial:
    record = FrameGraph(size.height, size.width, form, 1.0)
    trial = _with(bundle, _export(bundle, scorer, record), record)
    with FrameEngine(trial, EngineConfig()) as engine:
        deviation = _checked_deviation(trial, engine)
        record = replace(record, speedup=max(0.01, round(_speedup(trial, engine), 2)))
    return _Trial(_with(bundle, trial.frame_graph, record), record, deviation)


def _with(bundle: Bundle, graph: bytes | None, record: FrameGraph) -> Bundle:
    return replace(bundle, frame_graph=graph, manifest=replace(bundle.manifest, frame_graph=record))


def _export(bundle: Bundle, scorer: nn.Module, record: FrameGraph) -> bytes:
    manifest = bundle.manifest
    shapes = frame_shapes(manifest, record)
    layout = manifest.grid.layout(record.height, record.width)
    module = WholeFrame(scorer, layout, manifest.graph, record.form).eval()
    model = export_frame_graph(module, shapes)
    rewritten = to_half(model) if manifest.graph.precision == "fp16" else as_products(model)
    model = finish_frame_model(rewritten, shapes)
    check_graph(model)
    return to_bytes(model)


def _checked_deviation(trial: Bundle, engine: FrameEngine) -> float:
    deviation = max(frame_deviation(trial, engine, frame) for frame in _frames(trial, engine.size))
    tolerance = TOLERANCES[trial.manifest.graph.precision]
    if not deviation <= tolerance:
        raise ExportError(
            f"the frame graph deviates from the tiled one by {deviation:.2g} (relative; at most {tolerance:g} for "
            f"{trial.manifest.graph.precision}): it must not ship; export with --frame none"
        )
    return deviation


def _frames(bundle: Bundle, size: FrameSize) -> list[NDArray[np.uint8]]:
    """Frames of golden tiles, one as the agent's self-test has it, one that meets the grid elsewhere."""
    whole = golden_frame(bundle.golden.tiles, size.height, size.width)
    return [whole, np.ascontiguousarray(np.roll(whole, (3, 5), axis=(0, 1)))]


def _speedup(trial: Bundle, engine: FrameEngine) -> float:
    """Time of a frame in tiles over its time whole, each from picture to score: the median of pairs taken in turn."""
    frame = golden_frame(trial.golden.tiles, engine.size.height, engine.size.width)
    whole, tiled = Inspector(trial, engine), Inspector(trial, engine.tiled())
    ratios: list[float] = []
    began = time.monotonic()
    # The first pair lays out memory.
    while len(ratios) <= _LEAST_PAIRS or (len(ratios) <= _MOST_PAIRS and time.monotonic() - began < _ENOUGH_S):
        ratios.append(_seconds(tiled, frame) / _seconds(whole, frame))
    return median(ratios[1:])


def _seconds(inspector: Inspector, frame: NDArray[np.uint8]) -> float:
    began = time.perf_counter()
    inspector.inspect([frame])
    return time.perf_counter() - began
