"""The view that one of several detectors, trained in turn, has of their common session: its own steps and tensors.

A checkpoint holds `begun/index` (which member is learning), `begun/offset` (steps done before it), `done/NAME/…` of
members that are through, and `now/…` of the one that is learning.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kizu_train.detectors.base import Extras, Session, find_detector
from kizu_train.errors import UsageError


@dataclass(frozen=True, eq=False)
class Begun:
    """How far the members are: `index` is learning, after `offset` steps of others and `step` own ones."""

    index: int
    offset: int
    step: int
    tensors: Mapping[str, Tensor]

    def of(self, name: str) -> dict[str, Tensor]:
        """What member `name` had learned."""
        return _below(f"done/{name}/", self.tensors)


def begin(saved: tuple[int, dict[str, Tensor]] | None) -> Begun:
    """Where to begin, from what the common session restored."""
    if saved is None:
        return Begun(0, 0, 0, {})
    step, tensors = saved
    offset = int(tensors["begun/offset"])
    return Begun(int(tensors["begun/index"]), offset, step - offset, tensors)


def check_extras(session: Session, members: Sequence[tuple[str, str]]) -> None:
    """Refuse extras that none of `members` (name, detector) makes use of. Raises UsageError."""
    for name in session.extras.given():
        if not any(name in find_detector(detector).uses for _, detector in members):
            raise UsageError(f"--{name}: none of {', '.join(who for who, _ in members)} has use for it; leave it out")


class MemberSession:
    """The `Session` of member `index`; `last` is the last of its own steps that was heard of."""

    def __init__(
        self, whole: Session, detector: str, start: Begun, index: int, learned: Callable[[], dict[str, Tensor]]
    ) -> None:
        self._whole, self._start, self._index, self._learned = whole, start, index, learned
        self._uses = find_detector(detector).uses
        self.last = start.step if start.index == index else 0

    @property
    def extras(self) -> Extras:
        """Those extras that this member makes use of."""
        given = self._whole.extras.given()
        return Extras(**{name: path for name, path in given.items() if name in self._uses})

    @property
    def device(self) -> str:
        """`cpu` or `cuda`."""
        return self._whole.device

    @property
    def seed(self) -> int:
        """The common seed."""
        return self._whole.seed

    @property
    def should_stop(self) -> bool:
        """True once the user asked to stop."""
        return self._whole.should_stop

    def restore(self) -> tuple[int, dict[str, Tensor]] | None:
        """This member's steps and tensors, where it is the one that was learning."""
        own = _below("now/", self._start.tensors)
        return (self._start.step, own) if own and self._start.index == self._index else None

    def save(self, step: int, tensors: Callable[[], dict[str, Tensor]]) -> None:
        """Offer a checkpoint of all members."""
        self.last = step
        self._whole.save(self._start.offset + step, lambda: self._state(tensors()))

    def save_here(self) -> None:
        """Offer a checkpoint before this member's first step of now."""
        now = _below("now/", self._start.tensors) if self._start.index == self._index else {}
        self._whole.save(self._start.offset + self.last, lambda: self._state(now))

    def report(self, step: int, steps: int, losses: Mapping[str, float]) -> None:
        """Show and log, counted on from the members before."""
        self.last = step
        self._whole.report(self._start.offset + step, self._start.offset + steps, losses)

    def through(self) -> Begun:
        """This member has learned: where the next one begins; a step of its own keeps the count rising."""
        after = Begun(self._index + 1, self._start.offset + self.last + 1, 0, {})
        begun = {"begun/index": torch.tensor(after.index), "begun/offset": torch.tensor(after.offset)}
        self._whole.save(after.offset, lambda: begun | self._done())
        return after

    def _state(self, now: Mapping[str, Tensor]) -> dict[str, Tensor]:
        begun = {"begun/index": torch.tensor(self._index), "begun/offset": torch.tensor(self._start.offset)}
        return begun | self._done() | {f"now/{name}": part for name, part in now.items()}

    def _done(self) -> dict[str, Tensor]:
        return {f"done/{name}": part for name, part in self._learned().items()}


def _below(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name[len(prefix) :]: part for name, part in tensors.items() if name.startswith(prefix)}
