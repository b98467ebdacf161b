"""Which thresholds judge a camera: set by command and kept on disk, else configured, else the bundle's own."""

import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import structlog
from pydantic import BaseModel, ConfigDict, Field

from kizu_agent.camera_settings import CameraConfig, ThresholdRates
from kizu_agent.errors import CommandError, unknown_camera
from kizu_agent.state_file import StateFile
from kizu_contract.judging import Thresholds
from kizu_contract.manifest import Manifest

log = structlog.get_logger(__name__)

FILE_NAME = "thresholds.json"

Origin = Literal["bundle", "config", "product", "command"]


class ScoreThresholds(BaseModel):
    """Thresholds as scores; they mean something for the one model whose hash they carry."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, protected_namespaces=())

    warn: Annotated[float, Field(gt=0)]
    reject: Annotated[float, Field(gt=0)]
    model_sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


Override = ThresholdRates | ScoreThresholds
ProductRates = Callable[[str, str | None], ThresholdRates | None]
"""Camera and product → what the configuration gives for it."""
_Key = tuple[str | None, str]
"""Product (None: none runs) and camera."""


class _Previous(BaseModel):
    """What was set before the last change; None: nothing was."""

    model_config = ConfigDict(extra="forbid", strict=True)

    product: str | None
    camera: str
    override: ThresholdRates | ScoreThresholds | None


class _File(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    schema_version: Literal[1] = 1
    cameras: dict[str, ThresholdRates | ScoreThresholds]
    products: dict[str, dict[str, ThresholdRates | ScoreThresholds]] = {}
    """What was set while a product ran, by product and camera."""
    previous: list[_Previous] = []


@dataclass(frozen=True)
class ThresholdSetting:
    """Thresholds in effect and where they come from.

    `rates` is None where they were set as scores; `note` says what is set and cannot be applied, and why.
    """

    origin: Origin
    thresholds: Thresholds
    rates: ThresholdRates | None
    note: str | None = None


class ThresholdBook:
    """The thresholds of every camera for whatever model is in service; safe to use from several threads.

    What commands set is kept in `state_dir`. Rates hold for every model, through its calibration; scores only for the
    model they were set for; both for the product that they were set for (None: for no product), whose configured ones
    `product_rates` gives. A file that cannot be read is moved aside, noted in `problem`, and the defaults hold.
    """

    def __init__(
        self, state_dir: Path, cameras: Sequence[CameraConfig], product_rates: ProductRates = lambda *_: None
    ) -> None:
        self._file = StateFile(state_dir / FILE_NAME, _File)
        self._configured = {camera.name: camera.thresholds for camera in cameras}
        self._product_rates = product_rates
        self._changing = threading.Lock()
        self._previous: dict[_Key, Override | None] = {}
        self._overrides: Mapping[_Key, Override] = self._load()
        # One entry a camera and product: (override, model hash) it was worked out for, and the setting.
        self._known: dict[_Key, tuple[Override | None, str, ThresholdSetting]] = {}

    def get(self, camera: str, manifest: Manifest, sha256: str, product: str | None = None) -> Thresholds:
        """Give the thresholds of `camera` for the model `manifest` with content hash `sha256`; cheap, never fails."""
        return self.describe(camera, manifest, sha256, product).thresholds

    def describe(self, camera: str, manifest: Manifest, sha256: str, product: str | None = None) -> ThresholdSetting:
        """Give the thresholds of `camera` for this model, where they come from, and what cannot be applied."""
        key = (product, camera)
        override = self._overrides.get(key)
        known = self._known.get(key)
        if known is not None and known[0] is override and known[1] == sha256:
            return known[2]
        setting = self._resolve(key, override, manifest, sha256)
        if setting.note:
            log.warning("thresholds not applied", camera=camera, product=product, note=setting.note)
        self._known[key] = (override, sha256, setting)
        return setting

    def set(self, camera: str, override: Override, manifest: Manifest, sha256: str, product: str | None = None) -> None:
        """Keep `override` for `camera` on disk and use it from the next frame on.

        Raises CommandError when the camera is unknown or the model in service cannot judge by it, OSError when the
        disk refuses; nothing is changed then.
        """
        self.check_camera(camera)
        try:
            _scores(override, manifest, sha256)
        except ValueError as exc:
            raise CommandError("invalid", f"{camera}: these thresholds do not fit {manifest.name}: {exc}") from exc
        with self._changing:
            self._replace((product, camera), override)

    def reset(self, camera: str, product: str | None = None) -> None:
        """Forget what commands set for `camera`. Raises CommandError for an unknown camera, OSError by the disk."""
        self.check_camera(camera)
        with self._changing:
            self._replace((product, camera), None)

    def revert(self, camera: str, product: str | None = None) -> None:
        """Take the last change of `camera` back; once more takes the taking back back.

        Raises CommandError for an unknown camera and where nothing was changed, OSError by the disk.
        """
        self.check_camera(camera)
        key = (product, camera)
        with self._changing:
            if key not in self._previous:
                raise CommandError("no_previous", f"no command has changed the thresholds of {camera}")
            self._replace(key, self._previous[key])

    @property
    def problem(self) -> str | None:
        """What was set and is lost, in words; None where nothing is."""
        return self._file.problem and f"{self._file.problem}; default thresholds hold"

    def check_camera(self, camera: str) -> None:
        """Raise CommandError where there is no such camera."""
        if camera not in self._configured:
            raise unknown_camera(camera, sorted(self._configured))

    def _replace(self, key: _Key, override: Override | None) -> None:
        overrides = {known: kept for known, kept in self._overrides.items() if known != key}
        if override is not None:
            overrides[key] = override
        self._store(overrides, {**self._previous, key: self._overrides.get(key)})

    def _store(self, overrides: dict[_Key, Override], previous: dict[_Key, Override | None]) -> None:
        # Disk first: what is in effect is what a restart would find.
        cameras = {camera: kept for (product, camera), kept in overrides.items() if product is None}
        products: dict[str, dict[str, Override]] = {}
        for (product, camera), kept in overrides.items():
            if product is not None:
                products.setdefault(product, {})[camera] = kept
        before = [_Previous(product=product, camera=camera, override=o) for (product, camera), o in previous.items()]
        self._file.save(_File(cameras=cameras, products=products, previous=before))
        self._overrides, self._previous = overrides, previous

    def _load(self) -> Mapping[_Key, Override]:
        file = self._file.load()
        if file is None:
            return {}
        self._previous = {(kept.product, kept.camera): kept.override for kept in file.previous}
        return {
            (product, camera): kept
            for product, cameras in ((None, file.cameras), *file.products.items())
            for camera, kept in cameras.items()
        }

    def _resolve(self, key: _Key, override: Override | None, manifest: Manifest, sha256: str) -> ThresholdSetting:
        """Take the first of command, product, configuration and bundle that the model can judge by."""
        product, camera = key
        wishes: tuple[tuple[Origin, Override | None], ...] = (
            ("command", override),
            ("product", self._product_rates(camera, product)),
            ("config", self._configured.get(camera)),
        )
        notes = []
        for origin, wanted in wishes:
            if wanted is None:
                continue
            try:
                thresholds = _scores(wanted, manifest, sha256)
            except ValueError as exc:
                notes.append(f"{origin}: {exc}")
                continue
            rates = wanted if isinstance(wanted, ThresholdRates) else None
            return ThresholdSetting(origin, thresholds, rates, "; ".join(notes) or None)
        defaults = manifest.thresholds
        asked = ThresholdRates(warn_rate=defaults.warn_rate, reject_rate=defaults.reject_rate)
        return ThresholdSetting("bundle", defaults.scores(), asked, "; ".join(notes) or None)


def _scores(override: Override, manifest: Manifest, sha256: str) -> Thresholds:
    """Turn `override` into scores of this model. Raises ValueError when that cannot be."""
    if isinstance(override, ThresholdRates):
        return manifest.calibration.thresholds(override.warn_rate, override.reject_rate)
    if override.model_sha256 != sha256:
        raise ValueError(f"scores were set for model {override.model_sha256[:12]} and mean nothing for {sha256[:12]}")
    return Thresholds(override.warn, override.reject)
