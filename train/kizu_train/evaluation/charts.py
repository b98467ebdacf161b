"""Charts as inline SVG: they take their colours from the page, scale without loss and need no script."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

import numpy as np

from kizu_contract.judging import Thresholds
from kizu_train.evaluation.metrics import rank, roc_curve
from kizu_train.evaluation.records import Operating, ScoredPicture

_BINS = 40
_WIDTH, _HEIGHT = 560, 330
_LEFT, _RIGHT, _TOP, _BOTTOM = 46, 14, 34, 44
_NICE = (1, 2, 5)


@dataclass(frozen=True)
class _Axis:
    """A scale from `low` to `high`, logarithmic or not, drawn from `left` to `right`."""

    low: float
    high: float
    is_log: bool
    left: float = _LEFT
    right: float = _WIDTH - _RIGHT

    def at(self, value: float) -> float:
        low, high, value = (math.log(v) if self.is_log else v for v in (self.low, self.high, value))
        return self.left + (self.right - self.left) * (value - low) / (high - low)

    def edges(self, count: int) -> list[float]:
        make = np.geomspace if self.is_log else np.linspace
        return [float(edge) for edge in make(self.low, self.high, count + 1)]

    def ticks(self) -> list[float]:
        if not self.is_log:
            return _linear_ticks(self.low, self.high)
        decades = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
        steps = _NICE if len(decades) <= 4 else (1,)
        return [s * 10.0**d for d in decades for s in steps if self.low <= s * 10.0**d <= self.high]


def histogram(pictures: Sequence[ScoredPicture], thresholds: Thresholds) -> str:
    """Draw how scores spread, as ratio to the reject threshold, good pictures above defective ones."""
    good = [picture.ratio for picture in pictures if picture.is_good]
    defective = [picture.ratio for picture in pictures if not picture.is_good]
    warn = thresholds.warn / thresholds.reject
    axis = _ratio_axis([*good, *defective, warn, 1.0])
    rows = [row for row in (("good", "good", good), ("defective", "bad", defective)) if row[2]]
    high = (_HEIGHT - _TOP - _BOTTOM - 14 * (len(rows) - 1)) / len(rows)
    parts = []
    names = []
    for number, (name, kind, values) in enumerate(rows):
        top = _TOP + number * (high + 14)
        parts += _bars(axis, values, name, kind, top, high)
        names.append(_text(axis.left + 4, top + 10, f"{name} ({len(values)})", f"row-name start {kind}"))
    parts += [_limit(axis, warn, "warn", 0), _limit(axis, 1.0, "reject", 13), *names]
    parts += [_tick(axis, value) for value in axis.ticks()]
    scale = ", logarithmic" if axis.is_log else ""
    parts.append(_text(_middle(axis), _HEIGHT - 6, f"score ÷ reject threshold{scale}", "axis-name"))
    return _svg("Score histogram of good and defective pictures with the warn and reject thresholds", parts)


def roc(pictures: Sequence[ScoredPicture], warn: Operating, reject: Operating) -> str:
    """Draw the ROC curve of pictures with both thresholds on it; there must be good and defective ones."""
    good = np.array([picture.score for picture in pictures if picture.is_good])
    defective = np.array([picture.score for picture in pictures if not picture.is_good])
    across = _Axis(0, 1, is_log=False)
    down = _Axis(0, 1, is_log=False, left=_HEIGHT - _BOTTOM, right=_TOP - 8)
    points = [f"{across.at(x):.1f},{down.at(y):.1f}" for x, y in zip(*roc_curve(rank(defective, good)), strict=True)]
    parts = []
    for value in (0.0, 0.2, 0.4, 0.6, 0.8, 1.0):
        x, y = across.at(value), down.at(value)
        parts.append(_line(_LEFT, y, across.right, y, "grid"))
        parts.append(_text(_LEFT - 6, y + 4, f"{100 * value:.0f}", "tick end"))
        parts.append(_text(x, _HEIGHT - _BOTTOM + 16, f"{100 * value:.0f}", "tick"))
    parts.append(_line(across.at(0), down.at(0), across.at(1), down.at(1), "chance"))
    corner = f"{across.at(1):.1f},{down.at(0):.1f}"
    parts.append(f'<polygon class="roc-area" points="{" ".join(points)} {corner}"/>')
    parts.append(f'<polyline class="roc" points="{" ".join(points)}"/>')
    same = (warn.missed, warn.false_alarms) == (reject.missed, reject.false_alarms)
    marks = [] if same else [_mark(across, down, warn, "warn", "warn", -10)]
    marks.append(_mark(across, down, reject, "reject", "warn = reject" if same else "reject", 4))
    parts += marks
    parts.append(_text(_middle(across), _HEIGHT - 6, "false alarms, % of good pictures", "axis-name"))
    middle = (down.at(0) + down.at(1)) / 2
    name = "found, % of defective pictures"
    parts.append(f'<text class="axis-name" transform="translate(11 {middle:.1f}) rotate(-90)">{name}</text>')
    return _svg("ROC curve of pictures with both thresholds", parts)


def _mark(across: _Axis, down: _Axis, point: Operating, kind: str, name: str, drop: float) -> str:
    """A dot at a threshold, its name beside it and `drop` px lower; two dots may lie close together."""
    x = across.at(point.false_alarms / point.good)
    y = down.at(1 - point.missed / point.defective)
    is_right = x > _WIDTH * 0.7
    label = _text(x + (-10 if is_right else 10), y + drop, name, f"mark{' end' if is_right else ''}")
    return f'<circle class="dot {kind}" cx="{x:.1f}" cy="{y:.1f}" r="5"/>{label}'


def _bars(axis: _Axis, values: list[float], name: str, kind: str, top: float, high: float) -> list[str]:
    edges = axis.edges(_BINS)
    counts, _ = np.histogram(np.clip(values, axis.low, axis.high), edges)
    scale = (high - 16) / counts.max()
    base = top + high
    parts = [_line(axis.left, base, axis.right, base, "base")]
    for count, left, right in zip(counts.tolist(), edges, edges[1:], strict=False):
        if count:
            x, wide, tall = axis.at(left), axis.at(right) - axis.at(left) - 1, count * scale
            tip = f"{count} {name}, ratio {left:.3g} to {right:.3g}"
            shape = f'x="{x:.1f}" y="{base - tall:.1f}" width="{wide:.1f}" height="{tall:.1f}"'
            parts.append(f'<rect class="{kind}" {shape}><title>{escape(tip)}</title></rect>')
    parts.append(_text(axis.left - 6, base - counts.max() * scale + 4, str(counts.max()), "tick end"))
    parts.append(_text(axis.left - 6, base + 1, "0", "tick end"))
    return parts


def _limit(axis: _Axis, ratio: float, name: str, drop: float) -> str:
    """A line through all rows; its name lies `drop` px lower, on the side that has room."""
    x = axis.at(ratio)
    is_right = x > _WIDTH * 0.85
    label = _text(x + (-4 if is_right else 4), 10 + drop, name, f"limit-name {name} {'end' if is_right else 'start'}")
    return _line(x, 2, x, _HEIGHT - _BOTTOM, f"limit {name}") + label


def _tick(axis: _Axis, value: float) -> str:
    x, y = axis.at(value), _HEIGHT - _BOTTOM
    return _line(x, y, x, y + 4, "base") + _text(x, y + 17, f"{value:g}", "tick")


def _ratio_axis(values: list[float]) -> _Axis:
    """Logarithmic where the largest ratio would squeeze the good ones into a corner, with a margin at both ends."""
    low, high = min(values), max(values)
    if low > 0 and high / low > 6:
        margin = (high / low) ** 0.03
        return _Axis(low / margin, high * margin, is_log=True)
    margin = 0.03 * (high - low) or 0.1
    return _Axis(low - margin, high + margin, is_log=False)


def _linear_ticks(low: float, high: float) -> list[float]:
    rough = (high - low) / 6
    decade = 10.0 ** math.floor(math.log10(rough))
    step = next(s * decade for s in (*_NICE, 10) if s * decade >= rough)
    return [round(n * step, 10) for n in range(math.ceil(low / step), math.floor(high / step) + 1)]


def _middle(axis: _Axis) -> float:
    return (axis.left + axis.right) / 2


def _line(x1: float, y1: float, x2: float, y2: float, kind: str) -> str:
    return f'<line class="{kind}" x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}"/>'


def _text(x: float, y: float, text: str, kind: str) -> str:
    return f'<text class="{kind}" x="{x:.1f}" y="{y:.1f}">{escape(text)}</text>'


def _svg(label: str, parts: Sequence[str]) -> str:
    return f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{escape(label)}">{"".join(parts)}</svg>'
