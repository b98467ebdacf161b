"""The command `product`: what runs on the line, and with it the models and thresholds, in one step."""

from collections.abc import Callable, Mapping
from typing import Literal

from kizu_agent.answers import ProductAnswer, ProductCameraPart, RunningPart
from kizu_agent.audit import Change
from kizu_agent.commands import Command
from kizu_agent.errors import CommandError
from kizu_agent.payloads import ModelPart
from kizu_agent.products import Label, ProductBook, Running
from kizu_agent.records import ModelId
from kizu_agent.requests import Request

ModelIn = Callable[[str | None], ModelId | None]
"""The model in service in a slot, None where there is none."""


class ProductRequest(Request):
    """Tell what runs, or set it: a product, null for none, with its batch; or a new batch of what runs.

    A request that names a product or a batch is one to set.
    """

    action: Literal["get", "set"] | None = None
    product: Label | None = None
    batch: Label | None = None

    @property
    def is_set(self) -> bool:
        """Whether something shall change."""
        named = bool({"product", "batch"} & self.model_fields_set)
        if self.action is None:
            return named
        if named != (self.action == "set"):
            raise CommandError("invalid", "set takes product, batch or both; get takes neither")
        return named


def product_command(
    book: ProductBook, cameras: Mapping[str, object], model_in: ModelIn, on_change: Callable[[Running], None]
) -> Command[ProductRequest, ProductAnswer]:
    """The command on `book`; `on_change` hears what runs now."""
    products = _Products(book, tuple(cameras), model_in, on_change)
    return Command("product", ProductRequest, ProductAnswer, products.carry_out, _change)


def running_part(running: Running) -> RunningPart:
    """What runs, as a payload has it."""
    return RunningPart(product=running.product, batch=running.batch, since=running.since)


class _Products:
    def __init__(
        self, book: ProductBook, cameras: tuple[str, ...], model_in: ModelIn, on_change: Callable[[Running], None]
    ) -> None:
        self._book, self._cameras, self._model_in, self._on_change = book, cameras, model_in, on_change

    def carry_out(self, request: ProductRequest, answer: ProductAnswer) -> ProductAnswer:
        """Answer `request`. Raises CommandError, and then nothing has changed."""
        old = self._book.running
        if request.is_set:
            product = request.product if "product" in request.model_fields_set else old.product
            self._check_models(product)
            try:
                self._on_change(self._book.set(product, request.batch))
            except OSError as exc:
                raise CommandError("failed", f"the product cannot be kept, nothing was changed: {exc}") from exc
        new = self._book.running
        return answer.model_copy(
            update={
                "old": running_part(old),
                "new": running_part(new),
                "products": list(self._book.names),
                "cameras": [self._camera(camera) for camera in self._cameras],
            }
        )

    def _check_models(self, product: str | None) -> None:
        missing = [name for name in self._cameras if self._model_in(self._book.slot(name, product)) is None]
        if product is not None and product in self._book.names and missing:
            cameras = ", ".join(missing)
            raise CommandError("no_model", f"product {product}: the model for camera {cameras} is not in service")

    def _camera(self, camera: str) -> ProductCameraPart:
        return ProductCameraPart(camera=camera, model=ModelPart.of(self._model_in(self._book.slot_now(camera))))


def _change(request: ProductRequest, answer: ProductAnswer) -> Change | None:
    return Change("product", answer.old, answer.new) if request.is_set else None
