"""Several detectors in one graph, their maps brought to one scale on good tiles and added.

Source: the practice of combining detectors whose errors differ; the standardisation is akin to the quantile
normalisation of Batzner et al. 2024, and to the unification of outlier scores by Kriegel et al. 2011. What differs:
location and scale are the median of a member's map and how far the maxima of good tiles rise above it, taken on good
pictures that nobody learned from. Those maxima are what makes false alarms, so after this a member reaches 1 where it
would begin to cry wolf, however heavy its tail; means and deviations would let the heaviest tail rule.
A member on smaller tiles is run on windows cut from the tile, inside the graph (see `nets.windows`).
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from kizu_contract.strict_json import to_plain
from kizu_contract.tiles import TileLayout
from kizu_train.detectors.base import (
    DETECTORS,
    Detector,
    DetectorKind,
    ExtraName,
    Scores,
    Session,
    Settles,
    TileShape,
    TileSource,
    find_detector,
    frame_of,
    inputs_of,
)
from kizu_train.errors import UsageError
from kizu_train.nets.member_session import MemberSession, begin, check_extras
from kizu_train.nets.windows import CutWindows, JoinWindows, window_starts
from kizu_train.recipes import Recipe, resolve_member

_PER_TILE = 4
"""Windows that a batch takes of each random tile: fewer tiles are copied, and a batch still sees many pictures."""
_LEAST_SCALE = 1e-3
"""Of the location: a map that is level on good tiles must not make noise count."""


@dataclass(frozen=True)
class Joining:
    """Which recipes are joined and how: `members` by name, each `weights` (none: all 1), `sum` or `max` of them.

    `quantile` of the good tiles' maxima is what a member's map is divided by.
    """

    members: tuple[str, ...] = ()
    weights: tuple[float, ...] = ()
    combine: Literal["sum", "max"] = "sum"
    quantile: float = 0.9

    def __post_init__(self) -> None:
        if len(set(self.members)) != len(self.members) or "joint" in self.members:
            raise ValueError("members must be different recipes, and none of them joint")
        if self.weights and (len(self.weights) != len(self.members) or min(self.weights) <= 0):
            raise ValueError("weights needs one number above 0 for each of members, or none at all")
        if not 0.5 <= self.quantile <= 1:
            raise ValueError("quantile must lie between 0.5 and 1")


@dataclass(frozen=True)
class JointSettings:
    """`members` holds, by recipe name, what differs from that recipe; it is filled up to whole recipes at once.

    So a run keeps every member's settings, whatever becomes of the recipes. A table that names its `detector` stands
    alone, and needs no packaged recipe of its name.
    """

    joint: Joining = field(default_factory=Joining)
    members: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        strangers = sorted(self.members.keys() - set(self.joint.members))
        if strangers:
            raise UsageError(f"recipe.members.{strangers[0]} is no member; joint.members names {self.joint.members}")
        whole = {name: self.recipe(name).to_dict() for name in self.joint.members}
        object.__setattr__(self, "members", whole)

    def recipe(self, name: str) -> Recipe:
        """The whole recipe of member `name`."""
        return resolve_member(name, to_plain(self.members.get(name, {})))


class MemberScorer(nn.Module):
    """A member alone: tiles [N, T, T, C] → its maximum [N] and its map on the joint tile's cells [N, T/m, T/m]."""

    def __init__(self, scorer: nn.Module, cut: CutWindows, join: JoinWindows) -> None:
        super().__init__()
        self.scorer, self.cut, self.join = scorer, cut, join

    def forward(self, tiles: Tensor) -> Scores:
        """Score `tiles`; they become floats before they are cut, which members take as well."""
        _, maps = self.scorer(self.cut(tiles.to(torch.float32)))
        cells: Tensor = self.join(maps)
        return cells.amax((1, 2)), cells


class Nothing(nn.Module):
    """The map of a member that was never trained: zeros [N, T/m, T/m], tied to the tiles so that N is known."""

    def __init__(self, cells: int) -> None:
        super().__init__()
        self.cells = cells

    def forward(self, tiles: Tensor) -> Scores:
        """Score nothing."""
        score = tiles.to(torch.float32).amax((1, 2, 3)) * 0
        return score, score[:, None, None].expand(-1, self.cells, self.cells)


class JointScorer(nn.Module):
    """Tiles → maximum [N] and map [N, T/m, T/m] of Σ (or max) w · max(0, (map - location) / scale)."""

    def __init__(
        self, scorers: Mapping[str, nn.Module], gains: Mapping[str, tuple[float, float]], combine: str
    ) -> None:
        super().__init__()
        # A list: a member may bear the name of one of Module's own methods.
        self.names, self.scorers = tuple(scorers), nn.ModuleList(scorers.values())
        self.gains, self.combine = dict(gains), combine

    def forward(self, tiles: Tensor) -> Scores:
        """Score `tiles`."""
        return self.joined({name: scorer(tiles)[1] for name, scorer in zip(self.names, self.scorers, strict=True)})

    def joined(self, maps: Mapping[str, Tensor]) -> Scores:
        """Join the members' maps [N, T/m, T/m]."""
        parts = [torch.relu(maps[name] - location) * gain for name, (location, gain) in self.gains.items()]
        whole = parts[0]
        for part in parts[1:]:
            whole = whole + part if self.combine == "sum" else torch.maximum(whole, part)
        return whole.amax((1, 2)), whole


class Windows:
    """A `TileSource` of windows cut from the tiles of another one."""

    def __init__(self, tiles: TileSource, cut: CutWindows, starts: tuple[int, ...], seed: int) -> None:
        self._tiles, self._cut, self._starts, self._seed = tiles, cut, starts, seed

    @property
    def count(self) -> int:
        """How many windows one sweep gives."""
        return self._tiles.count * len(self._starts) ** 2

    def batch(self, step: int, size: int) -> NDArray[np.uint8]:
        """`size` random windows uint8 [size, t, t, C], anywhere in tiles of `step`."""
        each = 1 if len(self._starts) == 1 else _PER_TILE
        tiles = self._tiles.batch(step, -(-size // each))
        side, last = self._cut.side, self._starts[-1]
        if last == 0:
            return tiles[:size]
        y, x = np.random.default_rng([self._seed, step, side]).integers(0, last + 1, (2, size))
        rows, columns = y[:, None] + np.arange(side), x[:, None] + np.arange(side)
        chosen = np.arange(size) // each
        found: NDArray[np.uint8] = tiles[chosen[:, None, None], rows[:, :, None], columns[:, None, :]]
        return found

    def sweep(self) -> Iterator[NDArray[np.uint8]]:
        """Every window of every tile, uint8 [N, t, t, C], picture by picture."""
        for tiles in self._tiles.sweep():
            yield self._cut(torch.from_numpy(tiles)).numpy()

    def frame_layout(self) -> TileLayout:
        """Windows have no place in a frame: members that want one are refused before."""
        return self._tiles.frame_layout()


class Member:
    """One detector among the joined ones, with its own recipe and windows."""

    def __init__(self, name: str, recipe: Recipe, shape: TileShape, seed: int) -> None:
        self.name, self.recipe, self.seed, self.is_trained = name, recipe, seed, False
        self.shape, grid = shape, recipe.grid
        if grid.tile_px > shape.tile_px:
            raise UsageError(f"member {name} has tiles of {grid.tile_px} px; grid.tile_px must be at least that")
        own = TileShape(grid.tile_px, shape.channels, recipe.map_cell_px)
        self.detector: Detector = find_detector(recipe.detector).build(recipe.settings, own, seed)
        if inputs_of(self.detector) != ("tiles",) or frame_of(self.detector) is not None:
            raise UsageError(f"member {name} learns each place of a frame, which cannot be joined")
        if recipe.score not in self.detector.score_kinds:
            raise UsageError(f"member {name} has no score {recipe.score!r}; {', '.join(self.detector.score_kinds)}")

    def source(self, tiles: TileSource) -> Windows:
        """Its windows in the joint tiles."""
        cut = CutWindows(self.shape.tile_px, self.recipe.grid)
        return Windows(tiles, cut, window_starts(self.shape.tile_px, self.recipe.grid), self.seed)

    def scorer(self) -> nn.Module:
        """It alone, on joint tiles."""
        cells = self.shape.tile_px // self.shape.map_cell_px
        if not self.is_trained:
            return Nothing(cells).eval()
        recipe, shape = self.recipe, self.shape
        sigma = recipe.reduction.smooth_sigma_px
        join = JoinWindows(shape.tile_px, recipe.grid, recipe.map_cell_px, shape.map_cell_px, sigma)
        cut = CutWindows(shape.tile_px, recipe.grid)
        return MemberScorer(self.detector.scorer(recipe.score), cut, join).eval()


class JointDetector:
    """Members that learn one after the other and judge together."""

    def __init__(self, settings: JointSettings, shape: TileShape, seed: int) -> None:
        self.settings = settings.joint
        if len(self.settings.members) < 2:
            raise UsageError("joint.members must name at least two recipes, such as ['synthetic_defects', 'patch_vae']")
        self.members = [Member(name, settings.recipe(name), shape, seed) for name in self.settings.members]
        self.score_kinds: tuple[str, ...] = ("joint", *self.settings.members)
        self.location = torch.zeros(len(self.members))
        self.scale = torch.ones(len(self.members))

    def fit(self, tiles: TileSource, session: Session) -> None:
        """Let each member learn; one that was not reached when the fit was stopped stays out of the sum."""
        check_extras(session, [(member.name, member.recipe.detector) for member in self.members])
        start = begin(session.restore())
        for index, member in enumerate(self.members):
            if index < start.index:
                member.detector.load(start.of(member.name))
                member.is_trained = True
                continue
            view = MemberSession(session, member.recipe.detector, start, index, lambda: self._learned())  # noqa: PLW0108
            if session.should_stop:
                view.save_here()
                break
            member.detector.fit(member.source(tiles), view)
            was_stopped = view.should_stop
            member.is_trained = view.last > 0 or not was_stopped
            if was_stopped:
                break
            start = view.through()

    def settle(self, held_out: TileSource) -> None:
        """Settle the trained members, then take their locations and scales, on good tiles none has learned from."""
        for index, member in enumerate(self.members):
            if member.is_trained:
                if isinstance(member.detector, Settles):
                    member.detector.settle(member.source(held_out))
                maxima, cells = _survey(member.scorer(), held_out)
                location = float(np.median(cells))
                top = float(np.quantile(maxima, self.settings.quantile))
                self.location[index] = location
                self.scale[index] = max(top - location, _LEAST_SCALE * abs(location), 1e-9)

    def adopt(self, name: str, tensors: Mapping[str, Tensor]) -> None:
        """Take up what member `name` learned elsewhere, by the same recipe; `settle` is to follow."""
        for member in self.members:
            if member.name == name:
                member.detector.load(tensors)
                member.is_trained = True

    def tensors(self) -> dict[str, Tensor]:
        """What the members learned, each name behind its own, and their locations, scales and who was trained."""
        trained = torch.tensor([member.is_trained for member in self.members], dtype=torch.float32)
        own = {"joint/location": self.location, "joint/scale": self.scale, "joint/trained": trained}
        return own | self._learned()

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Take up what `tensors()` gave."""
        self.location, self.scale = tensors["joint/location"].clone(), tensors["joint/scale"].clone()
        for member, trained in zip(self.members, tensors["joint/trained"].tolist(), strict=True):
            prefix = f"{member.name}/"
            member.is_trained = bool(trained)
            if trained:
                own = {name[len(prefix) :]: part for name, part in tensors.items() if name.startswith(prefix)}
                member.detector.load(own)

    def score_all(self, tiles: Tensor) -> dict[str, Scores]:
        """Score by all together and by each alone, at the cost of one pass."""
        alone: dict[str, Scores] = {member.name: member.scorer()(tiles) for member in self.members}
        joint = self._joint()
        return {"joint": joint.joined({name: alone[name][1] for name in joint.gains})} | alone

    def scorer(self, kind: str) -> nn.Module:
        """The exportable module of all together, or of the member called `kind`."""
        for member in self.members:
            if member.name == kind:
                return member.scorer()
        return self._joint().eval()

    def _joint(self) -> JointScorer:
        weights = self.settings.weights or (1.0,) * len(self.members)
        numbers = zip(self.members, weights, self.location.tolist(), self.scale.tolist(), strict=True)
        gains = {m.name: (location, weight / scale) for m, weight, location, scale in numbers if m.is_trained}
        # Nobody trained: any member serves, for all of them score nothing.
        gains = gains or {self.members[0].name: (0.0, 1.0)}
        return JointScorer({m.name: m.scorer() for m in self.members if m.name in gains}, gains, self.settings.combine)

    def _learned(self) -> dict[str, Tensor]:
        return {
            f"{member.name}/{name}": part
            for member in self.members
            if member.is_trained
            for name, part in member.detector.tensors().items()
        }


def uses_of(recipe: Recipe) -> frozenset[ExtraName]:
    """The extras that a recipe makes use of; those of its members where it joins some."""
    if not isinstance(recipe.settings, JointSettings):
        return find_detector(recipe.detector).uses
    members = (recipe.settings.recipe(name) for name in recipe.settings.joint.members)
    return frozenset[ExtraName]().union(*(find_detector(member.detector).uses for member in members))


def _survey(scorer: nn.Module, tiles: TileSource) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Maxima and cells of a map over all `tiles`, both flat; some hundred cells of each tile, enough for a median."""
    maxima, cells = [], []
    with torch.inference_mode():
        for batch in tiles.sweep():
            for at in range(0, len(batch), 8):
                found = scorer(torch.from_numpy(batch[at : at + 8]))
                maxima.append(found[0].numpy())
                flat = found[1].flatten(1)
                cells.append(flat[:, :: max(1, flat.shape[1] // 256)].flatten().numpy())
    return np.concatenate(maxima), np.concatenate(cells)


DETECTORS["joint"] = DetectorKind(JointSettings, JointDetector, uses=frozenset({"backbone", "defects", "references"}))
