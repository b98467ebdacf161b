"""The patch VAE's network in its published forms, and its scorer."""

import math

import numpy as np
import pytest
import torch
from torch import nn

from kizu_train.detectors.base import TileShape
from kizu_train.detectors.patch_vae import PatchVaeDetector
from kizu_train.errors import UsageError
from kizu_train.nets.patch_vae import Network, PatchVae
from kizu_train.nets.patch_vae_terms import lowest_variance_term
from kizu_train.recipes import resolve_recipe


def _detector(recipe: str = "patch_vae", channels: int = 1, *overrides: str, seed: int = 0) -> PatchVaeDetector:
    resolved = resolve_recipe(recipe, overrides)
    return PatchVaeDetector(resolved.settings, TileShape(resolved.grid.tile_px, channels, resolved.map_cell_px), seed)


def _tiles(detector: PatchVaeDetector, count: int = 5) -> torch.Tensor:
    side, channels = detector.shape.tile_px, detector.shape.channels
    random = np.random.default_rng(0)
    return torch.from_numpy(random.integers(0, 256, (count, side, side, channels), dtype=np.uint8))


@pytest.mark.parametrize("recipe", ["patch_vae", "patch_vae_paper", "patch_vae_28px", "patch_vae_sigma"])
@pytest.mark.parametrize("channels", [1, 3])
def test_every_recipe_scores(recipe: str, channels: int) -> None:
    """Each recipe's network fits its tiles and gives finite, non-negative scores and maps of every kind."""
    detector = _detector(recipe, channels)
    shape = detector.shape
    side = shape.tile_px // shape.map_cell_px
    with torch.no_grad():
        for score, cells in detector.score_all(_tiles(detector)).values():
            assert score.shape == (5,)
            assert cells.shape == (5, side, side)
            assert (score.dtype, cells.dtype) == (torch.float32, torch.float32)
            assert torch.isfinite(score).all()
            assert torch.isfinite(cells).all()
            assert score.min() >= 0
            assert cells.min() >= 0


def test_the_published_28px_network() -> None:
    """Layer by layer, the 28 × 28 experiment's network: its layers' sizes and its number of parameters."""
    vae = _detector("patch_vae_28px").vae
    pixels = torch.rand(2, 1, 8, 8)
    sizes = [layer(pixels).shape for layer in (vae.encoder[:4], vae.encoder[:8])]
    assert sizes == [(2, 16, 4, 4), (2, 32, 2, 2)]
    start = vae.start(torch.rand(2, 2)).reshape(2, 1, 2, 2)
    assert [vae.decoder[:1](start).shape, vae.decoder(start).shape] == [(2, 32, 4, 4), (2, 16, 8, 8)]
    encoder = (4 * 1 * 16 + 32) + (4 * 16 * 32 + 64)
    latent = 2 * (128 * 2 + 2)
    decoder = (2 * 4 + 8) + (4 * 1 * 32 + 64) + (4 * 32 * 16 + 32)
    heads = 2 * (16 * 16 + 1 + 2)
    assert sum(p.numel() for p in vae.parameters()) == encoder + latent + decoder + heads


def test_the_paper_network() -> None:
    """96 px tiles shrink in five strided 4 × 4 convolutions to 3 × 3 at 16 times the first width."""
    vae = _detector("patch_vae_paper").vae
    convolutions = [layer for layer in vae.encoder if isinstance(layer, nn.Conv2d)]
    assert [layer.out_channels for layer in convolutions] == [16, 32, 64, 128, 256]
    assert {(layer.kernel_size, layer.stride) for layer in convolutions} == {((4, 4), (2, 2))}
    assert vae.side == 3


def test_score_and_map_are_the_residual_term() -> None:
    """Kind `m`: the score sums the map's pixels, and the map's cells average them."""
    detector = _detector("patch_vae", 3)
    tiles = _tiles(detector)
    with torch.no_grad():
        score, cells = detector.scorer("m")(tiles)
        pixels = detector.score_all(tiles)["m"][1]
        x = tiles.permute(0, 3, 1, 2) / 255
        mean, variance = detector.vae.decode(detector.vae.encode(x)[0])
    wanted = 0.5 * ((x - mean) ** 2 / variance).sum((1, 2, 3))
    torch.testing.assert_close(score, wanted)
    torch.testing.assert_close(cells.sum((1, 2)) * detector.shape.map_cell_px**2, wanted)
    torch.testing.assert_close(cells, pixels)


def test_regularised_score() -> None:
    """Kind `l` is β·D + A + M, shifted by the lowest A: the ranking of L, never below 0; the map carries it all."""
    detector = _detector("patch_vae", 1, "loss.beta=0.5")
    tiles = _tiles(detector)
    with torch.no_grad():
        found = detector.score_all(tiles)
        score, cells = detector.scorer("l")(tiles)
    torch.testing.assert_close(score, 0.5 * found["d"][0] + found["a"][0] + found["m"][0])
    torch.testing.assert_close(cells.sum((1, 2)) * detector.shape.map_cell_px**2, score)
    x = tiles.permute(0, 3, 1, 2) / 255
    with torch.no_grad():
        variance = detector.vae.decode(detector.vae.encode(x)[0])[1]
    raw = 0.5 * torch.log(2 * math.pi * variance).sum((1, 2, 3))
    floor = detector.settings.network.sigma_floor
    torch.testing.assert_close(found["a"][0] + lowest_variance_term(1, floor) * 32 * 32, raw, rtol=1e-4, atol=1e-2)


def test_scoring_is_deterministic_and_blind_to_the_batch() -> None:
    """The same tile scores the same, alone or among others: no sampling, no batch statistics."""
    scorer = _detector().scorer("m")
    tiles = _tiles(_detector())
    with torch.no_grad():
        whole, single = scorer(tiles), scorer(tiles[2:3])
    torch.testing.assert_close(whole[0][2:3], single[0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(whole[1][2:3], single[1], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("variance", ["softplus", "sigmoid"])
def test_sigma_has_a_floor(variance: str) -> None:
    """However low the head goes, σ stays at its floor."""
    vae = _detector("patch_vae", 1, f"network.variance={variance}", "network.sigma_floor=0.05").vae
    nn.init.constant_(vae.variance_head[0].up.bias, -1e4)
    with torch.no_grad():
        assert vae.decode(torch.zeros(1, 16))[1].min().item() == pytest.approx(0.05**2)


def test_mirrored_padding_treats_all_of_a_flat_tile_alike() -> None:
    """A uniform tile gives a uniform reconstruction up to its edges with mirrored padding, not with zeros."""

    def spread(padding: str) -> float:
        overrides = (f"network.padding={padding}", "network.batch_norm=false", "network.kernel=4")
        vae = _detector("patch_vae", 1, *overrides).vae
        with torch.no_grad():
            features = vae.encoder[:-2](torch.full((1, 1, 32, 32), 0.7))
            return float(features.std((2, 3)).max())

    assert spread("mirror") < 1e-5
    assert spread("zero") > 1e-3


def test_loss_weighs_its_terms_as_written() -> None:
    """The loss of a batch is β·D + A + M per tile with β as set: no weight of 1/batch sneaks in."""
    generator = torch.Generator().manual_seed(0)
    for beta in (1.0, 4.0):
        detector = _detector("patch_vae", 1, f"loss.beta={beta}")
        loss, terms = detector._loss(_tiles(detector, 16), generator)
        assert loss.item() == pytest.approx((beta * terms["D"] + terms["A"] + terms["M"]).item(), rel=1e-6)
    doubled = torch.cat([_tiles(detector, 4)] * 2)
    detector.vae.eval()
    latent_mean, log_variance = detector.vae.encode(doubled.permute(0, 3, 1, 2) / 255)
    wanted = 0.5 * (latent_mean**2 + log_variance.exp() - 1 - log_variance).sum(1).mean()
    assert detector._loss(doubled, generator)[1]["D"].item() == pytest.approx(wanted.item(), rel=0.05)


def test_seed_decides_the_weights() -> None:
    """The same seed gives the same first weights, whatever was drawn before; another seed others."""
    first = _detector(seed=1).tensors()
    torch.rand(3)
    again, other = _detector(seed=1).tensors(), _detector(seed=2).tensors()
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert any(not torch.equal(first[name], other[name]) for name in first)


@pytest.mark.parametrize(
    "wrong",
    [
        {"widths": ()},
        {"kernel": 3},
        {"stride": 1},
        {"decoder_widths": (8,)},
        {"head_kernel": 3},
        {"sigma_floor": 0.0},
        {"latent": 0},
    ],
)
def test_impossible_networks_are_refused(wrong: dict[str, object]) -> None:
    """Settings that no network fits are refused with what is needed."""
    with pytest.raises(ValueError, match=r"need|must"):
        Network(**wrong)  # type: ignore[arg-type]


@pytest.mark.parametrize(("tile_px", "why"), [(36, "multiple of 8"), (8, "too small to mirror")])
def test_tiles_that_do_not_fit_are_refused(tile_px: int, why: str) -> None:
    """Tiles that do not halve evenly, or shrink to nothing, are refused with the reason."""
    with pytest.raises(UsageError, match=why):
        PatchVae(Network(kernel=4), tile_px, 1)


def test_calibrated_sigma_scores_as_the_squared_error_does() -> None:
    """With one σ for all, M is the squared error over 2σ², σ belongs to what is saved, and no head is trained."""
    detector = _detector("patch_vae_sigma", 3)
    tiles = _tiles(detector)
    detector.vae.train()
    detector._loss(tiles, torch.Generator().manual_seed(0))
    detector.vae.eval()
    tensors = {name: tensor.clone() for name, tensor in detector.tensors().items()}
    assert not [name for name in tensors if name.startswith("variance_head")]
    other = _detector("patch_vae_sigma", 3, seed=5)
    other.load(tensors)
    with torch.no_grad():
        score, _ = detector.scorer("m")(tiles)
        assert torch.equal(score, other.scorer("m")(tiles)[0])
        x = tiles.permute(0, 3, 1, 2) / 255
        squared = ((x - detector.vae.decode(detector.vae.encode(x)[0])[0]) ** 2).sum((1, 2, 3))
    assert tensors["sigma.running"] != 0.25
    wanted = squared / (2 * (tensors["sigma.running"].sqrt() + math.exp(-6)) ** 2)
    torch.testing.assert_close(score, wanted, rtol=1e-2, atol=0)
