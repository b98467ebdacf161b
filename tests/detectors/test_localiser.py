"""The localiser learns where a scorer looks, and nothing else."""

from collections.abc import Callable, Iterator, Mapping

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from kizu_train.detectors.base import Extras, TileShape
from kizu_train.errors import UsageError
from kizu_train.nets.descent import Descent
from kizu_train.nets.localiser import Localiser, LocaliserSettings, make_localiser, spread, train_localiser
from kizu_train.nets.unet import UNetSettings

SETTINGS = LocaliserSettings(
    enabled=True, unet=UNetSettings((8, 16), out_stride=2), train=Descent(steps=150, batch=32, learning_rate=5e-3)
)
SHAPE = TileShape(16, 1, 2)


class _Grey:
    """Grey tiles with grain."""

    count = 64

    def batch(self, step: int, size: int) -> NDArray[np.uint8]:
        return np.random.default_rng(step).normal(110, 4, (size, 16, 16, 1)).astype(np.uint8)

    def sweep(self) -> Iterator[NDArray[np.uint8]]:
        yield self.batch(0, self.count)


class _Session:
    """Nothing to resume, nothing to report to."""

    device, seed, should_stop, extras = "cpu", 0, False, Extras()

    def restore(self) -> None:
        return None

    def save(self, step: int, tensors: Callable[[], dict[str, Tensor]]) -> None:
        """Keep nothing."""

    def report(self, step: int, steps: int, losses: Mapping[str, float]) -> None:
        """Tell nobody."""


@pytest.fixture(scope="module")
def localiser() -> Localiser:
    """Trained on a scorer that sees bright flaws alone."""
    found = make_localiser(SETTINGS, SHAPE, 0)
    assert found is not None
    train_localiser(found, lambda pixels: pixels.amax((1, 2, 3)), SETTINGS, _Grey(), _Session())
    return found


def _spot(shade: float) -> Tensor:
    """A grey tile with a spot in its lower right quarter: pixels [1, 1, T, T]."""
    pixels = torch.from_numpy(_Grey().batch(999, 1)).float().permute(0, 3, 1, 2) / 255
    pixels[..., 10:14, 10:14] = shade
    return pixels


def test_points_at_what_moves_the_score(localiser: Localiser) -> None:
    """A bright spot shows where it is; nothing else does."""
    with torch.no_grad():
        cells = localiser(_spot(0.95))[0]
    assert cells.shape == (8, 8)
    assert cells[5:7, 5:7].min() > 0.5
    assert cells[:4, :4].max() < 0.2


def test_ignores_what_the_scorer_does_not_see(localiser: Localiser) -> None:
    """A dark spot, plain as it is, does not move this scorer and does not show."""
    with torch.no_grad():
        assert localiser(_spot(0.05)).max() < 0.3


def test_maps_carry_the_score() -> None:
    """Without a localiser the map is the score throughout; with one, between its even share and all of it."""
    score, counts = torch.tensor([2.0, 8.0]), torch.rand(2, 8, 8)
    found, cells = spread(score, None, 0.2, 8)
    assert found is score
    assert torch.equal(cells, score[:, None, None].expand(2, 8, 8))
    _, cells = spread(score, counts, 0.2, 8)
    assert (cells >= 0.2 * score[:, None, None]).all()
    assert (cells <= score[:, None, None]).all()


def test_settings_refuse_what_cannot_be() -> None:
    """A share outside 0–1 and tiles that cannot be halved are refused; disabled, there is no localiser."""
    with pytest.raises(ValueError, match="even_share"):
        LocaliserSettings(even_share=1.5)
    with pytest.raises(UsageError, match="multiple of"):
        make_localiser(SETTINGS, TileShape(18, 1, 2), 0)
    assert make_localiser(LocaliserSettings(), SHAPE, 0) is None
