"""Features without a pretrained network: what is planted, and that the tasks are learned."""

import numpy as np
import torch
from numpy.typing import NDArray

from kizu_train.nets.self_supervised import Pretext, ScratchNetwork, crop, net_from
from kizu_train.nets.self_supervised_planting import Planting, plant, spots

SMALL = ScratchNetwork(widths=(8, 12, 16), crop_px=32, embedding=8)


def surface(count: int = 16, side: int = 48) -> NDArray[np.uint8]:
    """Tiles uint8 [count, side, side, 1] of a grating whose phase varies."""
    random = np.random.default_rng(0)
    y, x = np.mgrid[:side, :side] / 3.0
    phase = random.uniform(0, 6, (2, count, 1, 1))
    wave = 120 + 40 * np.sin(x + phase[0]) + 40 * np.sin(y + phase[1]) + random.normal(0, 3, (count, side, side))
    return wave.clip(0, 255).astype(np.uint8)[..., None]


def test_planting_says_what_it_changed() -> None:
    """Nothing is changed where the answer is 0, something where it is 1; every crop has its own spots."""
    crops = torch.from_numpy(surface(32)).permute(0, 3, 1, 2) / 255
    spoilt, change = plant(crops, Planting(), torch.Generator().manual_seed(0))
    difference = (spoilt - crops).abs().amax(1, keepdim=True)
    assert difference[change == 0].max() <= 0.031
    assert difference[change == 1].min() >= 0.059
    assert 0 <= float(spoilt.min()) <= float(spoilt.max()) <= 1
    assert float((change.amax((1, 2, 3)) > 0).float().mean()) > 0.5


def test_spots_are_as_large_as_asked() -> None:
    """Most of a crop stays good; larger axes cover more; masks are repeatable."""
    small, large = (
        spots(64, 64, Planting(smallest_px=low, largest_px=high), torch.Generator().manual_seed(0)).mean()
        for low, high in ((1.5, 3.0), (10.0, 16.0))
    )
    assert 0 < float(small) < float(large) < 0.5


def test_crops_are_cut_from_their_own_tiles() -> None:
    """Each crop lies somewhere in its tile."""
    tiles = torch.from_numpy(surface(4))
    found = crop(tiles, 16, torch.Generator().manual_seed(0))
    for tile, part in zip(tiles, found, strict=True):
        windows = tile[:, :, 0].unfold(0, 16, 1).unfold(1, 16, 1)
        assert bool((windows == part[:, :, 0]).flatten(2).all(2).any())


def test_both_tasks_are_learned() -> None:
    """After some steps on the same surface, planted spots are found and cells know each other again."""
    torch.manual_seed(0)
    pretext = Pretext(SMALL, Planting(largest_px=8), 1).train()
    optimizer = torch.optim.Adam(pretext.parameters(), 5e-3)
    tiles = torch.from_numpy(surface())
    shown = []
    for step in range(40):
        total, terms = pretext.loss(tiles, torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        total.backward()
        optimizer.step()
        shown.append({name: float(term) for name, term in terms.items()})
    for task in ("planted", "instance"):
        first, last = (np.mean([terms[task] for terms in part]) for part in (shown[:5], shown[-5:]))
        assert last < 0.8 * first


def test_network_is_known_by_its_weights() -> None:
    """Widths and channels come back from the parameters' shapes."""
    net = Pretext(SMALL, Planting(), 3).net.eval()
    pixels = torch.rand(1, 3, 32, 32)
    for ours, theirs in zip(net(pixels), net_from(net.state_dict())(pixels), strict=True):
        assert torch.equal(ours, theirs)
