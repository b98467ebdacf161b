"""What two heaps of scores tell: the best threshold between them, and a picture of both."""

from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
from numpy.typing import NDArray

_WIDTH, _HEIGHT, _EDGE, _BINS = 720, 360, 48, 48
_GOOD, _BAD, _LINE = (200, 120, 40), (60, 60, 210), (60, 60, 60)
"""Blue, red and grey, as OpenCV has colours: blue first."""


@dataclass(frozen=True)
class Split:
    """The threshold that judges most pictures right, and the share that it does."""

    threshold: float
    accuracy: float


def best_split(good: NDArray[np.float64], bad: NDArray[np.float64]) -> Split:
    """The best threshold over both heaps: pictures at or above it are judged bad. It has seen the labels."""
    scores = np.concatenate([good, bad])
    levels = np.append(np.unique(scores), np.nextafter(scores.max(), np.inf))
    passed = np.searchsorted(np.sort(good), levels)
    caught = len(bad) - np.searchsorted(np.sort(bad), levels)
    right = passed + caught
    best = int(right.argmax())
    below = levels[max(best - 1, 0)]
    return Split(float((below + levels[best]) / 2), float(right[best] / len(scores)))


def draw_histogram(
    path: Path, good: NDArray[np.float64], bad: NDArray[np.float64], threshold: float, title: str
) -> None:
    """Write a PNG of both heaps, good in blue, bad in red, each scaled to its share; the threshold as a line."""
    low, high = float(min(good.min(), bad.min())), float(max(good.max(), bad.max()))
    edges = np.linspace(low, max(high, low + 1e-9), _BINS + 1)
    heaps = [np.histogram(values, edges)[0] / len(values) for values in (good, bad)]
    tallest = max(float(heap.max()) for heap in heaps)
    canvas = np.full((_HEIGHT, _WIDTH, 3), 255, np.uint8)
    for heap, colour in zip(heaps, (_GOOD, _BAD), strict=True):
        _add_bars(canvas, heap / tallest, colour)
    foot = _HEIGHT - _EDGE
    cv2.line(canvas, (_EDGE, foot), (_WIDTH - _EDGE, foot), _LINE, 1)
    at = _EDGE + round((_WIDTH - 2 * _EDGE) * (threshold - low) / (edges[-1] - low))
    cv2.line(canvas, (at, _EDGE), (at, foot), _LINE, 1)
    _write(canvas, title, (_EDGE, 20), _LINE)
    _write(canvas, f"good ({len(good)})", (_EDGE, 38), _GOOD)
    _write(canvas, f"bad ({len(bad)})", (_EDGE + 120, 38), _BAD)
    for value, place in ((low, _EDGE), (threshold, at), (high, _WIDTH - _EDGE)):
        _write(canvas, f"{value:.3g}", (place - 18, foot + 20), _LINE)
    path.parent.mkdir(parents=True, exist_ok=True)
    assert cv2.imwrite(str(path), canvas)


def _add_bars(canvas: NDArray[np.uint8], shares: NDArray[np.float64], colour: tuple[int, int, int]) -> None:
    over = canvas.copy()
    step, foot = (_WIDTH - 2 * _EDGE) / _BINS, _HEIGHT - _EDGE
    for index, share in enumerate(shares):
        left, right = _EDGE + round(index * step), _EDGE + round((index + 1) * step) - 1
        cv2.rectangle(over, (left, foot - round(float(share) * (foot - _EDGE))), (right, foot), colour, -1)
    cv2.addWeighted(over, 0.55, canvas, 0.45, 0, dst=canvas)


def _write(canvas: NDArray[np.uint8], text: str, at: tuple[int, int], colour: tuple[int, int, int]) -> None:
    cv2.putText(canvas, text, at, cv2.FONT_HERSHEY_SIMPLEX, 0.45, colour, 1, cv2.LINE_AA)
