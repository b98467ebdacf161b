"""`sim:` — the simulated line as a camera: live at its rate, or as fast as it is asked (rate 0)."""

from kizu_agent.cameras.base import Picture
from kizu_agent.cameras.pacing import Pacer
from kizu_agent.errors import CameraEnded
from kizu_agent.simulation import SimulatedLine, SimulatorSettings


class SimulatedCamera:
    """Draws picture after picture from index 0; `source` is `sim:PART#INDEX`."""

    def __init__(self, settings: SimulatorSettings) -> None:
        self.is_live = settings.rate > 0
        self.drops: dict[str, int] = {}
        self._settings = settings
        self._line: SimulatedLine | None = None
        self._pacer = Pacer(settings.rate)
        self._index = 0

    def open(self) -> None:
        """Draw the blueprint and start the line at picture 0."""
        self._line, self._pacer, self._index = self._settings.line(), Pacer(self._settings.rate), 0

    def read(self) -> Picture | None:
        """Draw the next picture when it is due. Raises CameraEnded after `count` pictures."""
        if self._line is None:
            self.open()
        assert self._line is not None  # noqa: S101 - open made it
        if self._index == self._settings.count:
            raise CameraEnded(f"all {self._index} simulated pictures were drawn")
        if not self._pacer.is_due():
            return None
        index = self._index
        self._index += 1
        return Picture(self._line.draw(index).image, f"sim:{self._settings.part}#{index}")

    def close(self) -> None:
        """Stop the line."""
        self._line = None
