"""What the sweep of the default detectors varies, point by point, and which points are on the front."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from detection_cells import Method

BASES = {"joint_fast": "synthetic_defects_fast", "joint": "synthetic_defects"}
"""The recipes that are swept, and what the U-Net among their members is called."""


def _unet(widths: str, join: str, *, refine: bool, cell_px: int = 4) -> tuple[str, ...]:
    """A U-Net told in full: what a recipe says of its own does not show through."""
    return (
        f"network.widths=[{widths}]",
        f'network.join="{join}"',
        f"network.refine={str(refine).lower()}",
        f"network.out_stride={cell_px}",
        f"map_cell_px={cell_px}",
    )


def _memory(size: int, dimension: int, lattice_px: str = "4,8,8,16", levels: str = "1,2,3,4") -> tuple[str, ...]:
    """A memory told in full."""
    return (
        f"memory.size={size}",
        f"memory.dimension={dimension}",
        f"pyramid.levels=[{levels}]",
        f"pyramid.lattice_px=[{lattice_px}]",
    )


UNETS: Mapping[str, tuple[str, ...]] = {
    "u8": _unet("8,16,32,48,48", "concat", refine=True),
    "u12": _unet("12,24,48,64,64", "concat", refine=True),
    "u16": _unet("16,32,48,64,64", "concat", refine=True),
    "u16add": _unet("16,32,48,64,64", "add", refine=True),
    "u16flat": _unet("16,32,48,64", "add", refine=True),
    "u16slim": _unet("16,16,32,48,48", "add", refine=True),
    "u16bare": _unet("16,16,32,48,48", "add", refine=False),
    "u16lean": _unet("16,16,32,32", "add", refine=False),
    "u16coarse": _unet("16,16,32,48,48", "add", refine=False, cell_px=8),
    "w96": ("grid.stride_px=96",),
    "t64": ("grid.tile_px=64", "grid.stride_px=64"),
}
"""Width, depth, how ways join and resolution of the U-Net; of today's U-Net, the windows' size (t) and stride (w)."""

MEMORIES: Mapping[str, tuple[str, ...]] = {
    "m3000": _memory(3000, 32),
    "m1000": _memory(1000, 32),
    "m500": _memory(500, 32),
    "m3000d16": _memory(3000, 16),
    "m2000d16": _memory(2000, 16),
    "m1000d16": _memory(1000, 16),
    "m500d16": _memory(500, 16),
    "m3000c8": _memory(3000, 32, "8,8,8,16"),
    "m1000c8": _memory(1000, 32, "8,8,8,16"),
    "m500c8": _memory(500, 32, "8,8,8,16"),
    "m1000l3": _memory(1000, 32, "8,8,16", levels="2,3,4"),
    "m500c8d16": _memory(500, 16, "8,8,8,16"),
    "m250c8d16": _memory(250, 16, "8,8,8,16"),
}
"""Words of the memory, their dimension (d), how close its patches lie (c), how many scales (l)."""

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
    """Every memory with today's U-Net, every U-Net with today's memory, and some of both."""
    unet, memory = TODAY[base]
    pairs = [(unet, memory), *((unet, other) for other in MEMORIES), *((other, memory) for other in UNETS), *SMALL]
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
