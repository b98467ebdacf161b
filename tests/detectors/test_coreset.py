"""Few vectors for many: coreset and k-means."""

import torch

from kizu_train.nets.coreset import greedy_coreset, k_means


def clusters() -> tuple[torch.Tensor, torch.Tensor]:
    """Twelve far centres [12, 80] and 600 vectors close to them; the last centre has a single vector."""
    draw = torch.Generator().manual_seed(1)
    centres = 10 * torch.randn((12, 80), generator=draw)
    owner = torch.cat([torch.arange(599) % 11, torch.tensor([11])])
    return centres, centres[owner] + 0.1 * torch.randn((600, 80), generator=draw)


def test_coreset_reaches_every_cluster() -> None:
    """Twelve words cover twelve clusters, the rare one too; a random choice would miss it."""
    centres, vectors = clusters()
    chosen = greedy_coreset(vectors, 12, torch.Generator().manual_seed(0))
    assert set(torch.cdist(vectors[chosen], centres).argmin(1).tolist()) == set(range(12))
    assert torch.cdist(vectors, vectors[chosen]).min(1).values.max() < 4


def test_coreset_never_repeats_and_repeats_itself() -> None:
    """No vector twice, even among equal ones; the same seed gives the same words."""
    vectors = torch.cat([torch.zeros(20, 4), torch.ones(20, 4)])
    first, second = (greedy_coreset(vectors, 30, torch.Generator().manual_seed(2)) for _ in range(2))
    assert len(set(first.tolist())) == 30
    assert torch.equal(first, second)
    assert len(greedy_coreset(vectors, 50, torch.Generator())) == 40


def test_coreset_can_end_early() -> None:
    """What was chosen before the wish to stop is a coreset too."""
    _, vectors = clusters()
    asked = iter([False] * 4 + [True] * 9)
    chosen = greedy_coreset(vectors, 12, torch.Generator().manual_seed(0), stop=lambda: next(asked))
    assert torch.equal(chosen, greedy_coreset(vectors, 5, torch.Generator().manual_seed(0)))


def test_k_means_finds_the_centres() -> None:
    """Each word is the mean of one cluster."""
    centres, vectors = clusters()
    words = k_means(vectors, 12, torch.Generator().manual_seed(0))
    assert torch.cdist(words, centres).min(1).values.max() < 1.5
    assert len(set(torch.cdist(words, centres).argmin(1).tolist())) == 12


def test_k_means_takes_what_there_is() -> None:
    """Fewer vectors than words, or all alike, are no trouble."""
    words = k_means(torch.ones(3, 5), 10, torch.Generator().manual_seed(0))
    assert torch.equal(words, torch.ones(3, 5))
