"""The sweep's own reckoning: which points are on the front, where its knee is, what a point changes."""

import importlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

from kizu_train.recipes import resolve_recipe
from kizu_train.runs import build_detector

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def points(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """The sweep's points, which lie in no package."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    yield importlib.import_module("front_points")
    for name in ("front_points", "detection_cells", "harness"):
        sys.modules.pop(name, None)


def test_the_front_its_knee_and_what_is_equal(points: ModuleType) -> None:
    """Beaten points are left out; the knee gains most for its time; equal is the fastest within a point of accuracy."""
    table = {
        "a": (0.70, 2.0),
        "b": (0.88, 4.0),
        "c": (0.86, 5.0),
        "d": (0.895, 9.0),
        "e": (0.90, 30.0),
        "f": (0.90, 40.0),
    }
    places = [points.Place(name, accuracy, accuracy, ms) for name, (accuracy, ms) in table.items()]
    best = points.front(places)
    assert [place.name for place in best] == ["a", "b", "d", "e"]
    assert points.knee(best).name == "b"
    assert points.fastest_equal(best, places[4]).name == "d"
    assert points.knee(best[:1]).name == "a"


@pytest.mark.parametrize("base", ["joint", "joint_fast"])
def test_every_point_is_a_recipe(points: ModuleType, base: str) -> None:
    """Each point resolves, builds a detector, and differs from all others; today's is what the recipe is."""
    star = points.star(base)
    recipes = [resolve_recipe(point.recipe, point.overrides) for point in star]
    told = {json.dumps(recipe.to_dict(), sort_keys=True) for recipe in recipes}
    assert len({point.name for point in star}) == len(told) == len(star)
    for recipe in recipes:
        build_detector(recipe, "grey", 0)
    today = points.point(base, *points.TODAY[base])
    assert resolve_recipe(base, today.overrides) == resolve_recipe(base)
    assert len(points.full(base)) == len(points.UNETS) * len(points.MEMORIES)
    with pytest.raises(KeyError):
        points.point(base, "u99", "m1000")
