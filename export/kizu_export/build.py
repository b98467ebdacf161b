"""A run becomes a bundle: graph, checks, parity, golden tiles, manifest."""

from dataclasses import dataclass, replace

import cv2
import numpy as np
import onnx
from numpy.typing import NDArray

from kizu_agent.engine import Engine
from kizu_agent.settings import EngineConfig
from kizu_contract import SCHEMA_VERSION
from kizu_contract.bundle import Bundle
from kizu_contract.golden import MAX_GOLDEN_TILES, Golden
from kizu_contract.manifest import BatchProfile, DefaultThresholds, Graph, Manifest
from kizu_contract.pictures import channels_of
from kizu_export.checks import check_graph
from kizu_export.errors import ExportError, UsageError
from kizu_export.evidence import Evidence
from kizu_export.frame import FrameChoice, FrameReport, frame_size, with_frame_graph
from kizu_export.graph import OPSET, export_graph, finish_model, to_bytes
from kizu_export.lower import Limits, Precision, lower_precision
from kizu_export.parity import Parity, check_parity
from kizu_export.products import as_products
from kizu_train.detectors.base import frame_of, inputs_of
from kizu_train.runs import Run

_BATCH_PIXELS = 2**18
"""Pixels in a usual batch: on CPUs the rate is flat from a few tiles on, on GPUs it is not far from its best."""
_MAX_GOLDEN_BYTES = 32 * 2**20


@dataclass(frozen=True, eq=False)
class Built:
    """A bundle ready to be written, and how close its graph came to torch."""

    bundle: Bundle
    parity: Parity
    frame: FrameReport | None = None
    """What became of its graph of whole frames; None where none was asked for."""


def build_bundle(
    run: Run,
    *,
    name: str | None = None,
    version: str | None = None,
    precision: Precision = "fp32",
    evidence: Evidence | None = None,
    limits: Limits | None = None,
    frame: FrameChoice = "none",
    is_frame_forced: bool = False,
) -> Built:
    """Export `run`; the same run gives the same bundle. `name` and `version` default to the run's name and date.

    A lower `precision` needs `evidence` of what it loses. `frame` asks for a second graph, of whole frames; that it is
    kept, and how fast it was, follows a measurement. Raises UsageError without evidence, ExportError when the graph is
    refused, parity is missed or the loss is above `limits`, ValueError for a name that a manifest cannot hold.
    """
    if precision != "fp32" and evidence is None:
        raise UsageError(f"{precision} needs pictures to measure what it loses; name them with --data DIR")
    size = frame_size(frame, run, precision)
    manifest = _manifest(run, name or run.name, version or default_version(run.finished))
    graph = manifest.graph
    model = export_graph(run.scorer, graph)
    check_graph(model)
    scorer = _fast(model, graph) if precision == "fp32" else to_bytes(model)
    tiles = _few_enough(run.golden_tiles)
    position = run.golden_position[: len(tiles)] if run.golden_position is not None else None
    parity = check_parity(run.scorer, scorer, graph, tiles, position)
    if precision != "fp32" and evidence is not None:
        scorer, manifest = lower_precision(model, manifest, precision, evidence, limits or Limits())
    golden = _golden(scorer, manifest.graph, tiles, position)
    bundle = Bundle(manifest, scorer, golden, _png(run.preview))
    if size is None:
        return Built(bundle, parity)
    bundle, report = with_frame_graph(bundle, run.scorer, size, is_forced=is_frame_forced)
    return Built(bundle, parity, report)


def _fast(model: onnx.ModelProto, graph: Graph) -> bytes:
    """What ships in fp32: `model`, with what engines compute slowly written otherwise."""
    rewritten = as_products(model)
    if rewritten is not model:
        rewritten = finish_model(rewritten, graph)
        check_graph(rewritten)
    return to_bytes(rewritten)


def default_version(finished: str) -> str:
    """When the run was finished, as a version: 2026-01-31T12:00:00.000Z gives 20260131.120000."""
    date, _, time = finished.partition("T")
    return f"{date.replace('-', '')}.{time[:8].replace(':', '')}"


def batch_profile(tile_px: int) -> BatchProfile:
    """1, usual and four times usual tiles at a time: 64 and 256 up to tiles of 64 px, fewer of larger ones."""
    usual = 64
    while usual > 1 and usual * tile_px**2 > _BATCH_PIXELS:
        usual //= 2
    return BatchProfile(1, usual, 4 * usual)


def _manifest(run: Run, name: str, version: str) -> Manifest:
    limits = run.calibration.thresholds(run.warn_rate, run.reject_rate)
    tile_px = run.grid.tile_px
    return Manifest(
        schema=SCHEMA_VERSION,
        name=name,
        version=version,
        created=run.finished,
        graph=Graph(
            opset=OPSET,
            precision="fp32",
            inputs=inputs_of(run.scorer),
            tile_px=tile_px,
            channels=channels_of(run.colour),
            map_cell_px=run.map_cell_px,
            batch=batch_profile(tile_px),
        ),
        grid=run.grid,
        colour=run.colour,
        reduction=run.reduction,
        calibration=run.calibration,
        thresholds=DefaultThresholds(limits.warn, limits.reject, run.warn_rate, run.reject_rate),
        provenance=run.provenance,
        frame=frame_of(run.scorer),
    )


def _golden(scorer: bytes, graph: Graph, tiles: NDArray[np.uint8], position: NDArray[np.int64] | None) -> Golden:
    """What the graph gives, tile by tile on one thread: the plainest arithmetic, the same on every run."""
    single = replace(graph, batch=BatchProfile(1, 1, 1))
    with Engine(scorer, single, EngineConfig(threads=1)) as engine:
        places = np.zeros(len(tiles), np.int64) if position is None else position
        score, cells = engine.run(tiles, places)
    if not (np.isfinite(score).all() and np.isfinite(cells).all()):
        raise ExportError(
            "the scorer gives numbers that are not finite on golden tiles; train again with a larger floor"
        )
    return Golden(tiles, score, cells, position)


def _few_enough(tiles: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Keep the bundle small: as many golden tiles as fit with their maps, which may take four bytes a pixel."""
    room = _MAX_GOLDEN_BYTES // (tiles[0].size + 4 * tiles.shape[1] ** 2)
    return np.ascontiguousarray(tiles[: max(1, min(room, MAX_GOLDEN_TILES))])


def _png(picture: NDArray[np.uint8]) -> bytes:
    bgr = cv2.cvtColor(picture, cv2.COLOR_RGB2BGR) if picture.shape[2] == 3 else picture
    done, data = cv2.imencode(".png", bgr)
    if not done:
        raise ExportError(f"the preview of shape {list(picture.shape)} does not encode as PNG")
    return data.tobytes()
