"""What every camera driver gives."""

from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

WAIT_S = 0.5
"""A driver that waits for its next picture comes back at least this often."""


class Picture(NamedTuple):
    """One picture: `image` uint8 [H, W, 1 or 3 (RGB)], and the `source` that names it, None where nothing does."""

    image: NDArray[np.uint8]
    source: str | None


class Camera(Protocol):
    """A source of pictures; not thread-safe, used by one capture loop.

    A live camera (`is_live`) goes on whether or not anybody looks: its newest frame wins. The others wait. One that
    waits for a trigger (`is_triggered`) is well however long none comes; any other must tell by itself when its
    pictures stay away. One that makes its pictures when asked (`is_on_demand`) shows in each what is there now.
    One that draws them (`is_drawn`) works in dozens of planes of a picture's size, whose memory is not worth keeping.
    `drops` counts, by cause, the pictures that the driver itself could not give.
    """

    is_live: bool
    is_triggered: bool
    is_on_demand: bool
    is_drawn: bool
    drops: dict[str, int]

    def open(self) -> None:
        """Open or reopen; idempotent. Raises CameraError with its cause."""

    def read(self) -> Picture | None:
        """Wait for the next picture, at most about a second; None when none came yet and the camera is well.

        The picture is the caller's: the driver does not write into it again. Raises CameraError when the camera is
        lost, CameraEnded when there will be no more pictures, and PictureError for one picture that cannot be decoded.
        A native read may wait as long as the configured read timeout, the first one as long as the open timeout.
        """

    def skip(self) -> bool:
        """Pass over the next picture of a live camera, as cheaply as the driver can; tell whether one came.

        Waits and raises as `read` does, but for PictureError.
        """

    def close(self) -> None:
        """Give the device back; idempotent, never raises."""
