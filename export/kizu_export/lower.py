"""A lower precision with its price: what it loses against fp32, on the agent's engine, is measured and bounded."""

from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import onnx
from numpy.typing import NDArray

from kizu_agent.engine import Engine
from kizu_agent.inspector import load_inspector
from kizu_agent.settings import EngineConfig
from kizu_contract.bundle import Bundle
from kizu_contract.calibration import Calibration
from kizu_contract.golden import Golden
from kizu_contract.manifest import DefaultThresholds, Manifest, PrecisionLoss
from kizu_export.checks import check_graph
from kizu_export.errors import ExportError
from kizu_export.evidence import Evidence
from kizu_export.graph import finish_model, to_bytes
from kizu_export.layers import layers_of
from kizu_export.precision import halved_layers, to_half
from kizu_export.quantise import quantise
from kizu_export.ranges import measure_ranges
from kizu_export.subpixels import as_convolutions
from kizu_train.calibrate import calibrate
from kizu_train.evaluation.metrics import au_pro, image_auroc
from kizu_train.evaluation.pixels import PixelPool

Precision = Literal["fp32", "fp16", "int8"]

_QUANTILES = (0.5, 0.9, 1.0)
_KEPT_SHARES = (1 / 8, 1 / 4, 1 / 2)
"""Shares of the layers, the most sensitive first, that go back to fp32 one after the other while too much is lost."""
_AU_PRO_LIMIT = 0.3


@dataclass(frozen=True)
class Limits:
    """What a lower precision may cost: points of image AUROC, and shift of good scores and of their threshold."""

    most_loss: float = 0.5
    most_shift: float = 0.1


@dataclass(frozen=True, eq=False)
class _Judged:
    """Scores of the held-out pictures, and figures 0 to 1 on `good` and `defective` samples."""

    held_out: NDArray[np.float64]
    good: int
    defective: int
    auroc: float
    au_pro: float | None


def lower_precision(
    model: onnx.ModelProto, manifest: Manifest, precision: Precision, evidence: Evidence, limits: Limits
) -> tuple[bytes, Manifest]:
    """The fp32 `model` in lower `precision`, and the manifest with what that costs and thresholds measured anew.

    Of several ways to do it the first that keeps the `limits` is taken. Raises ExportError where none does.
    """
    before = _judge(to_bytes(model), manifest, evidence)
    small = replace(manifest, graph=replace(manifest.graph, precision=precision))
    tried: list[PrecisionLoss] = []
    for lowered, counts in _ways(model, small, evidence):
        after = _judge(lowered, small, evidence)
        loss = _loss(before, after, manifest.thresholds, evidence, counts)
        if loss.lost_points <= limits.most_loss and loss.most_shift <= limits.most_shift:
            return lowered, _with_thresholds(replace(small, precision=loss), before, after, evidence)
        tried.append(loss)
    best = min(tried, key=lambda loss: (loss.lost_points, loss.most_shift))
    raise ExportError(_refusal(precision, best, limits))


def _ways(model: onnx.ModelProto, manifest: Manifest, evidence: Evidence) -> Iterator[tuple[bytes, tuple[int, int]]]:
    """Graphs of the lower precision, the fastest first, with the numbers of layers in it and left in fp32."""
    if manifest.graph.precision == "fp16":
        yield _finished(to_half(model), manifest), (halved_layers(model), 0)
        return
    model = as_convolutions(model)
    layers = layers_of(model)
    if not layers:
        raise ExportError("int8: this detector has no layer that gains by eight bits; use fp32 or fp16")
    ranges = measure_ranges(model, evidence.batches(manifest))
    yield _finished(quantise(model, ranges), manifest), (len(layers), 0)
    tiles = next(evidence.batches(manifest))
    wanted = _maps(to_bytes(model), manifest, tiles)
    harm = {}
    for layer in layers:
        alone = quantise(model, ranges, [other for other in layers if other != layer])
        harm[layer] = float(np.abs(_maps(_finished(alone, manifest), manifest, tiles) - wanted).mean())
    worst = sorted(layers, key=lambda layer: -harm[layer])
    for count in sorted({max(1, round(share * len(layers))) for share in _KEPT_SHARES} - {len(layers)}):
        kept = worst[:count]
        yield _finished(quantise(model, ranges, kept), manifest), (len(layers) - count, count)


def _finished(model: onnx.ModelProto, manifest: Manifest) -> bytes:
    finished = finish_model(model, manifest.graph)
    check_graph(finished)
    return to_bytes(finished)


def _maps(scorer: bytes, manifest: Manifest, batch: dict[str, Any]) -> NDArray[np.float32]:
    with Engine(scorer, manifest.graph, EngineConfig()) as engine:
        return engine.run(batch["tiles"], batch.get("position"))[1]


def _judge(scorer: bytes, manifest: Manifest, evidence: Evidence) -> _Judged:
    """Score all pictures with `scorer` on the agent's own engine, on the CPU."""
    tile = np.zeros((1, manifest.graph.tile_px, manifest.graph.tile_px, manifest.graph.channels), np.uint8)
    no_answers = Golden(tile, np.zeros(1, np.float32), np.zeros((1, 1, 1), np.float32))
    inspector = load_inspector(Bundle(manifest, scorer, no_answers, b""), EngineConfig())
    with closing(inspector), closing(PixelPool()) as pool:
        held_out = [_finite(inspector.inspect([picture])[0].score) for picture in evidence.good(manifest)]
        scores: dict[bool, list[float]] = {True: [], False: []}
        for sample in evidence.samples(manifest):
            found = inspector.inspect([sample.picture])[0]
            scores[sample.is_good].append(_finite(found.score))
            if sample.is_good:
                pool.add_good(found.map)
            elif sample.mask is not None:
                pool.add_defective(sample.kind, found.map, sample.mask)
        ranking = pool.rankings().pooled
    auroc = image_auroc(np.array(scores[False]), np.array(scores[True]))
    covered = au_pro(ranking, _AU_PRO_LIMIT) if ranking is not None else None
    covered = None if covered is None else min(covered, 1.0)  # a sum of small areas may end a rounding above
    return _Judged(np.array(held_out), len(scores[True]), len(scores[False]), auroc or 0.0, covered)


def _finite(score: float) -> float:
    if not np.isfinite(score):
        raise ExportError("the graph gives scores that are not finite; train again with a larger floor")
    return float(score)


def _most_shift(before: _Judged, after: _Judged, thresholds: DefaultThresholds) -> float:
    """How far good scores, and the threshold that they would set, have moved: in reject thresholds."""
    moved = np.abs(np.quantile(after.held_out, _QUANTILES) - np.quantile(before.held_out, _QUANTILES)).max()
    rates = thresholds.warn_rate, thresholds.reject_rate
    was, is_now = (calibrate(judged.held_out.tolist()).thresholds(*rates).reject for judged in (before, after))
    return max(float(moved) / thresholds.reject, abs(is_now - was) / max(was, 1e-12))


def _loss(
    before: _Judged, after: _Judged, thresholds: DefaultThresholds, evidence: Evidence, counts: tuple[int, int]
) -> PrecisionLoss:
    return PrecisionLoss(
        reference="fp32",
        measured_on=evidence.measured_on,
        good_pictures=before.good,
        defective_pictures=before.defective,
        held_out_pictures=len(before.held_out),
        image_auroc_before=before.auroc,
        image_auroc_after=after.auroc,
        most_shift=_most_shift(before, after, thresholds),
        layers=counts[0],
        layers_kept=counts[1],
        au_pro_before=before.au_pro,
        au_pro_after=after.au_pro,
    )


def _with_thresholds(manifest: Manifest, before: _Judged, after: _Judged, evidence: Evidence) -> Manifest:
    """`manifest` calibrated for the lower precision, so that the false alarm rates asked for stay what they are.

    Where thresholds do not come from the held-out pictures (folds), they move by as much as those pictures' scores.
    """
    known = manifest.calibration
    found = calibrate(after.held_out.tolist()) if evidence.is_calibrated else _scaled(known, before, after)
    warn, reject = manifest.thresholds.warn_rate, manifest.thresholds.reject_rate
    limits = found.thresholds(warn, reject)
    return replace(manifest, calibration=found, thresholds=DefaultThresholds(limits.warn, limits.reject, warn, reject))


def _scaled(known: Calibration, before: _Judged, after: _Judged) -> Calibration:
    """`known` times the ratio of the middle scores."""
    times = max(float(np.median(after.held_out)), 1e-12) / max(float(np.median(before.held_out)), 1e-12)
    tail = replace(known.tail, start=known.tail.start * times, scale=known.tail.scale * times)
    return Calibration(known.frames, tuple((p, score * times) for p, score in known.quantiles), tail)


def _refusal(precision: Precision, best: PrecisionLoss, limits: Limits) -> str:
    return (
        f"{precision} loses too much to ship: image AUROC falls from {best.image_auroc_before:.4f} to "
        f"{best.image_auroc_after:.4f}, {best.lost_points:.2f} points (at most {limits.most_loss:g}: --most-loss), and "
        f"good scores or the reject threshold move by {best.most_shift:.3g} of it (at most {limits.most_shift:g}: "
        f"--most-shift), on {best.good_pictures} good and {best.defective_pictures} defective pictures; export fp32, "
        "or raise the limit"
    )
