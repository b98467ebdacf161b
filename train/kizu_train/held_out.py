"""Scores of good pictures that a detector never saw: what borders and thresholds are set by."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from kizu_contract.errors import PictureError
from kizu_contract.judging import BorderGain, FrameScore, level_frame
from kizu_contract.pictures import Colour, read_picture
from kizu_train.borders import border_gain
from kizu_train.calibrate import odd_ones
from kizu_train.detectors.base import Detector
from kizu_train.errors import DataError, TrainError
from kizu_train.recipes import Recipe
from kizu_train.scoring import score_kinds, with_border

_BORDER_PICTURES = 64
_BORDER_PIXELS = 2**26
"""Pixels of maps, all kinds together, that are held at once to measure borders: 256 MiB."""
_MOST_NAMED = 3
_LOG = logging.getLogger(__name__)


@dataclass(frozen=True)
class Scored:
    """Frame scores of the pictures at `paths`, in their order, by kind of score."""

    paths: tuple[Path, ...]
    scores: Mapping[str, list[float]]


def score_held_out(
    paths: Sequence[Path], recipe: Recipe, colour: Colour, detector: Detector
) -> tuple[dict[str, BorderGain], Scored]:
    """What levels the borders of each kind's maps, and the levelled scores of all `paths`.

    Raises DataError for a picture that cannot be read, TrainError for a score that is not finite.
    """
    known = _first_frames(paths, recipe, colour, detector) if recipe.calibration.level_borders else {}
    borders = _borders(known, detector)
    return borders, Scored(tuple(paths), _scores(paths, recipe, colour, detector, borders, known))


def tell_odd(paths: Sequence[Path], scores: Sequence[float]) -> None:
    """Name the held-out pictures that may be no good ones: they push the thresholds out for all."""
    odd = odd_ones(scores)
    others = max((score for index, score in enumerate(scores) if index not in odd), default=0.0)
    for index in odd[:_MOST_NAMED]:
        _LOG.warning(
            "look at %s: it scores %.3g, most others up to %.3g. If it is defective, take it out and train again: "
            "it pushes the thresholds out",
            paths[index],
            scores[index],
            others,
        )


def _first_frames(
    paths: Sequence[Path], recipe: Recipe, colour: Colour, detector: Detector
) -> dict[Path, dict[str, FrameScore]]:
    """Some of the held-out pictures by every kind, not levelled: what borders are measured on."""
    found: dict[Path, dict[str, FrameScore]] = {}
    pixels = 0
    for path in paths[:: max(1, len(paths) // _BORDER_PICTURES)]:
        found[path] = _scored(path, recipe, colour, detector)
        pixels += sum(frame.map.size for frame in found[path].values())
        if pixels > _BORDER_PIXELS:
            break
    return found


def _borders(known: Mapping[Path, Mapping[str, FrameScore]], detector: Detector) -> dict[str, BorderGain]:
    """What levels the borders of each kind's maps."""
    if not known:
        return {}
    found = {kind: border_gain([frames[kind].map for frames in known.values()]) for kind in detector.score_kinds}
    return {kind: gain for kind, gain in found.items() if gain is not None}


def _scores(
    paths: Sequence[Path],
    recipe: Recipe,
    colour: Colour,
    detector: Detector,
    borders: Mapping[str, BorderGain],
    known: Mapping[Path, Mapping[str, FrameScore]],
) -> dict[str, list[float]]:
    """Scores of all held-out pictures by every kind, levelled; those in `known` are not computed again."""
    scores: dict[str, list[float]] = {kind: [] for kind in detector.score_kinds}
    for path in paths:
        for kind, frame in (known.get(path) or _scored(path, recipe, colour, detector)).items():
            score = level_frame(frame, with_border(recipe.reduction, borders, kind)).score
            if not np.isfinite(score):
                raise TrainError(
                    f"{path}: the trained detector gives a score that is not finite; train with other settings"
                )
            scores[kind].append(score)
    return scores


def _scored(path: Path, recipe: Recipe, colour: Colour, detector: Detector) -> dict[str, FrameScore]:
    """A held-out picture's score and map by every kind, not levelled."""
    try:
        return score_kinds(detector, read_picture(path, colour), recipe.grid, recipe.reduction)
    except PictureError as exc:
        raise DataError(f"{path}: {exc}") from exc
