"""`sim:` — the simulated line as a camera: live at its rate, or as fast as it is asked (rate 0)."""

import time
from pathlib import Path

from kizu_agent.cameras.base import Picture
from kizu_agent.cameras.pacing import Pacer
from kizu_agent.cameras.simulated_faults import Faults
from kizu_agent.errors import CameraEnded, CameraError
from kizu_agent.simulation import SimulatedLine, SimulatorSettings


class SimulatedCamera:
    """Draws picture after picture from index 0; `source` is `sim:PART#INDEX`."""

    def __init__(self, settings: SimulatorSettings, read_timeout_s: float, *, is_triggered: bool = False) -> None:
        self.is_live = settings.rate > 0
        self.is_triggered = settings.trigger or is_triggered
        self.is_on_demand = True
        self.is_drawn = True
        self.drops: dict[str, int] = {}
        self._settings = settings
        self._read_timeout_s = read_timeout_s
        self._faults = Faults(Path(settings.fault) if settings.fault else None)
        self._line: SimulatedLine | None = None
        self._pacer = Pacer(settings.rate)
        self._index = 0
        self._silent_since_mono_s: float | None = None

    def open(self) -> None:
        """Draw the blueprint and start the line at picture 0. Raises CameraError while it is unplugged."""
        if self._faults.now() == "unplug":
            raise CameraError("unreachable", "the simulated camera is unplugged")
        self._line, self._pacer, self._index = self._settings.line(), Pacer(self._settings.rate), 0

    def read(self) -> Picture | None:
        """Draw the next picture when it is due. Raises CameraEnded after `count` pictures."""
        if not self._is_due():
            return None
        assert self._line is not None  # noqa: S101 - it is due
        index = self._index
        self._index += 1
        return self._photograph(self._line, index)

    def skip(self) -> bool:
        """Pass over the next picture without drawing it; what is wrong with the camera shows all the same."""
        if not self._is_due():
            return False
        self._index += 1
        fault = self._faults.now()
        self._faults.strike(fault)
        if fault == "silent":
            self._stay_silent()
            return False
        self._silent_since_mono_s = None
        return True

    def close(self) -> None:
        """Stop the line."""
        self._line = None

    def _is_due(self) -> bool:
        if self._line is None:
            self.open()
        if self._index == self._settings.count:
            raise CameraEnded(f"all {self._index} simulated pictures were drawn")
        if self._index == 0 and self._settings.first:
            time.sleep(self._settings.first)  # in one piece: a native call does not come back in between either
            self._pacer = Pacer(self._settings.rate)
        return self._pacer.is_due()

    def _photograph(self, line: SimulatedLine, index: int) -> Picture | None:
        fault = self._faults.now()
        self._faults.strike(fault)
        if fault == "silent":
            self._stay_silent()
            return None
        self._silent_since_mono_s = None
        # The same frozen picture whenever it is opened again: the sensor hangs, not the driver.
        image = line.draw(0 if fault == "freeze" else index).image
        return Picture(self._faults.spoil(fault, image), f"sim:{self._settings.part}#{index}")

    def _stay_silent(self) -> None:
        """No trigger comes, which is well; without one, a camera that gives nothing is lost after the read timeout."""
        now_mono_s = time.monotonic()
        since_mono_s = self._silent_since_mono_s = self._silent_since_mono_s or now_mono_s
        if not self.is_triggered and now_mono_s - since_mono_s >= self._read_timeout_s:
            raise CameraError("lost", f"no picture for {now_mono_s - since_mono_s:.1f} s")
