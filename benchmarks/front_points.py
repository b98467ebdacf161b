"""What the sweep of the default detectors varies, point by point, and which points are on the front."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from detection_cells import Method

BASES = {"joint_fast": "synthetic_defects_fast", "joint": "synthetic_defects"}
"""The recipes that are swept, and what the U-Net among their members is called."""

UNETS: Mapping[str, tuple[str, ...]] = {
    "u12": ("network.widths=[12,24,48,64,64]",),
    "u16": ("network.widths=[16,32,48,64,64]",),
    "u16add": ("network.widths=[16,32,48,64,64]", 'network.join="add"'),
    "u16slim": ("network.widths=[16,16,32,48,48]", 'network.join="add"'),
    "u16bare": ("network.widths=[16,16,32,48,48]", 'network.join="add"', "network.refine=false"),
    "u16lean": ("network.widths=[16,16,32,32]", 'network.join="add"', "network.refine=false"),
    "u16flat": ("network.widths=[16,32,48,64]", 'network.join="add"'),
    "u16coarse": ("network.widths=[16,16,32,48,48]", 'network.join="add"', "network.out_stride=8", "map_cell_px=8"),
    "u8": ("network.widths=[8,16,32,48,48]",),
    "w96": ("network.widths=[16,32,48,64,64]", "grid.stride_px=96"),
    "t64": ("network.widths=[16,32,48,64]", "grid.tile_px=64", "grid.stride_px=64"),
}
"""Width, depth, how ways join, resolution, tile and stride of the U-Net's windows."""

MEMORIES: Mapping[str, tuple[str, ...]] = {
    "m3000": ("memory.size=3000",),
    "m1000": ("memory.size=1000",),
    "m500": ("memory.size=500",),
    "m3000d16": ("memory.size=3000", "memory.dimension=16"),
    "m2000d16": ("memory.size=2000", "memory.dimension=16"),
    "m1000d16": ("memory.size=1000", "memory.dimension=16"),
    "m3000c8": ("memory.size=3000", "pyramid.lattice_px=[8,8,8,16]"),
    "m1000c8": ("memory.size=1000", "pyramid.lattice_px=[8,8,8,16]"),
    "m500c8": ("memory.size=500", "pyramid.lattice_px=[8,8,8,16]"),
    "m1000l3": ("memory.size=1000", "pyramid.levels=[2,3,4]", "pyramid.lattice_px=[8,8,16]"),
    "m250c8d16": ("memory.size=250", "memory.dimension=16", "pyramid.lattice_px=[8,8,8,16]"),
    "m500c8d16": ("memory.size=500", "memory.dimension=16", "pyramid.lattice_px=[8,8,8,16]"),
}
"""Words of the memory, their dimension, how close its patches lie, which scales."""

TODAY = {"joint_fast": ("u16bare", "m1000d16"), "joint": ("u16", "m3000")}
"""What the recipes are."""
SMALL = (
    ("u16slim", "m500c8"),
    ("u16bare", "m1000"),
    ("u16bare", "m500"),
    ("u12", "m1000"),
    ("u16bare", "m500c8"),
    ("u16bare", "m500c8d16"),
    ("u16lean", "m250c8d16"),
    ("u16coarse", "m500c8"),
    ("u16add", "m1000c8"),
)
"""Points that change both, in a star."""

EQUAL = 0.01
"""Accuracies that differ by no more count as equal."""


@dataclass(frozen=True)
class Point(Method):
    """A recipe with another U-Net and memory; `unet` and `memory` are their names."""

    unet: str = ""
    memory: str = ""

    @property
    def name(self) -> str:
        """How tables call it."""
        return f"{self.recipe}.{self.unet}+{self.memory}"


@dataclass(frozen=True)
class Place:
    """Where a point lies: `accuracy` is the mean of image AUROC and AU-PRO@0.3 over all sets."""

    name: str
    image_auroc: float
    au_pro: float
    cpu_ms: float

    @property
    def accuracy(self) -> float:
        """What the front weighs against time."""
        return (self.image_auroc + self.au_pro) / 2


def point(base: str, unet: str, memory: str, more: Sequence[str] = ()) -> Point:
    """The point of those names; `more` are further overrides. Raises KeyError for names that are not known."""
    member = BASES[base]
    overrides = [f"members.{member}.{text}" for text in UNETS[unet]]
    overrides += [f"members.pyramid_memory.{text}" for text in MEMORIES[memory]]
    return Point(base, overrides=(*overrides, *more), unet=unet, memory=memory)


def star(base: str, more: Sequence[str] = ()) -> list[Point]:
    """Every U-Net with today's memory, every memory with today's U-Net, and some of both."""
    unet, memory = TODAY[base]
    pairs = [(unet, memory), *((other, memory) for other in UNETS), *((unet, other) for other in MEMORIES), *SMALL]
    return [point(base, *pair, more) for pair in dict.fromkeys(pairs)]


def full(base: str, more: Sequence[str] = ()) -> list[Point]:
    """Every U-Net with every memory."""
    return [point(base, unet, memory, more) for unet in UNETS for memory in MEMORIES]


def front(places: Sequence[Place]) -> list[Place]:
    """Those that no other one beats in both, from the fastest to the most accurate."""
    kept: list[Place] = []
    for place in sorted(places, key=lambda found: (found.cpu_ms, -found.accuracy)):
        if not kept or place.accuracy > kept[-1].accuracy:
            kept.append(place)
    return kept


def knee(places: Sequence[Place]) -> Place:
    """The point of the `front` farthest above the line from its fastest to its most accurate; times are logarithms."""
    first, last = places[0], places[-1]
    across = math.log(last.cpu_ms / first.cpu_ms) or 1.0
    up = last.accuracy - first.accuracy or 1.0

    def above(place: Place) -> float:
        return (place.accuracy - first.accuracy) / up - math.log(place.cpu_ms / first.cpu_ms) / across

    return max(places, key=above)


def fastest_equal(places: Sequence[Place], reference: Place) -> Place:
    """The fastest of the `front` that is as accurate as `reference`, or nearly."""
    equal = [place for place in places if place.accuracy >= reference.accuracy - EQUAL]
    return min(equal, key=lambda place: place.cpu_ms) if equal else reference
