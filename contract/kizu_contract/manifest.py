"""Schema 1 of a bundle's manifest: frozen records, strict both ways."""

import json
import math
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, is_dataclass
from types import UnionType
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from kizu_contract import SCHEMA_VERSION
from kizu_contract.calibration import Calibration
from kizu_contract.errors import ManifestError
from kizu_contract.judging import Reduction, Thresholds
from kizu_contract.pictures import Colour, channels_of
from kizu_contract.tiles import TileGrid

MAX_MANIFEST_BYTES = 1 * 2**20
MAX_TILE_PX = 2048
NAME_PATTERN = r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}"
"""Names of bundles, agents and cameras: safe as an MQTT level, an Ignition tag and a file name."""
VERSION_PATTERN = r"[A-Za-z0-9][A-Za-z0-9_.+-]{0,63}"
_CREATED = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z")

Record = TypeVar("Record")


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
        if self.inputs not in (("tiles",), ("tiles", "position")):
            raise ValueError(f"inputs {list(self.inputs)}; they must be tiles, or tiles and position")
        if not (1 <= self.map_cell_px <= self.tile_px <= MAX_TILE_PX and self.tile_px % self.map_cell_px == 0):
            raise ValueError(f"map_cell_px {self.map_cell_px} must divide tile_px {self.tile_px} <= {MAX_TILE_PX}")


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

    def __post_init__(self) -> None:
        if self.schema != SCHEMA_VERSION:
            raise ValueError(f"schema {self.schema}; this kizu reads schema {SCHEMA_VERSION}")
        if not re.fullmatch(NAME_PATTERN, self.name):
            raise ValueError(f"name {self.name!r} must match {NAME_PATTERN}")
        if not re.fullmatch(VERSION_PATTERN, self.version):
            raise ValueError(f"version {self.version!r} must match {VERSION_PATTERN}")
        if not _CREATED.fullmatch(self.created):
            raise ValueError(f"created {self.created!r} must be UTC like 2026-01-31T12:00:00.000Z")
        if self.grid.tile_px != self.graph.tile_px:
            raise ValueError(f"the grid's tile_px {self.grid.tile_px} differs from the graph's {self.graph.tile_px}")
        if channels_of(self.colour) != self.graph.channels:
            raise ValueError(f"colour {self.colour} does not fit a graph of {self.graph.channels} channels")

    def to_json(self) -> bytes:
        """Write as UTF-8 JSON with sorted keys: the same manifest gives the same bytes."""
        text = json.dumps(asdict(self), indent=2, sort_keys=True, ensure_ascii=False, allow_nan=False)
        return text.encode() + b"\n"

    @classmethod
    def from_json(cls, data: bytes) -> "Manifest":
        """Read `data`. Raises ManifestError that names the key, for anything that schema 1 does not allow."""
        if len(data) > MAX_MANIFEST_BYTES:
            raise ManifestError(f"manifest.json has {len(data)} bytes; at most {MAX_MANIFEST_BYTES} are allowed")
        try:
            raw = json.loads(data, parse_constant=_refuse_constant)
        except (ValueError, RecursionError) as exc:
            raise ManifestError(f"manifest.json is not JSON: {exc}") from exc
        return parse_record(cls, raw, "manifest")


def parse_record(kind: type[Record], raw: object, where: str) -> Record:
    """Build the frozen dataclass `kind` from JSON data, with no key missing or added and no type bent.

    Raises ManifestError that names the place as `where.key`.
    """
    if not isinstance(raw, dict):
        raise ManifestError(f"{where} must be an object, not {type(raw).__name__}")
    hints = get_type_hints(kind)
    names = [field.name for field in fields(kind)]  # type: ignore[arg-type]  # every kind passed here is a dataclass
    missing, unknown = sorted(set(names) - raw.keys()), sorted(raw.keys() - set(names))
    if missing or unknown:
        raise ManifestError(f"{where}: missing keys {missing}, unknown keys {unknown}")
    values = {name: _parse(hints[name], raw[name], f"{where}.{name}") for name in names}
    try:
        return kind(**values)
    except ValueError as exc:
        raise ManifestError(f"{where}: {exc}") from exc


def _parse(hint: Any, raw: object, where: str) -> Any:  # noqa: PLR0911 - one return a type reads as a table
    origin, args = get_origin(hint), get_args(hint)
    if origin in (Union, UnionType):
        inner = next(arg for arg in args if arg is not type(None))
        return None if raw is None else _parse(inner, raw, where)
    if origin is Literal:
        if isinstance(raw, str) and raw in args:
            return raw
        raise ManifestError(f"{where} is {raw!r}; it must be one of {', '.join(args)}")
    if origin is tuple:
        if not isinstance(raw, list) or (args[-1] is not ... and len(raw) != len(args)):
            raise ManifestError(f"{where} must be a list of {'any' if args[-1] is ... else len(args)} entries")
        kinds = [args[0]] * len(raw) if args[-1] is ... else list(args)
        return tuple(_parse(kind, item, f"{where}[{i}]") for i, (kind, item) in enumerate(zip(kinds, raw, strict=True)))
    if origin is not None and issubclass(origin, Mapping):
        if not isinstance(raw, dict):
            raise ManifestError(f"{where} must be an object")
        return {
            key: value if args[1] is Any else _parse(args[1], value, f"{where}.{key}") for key, value in raw.items()
        }
    if is_dataclass(hint):
        return parse_record(hint, raw, where)  # type: ignore[arg-type]
    if hint is float and isinstance(raw, int | float) and not isinstance(raw, bool):
        number = _finite(raw)
        if number is not None:
            return number
    elif isinstance(raw, hint) and not isinstance(raw, bool):
        return raw
    raise ManifestError(f"{where} is {str(raw)[:80]!r}; it must be a {hint.__name__}")


def _finite(raw: float) -> float | None:
    try:
        number = float(raw)
    except OverflowError:
        return None
    return number if math.isfinite(number) else None


def _refuse_constant(text: str) -> float:
    raise ValueError(f"{text} is not a JSON number")
