"""The command `inspect`: a camera's next picture is inspected, and the verdict is the answer."""

import time
from collections.abc import Callable, Mapping
from typing import Annotated

from pydantic import Field

from kizu_agent.answers import ErrorPart, InspectAnswer, JudgedByPart
from kizu_agent.camera_settings import CameraConfig
from kizu_agent.commands import SlowCommand
from kizu_agent.encoding import finite, utc_now, utc_text
from kizu_agent.errors import CommandError, unknown_camera
from kizu_agent.payloads import ModelPart
from kizu_agent.products import Label, ProductBook
from kizu_agent.records import Inspection, Part
from kizu_agent.requests import Request
from kizu_agent.triggers import Order, Triggers

Finish = Callable[[InspectAnswer], None]


class InspectRequest(Request):
    """Inspect the next picture of `camera`; what it shows is told in `part_id` and `batch`.

    `product`: refuse where another one runs. `deadline_ms` from the command's arrival; null: as configured.
    """

    camera: Annotated[str, Field(min_length=1, max_length=64)]
    part_id: Label | None = None
    batch: Label | None = None
    product: Label | None = None
    deadline_ms: Annotated[float, Field(gt=0, le=60_000)] | None = None


def inspect_command(
    triggers: Triggers, products: ProductBook, cameras: Mapping[str, CameraConfig]
) -> SlowCommand[InspectRequest, InspectAnswer]:
    """The command on `triggers`."""
    return SlowCommand("inspect", InspectRequest, InspectAnswer, _Inspect(triggers, products, cameras).begin)


class _Inspect:
    def __init__(self, triggers: Triggers, products: ProductBook, cameras: Mapping[str, CameraConfig]) -> None:
        self._triggers, self._products, self._cameras = triggers, products, cameras

    def begin(self, request: InspectRequest, answer: InspectAnswer, came_mono_ns: int, finish: Finish) -> None:
        """Ask for the picture; `finish` gets the answer now or by the deadline."""
        running = self._products.at(came_mono_ns)
        part = Part(request.part_id, request.batch or running.batch, running.product)
        known = answer.model_copy(
            update={"camera": request.camera, "part_id": part.part_id, "batch": part.batch, "product": part.product}
        )

        def settle(found: Inspection | CommandError) -> None:
            elapsed = {"answered_at": utc_now(), "elapsed_ms": (time.monotonic_ns() - came_mono_ns) / 1e6}
            changes = _no_verdict(found) if isinstance(found, CommandError) else _verdict(found, came_mono_ns)
            finish(known.model_copy(update={**elapsed, **changes}))

        try:
            self._check_product(request, part)
            self._triggers.ask(self._order(request, part, came_mono_ns), settle)
        except CommandError as exc:
            settle(exc)

    def _check_product(self, request: InspectRequest, part: Part) -> None:
        if request.product is not None and request.product != part.product:
            raise CommandError("wrong_product", f"product {request.product} is asked for, and {part.product} runs")

    def _order(self, request: InspectRequest, part: Part, came_mono_ns: int) -> Order:
        camera = self._cameras.get(request.camera)
        if camera is None:
            raise unknown_camera(request.camera, sorted(self._cameras))
        if camera.trigger != "mqtt":
            raise CommandError("not_triggered", f'camera {camera.name} has trigger = "{camera.trigger}", not "mqtt"')
        deadline_s = camera.trigger_deadline_s if request.deadline_ms is None else request.deadline_ms / 1000
        return Order(camera.name, part, request.request_id, came_mono_ns, deadline_s, camera.trigger_queue)


def _no_verdict(why: CommandError) -> dict[str, object]:
    return {"ok": False, "error": ErrorPart(code=why.code, message=str(why)), "reason": why.code}


def _verdict(inspection: Inspection, came_mono_ns: int) -> dict[str, object]:
    thresholds = inspection.thresholds
    return {
        "verdict": inspection.verdict,
        "reason": inspection.reason,
        "score": finite(inspection.score),
        "ratio": finite(thresholds.ratio(inspection.score)),
        "thresholds": JudgedByPart(warn=thresholds.warn, reject=thresholds.reject),
        "model": ModelPart.of(inspection.model),
        "result_id": inspection.id,
        "frame": inspection.frame.number,
        "captured_at": utc_text(inspection.frame.captured_ns),
        "picture_ms": (inspection.frame.captured_mono_ns - came_mono_ns) / 1e6,
        "waited_ms": inspection.waited_ns / 1e6,
        "scoring_ms": inspection.scoring_ns / 1e6,
    }
