"""Segmentation on synthetic defects, on generated products."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

QUICK = (
    "grid.tile_px=64",
    "grid.stride_px=64",
    "grid.margin_px=0",
    "network.widths=[8,16,24,24]",
    "train.steps=120",
    "train.batch=8",
    "train.learning_rate=4e-3",
)


@pytest.mark.parametrize("kind", ["weave", "part"])
def test_separates_planted_defects(
    kind: str, make_product: Callable[..., Path], stand_trial: Callable[..., Any], tmp_path: Path
) -> None:
    """After some hundred steps it ranks spoilt pictures above good ones and finds the spots, as a bundle."""
    data = make_product(tmp_path / kind, kind)
    trial = stand_trial("synthetic_defects", data, *QUICK)
    assert trial.image_auroc > 0.9
    assert trial.pixel_auroc > 0.9
