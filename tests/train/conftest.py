"""Small pictures and quick settings for the tests of training."""

from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch

QUICK = (
    "grid.tile_px=16",
    "grid.stride_px=8",
    "grid.margin_px=8",
    "network.widths=[8,16]",
    "network.decoder_start=16",
    "network.decoder_widths=[8]",
    "network.latent=4",
    "train.batch=16",
    "train.steps=30",
)


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture
def quick() -> tuple[str, ...]:
    """Overrides that make `patch_vae` train in a second."""
    return QUICK


@pytest.fixture
def draw_pictures() -> Callable[..., list[Path]]:
    """A function that draws `count` different pictures, a stripe pattern with grain, into `folder`."""

    def draw(
        folder: Path, count: int, *, grey: bool = True, size: tuple[int, int] = (40, 56), seed: int = 0
    ) -> list[Path]:
        folder.mkdir(parents=True, exist_ok=True)
        random = np.random.default_rng(seed)
        paths = []
        for index in range(count):
            stripes = 128 + 60 * np.sin(np.arange(size[1]) / 3.0 + random.uniform(0, 6))
            picture = stripes[None, :, None] + random.normal(0, 6, (*size, 1 if grey else 3))
            paths.append(folder / f"{index:03}.png")
            assert cv2.imwrite(str(paths[-1]), np.clip(picture, 0, 255).astype(np.uint8))
        return paths

    return draw


@pytest.fixture
def good_folder(tmp_path: Path, draw_pictures: Callable[..., list[Path]]) -> Path:
    """A plain folder of twelve grey pictures."""
    draw_pictures(tmp_path / "good parts", 12)
    return tmp_path / "good parts"
