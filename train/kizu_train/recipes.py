"""Recipes: which detector, on which tiles, with which settings; TOML that says only what differs."""

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from kizu_contract.errors import ManifestError
from kizu_contract.judging import Reduction
from kizu_contract.strict_json import parse_record, to_plain
from kizu_contract.tiles import TileGrid
from kizu_train.data import ColourChoice
from kizu_train.detectors.base import find_detector
from kizu_train.errors import UsageError
from kizu_train.feeding import Ahead

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib


@dataclass(frozen=True)
class DataSettings:
    """`colour` as in `open_data`; `held_out_share` of the good pictures calibrate; pictures in memory: `cache_mb`.

    Where pictures are smaller than tiles, tiles shrink to them, as far as `smallest_tile_px`; 0: not at all.
    `prefetch` batches are made ahead of the steps by a thread, or by `workers` processes (see `kizu_train.feeding`);
    neither changes what is learned.
    """

    colour: ColourChoice = "auto"
    held_out_share: float = 0.2
    held_out_at_least: int = 5
    cache_mb: int = 1024
    smallest_tile_px: int = 0
    prefetch: int = 4
    workers: int = -1

    def __post_init__(self) -> None:
        if not (0 < self.held_out_share <= 0.5 and self.held_out_at_least >= 1 and self.cache_mb >= 1):
            raise ValueError("0 < held_out_share <= 0.5, held_out_at_least >= 1 and cache_mb >= 1 are needed")
        if self.smallest_tile_px < 0:
            raise ValueError("smallest_tile_px must be 0 or more")
        _ = self.ahead

    @property
    def ahead(self) -> Ahead:
        """How far ahead batches are made. Raises ValueError."""
        return Ahead(self.prefetch, self.workers)


@dataclass(frozen=True)
class Rates:
    """False alarm rates among good frames that the default thresholds are set for.

    `level_borders`: take off what good frames' maps rise by towards their borders (see `kizu_train.borders`).
    """

    warn_rate: float = 0.01
    reject_rate: float = 0.001
    level_borders: bool = True

    def __post_init__(self) -> None:
        if not 0 < self.reject_rate <= self.warn_rate < 1:
            raise ValueError("0 < reject_rate <= warn_rate < 1 is needed")


@dataclass(frozen=True)
class Recipe:
    """A resolved recipe. `score` is a kind the detector offers; `settings` is the detector's own dataclass.

    In TOML and in `--set` the fields of `settings` stand beside the others, as tables of their own.
    """

    name: str
    about: str
    detector: str
    score: str
    map_cell_px: int
    grid: TileGrid
    reduction: Reduction
    data: DataSettings
    calibration: Rates
    settings: Any

    def to_dict(self) -> dict[str, Any]:
        """All resolved settings as JSON data, flat as in TOML."""
        own: dict[str, Any] = to_plain(self)
        settings: dict[str, Any] = own.pop("settings")
        return own | settings


@dataclass(frozen=True)
class _Common:
    """The keys that recipes of every detector share, with the defaults."""

    name: str = ""
    about: str = ""
    detector: str = "patch_vae"
    score: str = "m"
    map_cell_px: int = 4
    grid: TileGrid = field(default_factory=lambda: TileGrid(32, 16, 16))
    reduction: Reduction = field(default_factory=lambda: Reduction("max", 8.0))
    data: DataSettings = field(default_factory=DataSettings)
    calibration: Rates = field(default_factory=Rates)


DEFAULTS = {"accurate": "joint", "fast": "joint_fast", "accurate_backbone": "joint_backbone"}
"""Names for what most users want, and the recipe that docs/detection.md shows to be it: the most accurate without
weights, the fastest within about two points of it, and the most accurate with a backbone."""


def list_recipes() -> dict[str, str]:
    """Names of the recipes that come with kizu, with what each says about itself."""
    return {name: str(_load(file, name).get("about", "")) for name, file in _packaged().items()}


def resolve_recipe(name_or_path: str, overrides: Sequence[str] = ()) -> Recipe:
    """The packaged recipe of that name, or the TOML file at that path, with `key=value` overrides (dotted keys).

    A name of `DEFAULTS` gives the recipe it stands for, under that recipe's own name. Raises UsageError for anything
    unknown, naming what is known.
    """
    packaged = _packaged()
    name_or_path = DEFAULTS.get(name_or_path, name_or_path)
    if name_or_path in packaged:
        raw = {"name": name_or_path} | _load(packaged[name_or_path], name_or_path)
    elif name_or_path.endswith(".toml"):
        raw = {"name": Path(name_or_path).stem} | _load(Path(name_or_path), name_or_path)
    else:
        known = ", ".join([*DEFAULTS, *packaged])
        raise UsageError(f"recipe {name_or_path!r} is not known; known are {known}, or a .toml file")
    for override in overrides:
        _apply(raw, override)
    return parse_recipe(raw)


def resolve_member(name: str, changes: Mapping[str, Any]) -> Recipe:
    """A recipe that is part of another one: the packaged one called `name` with `changes`, or these alone.

    They stand alone when they name a `detector`. Raises UsageError.
    """
    if "detector" in changes:
        return parse_recipe({"name": name, **changes})
    packaged = _packaged()
    if name not in packaged:
        raise UsageError(f"member {name!r} is no recipe; known are {', '.join(packaged)}, or give its detector")
    return parse_recipe(_over({"name": name} | _load(packaged[name], name), changes))


def _over(raw: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """`raw` with `changes`, table by table."""
    merged = dict(raw)
    for key, value in changes.items():
        below = merged.get(key)
        merged[key] = _over(below, value) if isinstance(below, Mapping) and isinstance(value, Mapping) else value
    return merged


def parse_recipe(raw: Mapping[str, Any]) -> Recipe:
    """Fill `raw` up with defaults and check every key and type. Raises UsageError."""
    detector = find_detector(str(raw.get("detector", _Common.detector)))
    own = to_plain(detector.settings())
    resolved = _merge(to_plain(_Common()) | own, raw, "")
    names = [item.name for item in fields(_Common)]
    try:
        shared = parse_record(_Common, {name: resolved[name] for name in names}, "recipe")
        settings = parse_record(detector.settings, {name: resolved[name] for name in own}, "recipe")
    except ManifestError as exc:
        raise UsageError(str(exc)) from exc
    if not (1 <= shared.map_cell_px <= shared.grid.tile_px and shared.grid.tile_px % shared.map_cell_px == 0):
        raise UsageError(f"recipe.map_cell_px {shared.map_cell_px} must divide grid.tile_px {shared.grid.tile_px}")
    return Recipe(**{name: getattr(shared, name) for name in names}, settings=settings)


def _packaged() -> dict[str, Path]:
    return {file.stem: file for file in sorted((Path(__file__).parent / "recipes").glob("*.toml"))}


def _load(file: Path, name: str) -> dict[str, Any]:
    try:
        return tomllib.loads(file.read_text(encoding="utf-8"))
    except OSError as exc:
        raise UsageError(f"{name}: cannot be read: {exc.strerror}") from exc
    except ValueError as exc:
        raise UsageError(f"{name}: is not TOML: {exc}") from exc


def _apply(raw: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not key.strip():
        raise UsageError(f"--set {override!r}: write it as key=value, such as train.steps=500")
    *tables, last = key.strip().split(".")
    place = raw
    for table in tables:
        place = place.setdefault(table, {})
        if not isinstance(place, dict):
            raise UsageError(f"--set {override!r}: {table} is a value, not a table")
    place[last] = _value(text.strip())


def _value(text: str) -> Any:
    """A TOML value, or the bare text where it is none: `score=l` needs no quotes."""
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except ValueError:
        return text


def _merge(defaults: dict[str, Any], raw: Mapping[str, Any], where: str) -> dict[str, Any]:
    unknown = sorted(raw.keys() - defaults.keys())
    if unknown:
        raise UsageError(f"recipe key {where}{unknown[0]} is not known; known are {', '.join(_keys(defaults, where))}")
    merged = dict(defaults)
    for key, value in raw.items():
        # A table that is empty by default takes any key: its reader checks them.
        if isinstance(defaults[key], dict) and defaults[key] and isinstance(value, Mapping):
            merged[key] = _merge(defaults[key], value, f"{where}{key}.")
        else:
            merged[key] = value
    return merged


def _keys(defaults: Mapping[str, Any], where: str) -> list[str]:
    found: list[str] = []
    for key, value in defaults.items():
        found += _keys(value, f"{where}{key}.") if isinstance(value, dict) else [f"{where}{key}"]
    return found
