"""An agent with a model of two graphs: a camera of the size goes whole, one of another size in tiles."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pytest
from torch import Tensor, nn

from kizu_agent.engine import Engine
from kizu_agent.errors import ModelError
from kizu_agent.frame_engine import FrameEngine
from kizu_agent.inspector import Inspector
from kizu_agent.outbox import Outbox
from kizu_agent.pipeline import Pipeline
from kizu_agent.self_test import Request, prove
from kizu_agent.settings import EngineConfig, OutboxConfig
from kizu_contract.bundle import Bundle, write_bundle
from kizu_contract.manifest import FrameGraph
from kizu_contract.tiles import FrameSize
from kizu_export import frame as frame_module
from kizu_export.frame import with_frame_graph


class Brightness(nn.Module):
    """What the small bundle's graph computes: the mean of each cell of 2 × 2 pixels; a gain makes it something else."""

    def __init__(self, gain: float = 1.0) -> None:
        super().__init__()
        self.gain = gain

    def forward(self, tiles: Tensor) -> tuple[Tensor, Tensor]:
        cells = tiles.float().reshape(-1, 2, 2, 2, 2).mean((2, 4)) * self.gain
        return cells.amax((1, 2)), cells


@pytest.fixture
def bundle(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> Bundle:
    """The small bundle with a graph for whole frames of 8 × 12."""
    monkeypatch.setattr(frame_module, "_ENOUGH_S", 0.0)
    return with_frame_graph(bundle, Brightness(), FrameSize(8, 12), is_forced=True)[0]


def inspect(pipeline: Pipeline, wait: Callable[..., None], count: int) -> FrameEngine:
    """Wait until the folders of `count` pictures are through; the engine that scored them, the agent stopped."""

    def inspected() -> float:
        pipeline.tick()
        return pipeline.figures()["inspected_frames_total"][0][1]

    wait(lambda: inspected() == count)
    (engine,) = pipeline._engines()
    assert pipeline.stop(5.0) == []
    assert isinstance(engine, FrameEngine)
    return engine


def results(state: Path) -> list[tuple[Path, float]]:
    """Picture and score of every result in a stopped agent's outbox."""
    outbox = Outbox(state / "outbox.sqlite3", OutboxConfig())
    try:
        messages = [row.message for row in outbox.take(1000)]
    finally:
        outbox.close()
    found = [json.loads(message.payload) for message in messages if message.topic.endswith("/result")]
    return [(Path(result["source"]), result["score"]) for result in found]


@pytest.mark.parametrize("is_mixed", [False, True])
def test_frames_go_whole_where_they_fit(
    bundle: Bundle, box, begin, wait: Callable[..., None], *, is_mixed: bool
) -> None:
    """Every frame has the score of its tiles; the tiled graph is loaded only for a camera of another size."""
    cameras = [{"name": "whole", "source": box.pictures("whole", 5)}]
    if is_mixed:
        cameras.append({"name": "tiled", "source": box.pictures("tiled", 4, height=21, width=9)})
    box.give()
    engine = inspect(begin(box.config(cameras)), wait, 9 if is_mixed else 5)
    assert (engine._tiles is not None) is is_mixed
    found = results(box.state)
    assert len(found) == (9 if is_mixed else 5)
    with Engine(bundle.scorer, bundle.manifest.graph, EngineConfig(threads=1)) as tiles:
        for path, score in found:
            picture = np.asarray(cv2.imread(str(path), cv2.IMREAD_GRAYSCALE))[:, :, None]
            assert score == pytest.approx(Inspector(bundle, tiles).inspect([picture])[0].score, rel=1e-4)


def test_graphs_that_disagree_are_refused(bundle: Bundle, tmp_path: Path) -> None:
    """Before a model is taken a process of its own compares its two graphs, and names the one that is off."""
    record = FrameGraph(8, 12, "tiles", 1.0)
    other = frame_module._export(bundle, Brightness(1.01), record)
    for name, graph in (("good", bundle.frame_graph), ("bad", other)):
        write_bundle(replace(bundle, frame_graph=graph), tmp_path / f"{name}.kizu")
    request = Request(
        str(tmp_path / "good.kizu"), (), require_signature=False, engine=EngineConfig(), tolerance=1e-3, timeout_s=60
    )
    assert prove(request, lambda: True).deviation < 1e-4
    with pytest.raises(ModelError, match=r"frame graph deviates by 0\.01 from the tiled one"):
        prove(replace(request, path=str(tmp_path / "bad.kizu")), lambda: True)
