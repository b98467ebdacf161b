"""A repeatable conveyor of drawn parts with seeded defects and their truth: the camera that every machine has."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import numpy as np
from numpy.typing import NDArray

from kizu_agent.cameras.urls import boolean, choice, invalid, number, split_url, whole
from kizu_agent.simulated_defects import DEFECTS
from kizu_agent.simulated_parts import ALBEDO, BODY, PARTS, RELIEF, RUST, Plane

DATASET_FIRST_INDEX = 1_000_000_000
"""Where `write_dataset` starts counting: a camera of the same seed counts from 0 and never shows these pictures."""

_TRAY = (0.115, 0.120, 0.130)
_RUST_TAKES = (0.25, 0.60, 0.85)
"""Share of the light that rust takes, by colour."""
_BANK_PX = 64


class Look(NamedTuple):
    """How the scene appears: `light` of the lamp, `noise` of the sensor in grey levels, `grain` of the metal."""

    light: float
    noise: float
    grain: float


LOOKS = {
    "standard": Look(light=1.0, noise=2.2, grain=0.030),
    "dim": Look(light=0.62, noise=3.4, grain=0.030),
    "noisy": Look(light=1.0, noise=6.0, grain=0.045),
}


class Drawn(NamedTuple):
    """One picture: `image` uint8 [H, W, 3] RGB, the `defect` it shows, its `mask` uint8 [H, W], 0 or 255."""

    image: NDArray[np.uint8]
    defect: str | None
    mask: NDArray[np.uint8]


class SimulatedLine:
    """Parts on a conveyor; picture `index` is the same whenever, and in whatever order, it is drawn.

    `part` is one of PARTS, `defect_rate` 0…1 the share of defective parts, `severity` how hard defects hit (1: usual),
    `look` one of LOOKS. The nuisances of a picture (pose, light, grain, noise) do not depend on its defect.
    """

    def __init__(
        self,
        part: str,
        seed: int = 1,
        defect_rate: float = 0.1,
        width: int = 256,
        height: int = 256,
        *,
        severity: float = 1.0,
        look: str = "standard",
    ) -> None:
        if part not in PARTS or look not in LOOKS:
            raise ValueError(f"no part {part!r} with look {look!r}; use {sorted(PARTS)} and {sorted(LOOKS)}")
        if not 0 <= defect_rate <= 1 or min(width, height) < 32 or seed < 0:
            raise ValueError("a line needs 0 <= defect_rate <= 1, sides of at least 32 px and seed >= 0")
        self.part, self.seed, self.defect_rate, self.severity = part, seed, defect_rate, severity
        self.width, self.height, self.look = width, height, look
        self.defects = tuple(DEFECTS[part])
        self._look = LOOKS[look]
        self._blueprint = PARTS[part](width, height)
        self._noise = _noise_bank(height, width, (1, 1)) * self._look.noise
        self._grain = _noise_bank(height, width, self._blueprint.grain_px) * self._look.grain
        self._across, self._down = _ramps(height, width)

    @classmethod
    def from_url(cls, url: str) -> "SimulatedLine":
        """Make the line of a `sim:` URL. Raises CameraError (cause `invalid`)."""
        return read_url(url).line()

    def defect_of(self, index: int) -> str | None:
        """The defect that picture `index` shows, without drawing it."""
        rng = self._rng(index, 0)
        is_defective = bool(rng.random() < self.defect_rate)
        kind = self.defects[int(rng.integers(len(self.defects)))]
        return kind if is_defective else None

    def draw(self, index: int) -> Drawn:
        """Draw picture `index` >= 0 with the defect that the seed gives it."""
        return self.draw_with(index, self.defect_of(index))

    def draw_with(self, index: int, defect: str | None) -> Drawn:
        """Draw picture `index` >= 0 with this defect of the part, or with none. Raises KeyError for a foreign one."""
        layers = self._blueprint.layers
        cover = None
        if defect is not None:
            layers = layers.copy()
            cover = DEFECTS[self.part][defect](self._blueprint, layers, self.severity, self._rng(index, 1))
        rng = self._rng(index, 2)
        pose = self._pose(rng)
        size = (self.width, self.height)
        layers = np.asarray(cv2.warpAffine(layers, pose, size, borderMode=cv2.BORDER_REPLICATE), np.float32)
        image = self._photograph(layers, rng)
        mask = np.zeros((self.height, self.width), np.uint8)
        if cover is not None:
            seen = cv2.warpAffine(cover, pose, size) > 0.25
            mask = np.asarray(cv2.dilate(seen.astype(np.uint8) * 255, np.ones((3, 3), np.uint8)), np.uint8)
        return Drawn(image, defect, mask)

    def _rng(self, index: int, purpose: int) -> np.random.Generator:
        return np.random.default_rng((self.seed, index, purpose))

    def _pose(self, rng: np.random.Generator) -> NDArray[np.float64]:
        turn = rng.uniform(-1, 1) * self._blueprint.turn_deg
        shift = rng.uniform(-0.008, 0.008, 2) * self._blueprint.size_px
        centre = (self.width / 2 - 0.5, self.height / 2 - 0.5)
        pose = np.asarray(cv2.getRotationMatrix2D(centre, turn, 1.0), np.float64)
        pose[:, 2] += shift
        return pose

    def _photograph(self, layers: NDArray[np.float32], rng: np.random.Generator) -> NDArray[np.uint8]:
        """Light the scene from the upper left, blur it as a lens does, add what the sensor adds.

        In place where possible: each plane of a large picture is megabytes.
        """
        facing = _facing(_plane(layers, RELIEF))
        metal, body, rust = (_plane(layers, layer) for layer in (ALBEDO, BODY, RUST))
        grain = _window(self._grain, self.height, self.width, rng)
        light = self._light(rng)
        metal += grain
        for factor in (facing, body, light):
            metal *= factor
        # An anchor off the centre moves the blurred part: its shadow falls to the lower right.
        reach = max(3, round(0.045 * self._blueprint.size_px))
        bright = np.asarray(cv2.blur(body, (reach, reach), anchor=(reach - 1, reach - 1)), np.float32)
        np.subtract(1, np.multiply(bright, 0.55, out=bright), out=bright)
        tray = np.add(np.multiply(grain, 2.5, out=facing), 1, out=facing)
        for factor in (bright, np.subtract(1, body, out=body), light):
            tray *= factor
        del bright, body, light
        image = np.empty((self.height, self.width, 3), np.uint8)
        is_rusty = bool(rust.any())
        for channel, tint in enumerate(self._blueprint.tint):
            shown = metal * (1 - _RUST_TAKES[channel] * rust) if is_rusty else metal
            lit = cv2.addWeighted(shown, tint, tray, _TRAY[channel], 0)
            seen = np.asarray(cv2.GaussianBlur(lit, (3, 3), 0.55), np.float32)
            seen += _window(self._noise, self.height, self.width, rng)
            # The clipped minimum matters: OpenCV saturates above 255 and takes the amount below 0.
            cv2.insertChannel(cv2.convertScaleAbs(np.maximum(seen, 0, out=seen)), image, channel)
        return image

    def _light(self, rng: np.random.Generator) -> Plane:
        """Brightness [H, W] in grey levels for albedo 1: a slight gradient that differs from picture to picture."""
        gain = 255 * self._look.light * rng.uniform(0.97, 1.03)
        tilt_x, tilt_y = rng.uniform(-0.03, 0.03, 2) - 0.03
        return np.asarray(gain * (1 + tilt_x * self._across + tilt_y * self._down), np.float32)


@dataclass(frozen=True)
class SimulatorSettings:
    """What a `sim:` URL says; `rate` in pictures a second (0: as fast as possible), `count` None for no end.

    `trigger`: it counts as waiting for a trigger. `first`: seconds from opening to the first picture. `fault`: path of
    the file that says what is wrong now (cameras/simulated_faults.py).
    """

    part: str
    rate: float = 10.0
    seed: int = 1
    defects: float = 0.1
    width: int = 256
    height: int = 256
    count: int | None = None
    severity: float = 1.0
    look: str = "standard"
    trigger: bool = False
    first: float = 0.0
    fault: str | None = None

    def line(self) -> SimulatedLine:
        """Make the line; it draws its part once, which takes some hundredths of a second."""
        return SimulatedLine(
            self.part, self.seed, self.defects, self.width, self.height, severity=self.severity, look=self.look
        )


_KNOWN: dict[str, Callable[[str], Any]] = {
    "rate": number(0, 1000),
    "seed": whole(0, 2**31 - 1),
    "defects": number(0, 1),
    "width": whole(32, 8192),
    "height": whole(32, 8192),
    "count": whole(1, 10**12),
    "severity": number(0.1, 3),
    "look": choice({name: name for name in LOOKS}),
    "trigger": boolean,
    "first": number(0, 3600),
    "fault": str,
}


def read_url(url: str) -> SimulatorSettings:
    """Read `sim:PART?rate=10&seed=1&defects=0.1&width=256&height=256&count=…&severity=1&look=standard`.

    Also `trigger`, `first` and `fault`, see SimulatorSettings.
    Raises CameraError (cause `invalid`) that says which settings there are.
    """
    part, settings = split_url(url, _KNOWN)
    if part not in PARTS:
        raise invalid(url, f"no part {part!r}; there are {', '.join(sorted(PARTS))}")
    return SimulatorSettings(part, **settings)


def write_dataset(
    folder: Path,
    line: SimulatedLine,
    good: int,
    test_good: int = 0,
    defective: int = 0,
    first: int = DATASET_FIRST_INDEX,
) -> None:
    """Write pictures in the MVTec layout: `train/good`, `test/good`, `test/KIND` with `ground_truth/KIND`.

    `defective` pictures take the part's defects in turn. Raises OSError when the folder cannot be written.
    """
    for index, place, defect in _plan(line, good, test_good, defective):
        drawn = line.draw_with(first + index, defect)
        _write(folder / place / f"{index:05}.png", np.asarray(cv2.cvtColor(drawn.image, cv2.COLOR_RGB2BGR), np.uint8))
        if defect is not None:
            _write(folder / "ground_truth" / defect / f"{index:05}_mask.png", drawn.mask)


def _plan(line: SimulatedLine, good: int, test_good: int, defective: int) -> Iterator[tuple[int, str, str | None]]:
    for index in range(good + test_good):
        yield index, "train/good" if index < good else "test/good", None
    for index in range(defective):
        kind = line.defects[index % len(line.defects)]
        yield good + test_good + index, f"test/{kind}", kind


def _write(path: Path, picture: NDArray[np.uint8]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(cv2.imencode(".png", picture)[1].tobytes())


def _plane(layers: NDArray[np.float32], layer: int) -> Plane:
    return np.asarray(cv2.extractChannel(layers, layer), np.float32)


def _facing(relief: Plane) -> Plane:
    """How much more light a slope gets than what lies flat, as a factor."""
    facing = np.asarray(cv2.Sobel(relief, cv2.CV_32F, 1, 0, ksize=3, scale=1 / 8), np.float32)
    facing += np.asarray(cv2.Sobel(relief, cv2.CV_32F, 0, 1, ksize=3, scale=1 / 8), np.float32)
    facing *= 0.55
    np.clip(facing, -0.75, 0.85, out=facing)
    facing += 1
    return facing


def _noise_bank(height: int, width: int, grain_px: tuple[int, int]) -> Plane:
    """Unit noise, smoothed along its grain, larger than a picture: fresh noise for each picture would cost more."""
    shape = (height + _BANK_PX, width + _BANK_PX)
    noise = np.random.default_rng(height * 8192 + width).normal(0, 1, shape).astype(np.float32)
    if grain_px != (1, 1):
        noise = np.asarray(cv2.blur(noise, grain_px), np.float32)
    return np.asarray(noise / noise.std(), np.float32)


def _window(bank: Plane, height: int, width: int, rng: np.random.Generator) -> Plane:
    y, x = rng.integers(_BANK_PX, size=2)
    return bank[y : y + height, x : x + width]


def _ramps(height: int, width: int) -> tuple[Plane, Plane]:
    """Coordinates from -1 to 1 across [1, W] and down [H, 1] the picture."""
    across = np.linspace(-1, 1, width, dtype=np.float32)[None, :]
    return across, np.linspace(-1, 1, height, dtype=np.float32)[:, None]
