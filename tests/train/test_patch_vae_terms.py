"""The terms of the loss against torch's own distributions, and what is done to the input."""

import math

import pytest
import torch
from torch.distributions import Normal, kl_divergence

from kizu_train.nets.patch_vae_terms import (
    Augment,
    CalibratedSigma,
    kl_term,
    lowest_variance_term,
    residual_term,
    variance_term,
)


def _random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed))


def test_kl_term() -> None:
    """D is the KL divergence from the standard normal in nats, summed over the latent; 0 at the prior."""
    mean, log_variance = _random(5, 3) * 4 - 2, _random(5, 3, seed=1) * 4 - 2
    posterior = Normal(mean, (0.5 * log_variance).exp())
    wanted = kl_divergence(posterior, Normal(0.0, 1.0)).sum(1)
    torch.testing.assert_close(kl_term(mean, log_variance), wanted)
    torch.testing.assert_close(kl_term(torch.zeros(2, 3), torch.zeros(2, 3)), torch.zeros(2))


def test_variance_and_residual_terms() -> None:
    """A + M is the negative log likelihood of a Gaussian, for each pixel summed over channels."""
    tiles, mean, variance = _random(2, 3, 4, 4), _random(2, 3, 4, 4, seed=1), _random(2, 3, 4, 4, seed=2) + 0.01
    wanted = -Normal(mean, variance.sqrt()).log_prob(tiles).sum(1)
    torch.testing.assert_close(variance_term(variance) + residual_term(tiles, mean, variance), wanted)
    assert residual_term(tiles, tiles, variance).abs().max() == 0


def test_each_term_by_hand() -> None:
    """One pixel, one channel: numbers that can be checked on paper."""
    one = torch.ones(1, 1, 1, 1)
    assert variance_term(one / (2 * math.pi)).item() == pytest.approx(0, abs=1e-6)
    assert residual_term(one, one * 0.5, one * 0.25).item() == pytest.approx(0.5)
    assert kl_term(torch.ones(1, 1), torch.zeros(1, 1)).item() == pytest.approx(0.5)


def test_lowest_variance_term() -> None:
    """A at the floor of σ is the lowest there is."""
    floor = torch.full((1, 3, 1, 1), 0.03**2)
    assert variance_term(floor).item() == pytest.approx(lowest_variance_term(3, 0.03), rel=1e-6)


def test_salt_and_pepper_spoils_the_input_only() -> None:
    """The asked share of pixels turns black or white, one for one and in all channels; the target stays clean."""
    tiles = _random(8, 3, 64, 64) * 0.8 + 0.1
    spoilt, target = Augment(salt_and_pepper=0.1)(tiles, torch.Generator().manual_seed(3))
    assert torch.equal(target, tiles)
    changed = (spoilt != tiles).any(1)
    assert (spoilt != tiles).all(1).equal(changed)
    assert changed.float().mean().item() == pytest.approx(0.1, abs=0.01)
    assert spoilt.amin(1)[changed].mean().item() == pytest.approx(0.5, abs=0.03)


def test_brightness_and_flips_change_input_and_target_alike() -> None:
    """Brightness and flips move input and target together, and differ from tile to tile."""
    tiles = _random(32, 1, 8, 8) * 0.5
    for augment in (Augment(0.0, brightness=0.3), Augment(0.0, flips=True)):
        spoilt, target = augment(tiles, torch.Generator().manual_seed(1))
        assert torch.equal(spoilt, target)
        assert not torch.equal(target, tiles)
    scale = (Augment(0.0, brightness=0.3)(tiles, torch.Generator().manual_seed(1))[1] / tiles).nan_to_num(1.0)
    assert 0.7 <= scale.min() < 0.8
    assert 1.2 < scale.max() <= 1.3001
    assert scale[:, 0].flatten(1).std(1).max() < 1e-4
    flipped = Augment(0.0, flips=True)(tiles, torch.Generator().manual_seed(1))[1]
    ways = [tiles, tiles.flip(2), tiles.flip(3), tiles.flip(2).flip(3)]
    hits = [sum(torch.equal(flipped[i], way[i]) for i in range(32)) for way in ways]
    assert sum(hits) == 32
    assert min(hits) > 2


@pytest.mark.parametrize("wrong", [{"salt_and_pepper": 1.0}, {"brightness": -0.1}])
def test_impossible_augmentation_is_refused(wrong: dict[str, float]) -> None:
    """Shares outside 0 to 1 are refused."""
    with pytest.raises(ValueError, match="between 0 and 1"):
        Augment(**wrong)


def test_darkening_stands_for_copies_of_the_data() -> None:
    """Input and target are darkened alike by none or one of the levels, each about as often, and never below black."""
    levels = (2, 4, 6, 8, 10)
    tiles = (_random(1200, 1, 2, 2) * 200 + 20).round() / 255
    spoilt, target = Augment(0.0, darken=levels)(tiles, torch.Generator().manual_seed(1))
    assert torch.equal(spoilt, target)
    darker = ((tiles - target) * 255).round().flatten(1)
    assert darker.std(1).max() == 0
    counts = torch.stack([(darker[:, 0] == level).sum() for level in (0, *levels)])
    assert counts.sum() == 1200
    assert counts.min() > 150
    assert counts.max() < 250
    black = torch.full((50, 1, 2, 2), 1 / 255)
    assert Augment(0.0, darken=levels)(black, torch.Generator().manual_seed(1))[1].min() == 0
    with pytest.raises(ValueError, match="grey levels"):
        Augment(darken=(0,))


def test_calibrated_sigma_is_the_optimum() -> None:
    """No other single σ explains the residuals better, and the gradient is that of the log of the squared error."""
    target, mean = _random(4, 1, 8, 8), _random(4, 1, 8, 8, seed=1).requires_grad_()
    variance = CalibratedSigma().observe(target, mean)

    def likelihood(value: torch.Tensor) -> torch.Tensor:
        every = value.expand_as(mean)
        return (variance_term(every) + residual_term(target, mean, every)).sum()

    with torch.no_grad():
        others = [likelihood(variance * factor) for factor in (0.8, 0.95, 1.05, 1.25)]
        assert likelihood(variance) < min(others)
    likelihood(variance).backward()
    assert mean.grad is not None
    wanted = torch.autograd.grad(0.5 * mean.numel() * ((target - mean) ** 2).mean().log(), mean)[0]
    torch.testing.assert_close(mean.grad, wanted, rtol=0.02, atol=1e-3)


def test_calibrated_sigma_never_collapses() -> None:
    """Perfect reconstructions leave σ at e⁻⁶; what is scored with is the average over the batches seen."""
    sigma = CalibratedSigma()
    tiles = torch.full((2, 1, 4, 4), 0.5)
    assert sigma.observe(tiles, tiles).sqrt().item() == pytest.approx(math.exp(-6), rel=1e-3)
    sigma.observe(tiles, tiles + 0.2)
    assert sigma().sqrt().item() == pytest.approx(0.2 / math.sqrt(2) + math.exp(-6), rel=1e-2)
    for _ in range(1000):
        sigma.observe(tiles, tiles)
    assert sigma().sqrt().item() < 0.004
