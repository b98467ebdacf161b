"""Frames to inspections: one pass of one model over frames of several cameras. Pure: no threads."""

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from kizu_agent.camera_settings import Region
from kizu_agent.errors import EngineError
from kizu_agent.inspector import Inspector
from kizu_agent.records import Frame, Inspection, ModelId
from kizu_contract.errors import PictureError
from kizu_contract.judging import FrameScore, Thresholds, Verdict
from kizu_contract.manifest import Manifest

REGION_OUTSIDE = "the configured region lies outside the picture"
ThresholdsOf = Callable[[str, Manifest, str], Thresholds]
"""Camera name, manifest and content hash of the model → the thresholds that judge."""


@dataclass(frozen=True, eq=False)
class _Job:
    """`why`: what keeps the frame from being scored; then there are no tiles."""

    frame: Frame
    region: NDArray[np.uint8] | None
    tiles: int
    why: str | None = None


def inspect_frames(
    frames: Sequence[Frame],
    inspector: Inspector,
    model: ModelId,
    thresholds_of: ThresholdsOf,
    regions: Mapping[str, Region | None],
) -> list[Inspection]:
    """Inspect `frames`, in their order, with one model.

    A frame that cannot be scored (its region lies outside the picture or has a size that the model cannot judge, the
    graph failed) comes back with the verdict `unknown` and the reason: it is never left out and never `ok`.
    """
    jobs = [_prepare(frame, regions.get(frame.camera), inspector) for frame in frames]
    pictures = [job.region for job in jobs if job.region is not None and job.why is None]
    began_ns = time.monotonic_ns()
    try:
        scored, reason = iter(inspector.inspect(pictures)), None
    except (EngineError, PictureError) as exc:
        scored, reason = iter(()), f"scoring failed: {exc}"
    took_ns = time.monotonic_ns() - began_ns
    total = max(1, sum(job.tiles for job in jobs))

    def finish(job: _Job) -> Inspection:
        thresholds = thresholds_of(job.frame.camera, inspector.manifest, model.sha256)
        score = next(scored, None) if job.why is None else None
        why = job.why or reason
        spent_ns = took_ns * job.tiles // total
        return _inspection(job, model, thresholds, score, why, began_ns, spent_ns)

    return [finish(job) for job in jobs]


def _inspection(
    job: _Job,
    model: ModelId,
    thresholds: Thresholds,
    scored: FrameScore | None,
    why: str | None,
    began_ns: int,
    spent_ns: int,
) -> Inspection:
    score = math.nan if scored is None else scored.score
    verdict = thresholds.verdict(score)
    if verdict is Verdict.UNKNOWN and why is None:
        why = "the score is not a number"
    return Inspection(
        frame=job.frame,
        model=model,
        thresholds=thresholds,
        score=score,
        verdict=verdict,
        frame_map=None if scored is None else scored.map,
        region=job.frame.image if job.region is None else job.region,
        tiles=job.tiles,
        waited_ns=began_ns - job.frame.captured_mono_ns,
        scoring_ns=spent_ns,
        reason=why,
    )


def _prepare(frame: Frame, region: Region | None, inspector: Inspector) -> _Job:
    picture = frame.image
    if region is not None:
        high, wide = picture.shape[:2]
        if region.x + region.width > wide or region.y + region.height > high:
            return _Job(frame, None, 0, REGION_OUTSIDE)
        picture = picture[region.y : region.y + region.height, region.x : region.x + region.width]
    why = inspector.misfit(picture)
    if why is not None:
        return _Job(frame, picture, 0, why)
    return _Job(frame, picture, inspector.manifest.grid.layout(*picture.shape[:2]).count)
