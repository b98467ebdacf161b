"""The dense autoencoder on generated products."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest


@pytest.mark.parametrize("loss", ["l2", "ssim"])
def test_separates_planted_defects(
    loss: str,
    make_product: Callable[..., Path],
    stand_trial: Callable[..., Any],
    border_share: Callable[..., float],
    tmp_path: Path,
) -> None:
    """Trained and scored by either loss, it ranks spoilt pictures above good ones and finds the spots, as a bundle."""
    data = make_product(tmp_path / "weave", "weave")
    quick = ("grid.tile_px=16", "grid.stride_px=8", "grid.margin_px=8", "network.widths=[96,16]", "train.steps=500")
    trial = stand_trial("ae_dense", data, *quick, f"loss.kind={loss}", f"score={loss}")
    assert trial.run.score == loss
    assert trial.image_auroc > 0.9
    assert trial.pixel_auroc > 0.9
    assert border_share(trial.run, data) <= 0.75
