"""Nearest remembered patch of raw pixels, at several scales: no network, learned in seconds.

Sources: the nearest neighbour of patches as a texture model (Efros & Leung 1999; Boiman & Irani, "Detecting
irregularities", 2007), PatchCore (Roth et al. 2022) for a bounded memory and the maximum over places. What differs from
PatchCore: raw patches of a Gaussian pyramid stand in for a pretrained network's features. Which scales count differs
between, say, circuit boards (fine ones) and biscuits (coarse ones), so good pictures that nobody learned from set
three things for each: its median distance, how far the maxima of tiles rise above it, and its **sight**, how much of
simple flaws drawn into those pictures stands out. The map is the root of the mean square, weighed by sight, of what
lies above the medians, in units of those rises: one scale that is surprised is enough.
"""

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from kizu_train.detectors.base import DETECTORS, DetectorKind, Scores, Session, TileShape, TileSource
from kizu_train.errors import UsageError
from kizu_train.nets.coreset import greedy_coreset
from kizu_train.nets.gathering import batches_of, sample_tiles
from kizu_train.nets.layers import to_cells, to_pixels
from kizu_train.nets.patch_vae_terms import Augment
from kizu_train.nets.pyramid import PatchMemory, Pyramid, level_px, spread_matrix
from kizu_train.planted import plant

_LOG = logging.getLogger(__name__)
_TOP = 0.9
"""Quantile of good tiles' maxima that a scale's map is measured by."""
_SETTLE_TILES, _PLANTED_TILES, _BATCH = 400, 64, 16
_PLANT_SEED = 0x51647
_SMALLEST_FLAW_PX = 4.0
_ROUND = 0.05
"""Below it the map is flat: the root of a difference of next to nothing would be all rounding."""
_FPR_LIMIT = 0.3
_KNOWN = ("locations", "scales", "weights")


@dataclass(frozen=True)
class PyramidSettings:
    """Scales: `levels` (0 is full size, each next one half of it), each with a patch every `lattice_px` of full size.

    Patches have `patch_px` of their level's own pixels: 8 at level 4 see 128 px of the picture.
    """

    levels: tuple[int, ...] = (1, 2, 3, 4)
    lattice_px: tuple[int, ...] = (4, 8, 8, 16)
    patch_px: int = 8

    def __post_init__(self) -> None:
        if not self.levels or sorted(set(self.levels)) != list(self.levels) or not 0 <= self.levels[0] < 10:
            raise ValueError("levels must be rising numbers from 0")
        if len(self.lattice_px) != len(self.levels) or self.patch_px < 2:
            raise ValueError("lattice_px needs one number for each of levels, and patch_px at least 2")
        for level, lattice in zip(self.levels, self.lattice_px, strict=True):
            if lattice < 2**level or lattice % 2**level:
                raise ValueError(f"lattice_px {lattice} of level {level} must be a multiple of {2**level}")

    @property
    def steps(self) -> tuple[int, ...]:
        """Pixels of its own level from one patch to the next."""
        return tuple(lattice // 2**level for level, lattice in zip(self.levels, self.lattice_px, strict=True))


@dataclass(frozen=True)
class MemorySettings:
    """What each scale remembers: `size` patches in `dimension` components, chosen from `candidates` of `tiles` tiles.

    `choice`: `greedy` covers rare patches too (a coreset), `random` follows how frequent they are. `flips` remembers
    patches mirrored as well: more good looks from few pictures, where products may look so.
    """

    size: int = 3000
    dimension: int = 32
    candidates: int = 40_000
    tiles: int = 600
    choice: str = "greedy"
    flips: bool = True

    def __post_init__(self) -> None:
        if min(self.size, self.dimension, self.tiles) < 1 or self.candidates < self.size:
            raise ValueError("size, dimension and tiles >= 1 and candidates >= size are needed")
        if self.choice not in ("greedy", "random"):
            raise ValueError("choice must be greedy or random")


@dataclass(frozen=True)
class PyramidMemorySettings:
    """Everything a recipe may set: a scale with `sight_step` more of sight (0–1) has e times the weight."""

    pyramid: PyramidSettings = field(default_factory=PyramidSettings)
    memory: MemorySettings = field(default_factory=MemorySettings)
    sight_step: float = 0.125

    def __post_init__(self) -> None:
        if not 0.01 <= self.sight_step <= 100:
            raise ValueError("sight_step must lie between 0.01 and 100")


class PyramidMemoryScorer(nn.Module):
    """Tiles uint8 [N, T, T, C] → largest cell [N] and map [N, T/m, T/m], about 1 at the maxima of good tiles."""

    def __init__(self, detector: "PyramidMemoryDetector") -> None:
        super().__init__()
        self.pyramid, self.memories, self.spreads = detector.pyramid, detector.memories, detector.spreads
        self.locations = tuple(detector.locations.tolist())
        self.gains = tuple((detector.weights.sqrt() / detector.scales).tolist())

    def forward(self, tiles: Tensor) -> Scores:
        """Score `tiles`."""
        total: Tensor | None = None
        parts = zip(self.pyramid(to_pixels(tiles)), self.memories, self.spreads, strict=True)
        for (level, memory, spread), location, gain in zip(parts, self.locations, self.gains, strict=True):
            squares = (torch.relu(spread(memory(level)) - location) * gain).square()
            total = squares if total is None else total + squares
        assert total is not None  # noqa: S101  # settings demand a level
        cells = (total + _ROUND**2).sqrt() - _ROUND
        return cells.amax((1, 2)), cells


class Spread(nn.Module):
    """A lattice's values [N, h, h] → the map's cells [N, G, G], by a constant matrix along each side."""

    matrix: Tensor
    turned: Tensor

    def __init__(self, matrix: Tensor) -> None:
        super().__init__()
        self.register_buffer("matrix", matrix, persistent=False)
        self.register_buffer("turned", matrix.T.contiguous(), persistent=False)

    def forward(self, lattice: Tensor) -> Tensor:
        """Lay `lattice` onto the cells."""
        return torch.matmul(torch.matmul(self.matrix, lattice), self.turned)


class PyramidMemoryDetector:
    """The memory of raw patches as a detector."""

    score_kinds: tuple[str, ...] = ("distance",)

    def __init__(self, settings: PyramidMemorySettings, shape: TileShape, _seed: int) -> None:
        self.settings, self.shape = settings, shape
        own, memory = settings.pyramid, settings.memory
        if level_px(shape.tile_px, own.levels[-1]) < own.patch_px:
            raise UsageError(
                f"grid.tile_px is {shape.tile_px}; a patch of {own.patch_px} px at level {own.levels[-1]} needs "
                f"{own.patch_px * 2 ** own.levels[-1]}: use larger tiles or fewer pyramid.levels"
            )
        dimension = min(memory.dimension, shape.channels * own.patch_px**2)
        self.pyramid = Pyramid(own.levels, shape.channels).eval()
        self.memories = nn.ModuleList(
            PatchMemory(level_px(shape.tile_px, level), own.patch_px, step, shape.channels, dimension, memory.size)
            for level, step in zip(own.levels, own.steps, strict=True)
        ).eval()
        spreads = (
            spread_matrix(shape.tile_px, level, own.patch_px, step, shape.map_cell_px)
            for level, step in zip(own.levels, own.steps, strict=True)
        )
        self.spreads = nn.ModuleList(Spread(torch.from_numpy(matrix)) for matrix in spreads).eval()
        count = len(own.levels)
        self.locations, self.scales = torch.zeros(count), torch.ones(count)
        self.weights = torch.full((count,), 1 / count)

    def fit(self, tiles: TileSource, session: Session) -> None:
        """Gather patches of good tiles at every scale, and remember some."""
        generator = torch.Generator().manual_seed(session.seed)
        gathered = self._gather(tiles, session, generator)
        for memory, vectors in zip(self._memories(), gathered, strict=True):
            memory.learn_basis(vectors)
            reduced = memory.of_vectors(vectors)
            memory.remember(reduced[self._choose(reduced, generator)])

    def settle(self, held_out: TileSource) -> None:
        """Take each scale's location, scale and weight from good tiles that nobody has learned from."""
        good = sample_tiles(held_out, _SETTLE_TILES)
        spoilt, masks = _planted(good[:: max(1, len(good) // _PLANTED_TILES)].numpy(), self.shape.map_cell_px)
        sights = []
        surveys = zip(self._survey(good), self._survey(torch.from_numpy(spoilt)), strict=True)
        for index, (plain, flawed) in enumerate(surveys):
            location, top = float(plain.median()), float(plain.amax((1, 2)).quantile(_TOP))
            self.locations[index], self.scales[index] = location, max(top - location, 1e-6)
            sights.append(_sight(plain.numpy(), flawed.numpy(), masks))
        self.weights = torch.softmax(torch.tensor(sights) / self.settings.sight_step, 0)
        named = zip(self.settings.pyramid.levels, self.weights.tolist(), strict=True)
        _LOG.info("scales: %s", ", ".join(f"level {level} {weight:.0%}" for level, weight in named))

    def tensors(self) -> dict[str, Tensor]:
        """The memories, and what is known of each scale."""
        known = zip(_KNOWN, (self.locations, self.scales, self.weights), strict=True)
        return dict(self.memories.state_dict()) | dict(known)

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Take up what was learned."""
        own = dict(tensors)
        self.locations, self.scales, self.weights = (own.pop(name).clone() for name in _KNOWN)
        self.memories.load_state_dict(own)

    def score_all(self, tiles: Tensor) -> dict[str, Scores]:
        """The one kind there is."""
        return {"distance": self.scorer("distance")(tiles)}

    def scorer(self, kind: str) -> nn.Module:
        """The exportable module."""
        if kind not in self.score_kinds:
            raise UsageError(f"score {kind!r} is not offered; pyramid_memory has {', '.join(self.score_kinds)}")
        return PyramidMemoryScorer(self).eval()

    def _memories(self) -> list[PatchMemory]:
        return [memory for memory in self.memories if isinstance(memory, PatchMemory)]

    def _survey(self, tiles: Tensor) -> list[Tensor]:
        """Every scale's map [K, T/m, T/m] of tiles uint8 [K, T, T, C]."""
        maps: list[list[Tensor]] = [[] for _ in self.memories]
        with torch.inference_mode():
            for part in torch.split(tiles, _BATCH):
                for index, level in enumerate(self.pyramid(to_pixels(part))):
                    maps[index].append(self.spreads[index](self.memories[index](level)))
        return [torch.cat(parts) for parts in maps]

    def _gather(self, tiles: TileSource, session: Session, generator: torch.Generator) -> list[Tensor]:
        """About `candidates` patches [V, C·p²] of every scale, from all over the pictures."""
        settings = self.settings.memory
        wanted = min(max(1, tiles.count), settings.tiles)
        each = -(-settings.candidates // wanted)
        augment = Augment(salt_and_pepper=0, flips=settings.flips)
        kept: list[list[Tensor]] = [[] for _ in self.memories]
        for batch in batches_of(tiles, settings.tiles, session):
            pixels, _ = augment(to_pixels(batch.cpu()), generator)
            for index, level in enumerate(self.pyramid(pixels)):
                vectors = self._memories()[index].patches(level)  # [N, C·p², h²]
                chosen = torch.randint(vectors.shape[2], (len(vectors), each), generator=generator)
                picked = vectors.gather(2, chosen[:, None].expand(-1, vectors.shape[1], -1))
                kept[index].append(picked.permute(0, 2, 1).reshape(-1, vectors.shape[1]))
        return [torch.cat(part) for part in kept]

    def _choose(self, vectors: Tensor, generator: torch.Generator) -> Tensor:
        size = self.settings.memory.size
        if self.settings.memory.choice == "greedy":
            return greedy_coreset(vectors, size, generator)
        return torch.randperm(len(vectors), generator=generator)[:size]


def _planted(tiles: NDArray[np.uint8], cell_px: int) -> tuple[NDArray[np.uint8], NDArray[np.float32]]:
    """A flaw drawn into each of `tiles` [K, T, T, C], and the share of each map cell that it covers, [K, T/m, T/m]."""
    random = np.random.default_rng(_PLANT_SEED)
    largest = max(_SMALLEST_FLAW_PX, tiles.shape[1] / 4)
    sizes = np.exp(random.uniform(np.log(_SMALLEST_FLAW_PX), np.log(largest), len(tiles)))
    found = [plant(tile, float(size), random) for tile, size in zip(tiles, sizes, strict=True)]
    masks = torch.from_numpy(np.stack([mask for _, mask, _ in found]).astype(np.float32))
    return np.stack([spoilt for spoilt, _, _ in found]), to_cells(masks, cell_px).numpy()


def _sight(good: NDArray[np.float32], spoilt: NDArray[np.float32], masks: NDArray[np.float32]) -> float:
    """AU-PRO of planted flaws up to a false positive rate of 0.3, stretched so that chance is 0 and all found is 1.

    `masks` [K, G, G] are the shares of cells of `spoilt` that a flaw covers. The area under a flaw's coverage is the
    mean over its cells of what is left of the limit at the rate at which the cell would be found.
    """
    ordered = np.sort(good.ravel())
    rates = 1 - np.searchsorted(ordered, spoilt, "left") / len(ordered)
    left = np.clip(1 - rates / _FPR_LIMIT, 0, None)
    found = (left * masks).sum((1, 2)) / masks.sum((1, 2))
    chance = _FPR_LIMIT / 2
    return float((found.mean() - chance) / (1 - chance))


DETECTORS["pyramid_memory"] = DetectorKind(PyramidMemorySettings, PyramidMemoryDetector)
