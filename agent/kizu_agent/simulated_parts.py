"""The shapes of the simulator: gears, screws and plates as relief, albedo and coverage, drawn once for a line."""

from collections.abc import Callable
from dataclasses import dataclass

import cv2
import numpy as np
from numpy.typing import NDArray

Plane = NDArray[np.float32]
"""float32 [H, W]."""

SUPERSAMPLING_SIDE_PX = 2048
RELIEF, ALBEDO, BODY, RUST = 0, 1, 2, 3
"""Channels of a blueprint's layers."""


@dataclass(frozen=True, eq=False)
class Blueprint:
    """One part as designed, in picture pixels.

    `layers` float32 [H, W, 4]: relief in pixels towards the camera, albedo, coverage of the part and rust, each 0…1.
    `size_px` is the shorter side of the picture, `turn_deg` how far a part may lie turned, `grain_px` (along, across)
    the length of its surface grain, `features` points (x, y) where defects of the shape itself sit.
    """

    layers: NDArray[np.float32]
    size_px: int
    turn_deg: float
    grain_px: tuple[int, int]
    tint: tuple[float, float, float]
    features: NDArray[np.float32]
    feature_px: float


def gear(width: int, height: int) -> Blueprint:
    """A spur gear of 16 teeth with a bore, a keyway and five holes; it may lie turned by any angle."""
    x, y, size = _centred(width, height)
    radius, angle = np.hypot(x, y), np.arctan2(y, x)
    teeth = 16
    outline = 0.385 + 0.038 * np.clip(1.7 * np.cos(teeth * angle), -1, 1)
    body = radius < outline
    body &= radius > 0.085
    body &= ~((np.abs(x) < 0.025) & (y < 0) & (y > -0.12))
    for hole in np.arange(5) * 2 * np.pi / 5 + np.pi / 2:
        body &= np.hypot(x - 0.22 * np.cos(hole), y - 0.22 * np.sin(hole)) > 0.052
    relief = _bevelled(body, 0.012) * 2.2
    relief += _step(body & (radius < 0.135), 0.010) * 1.6
    relief += _step(body & (radius > 0.31), 0.010) * 1.2
    marks = np.random.default_rng(7).normal(0, 1, 4096)
    relief += 0.16 * np.interp(radius * size * 1.2, np.arange(4096), marks).astype(np.float32)
    albedo = np.where(radius > 0.31, 0.60, 0.54).astype(np.float32)
    at = np.arange(teeth) * 2 * np.pi / teeth
    tips = np.stack([0.405 * np.cos(at), 0.405 * np.sin(at)], axis=1) * size
    features = (tips + np.array((width / 2, height / 2))).astype(np.float32)
    layers = _layers(relief, albedo, body, width, height)
    return Blueprint(layers, min(width, height), 180.0, (3, 3), (1.0, 0.99, 0.95), features, 0.064 * min(width, height))


def screw(width: int, height: int) -> Blueprint:
    """Three machine screws lying side by side in a fixture."""
    x, y, size = _centred(width, height)
    relief = np.zeros_like(x)
    albedo = np.full_like(x, 0.56)
    body = np.zeros(x.shape, bool)
    pitch = 0.042
    rows = (-0.29, 0.0, 0.29)
    for row in rows:
        off = y - row
        wave = np.abs(((x + 0.35 * off) / pitch) % 1 - 0.5) * 4 - 1
        thread = (x > -0.12) & (x <= 0.38)
        core = np.where(x <= -0.26, 0.115, 0.062)
        core = np.where((x > 0.34) & (x <= 0.40), 0.062 - (x - 0.34) * 0.6, core)
        core = np.where((x < -0.40) | (x > 0.40), 0.0, core) + np.where(thread, 0.010 * wave, 0)
        inside = (np.abs(off) < core) & (core > 0)
        profile = np.sqrt(np.maximum(1 - (off / np.maximum(core, 1e-3)) ** 2, 0)) * core * size * 0.30
        relief = np.where(inside, profile + np.where(thread, 1.1 * wave, 0), relief).astype(np.float32)
        body |= inside
        slot = (np.abs(off) < 0.018) & (x < -0.35) & inside
        albedo = np.where(slot, 0.26, albedo).astype(np.float32)
    albedo = np.where(x < -0.26, np.minimum(albedo, 0.52), albedo).astype(np.float32)
    middles = np.array([(at, row) for row in rows for at in np.linspace(-0.06, 0.28, 6)]) * size
    features = (middles + np.array((width / 2, height / 2))).astype(np.float32)
    layers = _layers(relief, albedo, body, width, height)
    return Blueprint(layers, min(width, height), 1.5, (9, 1), (1.0, 0.95, 0.84), features, 0.085 * min(width, height))


def plate(width: int, height: int) -> Blueprint:
    """A brushed cover plate with four countersunk holes, a slot, a knurled field and an engraved number."""
    x, y, size = _centred(width, height)
    half_x, half_y = width / min(width, height) / 2 - 0.06, height / min(width, height) / 2 - 0.06
    body = _rounded(x, y, half_x, half_y, 0.05)
    corners = [(sx * (half_x - 0.09), sy * (half_y - 0.09)) for sx in (-1, 1) for sy in (-1, 1)]
    sunk = np.zeros(x.shape, bool)
    for cx, cy in corners:
        away = np.hypot(x - cx, y - cy)
        body &= away > 0.030
        sunk |= away < 0.055
    body &= ~_rounded(x, y + 0.16, 0.16, 0.028, 0.028)
    relief = _bevelled(body, 0.012) * 2.4 - _step(sunk, 0.022) * 2.6
    knurl = _rounded(x, y - 0.17, 0.20, 0.075, 0.01)
    waves = np.cos((x + y) * 2 * np.pi / 0.045) + np.cos((x - y) * 2 * np.pi / 0.045)
    relief += np.where(knurl, 0.55 * waves, 0).astype(np.float32)
    engraved = np.zeros(x.shape, np.uint8)
    side = min(x.shape)
    origin = (int(x.shape[1] / 2 - 0.21 * side), int(x.shape[0] / 2 + 0.045 * side))
    cv2.putText(
        engraved, "KZ-2048", origin, cv2.FONT_HERSHEY_SIMPLEX, side / 310, 1, max(2, int(side / 75)), cv2.LINE_AA
    )
    relief -= 1.1 * engraved.astype(np.float32)
    albedo = np.full_like(x, 0.60) - 0.14 * engraved.astype(np.float32)
    edge = _rim(half_x, half_y) * size + (width / 2, height / 2)
    layers = _layers(relief, albedo, body, width, height)
    features = edge.astype(np.float32)
    return Blueprint(layers, min(width, height), 1.5, (31, 1), (0.95, 0.98, 1.0), features, 0.07 * min(width, height))


PARTS: dict[str, Callable[[int, int], Blueprint]] = {"gears": gear, "plates": plate, "screws": screw}


def _centred(width: int, height: int) -> tuple[Plane, Plane, int]:
    """Coordinates of the supersampled picture in units of its shorter side, from its centre, and that side."""
    times = max(1, min(4, SUPERSAMPLING_SIDE_PX // max(width, height)))
    size = min(width, height)
    ys, xs = np.mgrid[0 : height * times, 0 : width * times].astype(np.float32)
    x = ((xs + 0.5) / times - width / 2) / size
    y = ((ys + 0.5) / times - height / 2) / size
    return x, y, size


def _rounded(x: Plane, y: Plane, half_x: float, half_y: float, corner: float) -> NDArray[np.bool_]:
    outside_x = np.maximum(np.abs(x) - (half_x - corner), 0)
    outside_y = np.maximum(np.abs(y) - (half_y - corner), 0)
    return np.asarray(np.hypot(outside_x, outside_y) < corner)


def _rim(half_x: float, half_y: float) -> NDArray[np.float64]:
    """Points around a plate's edge, away from its corners."""
    along = np.linspace(-0.7, 0.7, 8)
    across = [(sx * half_x, half_y * t) for sx in (-1, 1) for t in along]
    down = [(half_x * t, sy * half_y) for sy in (-1, 1) for t in along]
    return np.array(across + down)


def _bevelled(body: NDArray[np.bool_], bevel: float) -> Plane:
    """1 inside `body`, falling to 0 at its edge over about `bevel` of the picture's shorter side."""
    return _step(body, bevel) * body


def _step(area: NDArray[np.bool_], bevel: float) -> Plane:
    return np.asarray(cv2.GaussianBlur(area.astype(np.float32), (0, 0), bevel * min(area.shape)), np.float32)


def _layers(relief: Plane, albedo: Plane, body: NDArray[np.bool_], width: int, height: int) -> NDArray[np.float32]:
    stacked = np.dstack([relief * body, albedo * body, body, np.zeros_like(albedo)]).astype(np.float32)
    small = np.asarray(cv2.resize(stacked, (width, height), interpolation=cv2.INTER_AREA), np.float32)
    coverage = np.maximum(small[..., BODY], 1e-3)
    small[..., ALBEDO] /= coverage
    return small
