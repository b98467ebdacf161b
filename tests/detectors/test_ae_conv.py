"""The convolutional autoencoder on generated products."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from kizu_train.runs import open_run

QUICK = ("grid.tile_px=32", "grid.stride_px=16", "grid.margin_px=16")
SSIM = (*QUICK, "network.widths=[16,32,32]", "network.latent=16", "network.squeeze=[]")


def test_squared_error_separates_planted_defects(
    make_product: Callable[..., Path],
    stand_trial: Callable[..., Any],
    border_share: Callable[..., float],
    tmp_path: Path,
) -> None:
    """Trained by the squared error, it ranks spoilt pictures above good ones and finds the spots, as a bundle."""
    data = make_product(tmp_path / "weave", "weave")
    trial = stand_trial("ae_conv", data, *QUICK, "train.steps=200", "train.batch=8")
    assert trial.image_auroc > 0.9
    assert trial.pixel_auroc > 0.9
    assert border_share(trial.run, data) <= 0.75


def test_ssim_separates_planted_defects(
    make_product: Callable[..., Path],
    stand_trial: Callable[..., Any],
    border_share: Callable[..., float],
    tmp_path: Path,
) -> None:
    """So does SSIM as loss and residual; an opened run scores the same bits."""
    data = make_product(tmp_path / "weave", "weave", channels=3)
    trial = stand_trial("ae_conv_ssim", data, *SSIM, "train.steps=150")
    assert trial.image_auroc > 0.9
    assert trial.pixel_auroc > 0.9
    assert border_share(trial.run, data) <= 0.75
    _check_reopened(trial)


def _check_reopened(trial: Any) -> None:
    """A run that is opened again scores the same bits, by either kind."""
    tiles = torch.from_numpy(trial.run.golden_tiles)
    for kind in trial.run.score_kinds:
        with torch.no_grad():
            first, second = (open_run(trial.run.path, kind).scorer(tiles) for _ in range(2))
        np.testing.assert_array_equal(first[1].numpy(), second[1].numpy())
    with torch.no_grad():
        assert torch.equal(trial.run.scorer(tiles)[0], open_run(trial.run.path, "ssim").scorer(tiles)[0])
