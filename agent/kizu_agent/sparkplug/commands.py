"""What hosts write: a rebirth of the node, and thresholds of a device, checked like every other command."""

import math
import time
from collections import Counter
from collections.abc import Callable

import structlog
from pydantic import ValidationError

from kizu_agent.audit import By, Change
from kizu_agent.errors import CommandError
from kizu_agent.payloads import ThresholdsPart
from kizu_agent.records import ModelId
from kizu_agent.sparkplug.metrics import REBIRTH, REJECT, WARN
from kizu_agent.sparkplug.payload import Metric, Payload, PayloadError, decode
from kizu_agent.thresholds import ScoreThresholds, ThresholdBook
from kizu_contract.judging import Thresholds
from kizu_contract.manifest import Manifest

log = structlog.get_logger(__name__)

WRITES_PER_S = 5.0
WRITES_AT_ONCE = 10.0
OUTCOMES = ("done", "refused", "malformed", "retained", "rate_limited", "unknown")

CameraModel = Callable[[str], tuple[ModelId, Manifest] | None]
"""The model in service for a camera; None where there is none."""


class HostCommands:
    """Carries out NCMD and DCMD payloads, none of which can make it raise; used by one thread.

    `outcomes` counts metrics that were written, and whole messages that were not even read.
    """

    def __init__(
        self,
        book: ThresholdBook,
        camera_model: CameraModel,
        product: Callable[[], str | None] = lambda: None,
        audit: Callable[[Change, By], None] = lambda _change, _by: None,
    ) -> None:
        self._book, self._camera_model, self._product, self._audit = book, camera_model, product, audit
        self._allowance, self._counted_mono_s = WRITES_AT_ONCE, time.monotonic()
        self.outcomes: Counter[str] = Counter(dict.fromkeys(OUTCOMES, 0))

    def asks_for_rebirth(self, payload: bytes) -> bool:
        """Read an NCMD; tell whether it is a rebirth request."""
        found = self._decode(payload, "NCMD")
        is_asked = False
        for metric in found.metrics if found else ():
            if metric.name == REBIRTH and metric.value is True:
                is_asked = True
                self.outcomes["done"] += 1
            else:
                self._refuse(
                    "unknown" if metric.name != REBIRTH else "refused", "NCMD", metric.name, "cannot be written"
                )
        return is_asked

    def write(self, camera: str, payload: bytes) -> bool:
        """Carry out a DCMD; tell whether thresholds were written to, successfully or not."""
        found = self._decode(payload, f"DCMD {camera}")
        wanted: dict[str, float] = {}
        for metric in found.metrics if found else ():
            if metric.name not in (WARN, REJECT):
                self._refuse("unknown", camera, metric.name, "cannot be written")
            elif (number := _number(metric)) is None:
                self._refuse("refused", camera, metric.name, "not a positive finite number")
            else:
                wanted[metric.name] = number
        if wanted and self._may_write(camera):
            self._set(camera, wanted)
        return found is not None and any(metric.name in (WARN, REJECT) for metric in found.metrics)

    def effective(self, camera: str) -> Thresholds | None:
        """The thresholds in effect for `camera`; None without a model."""
        found = self._camera_model(camera)
        return None if found is None else self._book.get(camera, found[1], found[0].sha256, self._product())

    def ignore(self, outcome: str, topic: str) -> None:
        """Count a message that is not even read."""
        self._refuse(outcome, topic, "", "ignored")

    def _set(self, camera: str, wanted: dict[str, float]) -> None:
        """Set those of both thresholds that are wanted, the other stays; both or nothing."""
        try:
            old, new = self._replace(camera, wanted)
        except (CommandError, ValidationError, OSError) as exc:
            self._refuse("refused", camera, ", ".join(wanted), str(exc).splitlines()[0])
            return
        self.outcomes["done"] += len(wanted)
        self._audit(Change(f"thresholds of camera {camera}", old, new), By("sparkplug"))

    def _replace(self, camera: str, wanted: dict[str, float]) -> tuple[ThresholdsPart, ThresholdsPart]:
        found = self._camera_model(camera)
        if found is None:
            raise CommandError("no_model", f"camera {camera} has no model yet")
        model, manifest = found
        product = self._product()
        old = self._book.get(camera, manifest, model.sha256, product)
        scores = {"warn": wanted.get(WARN, old.warn), "reject": wanted.get(REJECT, old.reject)}
        override = ScoreThresholds.model_validate({**scores, "model_sha256": model.sha256})
        self._book.set(camera, override, manifest, model.sha256, product)
        return ThresholdsPart.of(old), ThresholdsPart.of(Thresholds(override.warn, override.reject))

    def _may_write(self, camera: str) -> bool:
        """Each write goes to the disk: a storm of them must not wear it."""
        now = time.monotonic()
        earned = (now - self._counted_mono_s) * WRITES_PER_S
        self._allowance, self._counted_mono_s = min(WRITES_AT_ONCE, self._allowance + earned), now
        if self._allowance < 1:
            self._refuse("rate_limited", camera, "", f"more than {WRITES_PER_S:g} writes a second")
            return False
        self._allowance -= 1
        return True

    def _decode(self, payload: bytes, what: str) -> Payload | None:
        try:
            return decode(payload)
        except PayloadError as exc:
            self._refuse("malformed", what, "", str(exc))
            return None

    def _refuse(self, outcome: str, where: str, metric: str, reason: str) -> None:
        self.outcomes[outcome] += 1
        # The first of each kind, then each time their number doubles: a storm must not fill the log.
        count = self.outcomes[outcome]
        if count & (count - 1) == 0:
            log.warning(
                "host command refused",
                outcome=outcome,
                where=where,
                metric=metric[:64],
                reason=reason[:200],
                count=count,
            )


def _number(metric: Metric) -> float | None:
    value = metric.value
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return float(value) if math.isfinite(value) and value > 0 else None
