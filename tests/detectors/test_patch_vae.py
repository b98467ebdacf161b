"""The patch VAE on generated products."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from kizu_agent.inspector import load_inspector
from kizu_agent.settings import EngineConfig
from kizu_export.build import build_bundle
from kizu_train.fit import FitRequest, fit
from kizu_train.recipes import resolve_recipe
from kizu_train.runs import build_detector, open_run

SMALL = (
    "grid.tile_px=16",
    "grid.stride_px=8",
    "grid.margin_px=8",
    "network.widths=[16,32]",
    "network.decoder_start=32",
    "network.decoder_widths=[16]",
    "network.latent=8",
    "reduction.smooth_sigma_px=2.0",
)
QUICK = (*SMALL, "train.steps=400")


@pytest.mark.parametrize("recipe", ["patch_vae", "patch_vae_sigma"])
def test_separates_planted_defects(
    recipe: str,
    make_product: Callable[..., Path],
    stand_trial: Callable[..., Any],
    border_share: Callable[..., float],
    tmp_path: Path,
) -> None:
    """As a bundle it ranks spoilt above good and finds the spots; maxima of good pictures do not gather at borders."""
    data = make_product(tmp_path / "weave", "weave", tests=20)
    trial = stand_trial(recipe, data, *QUICK)
    assert trial.image_auroc > 0.9
    assert trial.pixel_auroc > 0.9
    assert border_share(trial.run, data) < 0.75


def test_each_kind_of_score_is_chosen_at_export(make_product: Callable[..., Path], tmp_path: Path) -> None:
    """One run gives a bundle for M, L, D and A: each says which it is and computes on the engine what torch does."""
    data = make_product(tmp_path / "weave", "weave", train=12, tests=1)
    recipe = resolve_recipe("patch_vae", (*SMALL, "train.steps=20", "loss.beta=2.0"))
    fit(FitRequest(recipe, data, tmp_path / "run", device="cpu"))
    run = open_run(tmp_path / "run")
    assert (run.score, run.score_kinds) == ("m", ("m", "l", "d", "a"))
    tiles = run.golden_tiles
    scores = {kind: _score_on_engine(tmp_path / "run", kind, tiles) for kind in run.score_kinds}
    x = torch.from_numpy(tiles).permute(0, 3, 1, 2) / 255
    vae = run.scorer.vae
    with torch.no_grad():
        mean, variance = vae.decode(vae.encode(x)[0])
        residual = (0.5 * (x - mean) ** 2 / variance).sum((1, 2, 3))
    np.testing.assert_allclose(scores["m"], residual.numpy(), rtol=1e-4)
    np.testing.assert_allclose(scores["l"], 2 * scores["d"] + scores["a"] + scores["m"], rtol=1e-4)
    assert len({float(values.sum()) for values in scores.values()}) == 4


def _score_on_engine(run: Path, kind: str, tiles: Any) -> Any:
    bundle = build_bundle(open_run(run, kind)).bundle
    assert bundle.manifest.provenance.recipe["score"] == kind
    inspector = load_inspector(bundle, EngineConfig(threads=1))
    try:
        return inspector.engine.run(tiles)[0]
    finally:
        inspector.close()


def test_calibrated_runs_are_told_apart() -> None:
    """A calibrated σ and a decoded one do not take each other's weights."""
    plain, calibrated = (
        build_detector(resolve_recipe(name, SMALL), "grey", 0) for name in ("patch_vae", "patch_vae_sigma")
    )
    with pytest.raises(RuntimeError, match="variance_head"):
        calibrated.load(plain.tensors())
