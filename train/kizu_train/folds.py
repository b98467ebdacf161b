"""Thresholds from all good pictures: each is scored by a detector that never saw it (cross-fitting).

Source: Stone, "Cross-validatory choice and assessment of statistical predictions", 1974; Vovk, "Cross-conformal
predictors", 2015. The detectors of the folds differ a little from the one that ships, so the scores are those of the
recipe on these pictures rather than of one detector; with few pictures that says far more than the few held out.
"""

import logging
from collections.abc import Sequence
from pathlib import Path

from kizu_train.data import PictureSet, Split, fold_out
from kizu_train.detectors.base import Extras, Settles
from kizu_train.held_out import Scored, score_held_out
from kizu_train.quiet_session import QuietSession
from kizu_train.recipes import Recipe
from kizu_train.runs import build_detector
from kizu_train.tile_pool import TilePool

_LOG = logging.getLogger(__name__)


def score_folds(pictures: PictureSet, recipe: Recipe, extras: Extras, seed: int, device: str, count: int) -> Scored:
    """Train `count` detectors, each without its share of the good `pictures`, and score each share by its own.

    Raises DataError as `fold_out`, TrainError and DataError as a fit.
    """
    found: list[Scored] = []
    for number, split in enumerate(fold_out(pictures, seed, count), 1):
        _LOG.info("fold %d of %d: learning from %d pictures for the thresholds", number, count, len(split.learn))
        found.append(_score_fold(split, pictures, recipe, QuietSession(seed, device, extras)))
    paths = tuple(path for scored in found for path in scored.paths)
    kinds = found[0].scores
    return Scored(paths, {kind: [score for scored in found for score in scored.scores[kind]] for kind in kinds})


def _score_fold(split: Split, pictures: PictureSet, recipe: Recipe, session: QuietSession) -> Scored:
    detector = build_detector(recipe, pictures.colour, session.seed)

    def pool(paths: Sequence[Path]) -> TilePool:
        return TilePool(paths, recipe.grid, pictures.colour, session.seed, recipe.data.cache_mb)

    detector.fit(pool(split.learn), session)
    if isinstance(detector, Settles):
        detector.settle(pool(split.held_out))
    return score_held_out(split.held_out, recipe, pictures.colour, detector)[1]
