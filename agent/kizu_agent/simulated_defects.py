"""The defects of the simulator: each changes a part's layers and says where."""

from collections.abc import Callable

import cv2
import numpy as np
from numpy.typing import NDArray

from kizu_agent.simulated_parts import ALBEDO, BODY, RELIEF, RUST, Blueprint, Plane

Layers = NDArray[np.float32]
Defect = Callable[[Blueprint, Layers, float, np.random.Generator], Plane]
"""Changes `layers` float32 [H, W, 4] in place, as hard as the severity (1: usual), and returns its coverage 0…1."""

_SUBPIXEL_BITS = 4


def scratch(part: Blueprint, layers: Layers, severity: float, rng: np.random.Generator) -> Plane:
    """A thin curved line of bare metal with a groove."""
    size = part.size_px
    middle, angle = _spot(layers, rng), rng.uniform(0, np.pi)
    half, bend = rng.uniform(0.07, 0.16) * size, rng.uniform(-0.06, 0.06) * size
    t = np.linspace(-1, 1, 17)
    along, across = t * half, bend * t * t
    points = np.stack(
        [
            middle[0] + along * np.cos(angle) - across * np.sin(angle),
            middle[1] + along * np.sin(angle) + across * np.cos(angle),
        ],
        axis=1,
    )
    line = np.zeros(layers.shape[:2], np.uint8)
    fixed = np.round(points * (1 << _SUBPIXEL_BITS)).astype(np.int32)
    thickness = max(1, round(rng.uniform(1.4, 2.6) * size / 256))
    cv2.polylines(line, [fixed], isClosed=False, color=255, thickness=thickness, lineType=cv2.LINE_AA, shift=4)
    cover = _on_body(line.astype(np.float32) / 255, layers)
    layers[..., RELIEF] -= 1.6 * severity * cover
    layers[..., ALBEDO] += rng.choice((0.30, -0.26)) * severity * cover
    return cover


def dent(part: Blueprint, layers: Layers, severity: float, rng: np.random.Generator) -> Plane:
    """A round dip where something hit the part."""
    radius = rng.uniform(0.026, 0.042) * part.size_px
    cover = _on_body(_blob(layers.shape, _spot(layers, rng), radius, rng.uniform(0.7, 1.4)), layers)
    layers[..., RELIEF] -= 1.25 * severity * radius * cover
    layers[..., ALBEDO] -= 0.22 * severity * cover
    return cover


def rust(part: Blueprint, layers: Layers, severity: float, rng: np.random.Generator) -> Plane:
    """A patch of rust with a ragged edge."""
    radius = rng.uniform(0.05, 0.09) * part.size_px
    blob = _blob(layers.shape, _spot(layers, rng), radius, rng.uniform(0.7, 1.4))
    coarse = rng.normal(0, 1, (18, 18)).astype(np.float32)
    ragged = cv2.resize(coarse, layers.shape[1::-1], interpolation=cv2.INTER_CUBIC)
    cover = _on_body(np.clip((blob + 0.10 * ragged - 0.42) * 6, 0, 1) * (blob > 0.1), layers)
    layers[..., RUST] = np.clip(0.9 * severity, 0, 1) * cover
    layers[..., ALBEDO] *= 1 - 0.15 * severity * cover
    return cover


def missing_piece(part: Blueprint, layers: Layers, severity: float, rng: np.random.Generator) -> Plane:
    """A tooth, or a piece of the edge, that broke off at one of the part's features; the break is bright and rough."""
    at = part.features[rng.integers(len(part.features))]
    centre = (layers.shape[1] / 2, layers.shape[0] / 2)
    radius = part.feature_px * float(np.clip(0.6 + 0.4 * severity, 0.4, 1.5))
    outwards = (at - centre) / max(float(np.hypot(*(at - centre))), 1.0)
    sideways = np.array((-outwards[1], outwards[0]))
    angles = np.linspace(0, 2 * np.pi, 16, endpoint=False)
    # Nearly a rectangle, so that no stubs of a tooth are left at its corners.
    square = np.sign(np.stack([np.cos(angles), np.sin(angles)])) * np.sqrt(np.abs([np.cos(angles), np.sin(angles)]))
    out, side = square * radius * rng.uniform(0.9, 1.12, 16)
    ring = at + outwards * radius * 0.25 + out[:, None] * outwards + side[:, None] * sideways
    hole = np.zeros(layers.shape[:2], np.uint8)
    cv2.fillPoly(hole, [np.round(ring * 16).astype(np.int32)], 255, cv2.LINE_AA, shift=4)
    cover = _on_body(hole.astype(np.float32) / 255, layers)
    wide = max(3, 2 * round(0.016 * part.size_px) + 1)
    gone = np.minimum(cover, cv2.erode(hole, np.ones((wide, wide), np.uint8)).astype(np.float32) / 255)
    face = np.clip(cover - gone, 0, 1)
    rough = cv2.GaussianBlur(rng.normal(0, 1, cover.shape).astype(np.float32), (0, 0), 0.8)
    layers[..., BODY] -= gone
    layers[..., RELIEF] += face * (1.6 * severity * rough - layers[..., RELIEF]) - gone * layers[..., RELIEF]
    layers[..., ALBEDO] += face * (0.78 - layers[..., ALBEDO])
    return cover


def thread_damage(part: Blueprint, layers: Layers, severity: float, rng: np.random.Generator) -> Plane:
    """A stretch of thread rolled flat."""
    at = part.features[rng.integers(len(part.features))]
    cover = _on_body(_blob(layers.shape, (at[0], at[1]), part.feature_px * 0.6, 1.3), layers)
    cover = np.asarray(np.clip(cover * 2.2, 0, 1), np.float32)
    length = max(3, round(0.09 * part.size_px))
    for channel in (RELIEF, BODY):
        plane = layers[..., channel]
        flat = cv2.blur(plane, (length, 1))
        plane += min(severity, 1.2) * cover * (flat - plane)
    layers[..., ALBEDO] += 0.10 * severity * cover
    return cover


DEFECTS: dict[str, dict[str, Defect]] = {
    "gears": {"dent": dent, "missing_tooth": missing_piece, "rust": rust, "scratch": scratch},
    "plates": {"broken_edge": missing_piece, "dent": dent, "rust": rust, "scratch": scratch},
    "screws": {"dent": dent, "rust": rust, "scratch": scratch, "thread_damage": thread_damage},
}
"""Each part's defects by the name that the truth gives them."""


def _spot(layers: Layers, rng: np.random.Generator) -> tuple[float, float]:
    """A point (x, y) well inside the part."""
    height, width = layers.shape[:2]
    inner = cv2.erode(layers[..., BODY], np.ones((5, 5), np.uint8))
    for _ in range(200):
        x, y = rng.integers(width), rng.integers(height)
        if inner[y, x] > 0.95:
            return float(x), float(y)
    return width / 2, height / 2


def _blob(shape: tuple[int, ...], at: tuple[float, float], radius: float, aspect: float) -> Plane:
    ys, xs = np.ogrid[0 : shape[0], 0 : shape[1]]
    away = ((xs - at[0]) * aspect) ** 2 + ((ys - at[1]) / aspect) ** 2
    return np.exp(-0.5 * away / (0.6 * radius) ** 2).astype(np.float32)


def _on_body(cover: NDArray[np.floating], layers: Layers) -> Plane:
    return (cover * layers[..., BODY]).astype(np.float32)
