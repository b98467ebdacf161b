from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
import pytest
from numpy.typing import NDArray

from kizu_contract.judging import FrameScore

Draw = Callable[..., Path]


@pytest.fixture
def draw(tmp_path: Path) -> Draw:
    """Give a function that draws a grey test picture with a bright square of `level`, and its mask where asked."""

    def draw_one(
        kind: str, name: str, level: int, *, mask: bool | None = None, size: tuple[int, int] = (40, 60)
    ) -> Path:
        picture, truth = np.full(size, 20, np.uint8), np.zeros(size, np.uint8)
        picture[10:18, 30:38] = level
        truth[10:18, 30:38] = 255 if mask else 0
        path = tmp_path / "test" / kind / f"{name}.png"
        save(path, picture)
        if mask is not None:
            save(tmp_path / "ground_truth" / kind / f"{name}_mask.png", truth)
        return path

    return draw_one


def save(path: Path, picture: NDArray[np.uint8]) -> None:
    """Write a PNG, making its folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    data = cv2.imencode(".png", picture)[1]
    path.write_bytes(bytes(data))


@pytest.fixture
def brightness() -> Callable[[NDArray[np.uint8]], FrameScore]:
    """Give a scorer whose map is the grey level and whose score is its maximum."""

    def score(picture: NDArray[np.uint8]) -> FrameScore:
        frame_map = picture[:, :, 0].astype(np.float32)
        return FrameScore(float(frame_map.max()), frame_map)

    return score
