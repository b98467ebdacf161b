"""Gaussian mixtures by expectation maximisation, vectorised, with full covariances that are shrunk to a common one.

Letters: n vectors; D features; K components.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from kizu_train.nets.gaussian import shrink, whitening

_LLOYD_STEPS = 10


@dataclass(frozen=True, eq=False)
class Mixture:
    """`weights` [K] sum to 1; `means` [K, D]; `covariances` [K, D, D], positive definite. All float64."""

    weights: Tensor
    means: Tensor
    covariances: Tensor

    def log_peaks(self) -> Tensor:
        """Logarithm [K] of each component's weighted density at its mean, without the constant of D."""
        volumes: Tensor = torch.linalg.slogdet(self.covariances).logabsdet
        return self.weights.log() - 0.5 * volumes

    def distances(self, vectors: Tensor) -> Tensor:
        """Squared Mahalanobis distance [n, K] of each vector [n, D] to each component."""
        parts = zip(self.means, whitening(self.covariances), strict=True)
        # Component by component: all at once would hold K times the sample.
        return torch.stack([((vectors - mean) @ whiten.mT).square().sum(1) for mean, whiten in parts], 1)


def fit_mixture(
    vectors: Tensor,
    components: int,
    *,
    steps: int,
    shrinkage: float,
    generator: torch.Generator,
    after_step: Callable[[int, float], bool],
) -> Mixture:
    """Fit to `vectors` float64 [n, D], n >= components, of about unit variance each, from a k-means start.

    A component that holds few vectors is drawn to the covariance within all components; `shrinkage` draws each to a
    multiple of the identity besides. `after_step` takes the step and the mean log likelihood, and says whether to stop.
    """
    share = torch.nn.functional.one_hot(_k_means(vectors, components, generator), components).to(vectors)
    mixture = _maximise(vectors, share, shrinkage)
    for step in range(1, steps + 1):
        joint = mixture.log_peaks() - 0.5 * mixture.distances(vectors)
        likelihood = torch.logsumexp(joint, 1, keepdim=True)
        mixture = _maximise(vectors, (joint - likelihood).exp(), shrinkage)
        mean = float(likelihood.mean()) - 0.5 * vectors.shape[1] * math.log(2 * math.pi)
        if after_step(step, mean):
            break
    return mixture


def _maximise(vectors: Tensor, share: Tensor, shrinkage: float) -> Mixture:
    """The mixture that the responsibilities `share` [n, K] make most likely, shrunk."""
    count, size = vectors.shape
    held = share.sum(0)
    means = (share.T @ vectors) / held.clamp_min(1e-9)[:, None]
    scatters = torch.stack(
        [(vectors - mean).T @ ((vectors - mean) * part[:, None]) for mean, part in zip(means, share.T, strict=True)]
    )
    within = scatters.sum(0) / count
    # As if each component had seen D vectors more that vary as within all components.
    covariances = (scatters + size * within) / (held + size)[:, None, None]
    weights = (held + 1) / (count + len(held))
    return Mixture(weights, means, shrink(covariances, shrinkage, 1e-6))


def _k_means(vectors: Tensor, clusters: int, generator: torch.Generator) -> Tensor:
    """The cluster [n] of each vector: k-means++ seeds, then a few of Lloyd's steps."""
    first = int(torch.randint(len(vectors), (1,), generator=generator))
    centres = vectors[first : first + 1]
    for _ in range(clusters - 1):
        nearest = torch.cdist(vectors, centres).amin(1).square().clamp_min(1e-12)
        chosen = int(torch.multinomial((nearest / nearest.sum()).cpu().float(), 1, generator=generator))
        centres = torch.cat([centres, vectors[chosen : chosen + 1]])
    for _ in range(_LLOYD_STEPS):
        member = torch.nn.functional.one_hot(torch.cdist(vectors, centres).argmin(1), clusters).to(vectors)
        held = member.sum(0)
        centres = torch.where((held > 0)[:, None], (member.T @ vectors) / held.clamp_min(1)[:, None], centres)
    return torch.cdist(vectors, centres).argmin(1)
