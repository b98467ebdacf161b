"""The table of products in the agent's configuration: what runs on the line decides which model judges, and how."""

from collections.abc import Sequence
from typing import Annotated

from pydantic import Field

from kizu_agent.camera_settings import CameraConfig, ThresholdRates
from kizu_agent.settings import Name, Section
from kizu_agent.slot_names import slot_name

HASH = "sha256:"


class ProductConfig(Section):
    """What judges while this product runs, on all cameras or on those named; the others judge as configured.

    Several tables may share a name where their cameras differ.
    """

    name: Name
    model: Name
    """Name of the bundle …"""
    version: Annotated[str, Field(pattern=r"^(sha256:[0-9a-f]{8,64}|[A-Za-z0-9_.+-]{1,64})$")] | None = None
    """… and, where it must be this one and no other, its version, or `sha256:` and eight or more digits of its hash.

    Then the bundle serves this product alone.
    """
    cameras: tuple[Name, ...] = ()
    """Empty: all."""
    thresholds: ThresholdRates | None = None
    """None: the camera's own, or the bundle's."""

    @property
    def slot(self) -> str:
        """The slot of its model."""
        if self.version is not None and self.version.startswith(HASH):
            return slot_name(self.model, sha256=self.version.removeprefix(HASH))
        return slot_name(self.model, self.version)


def table_problems(products: Sequence[ProductConfig], cameras: Sequence[CameraConfig]) -> list[str]:
    """What is wrong with the products as a whole, in words."""
    known = [camera.name for camera in cameras]
    problems, seen = [], set()
    for product in products:
        strangers = sorted(set(product.cameras) - set(known))
        if strangers:
            problems.append(f"product {product.name}: there is no camera {', '.join(strangers)}")
        for camera in product.cameras or known:
            if (product.name, camera) in seen:
                problems.append(f"product {product.name} is given twice for camera {camera}")
            seen.add((product.name, camera))
    return problems
