"""What the feature methods share: get a network, collect features of good tiles, learn a head, score each cell.

Tiles are large (256 px) although defects are small: a cell of the deepest usual layer sees 60 to 130 px, so cells
nearer than half of that to a tile's edge see mirrored pixels; 59 % of the cells of a 256 px tile see real ones only, of
a 128 px tile 28 %. Tiles overlap by a quarter, so that every pixel is well inside some tile or at the picture's edge.
No margin: the network mirrors its own borders, and a margin would quadruple the cost of a picture of one tile.

Each tile is looked at in several scales, each with a head of its own on its own lattice. A joint head would let the
scale decide on which good products vary most.

Mirrored pixels are better than zeros, but a mirrored pattern is still one that the product does not have: cells near a
tile's edge vary more than others and would decide on good pictures. They are weighed down by as much as they exceed
the others on good tiles that nothing was learned from.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from kizu_train.detectors.base import Scores, Session, TileShape, TileSource
from kizu_train.errors import TrainError, UsageError
from kizu_train.nets.backbone_files import HOW_TO_GET, read_backbone, take_weights, weights_of
from kizu_train.nets.backbones import build_backbone
from kizu_train.nets.descent import Descent, descend
from kizu_train.nets.features import BackboneChoice, Lattice, to_scale
from kizu_train.nets.layers import Enlarge, seeded, to_pixels
from kizu_train.nets.self_supervised import Pretext, ScratchNetwork, net_from
from kizu_train.nets.self_supervised_planting import Planting

SCRATCH = "scratch"
_BATCH_PIXELS = 2**19
_SETTLING = 100
"""Held-out tiles at most that tell how much cells near a tile's edge exceed the others."""
_EDGE_PX = 64
"""How far from its edge a tile's cells are weighed: about half of what a deep cell sees."""
_RING, _TAIL, _LEAST = 0.98, 0.998, 1e-12
_SMALLEST_PX = 32
_UNIT_PX = 16


@dataclass(frozen=True)
class Sample:
    """At most `tiles` tiles are looked at, spread evenly over the pictures, and `vectors` cells of them kept."""

    tiles: int = 800
    vectors: int = 40_000

    def __post_init__(self) -> None:
        if not 1 <= self.tiles <= self.vectors:
            raise ValueError("1 <= tiles <= vectors is needed")


@dataclass(frozen=True)
class FeatureSettings:
    """What a recipe may set about every feature method; `scratch`, `planting` and `train` only count without a file."""

    backbone: BackboneChoice = field(default_factory=BackboneChoice)
    scratch: ScratchNetwork = field(default_factory=ScratchNetwork)
    planting: Planting = field(default_factory=Planting)
    train: Descent = field(default_factory=lambda: Descent(steps=800, batch=24))
    sample: Sample = field(default_factory=Sample)


class FeatureScorer(nn.Module):
    """Tiles uint8 [N, T, T, C] → the largest cell of each [N], and the cells [N, T/m, T/m].

    Each of `scales` has a head and weights for its cells, [T/(m·scale), T/(m·scale)]; the map is the mean of theirs.
    """

    def __init__(
        self, lattice: Lattice, scales: tuple[int, ...], heads: list[nn.Module], weights: list[Tensor]
    ) -> None:
        super().__init__()
        self.lattice, self.scales = lattice, scales
        self.heads = nn.ModuleList(heads)
        self.weights = nn.ParameterList(nn.Parameter(each, requires_grad=False) for each in weights)
        self.enlarge = nn.ModuleList(Enlarge(scale, linear=True) if scale > 1 else nn.Identity() for scale in scales)

    def forward(self, tiles: Tensor) -> Scores:
        """Score `tiles`."""
        maps = zip(self.enlarge, self.each_scale(tiles), self.weights, strict=True)
        cells = torch.cat([enlarge((cells * weights)[:, None]) for enlarge, cells, weights in maps], 1).mean(1)
        return cells.amax((1, 2)), cells

    def each_scale(self, tiles: Tensor) -> list[Tensor]:
        """Distances of each scale's cells [N, T/(m·scale), T/(m·scale)], not weighed."""
        pixels = to_pixels(tiles)
        return [
            head(self.lattice(to_scale(pixels, scale))) for scale, head in zip(self.scales, self.heads, strict=True)
        ]


class FeatureDetector(ABC):
    """A detector of features; a method says what it learns from their vectors."""

    score_kinds: tuple[str, ...] = ("distance",)

    def __init__(self, settings: FeatureSettings, shape: TileShape, seed: int) -> None:
        if shape.tile_px < _SMALLEST_PX or shape.tile_px % _UNIT_PX:
            raise UsageError(
                f"recipe.grid.tile_px is {shape.tile_px}; feature methods need a multiple of 16, at least 32"
            )
        if shape.map_cell_px & (shape.map_cell_px - 1):
            raise UsageError(f"recipe.map_cell_px is {shape.map_cell_px}; feature methods need a power of two")
        self.choice, self.shape, self.seed = settings, shape, seed
        self.architecture = ""
        self.scoring: FeatureScorer | None = None
        self._trained: tuple[int, Callable[[], dict[str, Tensor]]] | None = (0, dict)

    @abstractmethod
    def learn(self, vectors: Tensor, generator: torch.Generator, session: Session) -> nn.Module:
        """Learn from vectors float32 [V, D] on the session's device: a module [N, D, h, w] → distances [N, h, w]."""

    @abstractmethod
    def head_from(self, tensors: Mapping[str, Tensor]) -> nn.Module:
        """The module whose `state_dict` was `tensors`. Raises KeyError or RuntimeError."""

    @property
    def has_backbone(self) -> bool:
        """Whether the features come from a file."""
        return self.architecture != SCRATCH

    def fit(self, tiles: TileSource, session: Session) -> None:
        """Get a network, collect features in one bounded sweep, learn from them."""
        self.architecture, net = self._net(tiles, session)
        lattice = self._lattice(net).to(session.device)
        with torch.no_grad():
            swept = list(self._collect(lattice, tiles, session))
            generator = torch.Generator(session.device).manual_seed(self.seed)
            heads = [self.learn(torch.cat(vectors), generator, session) for vectors in zip(*swept, strict=True)]
        weights = [torch.ones(side, side) for side in self._sides]
        self.scoring = FeatureScorer(lattice, self._scales, heads, weights).cpu().eval()
        if session.should_stop and self._trained is not None:
            # Training was through: a resumed fit takes the network from here and collects again.
            session.save(*self._trained)

    def settle(self, held_out: TileSource) -> None:
        """Weigh cells by good tiles that nothing was learned from: by how near an edge they lie, and by their scale."""
        scoring, draw = self._learned(), np.random.default_rng([self.seed, 0xED6E])
        chosen = _chosen(held_out, min(held_out.count, _SETTLING), draw)
        with torch.no_grad():
            swept = [scoring.each_scale(torch.from_numpy(batch)) for batch in _batches(chosen, self.shape.tile_px)]
            for weights, maps in zip(scoring.weights, zip(*swept, strict=True), strict=True):
                weights.copy_(settled_weights(torch.cat(maps), _EDGE_PX // self.shape.map_cell_px))

    def tensors(self) -> dict[str, Tensor]:
        """The network's weights, whose names begin with its architecture, and what was learned from its features."""
        scoring = self._learned()
        net = weights_of(scoring.lattice.net)
        found = {f"backbone.{self.architecture}.{name}": tensor for name, tensor in net.items()}
        found |= {f"head.{name}": tensor for name, tensor in scoring.heads.state_dict().items()}
        return found | {f"weights.{name}": tensor for name, tensor in scoring.weights.state_dict().items()}

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Take up what `tensors()` gave."""
        names = {name.split(".")[1] for name in tensors if name.startswith("backbone.")}
        if len(names) != 1:
            raise KeyError(f"weights of one backbone are wanted, there are {sorted(names) or 'none'}")
        (self.architecture,) = names
        net = self._net_from(_below(tensors, f"backbone.{self.architecture}."))
        heads = [self.head_from(_below(tensors, f"head.{index}.")) for index in range(len(self._scales))]
        weights = [tensors[f"weights.{index}"].reshape(side, side) for index, side in enumerate(self._sides)]
        self.scoring = FeatureScorer(self._lattice(net), self._scales, heads, weights).eval()

    def score_all(self, tiles: Tensor) -> dict[str, Scores]:
        """The one kind there is."""
        return {self.score_kinds[0]: self._learned()(tiles)}

    def scorer(self, kind: str) -> nn.Module:
        """The exportable module."""
        if kind not in self.score_kinds:
            raise UsageError(f"score {kind!r} is not offered; there is {self.score_kinds[0]}")
        return self._learned()

    @property
    def _scales(self) -> tuple[int, ...]:
        return self.choice.backbone.scales

    @property
    def _sides(self) -> list[int]:
        """Cells along a tile, at each scale."""
        return [self.shape.tile_px // scale // self.shape.map_cell_px for scale in self._scales]

    def _learned(self) -> FeatureScorer:
        if self.scoring is None:
            raise TrainError("nothing is learned yet; fit or load first")
        return self.scoring

    def _net(self, tiles: TileSource, session: Session) -> tuple[str, nn.Module]:
        file, source = session.extras.backbone, self.choice.backbone.source
        if file is not None and source == "scratch":
            raise UsageError(f"--backbone {file}: recipe.backbone.source is scratch; leave out one of them")
        if file is not None:
            return read_backbone(file, self.choice.backbone.layers, self.choice.backbone.borders)
        if source == "file":
            raise UsageError(f"this recipe takes its features from a pretrained network: {HOW_TO_GET}")
        return SCRATCH, self._train(tiles, session)

    def _train(self, tiles: TileSource, session: Session) -> nn.Module:
        with seeded(self.seed):
            pretext = Pretext(
                self.choice.scratch, self.choice.planting, self.shape.channels, self.choice.backbone.scales
            )
        descend(pretext, pretext.loss, self.choice.train, tiles, session)
        # Where no step is left, a checkpoint needs the weights as `descend` names them, but no moments.
        state = {f"module.{name}": tensor for name, tensor in pretext.state_dict().items()}
        is_through = int(pretext.done) >= self.choice.train.steps
        self._trained = (self.choice.train.steps, lambda: state) if is_through else None
        return pretext.net.requires_grad_(requires_grad=False)

    def _net_from(self, weights: Mapping[str, Tensor]) -> nn.Module:
        if self.architecture == SCRATCH:
            return net_from(weights)
        choice = self.choice.backbone
        try:
            backbone = build_backbone(self.architecture, choice.layers, choice.borders)
        except ValueError as exc:
            raise KeyError(str(exc)) from exc
        take_weights(backbone, weights)
        return backbone

    def _lattice(self, net: Any) -> Lattice:
        strides, choice = tuple(net.strides), self.choice.backbone
        unit = max(*strides, self.shape.map_cell_px) * max(choice.scales)
        if self.shape.tile_px % unit or self.shape.tile_px < 2 * unit:
            why = f"these layers and scales need a multiple of {unit}, at least {2 * unit}"
            raise UsageError(f"recipe.grid.tile_px is {self.shape.tile_px}; {why}")
        return Lattice(net, strides, choice.average, self.shape.map_cell_px)

    def _collect(self, lattice: Lattice, tiles: TileSource, session: Session) -> Iterator[list[Tensor]]:
        """Vectors [·, D] for each scale, of some cells of some tiles; one batch at least, also where it shall stop."""
        draw = np.random.default_rng([self.seed, 0xFEA7])
        total, done = min(tiles.count, self.choice.sample.tiles), 0
        share = max(1, self.choice.sample.vectors // total)
        for batch in _batches(_chosen(tiles, total, draw), self.shape.tile_px):
            pixels = to_pixels(torch.from_numpy(batch).to(session.device))
            yield [_some_cells(lattice(to_scale(pixels, scale)), share, draw) for scale in self._scales]
            done += len(batch)
            if self.has_backbone:
                session.report(done, total, {})
            if session.should_stop:
                return


def settled_weights(maps: Tensor, reach: int) -> Tensor:
    """Weights [h, h] for maps [N, h, h] of good tiles: with them, rings of cells and scales are as high as each other.

    Cells nearer than `reach` to an edge are weighed down (never up), so that the 0.98 quantile of each ring is that of
    the cells further inside: the largest count, not the mean. Then all are divided by their 0.998 quantile: a scale on
    which good products have odd spots must not drown one on which they have none.
    """
    side = maps.shape[-1]
    line = torch.arange(side, device=maps.device)
    depth = torch.minimum(line, side - 1 - line)
    ring = torch.minimum(depth[:, None], depth[None, :]).clamp(max=min(reach, max(0, side // 2 - 1)))
    inside = int(ring.max())
    heights = torch.stack([torch.quantile(maps[:, ring == index], _RING) for index in range(inside + 1)])
    weights = (heights[inside] / heights.clamp(min=_LEAST)).clamp(max=1)[ring]
    return weights / torch.quantile(maps * weights, _TAIL).clamp(min=_LEAST)


def _some_cells(features: Tensor, share: int, draw: np.random.Generator) -> Tensor:
    """`share` cells of each of `features` [N, D, h, w], drawn without repeats, as vectors [·, D]."""
    flat = features.flatten(2)
    cells = draw.permuted(np.tile(np.arange(flat.shape[2]), (len(flat), 1)), axis=1)[:, :share]
    index = torch.from_numpy(cells).to(flat.device)[:, None, :].expand(-1, flat.shape[1], -1)
    return flat.gather(2, index).transpose(1, 2).flatten(0, 1)


def _chosen(tiles: TileSource, total: int, draw: np.random.Generator) -> Iterator[NDArray[np.uint8]]:
    """`total` tiles of the sweep, one at random from each of as many equal stretches, as arrays [1 …, T, T, C]."""
    edges = np.linspace(0, tiles.count, total + 1).astype(np.int64)
    wanted = draw.integers(edges[:-1], np.maximum(edges[1:], edges[:-1] + 1))
    first = 0
    for part in tiles.sweep():
        inside = wanted[(wanted >= first) & (wanted < first + len(part))] - first
        first += len(part)
        if len(inside):
            yield part[inside]


def _batches(parts: Iterator[NDArray[np.uint8]], tile_px: int) -> Iterator[NDArray[np.uint8]]:
    """The same tiles, as many at a time as caches and memory bear."""
    size, held = max(1, _BATCH_PIXELS // tile_px**2), list[NDArray[np.uint8]]()
    for part in parts:
        held += [part[at : at + 1] for at in range(len(part))]
        while len(held) >= size:
            yield np.concatenate(held[:size])
            held = held[size:]
    if held:
        yield np.concatenate(held)


def _below(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name[len(prefix) :]: tensor for name, tensor in tensors.items() if name.startswith(prefix)}
