"""The plain autoencoders' networks in their published forms, and the detector around them."""

import numpy as np
import pytest
import torch
from torch import nn

from kizu_train.errors import UsageError
from kizu_train.nets.autoencoders import ConvAutoencoder, ConvNetwork, DenseAutoencoder, DenseNetwork
from kizu_train.nets.reconstruction import Objective, ReconstructionDetector
from kizu_train.recipes import resolve_recipe
from kizu_train.runs import build_detector


def _detector(recipe: str, *overrides: str, seed: int = 0) -> ReconstructionDetector:
    detector = build_detector(resolve_recipe(recipe, overrides), "rgb", seed)
    assert isinstance(detector, ReconstructionDetector)
    return detector


def _tiles(detector: ReconstructionDetector, count: int = 3) -> torch.Tensor:
    side = detector.shape.tile_px
    return torch.from_numpy(np.random.default_rng(0).integers(0, 256, (count, side, side, 3), dtype=np.uint8))


def test_published_dense_network() -> None:
    """784–256–100–256–784 with ReLU between and a sigmoid at the end."""
    network = DenseAutoencoder(DenseNetwork(), 28, 1)
    sizes = [layer.weight.shape[::-1] for layer in network.layers if isinstance(layer, nn.Linear)]
    assert sizes == [(784, 256), (256, 100), (100, 256), (256, 784)]
    assert network(torch.rand(2, 1, 28, 28)).shape == (2, 1, 28, 28)


def test_published_convolutional_network() -> None:
    """3,795 parameters on three channels, and a sixteenth of the places in the middle."""
    network = ConvAutoencoder(ConvNetwork(), 256, 3)
    assert sum(p.numel() for p in network.parameters()) == 3795
    pictures = torch.rand(1, 3, 256, 256)
    assert network.encoder(pictures).shape == (1, 8, 64, 64)
    assert network(pictures).shape == pictures.shape


def test_network_of_ssim_autoencoder() -> None:
    """Its middle is a vector of the latent's size: nothing else passes."""
    network = _detector("ae_conv_ssim").network
    narrow = [layer for layer in network.middle if isinstance(layer, nn.Linear)]
    assert [(layer.in_features, layer.out_features) for layer in narrow] == [(32 * 64, 100), (100, 32 * 64)]


@pytest.mark.parametrize("recipe", ["ae_dense", "ae_conv", "ae_conv_ssim"])
def test_every_recipe_scores(recipe: str) -> None:
    """Scores and maps of both kinds are finite and at least 0, and one pass over all kinds gives what scorers give."""
    detector = _detector(recipe)
    tiles = _tiles(detector)
    with torch.no_grad():
        found = detector.score_all(tiles)
        for kind in detector.score_kinds:
            score, cells = detector.scorer(kind)(tiles)
            assert cells.shape == (3, detector.shape.tile_px // 4, detector.shape.tile_px // 4)
            assert torch.isfinite(cells).all()
            assert cells.min() >= 0
            torch.testing.assert_close(score, cells.mean((1, 2)))
            assert torch.equal(found[kind][0], score)


def test_score_is_the_mean_error() -> None:
    """Kind `l2` is the mean squared error of the tile; kind `ssim` adds the absolute error as it is weighed."""
    detector = _detector("ae_dense", "loss.l1_weight=0.5")
    tiles = _tiles(detector)
    x = tiles.permute(0, 3, 1, 2) / 255
    with torch.no_grad():
        error = x - detector.network(x)
        found = detector.score_all(tiles)
        torch.testing.assert_close(found["l2"][0], (error**2).mean((1, 2, 3)))
        without = _detector("ae_dense").score_all(tiles)["ssim"][0]
        torch.testing.assert_close(found["ssim"][0] - without, 0.5 * error.abs().mean((1, 2, 3)), rtol=1e-4, atol=1e-5)


def test_trained_loss_is_the_default_score() -> None:
    """What was trained on comes first among the kinds, and is the loss."""
    for kind, recipe in (("l2", "ae_dense"), ("ssim", "ae_conv_ssim")):
        detector = _detector(recipe, "network.batch_norm=false") if kind == "ssim" else _detector(recipe)
        assert detector.score_kinds[0] == kind
        tiles = _tiles(detector)
        with torch.no_grad():
            loss = detector._loss(tiles, torch.Generator().manual_seed(0))[0]
            torch.testing.assert_close(loss, detector.score_all(tiles)[kind][0].mean())


def test_borders_are_treated_like_the_middle() -> None:
    """Where nothing passes through a vector, a flat tile is rebuilt flat up to its edges: no zeros are filled in."""
    for network in (ConvNetwork(), ConvNetwork((8, 16), kernel=4, shrink="stride", refine=1, slope=0.2)):
        with torch.no_grad():
            rebuilt = ConvAutoencoder(network, 32, 1)(torch.full((1, 1, 32, 32), 0.7))
        torch.testing.assert_close(rebuilt, rebuilt[:, :, :1, :1].expand_as(rebuilt), rtol=1e-5, atol=1e-6)


def test_seed_decides_the_weights() -> None:
    """The same seed gives the same first weights, another seed others."""
    first, again, other = (_detector("ae_conv", seed=seed).tensors() for seed in (1, 1, 2))
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert any(not torch.equal(first[name], other[name]) for name in first)


@pytest.mark.parametrize(
    ("build", "why"),
    [
        (lambda: DenseNetwork(widths=()), "at least one layer"),
        (lambda: ConvNetwork(widths=()), "at least one layer"),
        (lambda: ConvNetwork(kernel=4), "odd kernel"),
        (lambda: ConvNetwork(slope=1.0), "slope"),
        (lambda: Objective(l1_weight=-1.0), "l1_weight"),
    ],
)
def test_impossible_settings_are_refused(build: object, why: str) -> None:
    """Settings that no network fits are refused with what is needed."""
    assert callable(build)
    with pytest.raises(ValueError, match=why):
        build()


def test_tiles_that_do_not_fit_are_refused() -> None:
    """Tiles that do not halve evenly, shrink to nothing, or are smaller than an SSIM window."""
    for tile_px, why in ((30, "multiple of 4"), (4, "at least 8")):
        with pytest.raises(UsageError, match=why):
            ConvAutoencoder(ConvNetwork(), tile_px, 1)
    with pytest.raises(UsageError, match="SSIM window"):
        _detector("ae_dense", "grid.tile_px=4", "grid.stride_px=4", "grid.margin_px=0")
