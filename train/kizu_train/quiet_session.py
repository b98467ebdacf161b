"""A session that shows and keeps nothing: for detectors that are trained on the way to another one."""

from collections.abc import Callable, Mapping

from torch import Tensor

from kizu_train.detectors.base import Extras


class QuietSession:
    """A `Session` that starts fresh and runs to its end."""

    def __init__(self, seed: int, device: str, extras: Extras) -> None:
        self.seed, self.device, self.extras = seed, device, extras

    @property
    def should_stop(self) -> bool:
        """Never."""
        return False

    def restore(self) -> tuple[int, dict[str, Tensor]] | None:
        """Nothing: it starts fresh."""
        return None

    def save(self, step: int, tensors: Callable[[], dict[str, Tensor]]) -> None:
        """Keep nothing."""

    def report(self, step: int, steps: int, losses: Mapping[str, float]) -> None:
        """Show nothing."""
