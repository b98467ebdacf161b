"""How a fit shows itself: a bar on a terminal, a plain line now and then elsewhere."""

import sys
import time
from collections.abc import Mapping

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

_PLAIN_EVERY_S = 10.0


class FitProgress:
    """Shows step, losses and time left on stderr between `start` and `stop`."""

    def __init__(self) -> None:
        self._console = Console(stderr=True)
        self._is_terminal = self._console.is_terminal
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[losses]}"),
        )
        self._bar = Progress(*columns, TextColumn("left"), TimeRemainingColumn(), console=self._console)
        self._task: TaskID | None = None
        self._first: tuple[float, int] | None = None
        self._next_line = 0.0

    def start(self) -> None:
        """Begin to show."""
        if self._is_terminal:
            self._bar.start()

    def stop(self) -> None:
        """Leave the terminal as it was."""
        if self._is_terminal:
            self._bar.stop()

    def show(self, step: int, steps: int, losses: Mapping[str, float]) -> None:
        """Show `step` of `steps` with its losses."""
        text = "  ".join(f"{name} {value:.1f}" for name, value in losses.items() if name != "loss")
        if self._is_terminal:
            if self._task is None:
                self._task = self._bar.add_task("training", total=steps, losses=text)
            self._bar.update(self._task, completed=step, total=steps, losses=text)
        else:
            self._line(step, steps, text)

    def _line(self, step: int, steps: int, text: str) -> None:
        now = time.monotonic()
        self._first = self._first or (now, step)
        if now < self._next_line and step < steps:
            return
        self._next_line = now + _PLAIN_EVERY_S
        began, at = self._first
        left = f"  {(now - began) / (step - at) * (steps - step):.0f} s left" if step > at else ""
        sys.stderr.write(f"training {step}/{steps}  {text}{left}\n")
        sys.stderr.flush()
