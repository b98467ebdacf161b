"""Results on their way to the disk; while it refuses them they wait here, bounded, and the least important go first."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import count

from kizu_agent.payloads import EventPayload, HeatmapPart, ResultPayload
from kizu_agent.records import Priority
from kizu_contract.judging import Verdict

MAX_HELD = 5000
"""Results held at most: about 20 MB, and minutes of a line that makes thirty a second."""

_PRIORITY = {Verdict.OK: Priority.OK, Verdict.WARN: Priority.WARN, Verdict.UNKNOWN: Priority.WARN}


@dataclass(frozen=True)
class Thumbnail:
    """An encoded heatmap, `width` × `height` pixels."""

    jpeg: bytes
    width: int
    height: int


@dataclass(frozen=True)
class Outcome:
    """A frame's messages before they have numbers: nothing of its picture, so that thousands may wait."""

    result: ResultPayload
    event: EventPayload | None
    thumbnail: Thumbnail | None

    @property
    def priority(self) -> Priority:
        """The result's."""
        return _PRIORITY.get(self.result.verdict, Priority.REJECT)


class Held:
    """Outcomes in their order. Beyond `MAX_HELD` the oldest of the least important goes, one with an event last.

    `on_loss` hears the priority of each message that goes.
    """

    def __init__(self, on_loss: Callable[[Priority], None]) -> None:
        self._on_loss = on_loss
        self._numbers: Iterator[int] = count()
        self._lanes: dict[Priority, dict[int, Outcome]] = {priority: {} for priority in Priority}

    def __len__(self) -> int:
        return sum(map(len, self._lanes.values()))

    def add(self, outcome: Outcome) -> None:
        """Add the newest."""
        rank = outcome.priority if outcome.event is None else Priority.EVENT
        self._lanes[rank][next(self._numbers)] = outcome
        if len(self) > MAX_HELD:
            self._sacrifice()

    def oldest(self) -> Outcome | None:
        """The one to commit next; None where nothing is held."""
        front = self._front()
        return None if front is None else front[2]

    def remove_oldest(self) -> None:
        """It was committed."""
        front = self._front()
        if front is not None:
            del self._lanes[front[1]][front[0]]

    def strip(self) -> None:
        """Take the heatmaps away: they would fill the memory, and a disk that is full, before anything else."""
        for lane in self._lanes.values():
            for number, outcome in lane.items():
                if outcome.thumbnail is not None:
                    bare = outcome.result.model_copy(update={"heatmap": HeatmapPart()})
                    lane[number] = replace(outcome, result=bare, thumbnail=None)
                    self._on_loss(Priority.HEATMAP)

    def _front(self) -> tuple[int, Priority, Outcome] | None:
        fronts = [(*next(iter(lane.items())), rank) for rank, lane in self._lanes.items() if lane]
        number, outcome, rank = min(fronts, key=lambda front: front[0]) if fronts else (0, None, Priority.OK)
        return None if outcome is None else (number, rank, outcome)

    def _sacrifice(self) -> None:
        rank = max(rank for rank, lane in self._lanes.items() if lane)
        lane = self._lanes[rank]
        outcome = lane.pop(next(iter(lane)))
        self._on_loss(outcome.priority)
        if outcome.event is not None:
            self._on_loss(Priority.EVENT)
