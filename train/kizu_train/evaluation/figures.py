"""From scored pictures and rankings to the figures of an evaluation."""

import statistics
from collections.abc import Mapping, Sequence

import numpy as np

from kizu_contract.judging import Thresholds
from kizu_train.evaluation.metrics import Ranking, au_pro, auroc, average_precision, image_ap, image_auroc
from kizu_train.evaluation.records import ImageFigures, KindRow, PixelFigures, ScoredPicture, Timing

NO_IMAGE_FIGURES = ImageFigures(None, None)
NO_PIXEL_FIGURES = PixelFigures(None, None, None, None)


def image_figures(pictures: Sequence[ScoredPicture], kind: str | None = None) -> ImageFigures:
    """Rank all defective pictures, or those of `kind`, against all good ones."""
    good = np.array([picture.score for picture in pictures if picture.is_good])
    defective = np.array([p.score for p in pictures if not p.is_good and kind in {None, p.kind}])
    return ImageFigures(image_auroc(defective, good), image_ap(defective, good))


def pixel_figures(ranking: Ranking | None) -> PixelFigures:
    """Take all pixel metrics of a ranking."""
    if ranking is None:
        return NO_PIXEL_FIGURES
    return PixelFigures(auroc(ranking), average_precision(ranking), au_pro(ranking, 0.3), au_pro(ranking, 0.05))


def kind_rows(
    pictures: Sequence[ScoredPicture],
    rankings: Mapping[str, Ranking],
    masked: Mapping[str, int],
    thresholds: Thresholds,
) -> tuple[KindRow, ...]:
    """Good pictures first, then the kinds of defects by name."""
    kinds = {(picture.is_good, picture.kind) for picture in pictures}
    rows = []
    for is_good, kind in sorted(kinds, key=lambda entry: (not entry[0], entry[1])):
        scores = [picture.score for picture in pictures if (picture.is_good, picture.kind) == (is_good, kind)]
        rows.append(
            KindRow(
                kind=kind,
                is_good=is_good,
                pictures=len(scores),
                rejected=sum(score >= thresholds.reject for score in scores),
                flagged=sum(score >= thresholds.warn for score in scores),
                masked=0 if is_good else masked.get(kind, 0),
                image=NO_IMAGE_FIGURES if is_good else image_figures(pictures, kind),
                pixel=NO_PIXEL_FIGURES if is_good else pixel_figures(rankings.get(kind)),
            )
        )
    return tuple(rows)


def timing(seconds: Sequence[float], pixels: int) -> Timing:
    """Sum up the seconds that each picture took (at least one), `pixels` in all."""
    return Timing(
        mean_ms=1e3 * statistics.fmean(seconds),
        median_ms=1e3 * statistics.median(seconds),
        p95_ms=1e3 * float(np.quantile(seconds, 0.95)),
        megapixels_per_s=pixels / 1e6 / max(sum(seconds), 1e-9),
    )
