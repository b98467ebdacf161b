"""Tiles that are larger than the pictures, shrunk to them where a recipe allows it.

A picture smaller than a tile is mirrored up to one, and a seam of mirrored content is a rare sight: what runs into the
border of the picture looks like a line there. On pictures of about 250 px a U-Net's map rose six-fold at the borders
with tiles of 256 px, 1.2-fold with tiles that fit (docs/methods.md).
"""

import logging
from collections.abc import Mapping
from typing import Any

import numpy as np

from kizu_contract.pictures import read_picture
from kizu_train.data import PictureSet
from kizu_train.recipes import Recipe, parse_recipe

_STEP_PX = 32
"""Tile sides are multiples of it, as strides of networks and cells of maps want."""
_SHARE = 0.1
"""Of the pictures, at most about so many may be smaller than a tile."""
_SAMPLE = 50
_LOG = logging.getLogger(__name__)


def fit_tiles(recipe: Recipe, pictures: PictureSet) -> Recipe:
    """The recipe with tiles no larger than nine in ten of `pictures`, but of `data.smallest_tile_px` at least.

    Strides shrink in proportion, members of a joint recipe likewise. The same recipe where tiles fit, or where it sets
    no `smallest_tile_px`.
    """
    least, old = recipe.data.smallest_tile_px, recipe.grid.tile_px
    if least == 0 or old <= least or not pictures.train:
        return recipe
    some = pictures.train[:: max(1, len(pictures.train) // _SAMPLE)]
    sides = [min(read_picture(path, pictures.colour).shape[:2]) for path in some]
    fitting = int(np.quantile(sides, _SHARE)) // _STEP_PX * _STEP_PX
    tile = max(fitting, least)
    if tile >= old:
        return recipe
    _LOG.info("tiles of %d px instead of %d, for the pictures are no larger", tile, old)
    raw = recipe.to_dict()
    raw["grid"] = _shrunk(raw, tile)
    if "members" in raw:
        raw["members"] = {name: own | {"grid": _shrunk(own, tile)} for name, own in raw["members"].items()}
    return parse_recipe(raw)


def _shrunk(raw: Mapping[str, Any], tile: int) -> dict[str, Any]:
    """The grid of a resolved recipe with tiles of at most `tile` px, the stride on whole map cells."""
    grid, cell = dict(raw["grid"]), int(raw["map_cell_px"])
    if grid["tile_px"] > tile:
        stride = grid["stride_px"] * tile // grid["tile_px"] // cell * cell
        grid |= {"tile_px": tile, "stride_px": max(cell, stride), "margin_px": min(grid["margin_px"], tile - 1)}
    return grid
