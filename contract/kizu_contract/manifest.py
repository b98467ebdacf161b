"""Schema 1 of a bundle's manifest: frozen records, strict both ways."""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Literal

from kizu_contract import SCHEMA_VERSION
from kizu_contract.calibration import Calibration
from kizu_contract.errors import ManifestError
from kizu_contract.judging import Reduction, Thresholds
from kizu_contract.pictures import Colour, channels_of
from kizu_contract.strict_json import parse_json, parse_record, to_plain
from kizu_contract.tiles import FrameSize, TileGrid

MAX_MANIFEST_BYTES = 1 * 2**20
MAX_TILE_PX = 2048
NAME_PATTERN = r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}"
"""Names of bundles, agents and cameras: safe as an MQTT level, an Ignition tag and a file name."""
VERSION_PATTERN = r"[A-Za-z0-9][A-Za-z0-9_.+-]{0,63}"
_CREATED = re.compile(r"[0-9]{4}-[0-9]{2}-[0-9]{2}T[0-9]{2}:[0-9]{2}:[0-9]{2}\.[0-9]{3}Z")


@dataclass(frozen=True)
class BatchProfile:
    """Smallest, usual and largest batch of tiles; a TensorRT optimisation profile."""

    min: int
    opt: int
    max: int

    def __post_init__(self) -> None:
        if not 1 <= self.min <= self.opt <= self.max <= 65536:
            raise ValueError(f"batch profile {self.min}/{self.opt}/{self.max}; it must rise from 1 to at most 65536")


@dataclass(frozen=True)
class Graph:
    """The scorer graph's interface: `inputs` is ("tiles",) or ("tiles", "position"); map cells are map_cell_px wide."""

    opset: int
    precision: Literal["fp32", "fp16", "int8"]
    inputs: tuple[str, ...]
    tile_px: int
    channels: int
    map_cell_px: int
    batch: BatchProfile

    def __post_init__(self) -> None:
        if not 1 <= self.opset <= 100:
            raise ValueError(f"opset is {self.opset}; it must lie between 1 and 100")
        if self.inputs not in (("tiles",), ("tiles", "position")):
            raise ValueError(f"inputs {list(self.inputs)}; they must be tiles, or tiles and position")
        if not (1 <= self.map_cell_px <= self.tile_px <= MAX_TILE_PX and self.tile_px % self.map_cell_px == 0):
            raise ValueError(f"map_cell_px {self.map_cell_px} must divide tile_px {self.tile_px} <= {MAX_TILE_PX}")


@dataclass(frozen=True)
class FrameGraph:
    """The second graph, which takes frames of one size whole (docs/decisions/0024).

    `form`: `tiles` cuts, scores and joins inside; `shared` also computes once what overlapping tiles have in common.
    `speedup`: time of the tiled graph over its own for one frame, measured where it was exported.
    """

    height: int
    width: int
    form: Literal["tiles", "shared"]
    speedup: float

    def __post_init__(self) -> None:
        FrameSize(self.height, self.width)
        if not 0 < self.speedup <= 1e6:
            raise ValueError(f"speedup is {self.speedup}; it must lie above 0, at most at 1e6")

    @property
    def size(self) -> FrameSize:
        """The only size of frames it takes."""
        return FrameSize(self.height, self.width)


@dataclass(frozen=True)
class DefaultThresholds:
    """Score thresholds and the false alarm rates among good frames that they were asked for."""

    warn: float
    reject: float
    warn_rate: float
    reject_rate: float

    def __post_init__(self) -> None:
        self.scores()
        if not 0 < self.reject_rate <= self.warn_rate < 1:
            raise ValueError("false alarm rates must satisfy 0 < reject_rate <= warn_rate < 1")

    def scores(self) -> Thresholds:
        """Warn and reject as scores."""
        return Thresholds(self.warn, self.reject)


@dataclass(frozen=True)
class Provenance:
    """Where a model comes from: detector and `recipe` settings, seed, fingerprint of its pictures, metrics."""

    detector: str
    recipe: Mapping[str, Any]
    seed: int
    data_fingerprint: str
    train_pictures: int
    kizu_version: str
    metrics: Mapping[str, float]


@dataclass(frozen=True)
class PrecisionLoss:
    """What a graph of lower precision lost against itself in fp32: the same pictures, the same engine.

    AUROC and AU-PRO (up to 0.3) are 0 to 1, on `good_pictures` and `defective_pictures`: `tests` with real defects,
    or pieces of good pictures with `planted` flaws. `most_shift` is how far a quantile of the scores of
    `held_out_pictures`, or the reject threshold that they set, moved: in units of fp32's. `layers` are computed in
    the lower precision, `layers_kept` could be and stay in fp32.
    """

    reference: Literal["fp32"]
    measured_on: Literal["tests", "planted"]
    good_pictures: int
    defective_pictures: int
    held_out_pictures: int
    image_auroc_before: float
    image_auroc_after: float
    most_shift: float
    layers: int
    layers_kept: int
    au_pro_before: float | None = None
    au_pro_after: float | None = None

    def __post_init__(self) -> None:
        counts = (self.good_pictures, self.defective_pictures, self.held_out_pictures, self.layers)
        if min(counts) < 1 or self.layers_kept < 0 or self.most_shift < 0:
            raise ValueError(
                "a loss of precision is measured on some pictures and some layers, and shifts by 0 or more"
            )
        figures = (self.image_auroc_before, self.image_auroc_after, self.au_pro_before, self.au_pro_after)
        if not all(0 <= figure <= 1 for figure in figures if figure is not None):
            raise ValueError("AUROC and AU-PRO lie between 0 and 1")

    @property
    def lost_points(self) -> float:
        """Points of image AUROC lost, in hundredths; below 0 where it gained."""
        return 100 * (self.image_auroc_before - self.image_auroc_after)


@dataclass(frozen=True)
class Manifest:
    """Everything the agent must know of a bundle besides the graph itself."""

    schema: int
    name: str
    version: str
    created: str
    """UTC, RFC 3339 with milliseconds and Z."""
    graph: Graph
    grid: TileGrid
    colour: Colour
    reduction: Reduction
    calibration: Calibration
    thresholds: DefaultThresholds
    provenance: Provenance
    frame: FrameSize | None = None
    """The only size of frames that the graph can judge, None for any (see docs/decisions/0013)."""
    frame_graph: FrameGraph | None = None
    """What `frame.onnx` is; None where the bundle has none."""
    precision: PrecisionLoss | None = None
    """What the graph's lower precision cost; None where it is fp32, or nobody measured (see docs/decisions/0025)."""

    def __post_init__(self) -> None:
        if self.schema != SCHEMA_VERSION:
            raise ValueError(f"schema {self.schema}; this kizu reads schema {SCHEMA_VERSION}")
        if not re.fullmatch(NAME_PATTERN, self.name):
            raise ValueError(f"name {self.name!r} must match {NAME_PATTERN}")
        if not re.fullmatch(VERSION_PATTERN, self.version):
            raise ValueError(f"version {self.version!r} must match {VERSION_PATTERN}")
        _check_created(self.created)
        if self.grid.tile_px != self.graph.tile_px:
            raise ValueError(f"the grid's tile_px {self.grid.tile_px} differs from the graph's {self.graph.tile_px}")
        if channels_of(self.colour) != self.graph.channels:
            raise ValueError(f"colour {self.colour} does not fit a graph of {self.graph.channels} channels")
        if self.frame is not None and self.frame_graph is not None and self.frame != self.frame_graph.size:
            raise ValueError(f"frame is {self.frame}, the frame graph takes {self.frame_graph.size}")

    @property
    def takes_position(self) -> bool:
        """Whether the graph is told where in the frame's grid each tile lies."""
        return "position" in self.graph.inputs

    @property
    def places(self) -> int | None:
        """How many tiles the grid lays over a frame of the one size that fits; None where any size fits."""
        return None if self.frame is None else self.grid.layout(self.frame.height, self.frame.width).count

    def misfit(self, height: int, width: int) -> str | None:
        """Why the model cannot judge a frame of `height` × `width` pixels; None where it can."""
        if self.frame is None or self.frame == FrameSize(height, width):
            return None
        return (
            f"the frame has {height} × {width} pixels; model {self.name} knows each place of frames of {self.frame} "
            "and can judge no others: crop or scale the camera's frames to that, or train on frames of this size"
        )

    def to_json(self) -> bytes:
        """Write as UTF-8 JSON with sorted keys: the same manifest gives the same bytes.

        Raises ManifestError for what JSON cannot hold, such as a metric that is not a finite number.
        """
        try:
            text = json.dumps(to_plain(self), indent=2, sort_keys=True, ensure_ascii=False, allow_nan=False)
            return text.encode() + b"\n"
        except (TypeError, ValueError, RecursionError) as exc:
            raise ManifestError(f"the manifest of {self.name} cannot be written: {exc}") from exc

    @classmethod
    def from_json(cls, data: bytes) -> "Manifest":
        """Read `data`. Raises ManifestError that names the key, for anything that schema 1 does not allow."""
        if len(data) > MAX_MANIFEST_BYTES:
            raise ManifestError(f"manifest.json has {len(data)} bytes; at most {MAX_MANIFEST_BYTES} are allowed")
        return parse_record(cls, parse_json(data, "manifest.json"), "manifest")


def _check_created(text: str) -> None:
    try:
        if not _CREATED.fullmatch(text):
            raise ValueError
        datetime.fromisoformat(text.removesuffix("Z"))
    except ValueError:
        raise ValueError(f"created {text!r} must be a UTC time like 2026-01-31T12:00:00.000Z") from None
