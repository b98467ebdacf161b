"""A session that shows and keeps nothing: for detectors that are trained on the way to another one."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from torch import Tensor

from kizu_train.detectors.base import Extras


@dataclass(frozen=True)
class QuietSession:
    """A `Session` that starts fresh and runs to its end."""

    seed: int
    device: str
    extras: Extras
    should_stop: bool = False

    def restore(self) -> tuple[int, dict[str, Tensor]] | None:
        """Nothing: it starts fresh."""
        return None

    def save(self, step: int, tensors: Callable[[], dict[str, Tensor]]) -> None:
        """Keep nothing."""

    def report(self, step: int, steps: int, losses: Mapping[str, float]) -> None:
        """Show nothing."""
