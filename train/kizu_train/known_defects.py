"""A few known defects, cut from marked pictures: detectors that can use them paste them onto good tiles.

Two layouts are read, mixed as you like: `KIND/x.png` beside `ground_truth/KIND/x_mask.png` (MVTec; `ground_truth` may
lie in the folder or beside it), or `x_mask.png` beside `x.png`, at any depth. A folder `good` is passed over.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
from numpy.typing import NDArray

from kizu_contract.pictures import list_pictures, read_picture
from kizu_train.errors import DataError

_MARK = "_mask"
_MOST_REGIONS = 400
_SPECK_PX = 2
"""Marked regions with fewer pixels are slips of the brush."""


@dataclass(frozen=True, eq=False)
class MarkedRegion:
    """A marked region with what surrounds it: `pixels` uint8 [H, W, C], `mask` float32 [H, W], 0 or 1."""

    pixels: NDArray[np.uint8]
    mask: NDArray[np.float32]


class KnownDefects:
    """Marked regions, pasted one at a time."""

    def __init__(self, regions: Sequence[MarkedRegion]) -> None:
        self.regions = tuple(regions)

    def paste(
        self, tile: NDArray[np.float32], random: np.random.Generator
    ) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """A known defect on `tile` float32 [T, T, C], 0–255, and its mask float32 [T, T], 0–1.

        The region is flipped, turned, resized by 0.7 to 1.4, moved to any place, and its brightness is fitted to that
        of the place; in one of three cases it comes with its own surroundings, as it was photographed.
        """
        region = self.regions[random.integers(len(self.regions))]
        side = len(tile)
        warp = _random_warp(region, side, random)
        size = (side, side)
        # Mirrored surroundings may show the defect again: the mask is mirrored with them.
        found, mask = (
            cv2.warpAffine(item, warp, size, borderMode=cv2.BORDER_REFLECT_101).astype(np.float32)
            for item in (region.pixels, region.mask)
        )
        found = found.reshape(tile.shape)
        if random.random() < 1 / 3:
            return found, mask
        reach = cv2.dilate(mask, np.ones((5, 5), np.uint8))
        ring = cv2.dilate(reach, np.ones((7, 7), np.uint8)) - reach
        gap = _mean(tile - found, ring)
        alpha = cv2.GaussianBlur(reach, (0, 0), 1.5)[:, :, None]
        return np.asarray(tile + alpha * (found + gap - tile), np.float32), mask


def read_known_defects(folder: Path, channels: int, tile_px: int) -> KnownDefects:
    """Read the marked pictures below `folder` for tiles of `tile_px` and `channels`. Raises DataError."""
    if not folder.is_dir():
        raise DataError(f"{folder}: is not a folder; --defects names one with pictures of defects and their masks")
    pairs = _pairs(folder)
    if not pairs:
        raise DataError(f"{folder}: holds no pictures of defects; wanted KIND/x.png and ground_truth/KIND/x_mask.png")
    regions = [region for path, mask in pairs for region in _regions(path, mask, channels, tile_px)]
    if not regions:
        raise DataError(f"{folder}: no mask marks anything; defects are marked by values over 0")
    step = -(-len(regions) // _MOST_REGIONS)
    return KnownDefects(regions[::step])


def _pairs(folder: Path) -> list[tuple[Path, Path]]:
    """Every picture with its mask. Raises DataError for a picture without one."""
    pairs = []
    for path in list_pictures(folder):
        parts = path.relative_to(folder).parts
        if path.stem.endswith(_MARK) or "ground_truth" in parts or "good" in parts[:-1]:
            continue
        mask = _mask_of(folder, path)
        if mask is None:
            raise DataError(
                f"{path}: has no mask; mark its defect in {path.stem}{_MARK}.png beside it, or under ground_truth"
            )
        pairs.append((path, mask))
    return pairs


def _mask_of(folder: Path, path: Path) -> Path | None:
    relative = path.relative_to(folder).with_name(f"{path.stem}{_MARK}.png")
    # `--defects DATA/test` finds DATA/ground_truth; `--defects DATA` has `test` in its pictures' names.
    inner = Path(*relative.parts[1:]) if relative.parts[0] == "test" else relative
    places = (folder / relative, folder / "ground_truth" / inner, folder.parent / "ground_truth" / inner)
    return next((place for place in places if place.is_file()), None)


def _regions(path: Path, mask_path: Path, channels: int, tile_px: int) -> list[MarkedRegion]:
    """The connected regions of one picture, each with up to a tile of surroundings. Raises DataError."""
    picture = read_picture(path, "grey" if channels == 1 else "rgb")
    mask = read_picture(mask_path, "grey")[:, :, 0]
    if mask.shape != picture.shape[:2]:
        raise DataError(f"{mask_path}: is {mask.shape[1]} × {mask.shape[0]} pixels, its picture is not")
    # Parts of one defect that lie close together belong together.
    joined = cv2.dilate((mask > 0).astype(np.uint8), np.ones((9, 9), np.uint8))
    _, _, stats, centres = cv2.connectedComponentsWithStats(joined, connectivity=8)
    found = []
    for (x, y, width, height, _), centre in zip(stats[1:].tolist(), centres[1:], strict=True):
        wide, high = max(width, tile_px), max(height, tile_px)
        left, top = max(0, min(x, round(centre[0]) - wide // 2)), max(0, min(y, round(centre[1]) - high // 2))
        at = slice(top, max(top + high, y + height)), slice(left, max(left + wide, x + width))
        marked = (mask[at] > 0).astype(np.float32)
        if marked.sum() >= _SPECK_PX:
            found.append(MarkedRegion(np.ascontiguousarray(picture[at]), marked))
    return found


def _random_warp(region: MarkedRegion, side: int, random: np.random.Generator) -> NDArray[np.float64]:
    """An affine map that brings a marked pixel of the region to a random place of the tile."""
    ys, xs = np.nonzero(region.mask)
    pick = random.integers(len(xs))
    angle = random.uniform(0, 2 * np.pi) if random.random() < 0.5 else np.pi / 2 * random.integers(4)
    scale = np.exp(random.uniform(np.log(0.7), np.log(1.4)))
    turn = scale * np.array([(np.cos(angle), -np.sin(angle)), (np.sin(angle), np.cos(angle))])
    turn[:, 0] *= random.choice((-1, 1))
    place = random.uniform(0.1 * side, 0.9 * side, 2)
    return np.column_stack([turn, place - turn @ np.array((xs[pick], ys[pick]))])


def _mean(values: NDArray[np.float32], weight: NDArray[np.float32]) -> NDArray[np.float32]:
    """Weighted mean of each channel, float32 [C]."""
    return np.asarray((values * weight[:, :, None]).sum((0, 1)) / (weight.sum() + 1e-3), np.float32)
