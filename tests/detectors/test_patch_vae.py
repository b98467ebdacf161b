"""The patch VAE on generated products."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

QUICK = (
    "grid.tile_px=16",
    "grid.stride_px=8",
    "grid.margin_px=8",
    "network.widths=[16,32]",
    "network.decoder_start=32",
    "network.decoder_widths=[16]",
    "network.latent=8",
    "train.steps=400",
    "reduction.smooth_sigma_px=2.0",
)


def test_separates_planted_defects(
    make_product: Callable[..., Path],
    stand_trial: Callable[..., Any],
    tmp_path: Path,
) -> None:
    """After some hundred steps it ranks spoilt pictures above good ones and finds the spots, as a bundle."""
    data = make_product(tmp_path / "weave", "weave")
    trial = stand_trial("patch_vae", data, *QUICK)
    assert trial.image_auroc > 0.9
    assert trial.pixel_auroc > 0.9
