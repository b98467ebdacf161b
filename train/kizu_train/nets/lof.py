"""The local outlier factor as a graph: how much sparser the surroundings of an embedding are than its neighbours'.

Source: Breunig et al., "LOF: Identifying Density-Based Local Outliers", 2000. Letters: N tiles; R reference embeddings;
K candidates; E embedding size. Distances are Euclidean.

What differs from the source: a reference at the k-distance of a tile counts by a weight that falls from 1 to 0 within
`tie_softness` of it, rather than at once. The source counts ties in full, so there a rounding error that swaps two
neighbours moves the factor by a per cent, and two engines could not agree to 1e-4. For the same reason k-distances have
a floor, and references that are more crowded than that are thinned: ArcFace on pictures of one kind draws good
embeddings together to within 0.001, where their order is rounding.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from kizu_train.errors import TrainError

_NOUGHT = 1e-10
"""Added to the mean reachability distance, as scikit-learn does."""


@dataclass(frozen=True)
class Lof:
    """How the local outlier factor is taken.

    `neighbours` k of at most `references` good embeddings; `tie_softness` is relative to a tile's k-distance, `floor`
    to the median k-distance of the references: embeddings that coincide would otherwise be infinitely dense. It is
    at least `resolution`: two engines put a point of the unit sphere about 1e-6 apart in float32, 1e-4 of that.
    """

    neighbours: int = 20
    references: int = 1000
    tie_softness: float = 0.02
    floor: float = 0.1
    resolution: float = 0.01

    def __post_init__(self) -> None:
        if not (1 <= self.neighbours < self.references <= 3000):
            raise ValueError("1 <= neighbours < references <= 3000 is needed: the graph sorts that many distances")
        if not (0 < self.tie_softness <= 0.5 and 0 <= self.floor <= 1):
            raise ValueError("0 < tie_softness <= 0.5 and 0 <= floor <= 1 are needed")
        if not 0 <= self.resolution <= 1:
            raise ValueError("0 <= resolution <= 1 is needed")


class LocalOutlierFactor(nn.Module):
    """Embeddings float32 [N, E] → factor [N]: about 1 among the references, larger outside, always > 0 and finite."""

    references: Tensor
    centre: Tensor
    k_distance: Tensor
    density: Tensor
    floor: Tensor

    def __init__(self, settings: Lof, tensors: Mapping[str, Tensor]) -> None:
        """Take what `fit_lof` learned or `learned` gave. Raises KeyError where a tensor is missing."""
        super().__init__()
        self.softness = settings.tie_softness
        for name in ("references", "centre", "k_distance", "density", "floor"):
            self.register_buffer(name, tensors[name])
        count = len(self.references)
        self.neighbours = min(settings.neighbours, count - 1)
        self.candidates = min(2 * self.neighbours, count)

    def learned(self) -> dict[str, Tensor]:
        """The references (about their centre), their k-distances and local reachability densities, and the floor."""
        return dict(self.state_dict())

    def forward(self, embeddings: Tensor) -> Tensor:
        """Give the factor of each embedding."""
        near, distance, weight = self._neighbours(embeddings)
        reach = (weight * torch.maximum(distance, self.k_distance[near])).sum(1) + _NOUGHT
        return (weight * self.density[near]).sum(1) * reach

    def distance(self, embeddings: Tensor) -> Tensor:
        """Give the mean distance to the neighbours instead: the same scale everywhere, however dense it is there."""
        _, distance, weight = self._neighbours(embeddings)
        return (weight * distance).sum(1)

    def _neighbours(self, embeddings: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Indices, rising distances and weights of the candidates, all [N, K]."""
        near, distance = nearest(embeddings - self.centre, self.references, self.candidates)
        return near, distance, neighbour_weights(distance, self.neighbours, self.softness, self.floor)


def nearest(points: Tensor, references: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Indices and rising distances [N, count] of the `count` references [R, E] next to each point [N, E].

    Candidates come from a matrix product, which loses the digits of small distances; those of the candidates are then
    taken from the differences themselves.
    """
    square = (points * points).sum(1, keepdim=True) + (references * references).sum(1)
    rough = square - 2 * points @ references.T
    candidates = rough.topk(count, dim=1, largest=False).indices
    apart = points[:, None] - references[candidates]  # [N, K, E]
    distance, order = (apart * apart).sum(2).sqrt().topk(count, dim=1, largest=False)
    return candidates.gather(1, order), distance


def neighbour_weights(distance: Tensor, neighbours: int, softness: float, floor: Tensor) -> Tensor:
    """Weights [N, K], adding up to 1, of candidates at rising `distance` [N, K]: equal up to the k-distance."""
    last = torch.maximum(distance[:, neighbours - 1 : neighbours], floor)
    weight = (1 + (last - distance) / (last * softness)).clamp(0, 1)
    return weight / weight.sum(1, keepdim=True)


def fit_lof(embeddings: Tensor, settings: Lof) -> LocalOutlierFactor:
    """Learn from good embeddings [R, E]: their k-distances and densities, each without itself. Raises TrainError."""
    count = len(embeddings)
    if count < 2:
        raise TrainError("the local outlier factor needs at least 2 good tiles; add good pictures")
    exact = _thinned(embeddings.double(), settings)
    count = len(exact)
    centre = exact.mean(0)
    points = exact - centre
    k = min(settings.neighbours, count - 1)
    # In double precision a point is its own nearest reference; of copies any one may be left out.
    near, distance = nearest(points, points, min(2 * k, count - 1) + 1)
    near, distance = near[:, 1:], distance[:, 1:]
    raw = distance[:, k - 1]
    floor = (settings.floor * raw.median()).clamp(min=max(settings.resolution, 1e-6))
    k_distance = torch.maximum(raw, floor)
    weight = neighbour_weights(distance, k, settings.tie_softness, floor)
    reach = (weight * torch.maximum(distance, k_distance[near])).sum(1) + _NOUGHT
    found = {"references": points, "centre": centre, "k_distance": k_distance, "density": 1 / reach, "floor": floor}
    return LocalOutlierFactor(settings, {name: tensor.float() for name, tensor in found.items()})


def _thinned(points: Tensor, settings: Lof) -> Tensor:
    """Leave out points of [R, E] that have k + 1 others within `resolution` which stay: fewer than candidates."""
    k = min(settings.neighbours, len(points) - 1)
    is_near = torch.cdist(points, points, compute_mode="donot_use_mm_for_euclid_dist") < settings.resolution
    stays = is_near.sum(1) <= k
    for index in (~stays).nonzero().flatten().tolist():
        stays[index] = (is_near[index] & stays).sum() <= k
    return points[stays]
