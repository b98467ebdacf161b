"""Inspections, a configuration and an outbox on real files, as the pipeline would hand them over."""

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kizu_agent.camera_settings import CameraConfig
from kizu_agent.config import Config
from kizu_agent.outbox import Outbox
from kizu_agent.records import Frame, Inspection, ModelId
from kizu_agent.settings import AgentConfig, OutboxConfig
from kizu_contract.calibration import Calibration, Tail
from kizu_contract.judging import Reduction, Thresholds
from kizu_contract.manifest import BatchProfile, DefaultThresholds, Graph, Manifest, Provenance
from kizu_contract.tiles import TileGrid

SHA256 = "ab" * 32

MakeInspection = Callable[..., Inspection]


@pytest.fixture
def config(tmp_path: Path) -> Config:
    """Two cameras: `top` with every default, `side` with a heatmap of each frame."""
    side: dict[str, Any] = {"name": "side", "source": "sim:gears", "heatmap": {"when": "always", "width_px": 64}}
    return Config(
        agent=AgentConfig(name="box1", prefix="acme/osaka/press/line2", state_dir=tmp_path),
        cameras=(CameraConfig(name="top", source="sim:gears"), CameraConfig.model_validate(side)),
    )


@pytest.fixture
def model() -> ModelId:
    """The model that judges."""
    return ModelId("gears", "1", SHA256)


@pytest.fixture
def manifest() -> Manifest:
    """A manifest whose good frames score between 0 and 1, with an exponential tail from 0.9 on."""
    return Manifest(
        schema=1,
        name="gears",
        version="1",
        created="2026-01-31T12:00:00.000Z",
        graph=Graph(17, "fp32", ("tiles",), 64, 3, 8, BatchProfile(1, 8, 32)),
        grid=TileGrid(tile_px=64, stride_px=64),
        colour="rgb",
        reduction=Reduction(),
        calibration=Calibration(100, ((0.0, 0.0), (0.5, 0.5), (0.9, 0.9)), Tail(0.9, 0.1, 0.0, 0.1)),
        thresholds=DefaultThresholds(1.0, 2.0, 0.01, 0.001),
        provenance=Provenance("patch_vae", {}, 0, "", 100, "0.1.0", {}),
    )


@pytest.fixture
def inspect(model: ModelId) -> MakeInspection:
    """Make an inspection of `camera` with `score`; warn is 1.0, reject 2.0."""
    number = -1

    def make(score: float = 0.5, camera: str = "top", **changes: Any) -> Inspection:
        nonlocal number
        number += 1
        region = np.full((48, 96, 3), 128, np.uint8)
        thresholds = Thresholds(1.0, 2.0)
        is_known = np.isfinite(score)
        values: dict[str, Any] = {
            "frame": Frame(camera, number, region, f"sim:gears#{number}", time.time_ns(), time.monotonic_ns()),
            "model": model,
            "thresholds": thresholds,
            "score": score,
            "verdict": thresholds.verdict(score),
            "frame_map": np.full((48, 96), score, np.float32) if is_known else None,
            "region": region,
            "tiles": 6,
            "waited_ns": 1_000_000,
            "scoring_ns": 5_500_000,
            "reason": None if is_known else "scoring failed",
        }
        return Inspection(**{**values, **changes})

    return make


@pytest.fixture
def outbox(tmp_path: Path) -> Iterator[Outbox]:
    """An empty outbox."""
    box = Outbox(tmp_path / "outbox.sqlite3", OutboxConfig())
    yield box
    box.close()
