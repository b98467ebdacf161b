"""Frames to inspections: one pass of one model over frames of several cameras. Pure: no threads."""

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from kizu_agent.camera_settings import Region
from kizu_agent.errors import EngineError
from kizu_agent.inspector import Inspector
from kizu_agent.records import Frame, Inspection, ModelId, ZoneJudgement
from kizu_agent.zones import View, Zoned
from kizu_contract.errors import PictureError
from kizu_contract.judging import FrameScore, Thresholds, Verdict
from kizu_contract.manifest import Manifest

_WHOLE = View()
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
    views: Mapping[str, View],
) -> list[Inspection]:
    """Inspect `frames`, in their order, with one model; `views` by camera, one that is not there is seen whole.

    A frame that cannot be scored (its region or a zone lies outside the picture, it has a size that the model cannot
    judge, the graph failed) comes back with the verdict `unknown` and the reason: it is never left out and never `ok`.
    """
    jobs = [_prepare(frame, views.get(frame.camera, _WHOLE).region, inspector) for frame in frames]
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
        view = views.get(job.frame.camera, _WHOLE)
        judged = _judge(view, score, job.why or reason, inspector.manifest, thresholds)
        return _inspection(job, model, judged, score, began_ns, took_ns * job.tiles // total)

    return [finish(job) for job in jobs]


class _Judged(NamedTuple):
    """How a frame was judged: by its score, or by the worst of its zones."""

    score: float
    thresholds: Thresholds
    why: str | None
    zoned: Zoned | None
    zones: tuple[ZoneJudgement, ...]


def _judge(
    view: View, scored: FrameScore | None, why: str | None, manifest: Manifest, thresholds: Thresholds
) -> _Judged:
    """Judge what was scored; `why` says what kept a frame from it."""
    if scored is not None and view.zones:
        zoned = _by_zones(view, scored, manifest, thresholds)
        if isinstance(zoned, Zoned):
            return _Judged(zoned.worst.score, zoned.worst.thresholds, why, zoned, zoned.zones)
        scored, why = None, zoned
    score = math.nan if scored is None else scored.score
    return _Judged(score, thresholds, why, None, view.unjudged(thresholds))


def _by_zones(view: View, scored: FrameScore, manifest: Manifest, thresholds: Thresholds) -> Zoned | str:
    """The judgement by zones, or why there can be none."""
    if (kind := manifest.reduction.kind) != "max":
        return f"zones need a model that judges by its map's maximum; {manifest.name} has {kind}"
    try:
        return view.judge(scored.map, thresholds)
    except ValueError as exc:
        return str(exc)


def _inspection(
    job: _Job, model: ModelId, judged: _Judged, scored: FrameScore | None, began_ns: int, spent_ns: int
) -> Inspection:
    verdict, why = judged.thresholds.verdict(judged.score), judged.why
    if verdict is Verdict.UNKNOWN and why is None:
        why = "the score is not a number"
    return Inspection(
        frame=job.frame,
        model=model,
        thresholds=judged.thresholds,
        score=judged.score,
        verdict=verdict,
        frame_map=None if scored is None else scored.map,
        region=job.frame.image if job.region is None else job.region,
        tiles=job.tiles,
        waited_ns=began_ns - job.frame.captured_mono_ns,
        scoring_ns=spent_ns,
        reason=why,
        zone=judged.zoned.worst.name if judged.zoned else None,
        zones=judged.zones,
        inside=judged.zoned.inside if judged.zoned else None,
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
