"""Score every test picture once and measure the whole: one pass, no map outlives its picture but for its pixels."""

import math
import time
from collections.abc import Callable
from contextlib import closing
from datetime import datetime, timezone
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import track

from kizu_contract.errors import PictureError
from kizu_contract.judging import FrameScore, Thresholds
from kizu_contract.pictures import Colour, read_picture
from kizu_train.data import PictureSet, TestPicture
from kizu_train.errors import DataError
from kizu_train.evaluation.figures import image_figures, kind_rows, pixel_figures, timing
from kizu_train.evaluation.gallery import Gallery
from kizu_train.evaluation.masks import read_mask
from kizu_train.evaluation.pixels import PixelPool
from kizu_train.evaluation.records import EVALUATION_SCHEMA, Evaluation, Operating, Problem, ScoredPicture

ScorePicture = Callable[[NDArray[np.uint8]], FrameScore]
"""Picture uint8 [H, W, C] in the model's colour → its score and map float32 [H, W]."""


def evaluate(
    pictures: PictureSet,
    score: ScorePicture,
    thresholds: Thresholds,
    *,
    colour: Colour,
    examples: int = 6,
    show_progress: bool = False,
) -> Evaluation:
    """Score the test pictures one by one, in the model's `colour`, and measure; good ones alone are enough.

    At most `examples` pictures of each sort are kept as thumbnails for the report. Pictures that cannot be read, have
    a size that the scorer cannot judge, or get no finite score, are listed and left out; unusable masks are listed too,
    and their pictures still count as pictures.
    Raises DataError when no picture is left, and whatever `score` raises.
    """
    with closing(PixelPool()) as pool:
        run = _Run(pictures, score, thresholds, pool, Gallery(examples, thresholds))
        for test in track(
            pictures.tests, "scoring", console=Console(stderr=True), transient=True, disable=not show_progress
        ):
            run.take(test, colour)
        return run.finish()


class _Run:
    """One pass over the pictures."""

    def __init__(
        self, pictures: PictureSet, score: ScorePicture, thresholds: Thresholds, pool: PixelPool, gallery: Gallery
    ) -> None:
        self._root = pictures.root
        self._score = score
        self._thresholds = thresholds
        self._pool = pool
        self._gallery = gallery
        self._is_warm = False
        self._scored: list[ScoredPicture] = []
        self._seconds: list[float] = []
        self._masked: dict[str, int] = {}
        tests = pictures.root / "test"
        unreadable = (path for path in pictures.unreadable if path.is_relative_to(tests))
        self._problems = [Problem(self._name(path), "is not a readable picture") for path in unreadable]

    def take(self, test: TestPicture, colour: Colour) -> None:
        """Read, score, judge and measure one picture."""
        name = self._name(test.path)
        try:
            picture = read_picture(test.path, colour)
            found, seconds = self._timed(picture)
        except PictureError as exc:
            self._problems.append(Problem(name, str(exc)))
            return
        height, width = picture.shape[:2]
        if found.map.shape != (height, width):
            raise ValueError(f"{name}: the map has shape {found.map.shape}, the picture {height} × {width}")
        if not (math.isfinite(found.score) and np.isfinite(found.map).all()):
            self._problems.append(Problem(name, "the scorer gave numbers that are not finite"))
            return
        score, limits = float(found.score), self._thresholds
        scored = ScoredPicture(
            name, test.kind, test.is_good, score, limits.ratio(score), limits.verdict(score), width, height
        )
        self._scored.append(scored)
        self._seconds.append(seconds)
        mask = self._mask(test, height, width)
        if test.is_good:
            self._pool.add_good(found.map)
        elif mask is not None:
            self._pool.add_defective(test.kind, found.map, mask)
            self._masked[test.kind] = self._masked.get(test.kind, 0) + 1
        self._gallery.offer(scored, picture, found.map, mask)

    def finish(self) -> Evaluation:
        """Measure the whole."""
        if not self._scored:
            raise DataError(f"{self._root}: no test picture could be scored: {self._why_none()}")
        scored, limits, masked = tuple(self._scored), self._thresholds, sum(self._masked.values())
        good = sum(picture.is_good for picture in scored)
        ranked = self._pool.rankings()
        return Evaluation(
            schema=EVALUATION_SCHEMA,
            evaluated=datetime.now(timezone.utc).isoformat(timespec="milliseconds").replace("+00:00", "Z"),
            thresholds=limits,
            image=image_figures(scored),
            pixel=pixel_figures(ranked.pooled),
            regions=ranked.regions,
            pixel_pictures=masked + good if masked else 0,
            pixel_left_out=len(scored) - good - masked,
            reject=Operating.at(limits.reject, scored),
            warn=Operating.at(limits.warn, scored),
            kinds=kind_rows(scored, ranked.kinds, self._masked, limits),
            timing=timing(self._seconds, sum(picture.width * picture.height for picture in scored)),
            pictures=scored,
            unreadable=tuple(self._problems),
            examples=self._gallery.examples(),
        )

    def _timed(self, picture: NDArray[np.uint8]) -> tuple[FrameScore, float]:
        if not self._is_warm:
            self._score(picture)  # the first run of an engine pays for its set-up
            self._is_warm = True
        started = time.perf_counter()
        found = self._score(picture)
        return found, time.perf_counter() - started

    def _mask(self, test: TestPicture, height: int, width: int) -> NDArray[np.bool_] | None:
        """The mask of a defective picture, where it has a usable one that marks something."""
        if test.is_good or test.mask is None:
            return None
        try:
            mask = read_mask(test.mask, height, width)
        except PictureError as exc:
            self._problems.append(Problem(self._name(test.mask), str(exc)))
            return None
        return mask if mask.any() else None

    def _name(self, path: Path) -> str:
        return (path.relative_to(self._root) if path.is_relative_to(self._root) else path).as_posix()

    def _why_none(self) -> str:
        if self._problems:
            return f"{len(self._problems)} failed, the first: {self._problems[0].path}: {self._problems[0].error}"
        return "there is none; evaluation needs test/good, and test/<kind> for each kind of defect"
