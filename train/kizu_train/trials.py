"""Trials of recipes on the user's own pictures: each trained for a while, then judged on planted flaws.

A candidate learns from the learning pictures of a split and is judged on pieces of the held-out good pictures against
the same pieces with planted flaws (`planted`). No defect is needed; what real defects look like, nobody here knows.
"""

import dataclasses
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from kizu_contract.errors import KizuError
from kizu_contract.pictures import Colour, read_picture
from kizu_train.data import PictureSet, Split, hold_out, open_data
from kizu_train.detectors.base import Detector, Extras, Settles
from kizu_train.detectors.joint import JointDetector, JointSettings, uses_of
from kizu_train.errors import DataError, TrainError
from kizu_train.evaluation.metrics import au_pro, image_auroc
from kizu_train.evaluation.pixels import PixelPool
from kizu_train.planted import plant
from kizu_train.quiet_session import QuietSession
from kizu_train.recipes import Recipe, parse_recipe
from kizu_train.runs import build_detector
from kizu_train.scoring import frame_scorer
from kizu_train.tile_pool import TilePool

LEAST_TRIAL_S = 20.0
"""Less than this teaches no candidate anything."""
LEAST_PICTURES = 8
_PAIRS, _PIECE_PX = 24, 192
_FLAW_SHARES = (0.04, 0.15)
"""A flaw's size, of a picture's shorter side."""
_PROBE_STEPS = 40
_LEAST_STEPS = 20
_LOG = logging.getLogger(__name__)


@dataclass(frozen=True)
class Pace:
    """Seconds that a fit takes before and after its steps, and for each step."""

    base_s: float = 0.0
    step_s: float = 0.0

    def steps_in(self, seconds: float) -> float:
        """Steps that fit into `seconds`."""
        return (seconds - self.base_s) / max(self.step_s, 1e-9)


@dataclass(frozen=True)
class Trial:
    """How a candidate did: figures 0–1 on planted flaws, seconds of the trial; `failed` says why there are none.

    `share` of its recipe's steps were taken at `pace`; `pixel_ns` are nanoseconds to score a pixel.
    """

    recipe: Recipe
    seconds: float
    image_auroc: float = 0.0
    au_pro: float = 0.0
    share: float = 1.0
    pace: Pace = Pace()
    pixel_ns: float = 0.0
    failed: str | None = None
    detector: Detector | None = dataclasses.field(default=None, repr=False, compare=False)

    @property
    def figure(self) -> float:
        """What candidates are ranked by; -1 for one that failed."""
        return -1.0 if self.failed else (self.image_auroc + self.au_pro) / 2


class TrialBench:
    """The pictures of `data` that candidates are tried on, split as `recipe` says, and the pieces that judge them."""

    def __init__(self, data: Path, recipe: Recipe, seed: int, device: str, extras: Extras) -> None:
        self.seed, self.device, self._given = seed, device, extras
        self.pictures: PictureSet = open_data(data, recipe.data.colour, with_tests=False)
        if len(self.pictures.train) < LEAST_PICTURES:
            raise DataError(
                f"{data}: has {len(self.pictures.train)} good pictures; fit auto needs {LEAST_PICTURES} "
                "to learn from some and choose by others: add pictures, or name a recipe instead of auto"
            )
        settings = recipe.data
        self.split: Split = hold_out(self.pictures, seed, settings.held_out_share, settings.held_out_at_least)
        self.pairs = tuple(_pairs(self.split.held_out, self.pictures.colour, seed))

    def pool(self, recipe: Recipe, paths: Sequence[Path]) -> TilePool:
        """Tiles of `paths` on the recipe's grid."""
        return TilePool(paths, recipe.grid, self.pictures.colour, self.seed, recipe.data.cache_mb)

    def extras(self, recipe: Recipe) -> Extras:
        """What this recipe makes use of, of what was given."""
        uses = uses_of(recipe)
        return Extras(**{name: path for name, path in self._given.given().items() if name in uses})

    def fit(self, recipe: Recipe, tiles: TilePool, limit_s: float) -> tuple[Detector, Pace]:
        """A detector that learned for at most about `limit_s`, and how fast it did."""
        detector = build_detector(recipe, self.pictures.colour, self.seed)
        began = time.monotonic()
        session = _TrialSession(self.seed, self.device, self.extras(recipe), began + limit_s)
        detector.fit(tiles, session)
        return detector, session.pace(time.monotonic() - began, steps_of(recipe))

    def judging_s(self, recipe: Recipe, detector: Detector) -> float:
        """How long judging will take, from one piece."""
        score = frame_scorer(detector.scorer(recipe.score).eval(), recipe.grid, recipe.reduction)
        began = time.monotonic()
        score(self.pairs[0].good)
        return 2 * len(self.pairs) * (time.monotonic() - began)

    def judge(self, recipe: Recipe, detector: Detector) -> tuple[float, float, float]:
        """Image AUROC, AU-PRO@0.3 on the pieces, and nanoseconds a pixel."""
        if isinstance(detector, Settles):
            detector.settle(self.pool(recipe, self.split.held_out[:3]))
        score = frame_scorer(detector.scorer(recipe.score).eval(), recipe.grid, recipe.reduction)
        began, pixels = time.monotonic(), 0
        good, flawed = [], []
        with closing(PixelPool()) as pool:
            for pair in self.pairs:
                plain, spoilt = score(pair.good), score(pair.flawed)
                pixels += 2 * pair.mask.size
                if not (np.isfinite(plain.map).all() and np.isfinite(spoilt.map).all()):
                    raise TrainError("its scores are not finite")
                good.append(plain.score)
                flawed.append(spoilt.score)
                pool.add_good(plain.map)
                pool.add_defective(pair.kind, spoilt.map, pair.mask)
            ranking = pool.rankings().pooled
        auroc = image_auroc(np.array(flawed), np.array(good))
        covered = au_pro(ranking, 0.3) if ranking else None
        return auroc or 0.0, covered or 0.0, (time.monotonic() - began) * 1e9 / pixels


@dataclass(frozen=True, eq=False)
class _Pair:
    """A piece of a good picture uint8 [h, w, C], the same with a flaw, its mask bool [h, w] and kind."""

    good: NDArray[np.uint8]
    flawed: NDArray[np.uint8]
    mask: NDArray[np.bool_]
    kind: str


def _pairs(paths: Sequence[Path], colour: Colour, seed: int) -> list[_Pair]:
    """Pieces of the pictures in turn, each with a flaw of its own."""
    random = np.random.default_rng([seed, 0xA070])
    found = []
    for index in range(_PAIRS):
        picture = read_picture(paths[index % len(paths)], colour)
        height, width = picture.shape[:2]
        size = min(height, width) * random.uniform(*_FLAW_SHARES)
        y, x = (int(random.integers(0, max(0, side - _PIECE_PX) + 1)) for side in (height, width))
        piece = np.ascontiguousarray(picture[y : y + _PIECE_PX, x : x + _PIECE_PX])
        flawed, mask, kind = plant(piece, max(6.0, min(size, _PIECE_PX / 3)), random)
        found.append(_Pair(piece, flawed, mask, kind))
    return found


class _TrialSession(QuietSession):
    """One that ends at a deadline, and notes how fast it goes."""

    def __init__(self, seed: int, device: str, extras: Extras, deadline: float) -> None:
        super().__init__(seed, device, extras)
        self._deadline = deadline
        self._heard: list[tuple[float, int]] = []

    @property
    def should_stop(self) -> bool:
        """Whether the time is up."""
        return time.monotonic() >= self._deadline

    def save(self, step: int, tensors: Callable[[], dict[str, Tensor]]) -> None:  # noqa: ARG002 - it keeps nothing
        """Keep nothing, but note the time."""
        self._heard.append((time.monotonic(), step))

    def report(self, step: int, steps: int, losses: Mapping[str, float]) -> None:  # noqa: ARG002 - it shows nothing
        """Show nothing, but note the time."""
        self._heard.append((time.monotonic(), step))

    def pace(self, seconds: float, steps: int) -> Pace:
        """From what was heard of a fit of `steps` that took `seconds`: what came before the first step is no step's."""
        if not steps:
            return Pace(seconds, 0.0)
        if not self._heard:
            return Pace(0.0, seconds / steps)
        # The first steps are slow: memory is touched, kernels are chosen.
        (first_at, first), (last_at, last) = self._heard[min(4, len(self._heard) - 1)], self._heard[-1]
        step_s = (last_at - first_at) / (last - first) if last > first else seconds / max(last, 1)
        return Pace(max(seconds - step_s * last, 0.0), step_s)


def try_all(bench: TrialBench, recipes: Sequence[Recipe], end: float) -> list[Trial]:
    """A trial of each until about `end` on the monotonic clock, those that are left sharing the time that is left."""
    trials: list[Trial] = []
    for index, recipe in enumerate(recipes):
        _LOG.info("trying %s", recipe.name)
        joined = _join(bench, recipe, trials)
        if joined is not None:
            trials.append(joined)
            continue
        left = end - time.monotonic()
        if trials and left < LEAST_TRIAL_S / 2:
            trials.append(Trial(recipe, 0.0, failed="no time was left to try it"))
            continue
        sharers = sum(not isinstance(other.settings, JointSettings) for other in recipes[index:])
        trials.append(_try(bench, recipe, max(left, LEAST_TRIAL_S) / max(sharers, 1)))
    return trials


def _join(bench: TrialBench, recipe: Recipe, trials: Sequence[Trial]) -> Trial | None:
    """The trial of a joint recipe whose members were all tried: they are joined as they are. None for any other."""
    if not isinstance(recipe.settings, JointSettings):
        return None
    tried = {trial.recipe.name: trial for trial in trials if trial.detector is not None}
    members = {name: recipe.settings.recipe(name) for name in recipe.settings.joint.members}
    if any(name not in tried or _core(tried[name].recipe) != _core(member) for name, member in members.items()):
        return None
    began = time.monotonic()
    try:
        detector = build_detector(recipe, bench.pictures.colour, bench.seed)
        assert isinstance(detector, JointDetector)  # noqa: S101 - its settings say so
        for name in members:
            detector.adopt(name, _tensors_of(tried[name]))
        auroc, covered, pixel_ns = bench.judge(recipe, detector)
    except (KizuError, ValueError, RuntimeError) as exc:
        return Trial(recipe, time.monotonic() - began, failed=str(exc).splitlines()[0])
    own = [tried[name] for name in members]
    steps = [steps_of(trial.recipe) for trial in own]
    step_s = sum(n * trial.pace.step_s for n, trial in zip(steps, own, strict=True)) / max(sum(steps), 1)
    pace = Pace(sum(trial.pace.base_s for trial in own), step_s)
    share = min(trial.share for trial in own)
    return Trial(recipe, time.monotonic() - began, auroc, covered, share, pace, pixel_ns)


def _core(recipe: Recipe) -> tuple[Any, ...]:
    """What a member and the recipe that was tried must have in common."""
    return recipe.detector, recipe.settings, recipe.grid.tile_px, recipe.map_cell_px


def _tensors_of(trial: Trial) -> dict[str, Tensor]:
    return trial.detector.tensors() if trial.detector is not None else {}


def _try(bench: TrialBench, recipe: Recipe, limit_s: float) -> Trial:
    """Train and judge one candidate within about `limit_s`; whatever it raises is its own failure."""
    began = time.monotonic()
    try:
        tiles, steps = bench.pool(recipe, bench.split.learn), steps_of(recipe)
        share = min(1.0, _PROBE_STEPS / steps) if steps else 1.0
        detector, pace = bench.fit(scaled(recipe, share), tiles, limit_s)
        if share < 1:
            left = limit_s - (time.monotonic() - began) - bench.judging_s(recipe, detector)
            share = min(1.0, max(share, pace.steps_in(left) / steps))
            # The limit is a safety: a detector cut off has not lowered its learning rate.
            detector, pace = bench.fit(scaled(recipe, share), tiles, max(1.5 * left, 1.0))
        auroc, covered, pixel_ns = bench.judge(recipe, detector)
    except (KizuError, ValueError, RuntimeError) as exc:
        return Trial(recipe, time.monotonic() - began, failed=str(exc).splitlines()[0])
    return Trial(recipe, time.monotonic() - began, auroc, covered, share, pace, pixel_ns, None, detector)


def scaled(recipe: Recipe, share: float) -> Recipe:
    """The recipe with `share` of the steps of every table that has some; at least twenty each."""
    return recipe if share == 1 else parse_recipe(_scaled(recipe.to_dict(), share))


def steps_of(recipe: Recipe) -> int:
    """Steps of all tables together; 0 for a recipe that learns in one sweep."""
    return _steps(recipe.to_dict())


def _scaled(raw: Mapping[str, Any], share: float) -> dict[str, Any]:
    return {
        key: max(_LEAST_STEPS, round(value * share))
        if key == "steps" and isinstance(value, int)
        else _scaled(value, share)
        if isinstance(value, Mapping)
        else value
        for key, value in raw.items()
    }


def _steps(raw: Mapping[str, Any]) -> int:
    own = raw.get("steps", 0)
    return (own if isinstance(own, int) else 0) + sum(
        _steps(part) for part in raw.values() if isinstance(part, Mapping)
    )
