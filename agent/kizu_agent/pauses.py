"""Cameras that are paused by command; over restarts too, for somebody may be at work in front of them."""

import threading
from collections.abc import Iterable
from pathlib import Path

from pydantic import BaseModel, ConfigDict

from kizu_agent.state_file import StateFile

FILE_NAME = "paused.json"


class _File(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    schema_version: int = 1
    cameras: list[str]


class PauseBook:
    """Which cameras are paused; from any thread. `problem` says in words that this is not known any more."""

    def __init__(self, state_dir: Path) -> None:
        self._file = StateFile(state_dir / FILE_NAME, _File)
        self._changing = threading.Lock()
        self.paused = frozenset((self._file.load() or _File(cameras=[])).cameras)

    @property
    def problem(self) -> str | None:
        """Why it is not known which cameras were paused; None where it is."""
        return self._file.problem

    def set(self, cameras: Iterable[str], *, is_paused: bool) -> None:
        """Pause `cameras`, or let them go on. Raises OSError, and nothing has changed then."""
        with self._changing:
            paused = self.paused | set(cameras) if is_paused else self.paused - set(cameras)
            self._file.save(_File(cameras=sorted(paused)))
            self.paused = paused
