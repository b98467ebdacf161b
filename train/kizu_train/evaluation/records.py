"""What an evaluation finds, and its JSON form."""

import json
from dataclasses import asdict, dataclass, field, fields

from kizu_contract.judging import Thresholds, Verdict
from kizu_train.evaluation.metrics import f1

EVALUATION_SCHEMA = 1
"""Version of the JSON form."""


@dataclass(frozen=True)
class ScoredPicture:
    """A test picture with its score; `path` is relative to the data folder, with forward slashes."""

    path: str
    kind: str
    is_good: bool
    score: float
    ratio: float
    verdict: Verdict
    width: int
    height: int


@dataclass(frozen=True)
class Problem:
    """A picture or mask that could not be used, and why."""

    path: str
    error: str


@dataclass(frozen=True)
class ImageFigures:
    """Pictures ranked by frame score: 0 to 1, None where good or defective pictures are missing."""

    auroc: float | None
    ap: float | None


@dataclass(frozen=True)
class PixelFigures:
    """Pixels pooled over pictures at their own size: 0 to 1, None where there is no mask or no good pixel.

    `au_pro_30` and `au_pro_05` are the areas up to false positive rates of 0.3 and 0.05.
    """

    auroc: float | None
    ap: float | None
    au_pro_30: float | None
    au_pro_05: float | None


@dataclass(frozen=True)
class Operating:
    """What the verdicts come to when pictures with a score of at least `score` are held back.

    Escape rate is the share of defective pictures that pass, overkill rate the share of good ones held back; None
    where there are none of them.
    """

    score: float
    defective: int
    missed: int
    good: int
    false_alarms: int
    escape_rate: float | None
    overkill_rate: float | None
    f1: float | None

    @classmethod
    def at(cls, score: float, pictures: tuple[ScoredPicture, ...]) -> "Operating":
        """Judge `pictures` at the threshold `score`."""
        good = [picture.score >= score for picture in pictures if picture.is_good]
        defective = [picture.score >= score for picture in pictures if not picture.is_good]
        missed, false_alarms = len(defective) - sum(defective), sum(good)
        return cls(
            score,
            len(defective),
            missed,
            len(good),
            false_alarms,
            missed / len(defective) if defective else None,
            false_alarms / len(good) if good else None,
            f1(sum(defective), missed, false_alarms),
        )


@dataclass(frozen=True)
class KindRow:
    """One kind of test picture: how many, how many `rejected` and `flagged` (warn or reject), and its figures.

    The figures of a defective kind are taken against all good pictures, those of pixels with the good pixels of the
    kind's own pictures too; `masked` pictures took part in them. All are None for good pictures.
    """

    kind: str
    is_good: bool
    pictures: int
    rejected: int
    flagged: int
    masked: int
    image: ImageFigures
    pixel: PixelFigures


@dataclass(frozen=True)
class Timing:
    """Milliseconds per picture, from pixels in host memory to the map in host memory, after one warm-up."""

    mean_ms: float
    median_ms: float
    p95_ms: float
    megapixels_per_s: float


@dataclass(frozen=True)
class Example:
    """A picture for the report: JPEG thumbnails of the input and of the heatmap with the truth outlined."""

    picture: ScoredPicture
    has_mask: bool
    input_jpeg: bytes
    heatmap_jpeg: bytes


@dataclass(frozen=True)
class Examples:
    """Worst misses, worst false alarms and best catches, each the most telling first; not part of the JSON form."""

    misses: tuple[Example, ...] = ()
    false_alarms: tuple[Example, ...] = ()
    catches: tuple[Example, ...] = ()


@dataclass(frozen=True)
class Evaluation:
    """Everything measured on one set of test pictures.

    `evaluated` is UTC, RFC 3339 with milliseconds. `regions` counts ground-truth regions; `pixel_pictures` took part in
    pixel figures, `pixel_left_out` are defective pictures without a mask or with an empty one.
    """

    schema: int
    evaluated: str
    thresholds: Thresholds
    image: ImageFigures
    pixel: PixelFigures
    regions: int
    pixel_pictures: int
    pixel_left_out: int
    reject: Operating
    warn: Operating
    kinds: tuple[KindRow, ...]
    timing: Timing
    pictures: tuple[ScoredPicture, ...]
    unreadable: tuple[Problem, ...]
    examples: Examples = field(default=Examples(), repr=False)

    def to_json(self) -> bytes:
        """Write as UTF-8 JSON: the fields above in order, `examples` left out, null where there is no figure."""
        whole = {item.name: getattr(self, item.name) for item in fields(self) if item.name != "examples"}
        text = json.dumps(whole, default=asdict, indent=2, ensure_ascii=False, allow_nan=False)
        return text.encode() + b"\n"

    def headline(self) -> dict[str, float]:
        """The figures that exist, by name, for a bundle's provenance."""
        figures: dict[str, float | None] = {
            "image_auroc": self.image.auroc,
            "image_ap": self.image.ap,
            "pixel_auroc": self.pixel.auroc,
            "pixel_ap": self.pixel.ap,
            "au_pro_30": self.pixel.au_pro_30,
            "au_pro_05": self.pixel.au_pro_05,
            "escape_rate": self.reject.escape_rate,
            "overkill_rate": self.reject.overkill_rate,
            "f1": self.reject.f1,
        }
        return {name: value for name, value in figures.items() if value is not None}
