"""From run to bundle: the same bytes every time, the numbers of torch, and a gate that closes."""

import copy
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from torch import Tensor, nn

from kizu_agent.engine import Engine
from kizu_agent.inspector import Inspector, self_test
from kizu_agent.settings import EngineConfig
from kizu_contract.bundle import read_bundle, write_bundle
from kizu_contract.judging import score_frame
from kizu_contract.manifest import Graph
from kizu_export.build import batch_profile, build_bundle, default_version
from kizu_export.errors import ExportError
from kizu_export.graph import export_graph, to_bytes
from kizu_export.parity import check_parity, run_torch
from kizu_train.runs import Run


def test_same_run_gives_same_bytes(run: Run, tmp_path: Path) -> None:
    """Exporting twice gives files that do not differ in a byte."""
    for name in ("a", "b"):
        write_bundle(build_bundle(run).bundle, tmp_path / name)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_bundle_reads_back_and_proves_itself(run: Run, bundle_path: Path) -> None:
    """The file holds the run's facts, and its golden tiles pass on the agent's engine."""
    bundle = read_bundle(bundle_path)
    manifest = bundle.manifest
    assert (manifest.name, manifest.version, manifest.created) == ("small", "20260131.123456", run.finished)
    assert manifest.thresholds.scores() == run.calibration.thresholds(0.01, 0.001)
    assert manifest.provenance == run.provenance
    with Engine(bundle.scorer, manifest.graph, EngineConfig()) as engine:
        assert self_test(bundle, engine, 1e-5) < 1e-5


def test_agent_scores_pictures_as_torch_does(run: Run, bundle_path: Path) -> None:
    """A picture scored by the agent from the file has the score that torch gives in training's evaluation."""
    bundle = read_bundle(bundle_path)
    picture = np.random.default_rng(8).integers(0, 256, (70, 90, 1), dtype=np.uint8)
    wanted = score_frame(picture, run.grid, run.reduction, lambda tiles: run_torch(run.scorer, tiles, 64))
    with Engine(bundle.scorer, bundle.manifest.graph, EngineConfig()) as engine:
        found = Inspector(bundle, engine).inspect([picture])[0]
    assert found.score == pytest.approx(wanted.score, rel=1e-4)
    np.testing.assert_allclose(found.map, wanted.map, rtol=1e-4)


def test_graph_names_no_machine(scorer: nn.Module, graph: Graph) -> None:
    """Nothing in the graph tells where, when or with which version it was made."""
    model = onnx.load_from_string(to_bytes(export_graph(scorer, graph)))
    assert (model.producer_name, model.producer_version, len(model.metadata_props)) == ("kizu", "", 0)
    texts = [node.doc_string for node in model.graph.node] + [model.doc_string, model.graph.doc_string]
    assert not any(texts)
    assert str(Path(__file__).parent).encode() not in to_bytes(model)


def test_deviation_is_small_and_reported(scorer: nn.Module, graph: Graph, tiles: np.ndarray) -> None:
    """Parity is measured at batches of 1, opt and max, and is far inside the tolerance."""
    parity = check_parity(scorer, to_bytes(export_graph(scorer, graph)), graph, tiles)
    assert parity.batches == (1, 64, 256)
    assert 0 <= max(parity.score, parity.map) < 1e-5


def test_changed_weights_do_not_pass(scorer: nn.Module, graph: Graph, tiles: np.ndarray) -> None:
    """A graph whose weights were disturbed by a thousandth is refused, with the deviation."""
    other = copy.deepcopy(scorer)
    with torch.no_grad():
        for weights in other.parameters():
            weights.mul_(1.001)
    with pytest.raises(ExportError, match="deviates from torch by"):
        check_parity(scorer, to_bytes(export_graph(other, graph)), graph, tiles)


class BakedBatch(nn.Module):
    """A scorer whose trace freezes the batch: right for the two tiles it was traced with."""

    def forward(self, tiles: Tensor) -> tuple[Tensor, Tensor]:
        cells = tiles.float().reshape(-1, 4, 4, 4, 4).amax(dim=(2, 4))
        return cells.sum(dim=(1, 2)) / int(tiles.shape[0]), cells


def test_frozen_batch_does_not_pass(with_scorer: Callable[[nn.Module], Run]) -> None:
    """A scorer that is right at one batch size only is refused."""
    with pytest.raises(ExportError, match="deviates from torch"):
        build_bundle(with_scorer(BakedBatch()))


class Broken(nn.Module):
    """Gives numbers that are none."""

    def forward(self, tiles: Tensor) -> tuple[Tensor, Tensor]:
        cells = tiles.float().reshape(-1, 4, 4, 4, 4).amax(dim=(2, 4))
        return (cells - cells).sum(dim=(1, 2)) / (cells - cells).sum(dim=(1, 2)), cells


def test_not_a_number_does_not_ship(with_scorer: Callable[[nn.Module], Run]) -> None:
    """A scorer that gives NaN is refused."""
    with pytest.raises(ExportError, match="deviates from torch by inf"):
        build_bundle(with_scorer(Broken()))


def test_golden_tiles_stay_few(run: Run) -> None:
    """A run with more golden tiles than a bundle may hold keeps the first ones."""
    many = replace(run, golden_tiles=np.repeat(run.golden_tiles, 60, axis=0))
    assert len(build_bundle(many).bundle.golden.tiles) == 256


@pytest.mark.parametrize(("tile_px", "usual"), [(8, 64), (64, 64), (96, 16), (512, 1), (2048, 1)])
def test_profile_follows_tile_size(tile_px: int, usual: int) -> None:
    """Batches hold about a quarter of a megapixel, 64 tiles at most."""
    profile = batch_profile(tile_px)
    assert (profile.min, profile.opt, profile.max) == (1, usual, 4 * usual)


def test_version_is_when_the_run_finished() -> None:
    """The default version sorts by time and fits a manifest."""
    assert default_version("2026-01-31T12:34:56.789Z") == "20260131.123456"
