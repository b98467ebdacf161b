"""Networks that embed a tile as a point on the unit sphere, and the heads that train them.

Letters: N tiles; C channels; T tile side; E embedding size; K classes.
"""

import math
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from kizu_train.detectors.base import TileShape
from kizu_train.errors import UsageError
from kizu_train.nets.layers import MirrorConv, seeded


@dataclass(frozen=True)
class EmbeddingNet:
    """A small network from scratch: for each entry of `widths` two convolutions, the first with stride 2.

    `pool` `flat` keeps where in the tile something lies, `mean` forgets it; `size` is the embedding's.
    """

    widths: tuple[int, ...] = (32, 64, 128)
    size: int = 64
    pool: Literal["flat", "mean"] = "flat"

    def __post_init__(self) -> None:
        if not self.widths or min(self.widths) < 1 or self.size < 2:
            raise ValueError("at least one of widths, each at least 1, and size >= 2 are needed")


class Embedding(nn.Module):
    """Pixels float32 [N, C, T, T], 0–1 → points on the unit sphere [N, E]."""

    def __init__(self, body: nn.Module, features: int, size: int) -> None:
        super().__init__()
        self.body = body
        # Batch norm keeps the points spread about the origin: without it they may all gather in one direction.
        self.project = nn.Sequential(nn.Linear(features, size, bias=False), nn.BatchNorm1d(size))

    def forward(self, pixels: Tensor) -> Tensor:
        """Embed `pixels`."""
        return to_sphere(self.project(self.body(pixels)))


def make_embedding(network: EmbeddingNet, shape: TileShape, seed: int) -> Embedding:
    """The network for tiles of `shape`, its weights drawn by `seed`. Raises UsageError where tiles are too small."""
    side = shape.tile_px
    for _ in network.widths:
        if side < 3:
            raise UsageError(f"tiles of {shape.tile_px} px are too small for {len(network.widths)} network.widths")
        side = -(-side // 2)
    with seeded(seed):
        layers: list[nn.Module] = []
        for low, high in pairwise((shape.channels, *network.widths)):
            layers += (
                [MirrorConv(low, high, 3, 2), MirrorConv(high, high)] if side > 1 else [MirrorConv(low, high, 3, 2)]
            )
        pool = nn.AdaptiveAvgPool2d(1) if network.pool == "mean" else nn.Identity()
        features = network.widths[-1] * (1 if network.pool == "mean" else side**2)
        return Embedding(nn.Sequential(*layers, pool, nn.Flatten()), features, network.size)


def to_sphere(points: Tensor) -> Tensor:
    """Points [N, E] → their directions, of length 1."""
    return points / ((points * points).sum(1, keepdim=True) + 1e-12).sqrt()


@dataclass(frozen=True)
class MetricLoss:
    """How classes are told apart on the sphere.

    `l2_softmax`: softmax of embeddings of fixed length `scale` (Ranjan et al., "L2-constrained Softmax Loss for
    Discriminative Face Verification", 2017). `arcface`: softmax of `scale` times the cosine to a centre of each class,
    the right class at an angle enlarged by `margin` radians (Deng et al., "ArcFace", 2019).
    """

    kind: Literal["l2_softmax", "arcface"] = "arcface"
    scale: float = 16.0
    margin: float = 0.5

    def __post_init__(self) -> None:
        if not (self.scale > 0 and 0 <= self.margin < math.pi / 2):
            raise ValueError("scale > 0 and 0 <= margin < π/2 are needed")


class ClassHead(nn.Module):
    """Embeddings on the unit sphere [N, E] → logits of K classes [N, K]."""

    def __init__(self, size: int, classes: int, loss: MetricLoss, seed: int) -> None:
        super().__init__()
        self.scale, self.margin = loss.scale, loss.margin if loss.kind == "arcface" else 0.0
        draw = torch.Generator().manual_seed(seed)
        self.weight = nn.Parameter(torch.randn(classes, size, generator=draw) / math.sqrt(size))
        self.bias = nn.Parameter(torch.zeros(classes)) if loss.kind == "l2_softmax" else None

    def forward(self, embeddings: Tensor) -> Tensor:
        """Logits without a margin, as for scoring."""
        if self.bias is not None:
            return self.scale * embeddings @ self.weight.T + self.bias
        return self.scale * embeddings @ to_sphere(self.weight).T

    def loss(self, embeddings: Tensor, labels: Tensor) -> Tensor:
        """Cross-entropy of `labels` int64 [N], with the margin: a scalar."""
        logits = self(embeddings)
        if self.margin:
            cosine = (logits / self.scale).clamp(-1 + 1e-6, 1 - 1e-6)
            turned = cosine * math.cos(self.margin) - (1 - cosine**2).sqrt() * math.sin(self.margin)
            # Beyond π the cosine would rise again; a straight line goes on falling.
            turned = torch.where(cosine > -math.cos(self.margin), turned, cosine - self.margin * math.sin(self.margin))
            right = functional.one_hot(labels, len(self.weight)).bool()
            logits = torch.where(right, self.scale * turned, logits)
        return functional.cross_entropy(logits, labels)
