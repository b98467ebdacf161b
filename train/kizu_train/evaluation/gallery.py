"""Keeps the few pictures that a report shows, as thumbnails, while the evaluation streams past."""

import heapq
from itertools import chain, zip_longest

import cv2
import numpy as np
from numpy.typing import NDArray

from kizu_contract.heatmap import overlay, shrink_by_maximum
from kizu_contract.judging import Thresholds, Verdict
from kizu_contract.pictures import to_colour
from kizu_train.evaluation.records import Example, Examples, ScoredPicture

THUMBNAIL_PX = 320
"""Longest side of a thumbnail."""
_SMALL_PX = 160
_JPEG_QUALITY = 85


class Gallery:
    """The `size` worst misses, worst false alarms and best catches of each kind; thumbnails are made only for those."""

    def __init__(self, size: int, thresholds: Thresholds) -> None:
        self._thresholds = thresholds
        self._misses = _Best(size)
        self._false_alarms = _Best(size)
        self._catches: dict[str, _Best] = {}
        self._size = size

    def offer(
        self,
        scored: ScoredPicture,
        picture: NDArray[np.uint8],
        frame_map: NDArray[np.float32],
        mask: NDArray[np.bool_] | None,
    ) -> None:
        """Consider `picture` uint8 [H, W, C] with its map float32 [H, W] and mask bool [H, W]."""
        if scored.is_good:
            places = [(self._false_alarms, scored.ratio)]
        else:
            catches = self._catches.setdefault(scored.kind, _Best(self._size))
            places = [(self._misses, -scored.ratio), (catches, scored.ratio)]
        wanted = [(place, merit) for place, merit in places if place.would_take(merit)]
        if wanted:
            example = make_example(scored, picture, frame_map, mask, self._thresholds)
            for place, merit in wanted:
                place.take(merit, example)

    def examples(self) -> Examples:
        """What was kept; catches were at least warned of, take turns over the kinds, and are none of the misses."""
        misses = self._misses.ranked()
        shown = {example.picture.path for example in misses}
        turns = chain.from_iterable(zip_longest(*(best.ranked() for best in self._catches.values())))
        caught = (one for one in turns if one is not None and one.picture.verdict is not Verdict.OK)
        catches = [one for one in caught if one.picture.path not in shown]
        return Examples(misses, self._false_alarms.ranked(), tuple(catches[: self._size]))


class _Best:
    """The `size` examples of the highest merit; of equal ones the first stays."""

    def __init__(self, size: int) -> None:
        self._size = size
        self._heap: list[tuple[float, int, Example]] = []
        self._order = 0

    def would_take(self, merit: float) -> bool:
        return self._size > 0 and (len(self._heap) < self._size or merit > self._heap[0][0])

    def take(self, merit: float, example: Example) -> None:
        # The falling order number settles ties before examples, which have no order, would be compared.
        self._order -= 1
        entry = (merit, self._order, example)
        if len(self._heap) < self._size:
            heapq.heappush(self._heap, entry)
        else:
            heapq.heapreplace(self._heap, entry)

    def ranked(self) -> tuple[Example, ...]:
        return tuple(example for _, _, example in sorted(self._heap, key=lambda entry: entry[:2], reverse=True))


def make_example(
    scored: ScoredPicture,
    picture: NDArray[np.uint8],
    frame_map: NDArray[np.float32],
    mask: NDArray[np.bool_] | None,
    thresholds: Thresholds,
) -> Example:
    """Draw the thumbnails of one picture; very small pictures are enlarged pixel by pixel."""
    # A strip thinner than a thumbnail's pixel shows its head only.
    longest = THUMBNAIL_PX * frame_map.shape[1]
    picture, frame_map = picture[:longest], frame_map[:longest]
    mask = None if mask is None else mask[:longest]
    height, width = frame_map.shape
    if max(height, width) < _SMALL_PX:
        times = THUMBNAIL_PX // max(height, width)
        picture, frame_map = _enlarge(picture, times), _enlarge(frame_map, times)
        mask = None if mask is None else _enlarge(mask, times)
        height, width = frame_map.shape
    # overlay() bounds the width; this width keeps the height within the thumbnail too.
    bound = max(1, min(THUMBNAIL_PX, width * THUMBNAIL_PX // height))
    heat = overlay(picture, frame_map, thresholds, bound)
    plain = to_colour(_fit(picture, heat.shape[1], heat.shape[0]), "rgb")
    if mask is not None and mask.any():
        heat = _outline(heat, mask)
    return Example(scored, mask is not None and bool(mask.any()), _jpeg(plain), _jpeg(heat))


def _enlarge(array: NDArray, times: int) -> NDArray:  # type: ignore[type-arg]  # any dtype passes through
    return array.repeat(times, axis=0).repeat(times, axis=1)


def _fit(picture: NDArray[np.uint8], width: int, height: int) -> NDArray[np.uint8]:
    resized = np.asarray(cv2.resize(picture, (width, height), interpolation=cv2.INTER_AREA), np.uint8)
    return resized if resized.ndim == 3 else resized[:, :, None]


def _outline(picture: NDArray[np.uint8], mask: NDArray[np.bool_]) -> NDArray[np.uint8]:
    """Draw the edge of `mask` around its regions, white on black: it stands out on any picture and any heat."""
    height, width = picture.shape[:2]
    small = shrink_by_maximum(mask.astype(np.float32), (width, height)).astype(np.uint8)
    # One pixel away from the region, so that a thin defect is framed and not painted over.
    around = cv2.dilate(small, np.ones((5, 5), np.uint8))
    contours, _ = cv2.findContours(around, cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_NONE)
    drawn = np.ascontiguousarray(picture)
    cv2.drawContours(drawn, contours, -1, (0, 0, 0), 3)
    cv2.drawContours(drawn, contours, -1, (255, 255, 255), 1)
    return drawn


def _jpeg(picture: NDArray[np.uint8]) -> bytes:
    _, data = cv2.imencode(".jpg", picture[:, :, ::-1], [cv2.IMWRITE_JPEG_QUALITY, _JPEG_QUALITY])
    return bytes(data)
