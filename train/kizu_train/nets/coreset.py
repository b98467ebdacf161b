"""Few vectors that stand for many: a greedy coreset and k-means, both in torch on whatever device the vectors are.

Letters: V vectors; D their dimension; M chosen ones.
"""

from collections.abc import Callable

import torch
from torch import Tensor

_SWEEPS = 25
_CHUNK = 4096


def greedy_coreset(
    vectors: Tensor, size: int, generator: torch.Generator, *, project_to: int = 64, stop: Callable[[], bool] = bool
) -> Tensor:
    """Indices [M] of `size` of `vectors` [V, D] that cover the rest: each is the farthest from those before it.

    Source: Sener & Savarese 2018; as in PatchCore distances are measured after a random projection (Johnson and
    Lindenstrauss), here to `project_to`. Every beginning of the result is a coreset too, so `stop` may end it early.
    """
    if size >= len(vectors):
        return torch.arange(len(vectors), device=vectors.device)
    lookalike = vectors - vectors.mean(0)
    if vectors.shape[1] > project_to:
        random = torch.randn((vectors.shape[1], project_to), generator=generator, device=vectors.device)
        lookalike = lookalike @ (random / project_to**0.5)
    return _farthest_first(lookalike, size, generator, stop)


def _farthest_first(vectors: Tensor, size: int, generator: torch.Generator, stop: Callable[[], bool]) -> Tensor:
    """Each step is one matrix-vector product: |v - c|² up to |v|², which is added once."""
    squares = vectors.square().sum(1)
    newest = torch.randint(len(vectors), (), generator=generator, device=vectors.device)
    nearest = torch.full_like(squares, torch.inf)
    chosen = [newest]
    while len(chosen) < size and not stop():
        nearest = torch.minimum(nearest, torch.addmv(squares + squares[newest], vectors, vectors[newest], alpha=-2))
        nearest[newest] = -torch.inf
        newest = nearest.argmax()
        chosen.append(newest)
    return torch.stack(chosen)


def k_means(vectors: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """At most `count` centres [M, D] of `vectors` [V, D]: k-means++ (Arthur & Vassilvitskii 2007), then Lloyd's sweeps.

    A centre that loses all its vectors stays where it was.
    """
    centres = vectors[_spread(vectors, min(count, len(vectors)), generator)]
    for _ in range(_SWEEPS):
        nearest = nearest_word(vectors, centres)
        sums = torch.zeros_like(centres).index_add_(0, nearest, vectors)
        sizes = torch.bincount(nearest, minlength=len(centres))[:, None]
        moved = torch.where(sizes > 0, sums / sizes.clamp(min=1), centres)
        if torch.equal(moved, centres):
            break
        centres = moved
    return centres


def _spread(vectors: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """Indices of `count` starts, each drawn in proportion to the squared distance from those before."""
    drawn = [torch.randint(len(vectors), (), generator=generator, device=vectors.device)]
    nearest = torch.full((len(vectors),), torch.inf, device=vectors.device)
    while len(drawn) < count:
        nearest = torch.minimum(nearest, (vectors - vectors[drawn[-1]]).square().sum(1))
        total = nearest.cumsum(0)
        at = torch.rand((), generator=generator, device=vectors.device) * total[-1]
        drawn.append(torch.searchsorted(total, at).clamp(max=len(vectors) - 1))
    return torch.stack(drawn)


def nearest_word(vectors: Tensor, words: Tensor) -> Tensor:
    """Index [V] of the word [M, D] nearest to each of `vectors` [V, D]."""
    half = words.square().sum(1) / 2
    return torch.cat([(half - chunk @ words.T).argmin(1) for chunk in torch.split(vectors, _CHUNK)])
