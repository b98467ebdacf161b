"""The second graph of a bundle: exported through every gate, kept where it is faster, proven on the agent's engine."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import onnx
import pytest
from torch import Tensor, nn

from kizu_agent.engine import Engine
from kizu_agent.frame_engine import FrameEngine
from kizu_agent.inspector import Inspector, load_inspector, self_test
from kizu_agent.settings import EngineConfig
from kizu_contract.bundle import Bundle, read_bundle, write_bundle
from kizu_contract.manifest import FrameGraph
from kizu_contract.tiles import FrameSize, TileGrid
from kizu_export import frame as frame_module
from kizu_export.__main__ import main
from kizu_export.build import build_bundle
from kizu_export.errors import ExportError, UsageError
from kizu_export.evidence import Evidence
from kizu_export.frame import frame_choice, frame_size
from kizu_export.lower import Limits, Precision
from kizu_export.whole_frame import Form
from kizu_train.detectors.base import Scores, TileShape, find_detector
from kizu_train.detectors.patch_vae import PatchVaeSettings
from kizu_train.nets.patch_vae import Network
from kizu_train.runs import Run

ONE_THREAD = EngineConfig(threads=1)
SIZE = FrameSize(60, 44)


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Few pairs are timed: these tests are of what is done with them."""
    monkeypatch.setattr(frame_module, "_LEAST_PAIRS", 1)
    monkeypatch.setattr(frame_module, "_ENOUGH_S", 0.0)


@pytest.fixture
def vae_run(run: Run) -> Run:
    """A run of a small patch VAE, whose encoder can be shared."""
    network = Network(widths=(4, 6), latent=3, decoder_start=6, decoder_widths=(4,))
    scorer = find_detector("patch_vae").build(PatchVaeSettings(network=network), TileShape(16, 1, 4), 3).scorer("m")
    return replace(run, scorer=scorer)


class Placed(nn.Module):
    """Learns each place: what it scores depends on the position."""

    inputs = ("tiles", "position")
    frame = SIZE

    def forward(self, tiles: Tensor, position: Tensor) -> Scores:
        cells = tiles.float().reshape(-1, 4, 4, 4, 4).mean((2, 4)) + position.float()[:, None, None]
        return cells.amax((1, 2)), cells


def assert_agent_agrees(bundle: Bundle) -> None:
    """A picture of the size scores by the frame graph as by the tiles, and the self-test passes."""
    picture = np.random.default_rng(8).integers(0, 256, (SIZE.height, SIZE.width, 1), dtype=np.uint8)
    with Engine(bundle.scorer, bundle.manifest.graph, ONE_THREAD) as tiles:
        wanted = Inspector(bundle, tiles).inspect([picture])[0]
    inspector = load_inspector(bundle, ONE_THREAD)
    assert isinstance(inspector.engine, FrameEngine)
    assert inspector.engine.run_frame(picture) is not None
    found = inspector.inspect([picture])[0]
    assert self_test(bundle, inspector.engine, 1e-3) < 1e-3
    inspector.close()
    assert found.score == pytest.approx(wanted.score, rel=1e-3)
    np.testing.assert_allclose(found.map, wanted.map, rtol=1e-3)


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
@pytest.mark.parametrize("form", ["tiles", "shared"])
def test_both_forms_ship_and_agree(
    run: Run, vae_run: Run, form: Form, precision: Precision, evidence: Evidence
) -> None:
    """Either form passes its gate in either precision, says in the manifest what it is, and agrees on the engine."""
    own = vae_run if form == "shared" else run
    plain = build_bundle(own, precision=precision, evidence=evidence, limits=Limits(100, 100)).bundle
    trial = frame_module._trial(plain, own.scorer, SIZE, form)
    record = trial.bundle.manifest.frame_graph
    assert record is not None
    assert (record.size, record.form) == (SIZE, form)
    assert 0 <= trial.deviation <= frame_module.TOLERANCES[precision]
    assert_agent_agrees(trial.bundle)


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("form", ["tiles", "shared"])
def test_decoders_of_small_tiles_ship_as_products(run: Run, form: Form) -> None:
    """In both graphs: no transposed convolution is left, and the agent's engine gives the same numbers by either."""
    network = Network(widths=(4, 6), latent=3, decoder_start=6, decoder_widths=(6, 4), padding="zero")
    scorer = find_detector("patch_vae").build(PatchVaeSettings(network=network), TileShape(16, 1, 4), 3).scorer("m")
    plain = build_bundle(replace(run, scorer=scorer)).bundle
    trial = frame_module._trial(plain, scorer, SIZE, form).bundle
    assert trial.frame_graph is not None
    for graph in (plain.scorer, trial.frame_graph):
        assert "ConvTranspose" not in {node.op_type for node in onnx.load_from_string(graph).graph.node}
    assert_agent_agrees(trial)


@pytest.mark.usefixtures("quick")
def test_a_model_of_places_ships_whole(run: Run) -> None:
    """A scorer that is told positions has them inside the graph; its only size is the one `auto` takes."""
    position = np.arange(len(run.golden_tiles), dtype=np.int64)
    placed = replace(run, scorer=Placed().eval(), golden_position=position)
    built = build_bundle(placed, frame="auto", is_frame_forced=True)
    assert built.bundle.manifest.frame_graph is not None
    assert built.bundle.manifest.frame_graph.size == built.bundle.manifest.frame == SIZE
    assert_agent_agrees(built.bundle)
    with pytest.raises(UsageError, match="frames of 60 × 44 only"):
        build_bundle(placed, frame=FrameSize(61, 44))


@pytest.mark.usefixtures("quick")
def test_weights_are_kept_once(vae_run: Run) -> None:
    """However many parts the graph has, the file holds every weight once."""
    large = replace(vae_run, grid=TileGrid(16, 8, 4))
    trial = frame_module._trial(build_bundle(large).bundle, large.scorer, FrameSize(200, 60), "shared")
    graph = onnx.load_from_string(trial.bundle.frame_graph or b"").graph
    assert sum(node.op_type == "ConvTranspose" for node in graph.node) > 3 * 2
    contents = [(t.data_type, tuple(t.dims), onnx.numpy_helper.to_array(t).tobytes()) for t in graph.initializer]
    assert len(contents) == len(set(contents))


class Wrong(nn.Module):
    """Claims to share, and shares something else."""

    def forward(self, tiles: Tensor) -> Scores:
        cells = tiles.float().reshape(-1, 4, 4, 4, 4).mean((2, 4))
        return cells.amax((1, 2)), cells

    def can_share(self, _stride_px: int) -> bool:
        return True

    def share(self, block: Tensor, _stride_px: int) -> tuple[Tensor, ...]:
        return (block.new_ones((1000,)) * 1.001,)

    def score_shared(self, tiles: Tensor, *shared: Tensor) -> Scores:
        score, cells = self(tiles)
        return score, cells * shared[0][: len(cells), None, None]


@pytest.mark.usefixtures("quick")
def test_other_numbers_do_not_ship(with_scorer: Callable[[nn.Module], Run]) -> None:
    """A detector that shares what it must not is refused with the deviation, forced or not."""
    with pytest.raises(ExportError, match=r"deviates from the tiled one by 0\.001"):
        build_bundle(with_scorer(Wrong()), frame=SIZE, is_frame_forced=True)


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("best", ["tiles", "shared"])
def test_the_faster_form_is_taken(vae_run: Run, best: Form, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a detector can share, both forms are tried, and the one that measured faster is in the bundle."""
    tried: list[Form] = []

    def trial(bundle: Bundle, _scorer: nn.Module, size: FrameSize, form: Form) -> frame_module._Trial:
        tried.append(form)
        record = FrameGraph(size.height, size.width, form, 2.5 if form == best else 1.5)
        return frame_module._Trial(frame_module._with(bundle, bundle.scorer, record), record, 0.0)

    monkeypatch.setattr(frame_module, "_trial", trial)
    built = build_bundle(vae_run, frame=SIZE)
    assert sorted(tried) == ["shared", "tiles"]
    assert built.bundle.manifest.frame_graph == FrameGraph(SIZE.height, SIZE.width, best, 2.5)


@pytest.mark.usefixtures("quick")
def test_a_slower_graph_is_left_out_unless_forced(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where nothing is gained the bundle is as without the option, and the report tells what was measured."""
    monkeypatch.setattr(frame_module, "_WORTH", 1e6)
    built = build_bundle(run, frame=SIZE)
    assert built.frame is not None
    assert not built.frame.is_kept
    assert built.frame.record.speedup > 0
    assert (built.bundle.frame_graph, built.bundle.manifest) == (None, build_bundle(run).bundle.manifest)
    assert build_bundle(run, frame=SIZE, is_frame_forced=True).bundle.frame_graph is not None


def test_the_time_of_either_form_decides(vae_run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """The speedup is the tiled time over the whole one: a tiled engine that dawdles makes it large."""
    monkeypatch.setattr(frame_module, "_ENOUGH_S", 0.0)
    run_tiles = Engine.run

    def dawdle(self: Engine, *given: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        for _ in range(50):
            run_tiles(self, *given)
        return run_tiles(self, *given)

    bundle = frame_module._trial(build_bundle(vae_run).bundle, vae_run.scorer, SIZE, "tiles").bundle
    with FrameEngine(bundle, ONE_THREAD) as engine:
        plain = frame_module._speedup(bundle, engine)
        monkeypatch.setattr(Engine, "run", dawdle)
        assert frame_module._speedup(bundle, engine) > 3 * plain


@pytest.mark.parametrize("text", ["", "1200", "1200x", "x", "0x5", "70000x5", "1200*1920", "automatic"])
def test_no_size_is_guessed(text: str) -> None:
    """What is neither a size nor a word is refused."""
    with pytest.raises(ValueError, match=r"frame size|each side"):
        frame_choice(text)


def test_auto_needs_one_size(run: Run) -> None:
    """Without pictures of one size, `auto` is wrong usage that says what to give instead."""
    assert frame_choice("60x44") == SIZE
    assert frame_size("none", run, "fp32") is None
    assert frame_size("auto", replace(run, picture_size=SIZE), "fp32") == SIZE
    with pytest.raises(UsageError, match="give --frame HxW"):
        frame_size("auto", run, "fp32")
    with pytest.raises(UsageError, match="int8"):
        frame_size(SIZE, run, "int8")


def test_the_command_line_from_pictures_to_a_verified_bundle(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Training notes the pictures' size, --frame auto takes it, inspect shows the graph, verify proves it."""
    from kizu_train.__main__ import main as train

    data, run, bundle = tmp_path / "good", tmp_path / "run", tmp_path / "m.kizu"
    data.mkdir()
    draw = np.random.default_rng(0)
    for index in range(8):
        cv2.imwrite(str(data / f"{index}.png"), draw.integers(90, 110, (28, 30), np.uint8))
    settings = ["--set", "train.steps=2", "--set", "train.batch=8"]
    assert train(["fit", "patch_vae_28px", "--data", str(data), "--out", str(run), *settings]) == 0
    assert main([str(run), "--out", str(bundle), "--frame", "auto", "--force-frame"]) == 0
    assert main(["verify", str(bundle)]) == 0
    assert main(["inspect", str(bundle)]) == 0
    out = capsys.readouterr().out
    assert "28 × 30 whole (" in out
    assert "and a frame of 28 × 30 within" in out
    assert "28 × 30 whole, " in out
    assert main(["inspect", str(bundle), "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown["manifest"]["frame_graph"]["form"] in ("tiles", "shared")
    assert shown["frame_graph_facts"]["operators"]["Conv"] > 0
    with pytest.raises(SystemExit, match="2"):
        main([str(run), "--out", str(bundle), "--frame", "28by30"])


@pytest.mark.usefixtures("quick")
def test_signing_anew_keeps_both_graphs(run: Run, tmp_path: Path) -> None:
    """A bundle that is signed later keeps its content, the frame graph included."""
    bundle = tmp_path / "m.kizu"
    write_bundle(build_bundle(run, frame=SIZE, is_frame_forced=True).bundle, bundle)
    assert main(["keygen", "--out", str(tmp_path)]) == 0
    key, signed = str(tmp_path / "kizu-private.pem"), tmp_path / "signed.kizu"
    assert main(["sign", str(bundle), "--key", key, "--out", str(signed)]) == 0
    assert read_bundle(signed).frame_graph == read_bundle(bundle).frame_graph is not None
