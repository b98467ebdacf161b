"""Frames to inspections, on a real bundle and a real engine."""

import math
import time
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from kizu_agent.camera_settings import Region, ZoneConfig
from kizu_agent.inspection import inspect_frames
from kizu_agent.inspector import Inspector, load_inspector
from kizu_agent.records import Frame, Inspection, ModelId
from kizu_agent.settings import EngineConfig
from kizu_agent.zones import View
from kizu_contract.bundle import Bundle
from kizu_contract.judging import Thresholds, Verdict

MODEL = ModelId("plates", "1.0.0", "ab" * 32)
LIMITS = {"a": Thresholds(100.0, 200.0), "b": Thresholds(1.0, 2.0)}


@pytest.fixture
def inspector(bundle: Bundle) -> Iterator[Inspector]:
    inspector = load_inspector(bundle, EngineConfig(threads=1))
    yield inspector
    inspector.close()


def frame(camera: str, height: int, width: int, level: int, number: int = 0, channels: int = 1) -> Frame:
    image = np.full((height, width, channels), level, np.uint8)
    return Frame(camera, number, image, None, time.time_ns(), time.monotonic_ns())


def inspect(inspector: Inspector, frames: list[Frame], **views: View) -> list[Inspection]:
    return inspect_frames(frames, inspector, MODEL, lambda camera, *_: LIMITS[camera], views)


def test_cameras_of_different_sizes_share_a_pass_in_order(inspector: Inspector) -> None:
    """Each frame gets its own score, map and camera's thresholds, in the order it came."""
    frames = [frame("a", 8, 12, 150, 0), frame("b", 5, 5, 0, 0), frame("a", 8, 12, 250, 1), frame("b", 20, 9, 3, 1)]
    found = inspect(inspector, frames)
    assert [inspection.frame for inspection in found] == frames
    assert [inspection.score for inspection in found] == pytest.approx([150, 0, 250, 3], abs=1e-3)
    assert [inspection.verdict.value for inspection in found] == ["warn", "ok", "reject", "reject"]
    assert [inspection.frame_map.shape for inspection in found] == [(8, 12), (5, 5), (8, 12), (20, 9)]
    assert all(inspection.reason is None and inspection.waited_ns >= 0 for inspection in found)


def test_a_region_is_what_is_inspected(inspector: Inspector) -> None:
    """Only the region's pixels are scored, and they are what the heatmap will show."""
    whole = frame("a", 12, 16, 255)
    whole.image[2:8, 3:13] = 7
    (found,) = inspect(inspector, [whole], a=View(Region(x=3, y=2, width=10, height=6)))
    assert found.region.shape == (6, 10, 1)
    assert found.score == pytest.approx(7, abs=1e-3)
    assert found.frame_map.shape == (6, 10)
    assert found.verdict is Verdict.OK


@pytest.mark.parametrize("region", [Region(x=5, y=0, width=4, height=8), Region(x=0, y=8, width=1, height=1)])
def test_a_region_outside_the_picture_is_unknown_alone(inspector: Inspector, region: Region) -> None:
    """The frame comes back unknown with the reason; its neighbours are scored and stay in their places."""
    found = inspect(inspector, [frame("a", 8, 8, 0), frame("b", 8, 8, 5), frame("a", 8, 9, 3)], a=View(region))
    assert [i.verdict is Verdict.UNKNOWN for i in found] == [True, False, region.x == 0]
    assert "region lies outside" in found[0].reason
    assert math.isnan(found[0].score)
    assert found[0].frame_map is None
    assert found[1].score == pytest.approx(5, abs=1e-3)


def test_a_graph_that_fails_makes_all_unknown(inspector: Inspector) -> None:
    """No frame of a failed pass is left out, none is ok, each says why."""
    inspector.close()
    found = inspect(inspector, [frame("a", 8, 8, 0), frame("b", 8, 8, 0)])
    assert [i.verdict for i in found] == [Verdict.UNKNOWN] * 2
    assert all("scoring failed: the engine is closed" in (i.reason or "") for i in found)


def test_a_picture_of_a_form_nobody_knows_does_not_kill(inspector: Inspector) -> None:
    """Two channels are no picture: unknown with the reason, not an exception that stops the service."""
    found = inspect(inspector, [frame("a", 8, 8, 0, channels=2)])
    assert found[0].verdict is Verdict.UNKNOWN
    assert "must be uint8" in found[0].reason


def test_a_score_that_is_no_number_is_unknown(bundle: Bundle) -> None:
    """A graph that gives NaN judges nothing ok."""
    model = onnx.load_model_from_string(bundle.scorer)
    gain = next(tensor for tensor in model.graph.initializer if tensor.name == "gain")
    gain.CopyFrom(numpy_helper.from_array(np.array([np.nan], np.float32), "gain"))
    inspector = load_inspector(replace(bundle, scorer=model.SerializeToString()), EngineConfig(threads=1))
    (found,) = inspect(inspector, [frame("a", 8, 8, 9)])
    inspector.close()
    assert found.verdict is Verdict.UNKNOWN
    assert found.reason == "the score is not a number"


def _in_colour(bundle: Bundle, spread: int) -> Bundle:
    """The bundle with three channels; its golden tiles' channels differ by up to `spread`."""
    scorer = onnx.load_model_from_string(bundle.scorer)
    scorer.graph.input[0].type.tensor_type.shape.dim[3].dim_value = 3
    weights = onnx.helper.make_node("ReduceMean", ["planes"], ["grey"], axes=[1], keepdims=1)
    pool = next(node for node in scorer.graph.node if node.op_type == "AveragePool")
    pool.input[0] = "grey"
    scorer.graph.node.insert(list(scorer.graph.node).index(pool), weights)
    manifest = replace(bundle.manifest, colour="rgb", graph=replace(bundle.manifest.graph, channels=3))
    tiles = np.repeat(bundle.golden.tiles, 3, axis=3) // 2
    tiles[:, :, :, 0] += np.uint8(spread)
    return replace(
        bundle, scorer=scorer.SerializeToString(), manifest=manifest, golden=replace(bundle.golden, tiles=tiles)
    )


def test_a_grey_camera_before_a_model_of_colour_pictures_is_unknown(bundle: Bundle) -> None:
    """Grey values repeated are colours that the model never saw: unknown with words, and a colour camera is judged."""
    inspector = load_inspector(_in_colour(bundle, 60), EngineConfig(threads=1))
    grey, colour = inspect(inspector, [frame("a", 8, 8, 5), frame("a", 8, 8, 5, channels=3)])
    inspector.close()
    assert grey.verdict is Verdict.UNKNOWN
    assert "trained on colour pictures" in (grey.reason or "")
    assert (colour.reason, colour.score) == (None, pytest.approx(5, abs=1e-3))


def test_a_model_of_grey_pictures_takes_either_camera(bundle: Bundle, inspector: Inspector) -> None:
    """Three channels trained on grey pictures, and one channel, judge after the conversion that training made too."""
    three = load_inspector(_in_colour(bundle, 4), EngineConfig(threads=1))
    for any_model in (three, inspector):
        found = inspect(any_model, [frame("a", 8, 8, 5), frame("a", 8, 8, 5, channels=3)])
        assert [i.score for i in found] == pytest.approx([5, 5], abs=1e-3)
    three.close()


def _zone(name: str, corner: int, **members: object) -> ZoneConfig:
    polygon = ((corner, 0), (corner + 3, 0), (corner + 3, 7), (corner, 7))
    return ZoneConfig.model_validate({"name": name, "polygon": polygon, **members})


def test_zones_judge_in_place_of_the_whole(inspector: Inspector) -> None:
    """Score, thresholds and verdict are the worst zone's; what lies beside the zones is not seen."""
    found = frame("a", 8, 32, 10)
    found.image[:, 26:], found.image[:, 12:20], found.image[:, :6] = 255, 150, 90
    view = View(zones=(_zone("left", 0), _zone("right", 14, threshold_factor=0.5)), mm_per_px=0.5)
    (inspection,) = inspect(inspector, [found], a=view)
    assert (inspection.zone, inspection.verdict, inspection.thresholds) == (
        "right",
        Verdict.REJECT,
        Thresholds(50.0, 100.0),
    )
    assert inspection.score == inspection.frame_map[:, 14:18].max()
    assert [(zone.name, zone.verdict, zone.area_px) for zone in inspection.zones] == [
        ("left", Verdict.OK, 0),
        ("right", Verdict.REJECT, 32),
    ]
    assert inspection.inside.sum() == 64


def test_a_zone_outside_the_picture_makes_the_frame_unknown(inspector: Inspector) -> None:
    """It is never judged by what is left; every zone is told as unknown, so that no key goes away."""
    view = View(zones=(_zone("left", 0), _zone("far", 60)))
    (inspection,) = inspect(inspector, [frame("a", 8, 16, 10)], a=view)
    assert inspection.verdict is Verdict.UNKNOWN
    assert inspection.reason == "zone far: lies outside the inspected region of 16 × 8 px"
    assert [(zone.name, zone.verdict) for zone in inspection.zones] == [
        ("left", Verdict.UNKNOWN),
        ("far", Verdict.UNKNOWN),
    ]
    assert inspection.zone is None
