"""The two autoencoders on generated products."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from kizu_train.detectors.dual_ae import Contest, DualDetector
from kizu_train.recipes import resolve_recipe
from kizu_train.runs import build_detector, open_run

QUICK = (
    "grid.tile_px=16",
    "grid.stride_px=8",
    "grid.margin_px=8",
    "generator.widths=[16,32]",
    "generator.latent=16",
    "judge.widths=[16,32]",
    "judge.latent=16",
)


def _detector(*overrides: str, seed: int = 0) -> DualDetector:
    detector = build_detector(resolve_recipe("dual_ae", (*QUICK, *overrides)), "rgb", seed)
    assert isinstance(detector, DualDetector)
    return detector


def _tiles(count: int = 4) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(0).integers(0, 256, (count, 16, 16, 3), dtype=np.uint8))


def test_separates_planted_defects(
    make_product: Callable[..., Path],
    stand_trial: Callable[..., Any],
    border_share: Callable[..., float],
    tmp_path: Path,
) -> None:
    """It ranks spoilt pictures above good ones and finds the spots, as a bundle; an opened run scores the same bits."""
    data = make_product(tmp_path / "weave", "weave")
    trial = stand_trial("dual_ae", data, *QUICK, "train.steps=300")
    assert trial.image_auroc > 0.9
    assert trial.pixel_auroc > 0.9
    assert border_share(trial.run, data) <= 0.75
    tiles = torch.from_numpy(trial.run.golden_tiles)
    with torch.no_grad():
        again = open_run(trial.run.path)
        assert torch.equal(trial.run.scorer(tiles)[1], again.scorer(tiles)[1])
        assert not torch.equal(trial.run.scorer(tiles)[0], open_run(trial.run.path, "generator").scorer(tiles)[0])


def test_each_loss_reaches_its_own_network() -> None:
    """The judge's weights follow |x − D(x)| − k·|G − D(G)| alone, the generator's |x − G| + |G − D(G)| alone."""
    detector = _detector("generator.batch_norm=false", "contest.adversarial=2.0")
    network = detector.network
    network.balance.fill_(0.7)
    x = _tiles().permute(0, 3, 1, 2) / 255
    detector._loss(_tiles(), torch.Generator())[0].backward()
    found = {name: weight.grad.clone() for name, weight in network.named_parameters() if weight.grad is not None}
    made = network.generator(x)
    judged = network.judge(made.detach())
    judging = (x - network.judge(x)).abs().mean() - 0.7 * (made.detach() - judged).abs().mean()
    making = (x - made).abs().mean() + 2 * (made - network.judge(made)).abs().mean()
    for part, loss in ((network.judge, judging), (network.generator, making)):
        weights = dict(part.named_parameters())
        wanted = torch.autograd.grad(loss, list(weights.values()), retain_graph=True)
        prefix = "judge" if part is network.judge else "generator"
        for name, grad in zip(weights, wanted, strict=True):
            torch.testing.assert_close(found[f"{prefix}.{name}"], grad, rtol=1e-4, atol=1e-7)


def test_balance_moves_towards_its_ratio() -> None:
    """The balance rises while what was made is rebuilt too well, falls while too badly, and stays within 0…1."""
    detector = _detector("contest.pace=0.1")
    one = torch.tensor(1.0)
    detector._shift_balance(one, 0.2 * one)
    assert detector.network.balance.item() == pytest.approx(0.03)
    detector._shift_balance(one, 5 * one)
    assert detector.network.balance.item() == 0
    for _ in range(40):
        detector._shift_balance(one, 0 * one)
    assert detector.network.balance.item() == 1
    assert "balance" in detector.tensors()


def test_kinds_of_score() -> None:
    """`dual` passes through both networks, `generator` through the first; scorers and one pass over all agree."""
    detector = _detector()
    tiles = _tiles()
    x = tiles.permute(0, 3, 1, 2) / 255
    with torch.no_grad():
        found = detector.score_all(tiles)
        made = detector.network.generator(x)
        for kind, rebuilt in (("generator", made), ("dual", detector.network.judge(made))):
            torch.testing.assert_close(found[kind][0], ((x - rebuilt) ** 2).mean((1, 2, 3)))
            assert torch.equal(detector.scorer(kind)(tiles)[1], found[kind][1])


def test_seed_and_settings() -> None:
    """The seed decides the weights; impossible contests are refused."""
    first, again, other = (_detector(seed=seed).tensors() for seed in (1, 1, 2))
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert any(not torch.equal(first[name], other[name]) for name in first)
    with pytest.raises(ValueError, match="ratio"):
        Contest(ratio=2.0)
