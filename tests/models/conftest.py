"""Small real bundles, a keeper on real directories, and a wait for what it reports."""

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from kizu_agent.inspection import inspect_frames
from kizu_agent.models import ModelKeeper
from kizu_agent.records import Frame, ModelReport
from kizu_agent.settings import EngineConfig, ModelsConfig, ProbationConfig
from kizu_contract.bundle import Bundle, Golden, write_bundle
from kizu_contract.calibration import Calibration, Tail
from kizu_contract.judging import Reduction, Thresholds
from kizu_contract.manifest import BatchProfile, DefaultThresholds, Graph, Manifest, Provenance
from kizu_contract.tiles import TileGrid

TILE_PX, CELL_PX, OPSET = 8, 4, 17
ENGINE = EngineConfig(threads=1)
OFF = ProbationConfig(frames=0)


def _graph(factor: float, extra: Sequence[onnx.NodeProto], scale: str) -> bytes:
    """Mean of each cell times `factor`; `extra` nodes make the float [1] named `scale`, which multiplies it."""
    nodes = [
        helper.make_node("Cast", ["tiles"], ["float"], to=TensorProto.FLOAT),
        helper.make_node("Transpose", ["float"], ["planes"], perm=[0, 3, 1, 2]),
        helper.make_node("AveragePool", ["planes"], ["pooled"], kernel_shape=[4, 4], strides=[4, 4]),
        helper.make_node("Squeeze", ["pooled", "axis"], ["cells"]),
        *extra,
        helper.make_node("Mul", ["cells", scale], ["map"]),
        helper.make_node("ReduceMean", ["map"], ["score"], axes=[1, 2], keepdims=0),
    ]
    shapes = {"score": ["N"], "map": ["N", 2, 2]}
    graph = helper.make_graph(
        nodes,
        "scorer",
        [helper.make_tensor_value_info("tiles", TensorProto.UINT8, ["N", TILE_PX, TILE_PX, 1])],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in shapes.items()],
        [
            helper.make_tensor("axis", TensorProto.INT64, [1], [1]),
            helper.make_tensor("factor", TensorProto.FLOAT, [1], [factor]),
        ],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=8)
    return bytes(model.SerializeToString())


def _manifest(name: str, version: str) -> Manifest:
    return Manifest(
        schema=1,
        name=name,
        version=version,
        created="2026-01-31T12:00:00.000Z",
        graph=Graph(OPSET, "fp32", ("tiles",), TILE_PX, 1, CELL_PX, BatchProfile(1, 4, 64)),
        grid=TileGrid(TILE_PX, TILE_PX),
        colour="grey",
        reduction=Reduction("max"),
        calibration=Calibration(100, ((0.5, 1.0), (0.99, 2.0)), Tail(2.0, 0.01, 0.0, 1.0)),
        thresholds=DefaultThresholds(2.0, 3.0, 0.01, 0.001),
        provenance=Provenance("mean", {}, 0, "0" * 64, 100, "0.1.0", {}),
    )


def _golden(factor: float) -> Golden:
    tiles = np.random.default_rng(7).integers(0, 256, (6, TILE_PX, TILE_PX, 1), np.uint8)
    cells = tiles.reshape(6, 2, CELL_PX, 2, CELL_PX).mean(axis=(2, 4), dtype=np.float64) * factor
    return Golden(tiles, cells.mean(axis=(1, 2)).astype(np.float32), cells.astype(np.float32))


MakeBundle = Callable[..., Path]


@pytest.fixture
def make_bundle() -> MakeBundle:
    """Write a bundle whose score is the picture's mean times `factor`."""

    def make(
        path: Path,
        *,
        name: str = "gears",
        version: str = "1",
        factor: float = 1.0,
        golden: Golden | None = None,
        extra: Sequence[onnx.NodeProto] = (),
        scale: str = "factor",
        key: Any = None,
        created: str = "2026-01-31T12:00:00.000Z",
    ) -> Path:
        scorer = _graph(factor, extra, scale)
        manifest = replace(_manifest(name, version), created=created)
        bundle = Bundle(manifest, scorer, golden or _golden(factor), b"\x89PNG preview")
        write_bundle(bundle, path, key)
        return path

    return make


@pytest.fixture
def golden_of() -> Callable[[float], Golden]:
    """Golden tiles of a model with this factor."""
    return _golden


class Box:
    """A keeper on directories of its own; what it reports, in order."""

    def __init__(self, root: Path, make: MakeBundle) -> None:
        self.root, self.make = root, make
        self.drop, self.state = root / "drop", root / "state"
        self.reports: list[ModelReport] = []
        self.changed = threading.Condition()
        self.keeper: ModelKeeper | None = None
        self.settings: dict[str, Any] = {}
        self.engine = ENGINE
        self.slots: tuple[str | None, ...] = (None,)

    def start(self) -> ModelKeeper:
        """Start a fresh keeper and wait until it has restored what there was."""
        keeper = self.new()
        keeper.start()
        assert keeper.wait_restored(10)
        return keeper

    def new(self) -> ModelKeeper:
        """Make a fresh keeper that has not begun."""
        self.reports.clear()
        config = ModelsConfig(**{"drop_dir": self.drop, "probation": OFF, **self.settings})
        self.keeper = ModelKeeper(config, self.engine, self.state, self.slots, self.note)
        return self.keeper

    def stop(self) -> None:
        """Stop the keeper, if one runs."""
        if self.keeper is not None:
            assert self.keeper.stop(10)
            assert self.keeper.failure is None

    def note(self, report: ModelReport) -> None:
        with self.changed:
            self.reports.append(report)
            self.changed.notify_all()

    def wait_for(self, kind: str, file: str | None = None, timeout_s: float = 30) -> ModelReport:
        """Wait for a report of this kind (and file), taking models over as an inspection thread does."""
        deadline = time.monotonic() + timeout_s
        while time.monotonic() < deadline:
            assert self.keeper is not None
            assert self.keeper.failure is None
            for slot in self.slots:
                self.keeper.current(slot)
            with self.changed:
                for report in self.reports:
                    if report.kind == kind and file in (None, report.file):
                        return report
                self.changed.wait(0.05)
        raise AssertionError(f"no {kind} within {timeout_s} s; came: {self.reports}")

    def put(self, file: str = "m.kizu", **kind: Any) -> Path:
        """Drop a bundle as a careful user does: written elsewhere, renamed in."""
        written = self.make(self.root / f"{file}.elsewhere", **kind)
        return written.rename(self.drop / file)

    def put_bytes(self, data: bytes, name: str = "m.kizu") -> Path:
        """Drop any bytes at once."""
        path = self.drop / name
        path.write_bytes(data)
        return path

    def inspect(self, level: int = 100, frames: int = 1, slot: str | None = None, reject: float = 400.0) -> list[Any]:
        """Inspect grey pictures of this level, as the inspection stage does; returns the inspections."""
        assert self.keeper is not None
        found: list[Any] = []
        limits = Thresholds(reject / 2, reject)
        for _ in range(frames):
            loaded = self.keeper.current(slot)
            if loaded is None:
                break
            picture = np.full((TILE_PX, TILE_PX, 1), level, np.uint8)
            frame = Frame("cam", len(found), picture, None, time.time_ns(), time.monotonic_ns())
            passed = inspect_frames([frame], loaded.inspector, loaded.id, lambda *_: limits, {})
            self.keeper.observe(loaded, passed)
            found += passed
        return found

    def crash(self) -> None:
        """End as after a power cut: what is on disk stays, nothing is said of an orderly stop."""
        self.stop()
        self.keeper = None

    def score(self, slot: str | None = None) -> float:
        """What the model in service gives for a picture of grey value 100: 100 times its factor."""
        assert self.keeper is not None
        loaded = self.keeper.current(slot)
        assert loaded is not None
        picture = np.full((TILE_PX, TILE_PX, 1), 100, np.uint8)
        return loaded.inspector.inspect([picture])[0].score

    def quarantined(self) -> list[Path]:
        """Files in quarantine, without their reasons."""
        files = (self.state / "quarantine").iterdir()
        return sorted(path for path in files if not path.name.endswith(".reason.json"))


@pytest.fixture(autouse=True)
def _soon(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Look at files sooner than in the field, unless the test is about just that."""
    if "real_waits" not in request.fixturenames:
        monkeypatch.setattr("kizu_agent.models.POLL_S", 0.1)
        monkeypatch.setattr("kizu_agent.drop.STABLE_S", 0.2)
        monkeypatch.setattr("kizu_agent.drop.TRUNCATED_S", 1.0)


@pytest.fixture
def real_waits() -> None:
    """Keep the waits of the field."""


@pytest.fixture
def box(tmp_path: Path, make_bundle: MakeBundle) -> Iterator[Box]:
    """A box without models; its keeper is stopped at the end."""
    found = Box(tmp_path, make_bundle)
    found.drop.mkdir()
    yield found
    found.stop()
