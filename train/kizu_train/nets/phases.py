"""Several trainings in one fit, one after the other, each resumable: a session for each, counting on from the last."""

from collections.abc import Callable, Mapping

from torch import Tensor

from kizu_train.detectors.base import Extras, Session

_KEPT = "kept."


class Phase:
    """The `Session` of one phase of a fit: steps `first` to `first + steps` of `total`.

    `kept` gives what earlier phases learned; it is saved along, and `earlier` finds it again when a fit is resumed.
    """

    def __init__(
        self, session: Session, first: int, total: int, kept: Callable[[], dict[str, Tensor]] | None = None
    ) -> None:
        self._session, self._first, self._total, self._kept = session, first, total, kept
        self._saved: tuple[int, dict[str, Tensor]] | None = None
        self.done = 0
        """Steps done in this phase."""

    def resume(self, saved: tuple[int, dict[str, Tensor]] | None) -> "Phase":
        """Take up the fit's checkpoint where it is of this phase."""
        if saved is not None and is_late(saved[1]) == (self._kept is not None):
            self.done = saved[0] - self._first
            self._saved = (self.done, saved[1])
        return self

    @property
    def extras(self) -> Extras:
        """What the user gave."""
        return self._session.extras

    @property
    def device(self) -> str:
        """`cpu` or `cuda`."""
        return self._session.device

    @property
    def seed(self) -> int:
        """Another for each phase."""
        return self._session.seed + 7919 * self._first

    @property
    def should_stop(self) -> bool:
        """As the fit's."""
        return self._session.should_stop

    def restore(self) -> tuple[int, dict[str, Tensor]] | None:
        """This phase's checkpoint."""
        return self._saved

    def save(self, step: int, tensors: Callable[[], dict[str, Tensor]]) -> None:
        """Offer a checkpoint of this phase with what earlier ones learned."""
        kept, self.done = self._kept, step

        def joined() -> dict[str, Tensor]:
            earlier = kept() if kept is not None else {}
            # A file of tensors holds no tensor twice; what this phase trains may be among what was there before.
            return tensors() | {f"{_KEPT}{name}": tensor.clone() for name, tensor in earlier.items()}

        self._session.save(self._first + step, joined)

    def report(self, step: int, _steps: int, losses: Mapping[str, float]) -> None:
        """Report among all steps of the fit."""
        self._session.report(self._first + step, self._total, losses)


def is_late(tensors: Mapping[str, Tensor]) -> bool:
    """Tell whether a checkpoint is of a phase that keeps what earlier ones learned."""
    return any(name.startswith(_KEPT) for name in tensors)


def earlier(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What earlier phases learned, from a later phase's checkpoint."""
    return {name[len(_KEPT) :]: tensor for name, tensor in tensors.items() if name.startswith(_KEPT)}
