"""Which product runs on the line: it decides which model judges each camera, and by which thresholds.

A frame is judged by the product that ran when it was captured, or when its trigger came in, whatever has been ordered
meanwhile; so a change needs no pause, and no frame is judged half by one product and half by another.
"""

import threading
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

from kizu_agent.camera_settings import CameraConfig, ThresholdRates
from kizu_agent.encoding import utc_now
from kizu_agent.errors import CommandError
from kizu_agent.product_settings import ProductConfig
from kizu_agent.records import Frame, Part
from kizu_agent.slot_names import NO_SLOT
from kizu_agent.state_file import StateFile

FILE_NAME = "product.json"
_REMEMBERED = 256
"""Changes that are remembered for frames which were captured before them."""

Label = Annotated[str, Field(min_length=1, max_length=128, pattern=r"^[^\x00-\x1f\x7f]+$")]
"""What a plant calls a part, a batch or a product."""


class _File(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    schema_version: Literal[1] = 1
    product: Label | None
    batch: Label | None
    since: str


@dataclass(frozen=True)
class Running:
    """What runs: a product of the configuration (None: none was set) and a batch, since when (UTC text, monotonic).

    Without `is_known`, a product runs that the agent does not know: nothing may be judged by guessing.
    """

    product: str | None
    batch: str | None
    since: str
    since_mono_ns: int
    is_known: bool = True


class ProductBook:
    """The product that runs, now and a moment ago; safe to use from several threads, reading never waits."""

    def __init__(self, state_dir: Path, products: Sequence[ProductConfig], cameras: Sequence[CameraConfig]) -> None:
        names = [camera.name for camera in cameras]
        self._own = {camera.name: camera.model for camera in cameras}
        self._tables = {(product.name, camera): product for product in products for camera in product.cameras or names}
        self._named = {camera for _, camera in self._tables}
        self.names = tuple(dict.fromkeys(product.name for product in products))
        self._file = StateFile(state_dir / FILE_NAME, _File)
        self._changing = threading.Lock()
        self._history: deque[Running] = deque([self._load()], maxlen=_REMEMBERED)

    @property
    def running(self) -> Running:
        """What runs now."""
        return self._history[-1]

    @property
    def problem(self) -> str | None:
        """Why it is not known what runs; None where it is."""
        if self.running.is_known:
            return None
        return self._file.problem or f"product {self.running.product} is not in the configuration: set another one"

    @property
    def slots(self) -> frozenset[str | None]:
        """Every slot that a camera may ask for."""
        return frozenset(self._own.values()) | {table.slot for table in self._tables.values()}

    def slot(self, camera: str, product: str | None, *, is_known: bool = True) -> str | None:
        """The slot whose model judges `camera` while `product` runs."""
        if not is_known and camera in self._named:
            return NO_SLOT
        table = None if product is None else self._tables.get((product, camera))
        return self._own[camera] if table is None else table.slot

    def slot_now(self, camera: str) -> str | None:
        """The slot whose model judges `camera` now."""
        running = self.running
        return self.slot(camera, running.product, is_known=running.is_known)

    def rates(self, camera: str, product: str | None) -> ThresholdRates | None:
        """The thresholds that the configuration gives for `product` on `camera`; None: those of the camera."""
        table = None if product is None else self._tables.get((product, camera))
        return None if table is None else table.thresholds

    def mark(self, frame: Frame) -> tuple[Frame, str | None]:
        """The frame with its part, and the slot that judges it."""
        trigger = frame.trigger
        running = self.at(frame.captured_mono_ns if trigger is None else trigger.came_mono_ns)
        given = Part() if trigger is None else trigger.part
        part = Part(given.part_id, given.batch or running.batch, running.product)
        return replace(frame, part=part), self.slot(frame.camera, running.product, is_known=running.is_known)

    def set(self, product: str | None, batch: str | None) -> Running:
        """Let `product` run from this moment on, on disk first. Raises CommandError, OSError; nothing changed then."""
        if product is not None and product not in self.names:
            known = ", ".join(self.names) or "none"
            raise CommandError("unknown_product", f"there is no product {product[:64]!r}; there are: {known}")
        with self._changing:
            since = utc_now()
            self._file.save(_File(product=product, batch=batch, since=since))
            # Not before the disk has it, and one record with all of it: whoever reads sees all of it or nothing.
            running = Running(product, batch, since, time.monotonic_ns())
            self._history.append(running)
        return running

    def at(self, mono_ns: int) -> Running:
        """What ran at that moment of `time.monotonic_ns()`."""
        running = self._history[-1]
        if running.since_mono_ns <= mono_ns:
            return running
        with self._changing:
            earlier = tuple(self._history)
        return next((seen for seen in reversed(earlier) if seen.since_mono_ns <= mono_ns), earlier[0])

    def _load(self) -> Running:
        kept = self._file.load()
        if kept is None:
            is_known = self._file.problem is None
            return Running(None, None, utc_now(), 0, is_known)
        return Running(kept.product, kept.batch, kept.since, 0, kept.product is None or kept.product in self.names)
