"""Gaussians of vectors: moments gathered batch by batch, covariances shrunk, distances whitened.

Letters: D features of a vector, n vectors, K components.
"""

import torch
from torch import Tensor


class Moments:
    """Count, mean [D] and scatter [D, D] of the vectors seen so far, in float64.

    Batches are joined by the formula of Chan, Golub and LeVeque (1979): no difference of large sums is taken.
    """

    def __init__(self) -> None:
        self.count = 0
        self.mean, self.scatter = torch.zeros(0), torch.zeros(0)

    def add(self, vectors: Tensor) -> None:
        """Take in `vectors` [n, D], n >= 1."""
        vectors = vectors.double()
        mean = vectors.mean(0)
        centred = vectors - mean
        scatter = centred.T @ centred
        if self.count == 0:
            self.count, self.mean, self.scatter = len(vectors), mean, scatter
            return
        total = self.count + len(vectors)
        apart = mean - self.mean
        self.scatter += scatter + torch.outer(apart, apart) * (self.count * len(vectors) / total)
        self.mean = self.mean + apart * (len(vectors) / total)
        self.count = total

    def covariance(self) -> Tensor:
        """Covariance [D, D] of the vectors seen."""
        return self.scatter / self.count


def shrink(covariance: Tensor, share: float, floor: float = 0.0) -> Tensor:
    """Covariances [..., D, D] drawn to a multiple of the identity: (1 - s)·Σ + (s·mean variance + floor)·I.

    `share` s lies in 0 to 1; `floor` is a variance, such as what rounding to whole grey levels adds.
    """
    size = covariance.shape[-1]
    mean = covariance.diagonal(dim1=-2, dim2=-1).mean(-1)[..., None, None]
    return (1 - share) * covariance + (share * mean + floor) * torch.eye(size, dtype=covariance.dtype).to(covariance)


def whitening(covariance: Tensor) -> Tensor:
    """W [..., D, D] with W Σ Wᵀ = I, so that |W (x - μ)|² is the squared Mahalanobis distance; Σ positive definite."""
    variances, directions = torch.linalg.eigh(covariance)
    scaled: Tensor = directions.mT / variances.clamp_min(torch.finfo(covariance.dtype).tiny).sqrt()[..., None]
    return scaled
