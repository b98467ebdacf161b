"""Whether a live camera's picture may be judged: its size, its light, and whether it moves at all.

Runs in the capture process. Costs of a picture of 1920 × 1200 stand in docs/decisions/0016.
"""

import hashlib
import time
from collections import Counter
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from kizu_agent.errors import CameraError

Image = NDArray[np.uint8]

PICTURE_CAUSES = frozenset({"black", "white", "frozen", "size_changed", "unreadable"})
"""Causes that only a good picture takes back; for others it is enough that the camera answers."""
WHITE_LEVEL = 250
"""Grey level from which a pixel counts as saturated: what a JPEG makes of 255."""
STRAY_SHARE = 0.001
"""So many values may lie on the other side of the level: hot and dead pixels."""
REOPEN_S = 60.0
"""A camera that has been dark for so long is opened again: a stuck driver may give empty buffers for ever."""
_SAMPLES_A_SIDE = 96
_ROWS_AT_ONCE = 64


@dataclass(frozen=True)
class Limits:
    """What a live camera's pictures must keep to; the parent sends it with the order to open.

    `…_after_s` in seconds, 0: not looked for. `black_level` grey level 0 to 254. `size` (width, height) in pixels,
    None: that of the first picture. `frozen` digest of the picture that an earlier process of this camera froze at.
    """

    frozen_after_s: float = 0.0
    black_after_s: float = 0.0
    white_after_s: float = 0.0
    black_level: int = 16
    size: tuple[int, int] | None = None
    frozen: str | None = None


class Doubt(NamedTuple):
    """Why a picture is not judged; `is_loss` once that has lasted long enough for the camera to count as lost."""

    cause: str
    message: str
    is_loss: bool


class PictureChecks:
    """Looks at each picture of one camera in turn.

    Until the first good picture every doubtful one is refused at once: no outage ends, and no camera begins, with a
    picture that shows nothing. After it, black and white ones pass until they have lasted.
    """

    def __init__(self, limits: Limits) -> None:
        self.drops: Counter[str] = Counter()
        self.frozen = limits.frozen
        """Digest of the picture that the camera is frozen at, None while it moves."""
        self._limits = limits
        self._size = limits.size
        self._has_given = False
        self._tone: str | None = None
        self._tone_since_mono_s = 0.0
        self._previous: Image | None = None
        self._same_since_mono_s: float | None = None

    def look(self, image: Image) -> Doubt | None:
        """Say what keeps `image`, uint8 [H, W, C], from being judged; None where nothing does.

        Raises CameraError where opening the camera again is the only remedy: `size_changed`, `frozen`, and `black` or
        `white` after a minute of it.
        """
        now_mono_s = time.monotonic()
        self._check_size(image)
        doubt = self._check_tone(image, now_mono_s) or self._check_frozen(image, now_mono_s)
        if doubt is None:
            self._has_given = True
        else:
            self.drops[doubt.cause] += 1
        return doubt

    def _check_size(self, image: Image) -> None:
        size = (image.shape[1], image.shape[0])
        self._size = self._size or size
        if size != self._size:
            self.drops["size_changed"] += 1
            given, wanted = (f"{width} × {height}" for width, height in (size, self._size))
            raise CameraError("size_changed", f"gives pictures of {given} pixels instead of {wanted}")

    def _check_tone(self, image: Image, now_mono_s: float) -> Doubt | None:
        tone = self._tone_of(image)
        if tone is None or tone != self._tone:
            self._tone, self._tone_since_mono_s = tone, now_mono_s
        if tone is None:
            return None
        lasts_s = now_mono_s - self._tone_since_mono_s
        after_s = self._limits.black_after_s if tone == "black" else self._limits.white_after_s
        is_loss = lasts_s >= after_s
        if self._has_given and not is_loss:
            return None
        message = f"nothing but {tone} pictures for {lasts_s:.1f} s"
        if lasts_s >= after_s + REOPEN_S:
            self.drops[tone] += 1
            raise CameraError(tone, message)
        # What comes next begins like a start: only a good picture ends this.
        self._has_given = self._has_given and not is_loss
        return Doubt(tone, message, is_loss)

    def _tone_of(self, image: Image) -> str | None:
        """`black` or `white` where nearly all values lie beyond the level; a sample tells nearly always that not."""
        steps = [max(1, side // _SAMPLES_A_SIDE) for side in image.shape[:2]]
        sample = image[:: steps[0], :: steps[1]]
        limits = self._limits
        if limits.black_after_s and all(_is_below(part, limits.black_level) for part in (sample, image)):
            return "black"
        if limits.white_after_s and all(_is_above(part, WHITE_LEVEL) for part in (sample, image)):
            return "white"
        return None

    def _check_frozen(self, image: Image, now_mono_s: float) -> Doubt | None:
        if not self._limits.frozen_after_s:
            return None
        if self.frozen is not None and digest(image) != self.frozen:
            self.frozen = None
        if self.frozen is None and not _are_same(self._previous, image):
            self._previous, self._same_since_mono_s = image, now_mono_s
            return None
        if self._same_since_mono_s is None:
            self._same_since_mono_s = now_mono_s
        same_s = now_mono_s - self._same_since_mono_s
        if same_s >= self._limits.frozen_after_s:
            self.drops["frozen"] += 1
            self.frozen = self.frozen or digest(image)
            raise CameraError("frozen", f"gave the same picture, bit by bit, for {same_s:.1f} s")
        message = "gives the picture still at which it froze"
        return Doubt("frozen", message, is_loss=False) if self.frozen is not None else None


def limits_from(order: dict[str, Any]) -> Limits:
    """Read limits as JSON carried them."""
    size = order["size"]
    return Limits(**{**order, "size": None if size is None else (size[0], size[1])})


def digest(image: Image) -> str:
    """A digest of all pixels and the shape of `image`, 32 hex digits."""
    return hashlib.blake2b(np.ascontiguousarray(image).data, digest_size=16, key=repr(image.shape).encode()).hexdigest()


def _is_below(part: Image, level: int) -> bool:
    return int(np.count_nonzero(part > level)) <= part.size * STRAY_SHARE


def _is_above(part: Image, level: int) -> bool:
    return int(np.count_nonzero(part < level)) <= part.size * STRAY_SHARE


def _are_same(one: Image | None, other: Image) -> bool:
    """Compare bit by bit, some rows at a time: pictures of a camera that lives differ in the first ones."""
    if one is None or one.shape != other.shape:
        return False
    starts = range(0, len(other), _ROWS_AT_ONCE)
    return all(np.array_equal(one[row : row + _ROWS_AT_ONCE], other[row : row + _ROWS_AT_ONCE]) for row in starts)
