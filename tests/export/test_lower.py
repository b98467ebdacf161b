"""Lower precisions: what they lose is measured, written down, and refused where it is too much."""

from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from torch import Tensor, nn

from kizu_agent.engine import Engine
from kizu_agent.errors import ModelError
from kizu_agent.inspector import load_inspector, self_test
from kizu_agent.settings import EngineConfig
from kizu_contract.bundle import Bundle, read_bundle, write_bundle
from kizu_contract.errors import ManifestError
from kizu_contract.golden import Golden
from kizu_contract.manifest import Manifest, PrecisionLoss
from kizu_export.build import build_bundle
from kizu_export.errors import ExportError, UsageError
from kizu_export.evidence import Evidence, gather_evidence
from kizu_export.lower import Limits
from kizu_export.show import loss_in_words
from kizu_train.calibrate import calibrate
from kizu_train.errors import TrainError
from kizu_train.runs import Run

LOOSE = Limits(100, 100)


class Contrast(nn.Module):
    """Scores by how much a pixel differs from its neighbourhood, through layers of more channels than it needs."""

    def __init__(self) -> None:
        super().__init__()
        self.edges = self._layer(1, 8)
        self.mix = nn.Sequential(*(self._layer(8, 8) for _ in range(4)))
        for layer in self.mix:  # about the identity, so that what the edges tell is not lost on the way
            nn.init.dirac_(layer[1].weight)
            layer[1].weight.data.add_(0.02 * torch.randn_like(layer[1].weight))
            nn.init.zeros_(layer[1].bias)
        self.pool = nn.AvgPool2d(4)

    def forward(self, tiles: Tensor) -> tuple[Tensor, Tensor]:
        """Tiles uint8 [N, 16, 16, 1] → score [N], map [N, 4, 4]."""
        pixels = tiles.permute(0, 3, 1, 2).float() / 255
        cells = self.pool(self.mix(self.edges(pixels))).mean(1)
        return cells.amax((1, 2)), cells

    def _layer(self, low: int, high: int) -> nn.Module:
        return nn.Sequential(nn.ReflectionPad2d(1), nn.Conv2d(low, high, 3), nn.ReLU())


class Fragile(Contrast):
    """What it scores by is a thousandth of what stands beside it in the same tensors: eight bits cannot hold both."""

    def __init__(self) -> None:
        super().__init__()
        with torch.no_grad():
            first, second = self.mix[0][1], self.mix[1][1]
            first.weight[4:] *= 1000
            first.bias[4:] *= 1000
            second.weight[:, 4:] = 0


@pytest.fixture
def contrast(run: Run) -> Run:
    """A run around the robust scorer."""
    return with_scorer(run, Contrast)


@pytest.fixture
def fragile(run: Run) -> Run:
    """A run around the scorer that eight bits ruin."""
    return with_scorer(run, Fragile)


def with_scorer(run: Run, kind: type[nn.Module]) -> Run:
    with torch.random.fork_rng():
        torch.manual_seed(2)
        return replace(run, scorer=kind().eval())


def scores_of(bundle: Bundle, paths: tuple[Path, ...]) -> list[float]:
    inspector = load_inspector(bundle, EngineConfig(threads=1))
    pictures = [cv2.imread(str(path), cv2.IMREAD_GRAYSCALE)[:, :, None] for path in paths]
    try:
        return [found.score for found in inspector.inspect(pictures)]
    finally:
        inspector.close()


@pytest.mark.parametrize("precision", ["fp16", "int8"])
def test_loss_is_measured_and_written(contrast: Run, evidence: Evidence, tmp_path: Path, precision: str) -> None:
    """The manifest says what was lost on which pictures, and comes back from the file as it was."""
    built = build_bundle(contrast, precision=precision, evidence=evidence, limits=LOOSE)
    write_bundle(built.bundle, tmp_path / "m.kizu")
    manifest = read_bundle(tmp_path / "m.kizu").manifest
    assert manifest.graph.precision == precision
    loss = manifest.precision
    assert loss is not None
    assert (loss.good_pictures, loss.defective_pictures, loss.held_out_pictures) == (12, 12, 6)
    assert loss.measured_on == "tests"
    assert 0.6 < loss.image_auroc_before <= 1
    assert abs(loss.lost_points) < 5
    assert 0 < loss.most_shift < 0.1
    assert f"{loss.image_auroc_after:.4f}" in loss_in_words(loss)


@pytest.mark.parametrize("precision", ["fp16", "int8"])
def test_same_run_gives_same_bytes(contrast: Run, evidence: Evidence, tmp_path: Path, precision: str) -> None:
    """Exporting twice gives files that do not differ in a byte."""
    for name in ("a", "b"):
        bundle = build_bundle(contrast, precision=precision, evidence=evidence, limits=LOOSE).bundle
        write_bundle(bundle, tmp_path / name)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_thresholds_are_measured_anew(contrast: Run, evidence: Evidence) -> None:
    """Calibration and thresholds are those of the lower precision's own scores of the held-out pictures."""
    bundle = build_bundle(contrast, precision="int8", evidence=evidence, limits=LOOSE).bundle
    wanted = calibrate(scores_of(bundle, evidence.held_out))
    assert bundle.manifest.calibration.frames == 6
    assert bundle.manifest.thresholds.reject == pytest.approx(wanted.score_at(0.001), rel=1e-5)


def test_thresholds_of_folds_move_with_the_scores(contrast: Run, evidence: Evidence) -> None:
    """Where they come from more pictures than were held out, they are kept, times what those pictures' scores moved."""
    plain = build_bundle(contrast).bundle
    folds = replace(evidence, is_calibrated=False)
    small = build_bundle(contrast, precision="int8", evidence=folds, limits=LOOSE).bundle
    times = np.median(scores_of(small, evidence.held_out)) / np.median(scores_of(plain, evidence.held_out))
    assert times != 1
    assert small.manifest.calibration.frames == plain.manifest.calibration.frames
    ratio = small.manifest.thresholds.reject / plain.manifest.thresholds.reject
    assert ratio == pytest.approx(times, rel=1e-5)


def test_what_is_fragile_stays_in_fp32(fragile: Run, evidence: Evidence) -> None:
    """Where eight bits ruin a layer, it goes back to floats, and the rest stays small."""
    loss = build_bundle(fragile, precision="int8", evidence=evidence, limits=Limits(2, 100)).bundle.manifest.precision
    assert loss is not None
    assert (loss.layers, loss.layers_kept) == (2, 2)
    assert loss.lost_points <= 2


def test_too_great_a_loss_is_refused(fragile: Run, evidence: Evidence, monkeypatch: pytest.MonkeyPatch) -> None:
    """What eight bits ruin does not ship: the message tells AUROC before and after, and what to do."""
    monkeypatch.setattr("kizu_export.lower._KEPT_SHARES", ())
    with pytest.raises(ExportError, match=r"int8 loses too much to ship: image AUROC falls from .*--most-loss.* fp32"):
        build_bundle(fragile, precision="int8", evidence=evidence, limits=Limits(0.5, 100))


@pytest.mark.parametrize("precision", ["fp16", "int8"])
def test_too_great_a_shift_is_refused(contrast: Run, evidence: Evidence, precision: str) -> None:
    """Scores of good pictures that move further than allowed are refused too."""
    with pytest.raises(ExportError, match=f"{precision} loses too much .*--most-shift"):
        build_bundle(contrast, precision=precision, evidence=evidence, limits=Limits(100, 1e-9))


def test_flaws_are_planted_where_there_are_no_tests(contrast: Run, evidence: Evidence) -> None:
    """Without real defects, pieces of held-out pictures are judged with and without a flaw, their regions too."""
    planted = replace(evidence, tests=())
    loss = build_bundle(contrast, precision="int8", evidence=planted, limits=LOOSE).bundle.manifest.precision
    assert loss is not None
    assert (loss.measured_on, loss.good_pictures, loss.defective_pictures) == ("planted", 64, 64)
    assert loss.au_pro_before is not None
    assert loss.au_pro_after == pytest.approx(loss.au_pro_before, abs=0.05)
    assert "planted" in loss_in_words(loss)


def test_lower_precision_needs_evidence(contrast: Run) -> None:
    """Nothing of lower precision ships unmeasured."""
    with pytest.raises(UsageError, match="--data"):
        build_bundle(contrast, precision="fp16")


class Brightness(nn.Module):
    """No layer at all."""

    def forward(self, tiles: Tensor) -> tuple[Tensor, Tensor]:
        cells = tiles.float().reshape(-1, 4, 4, 4, 4).amax(dim=(2, 4))
        return cells.amax((1, 2)), cells


def test_nothing_to_gain_is_refused(run: Run, evidence: Evidence) -> None:
    """A detector without layers that eight bits could compute says so."""
    with pytest.raises(ExportError, match="no layer that gains"):
        build_bundle(replace(run, scorer=Brightness()), precision="int8", evidence=evidence)


def test_pictures_of_another_training_are_refused(run: Run, pictures: Path) -> None:
    """Evidence is what the run was trained on: without a whole run, or with other pictures, there is none."""
    with pytest.raises(TrainError, match="not a run"):
        gather_evidence(run, pictures)


def test_self_test_allows_what_rounding_makes(contrast: Run, evidence: Evidence) -> None:
    """Golden numbers of eight bits may be off by what another processor rounds, not by more; fp32's may not."""
    small = build_bundle(contrast, precision="int8", evidence=evidence, limits=LOOSE).bundle
    plain = build_bundle(contrast).bundle
    deviate(small, 1.05)
    with pytest.raises(ModelError, match="deviate"):
        deviate(small, 1.25)
    with pytest.raises(ModelError, match="deviate"):
        deviate(plain, 1.05)


def deviate(bundle: Bundle, times: float) -> None:
    golden = bundle.golden
    score, cells = ((array * times).astype(np.float32) for array in (golden.score, golden.map))
    other = replace(bundle, golden=Golden(golden.tiles, score, cells, golden.position))
    with Engine(bundle.scorer, bundle.manifest.graph, EngineConfig(threads=1)) as engine:
        self_test(other, engine, 1e-3)


def test_manifest_is_strict_about_the_loss(manifest: Manifest) -> None:
    """The record is optional, whole where it is there, and its figures are bounded."""
    loss = PrecisionLoss("fp32", "planted", 64, 64, 8, 0.99, 0.985, 0.01, 14, 1, None, None)
    whole = replace(manifest, precision=loss)
    assert Manifest.from_json(whole.to_json()) == whole
    assert loss.lost_points == pytest.approx(0.5)
    assert b'"precision": {' not in manifest.to_json()
    for wrong in ({"image_auroc_after": 1.5}, {"layers": 0}, {"most_shift": -1.0}):
        with pytest.raises(ValueError, match=r"loss of precision|between 0 and 1"):
            replace(loss, **wrong)
    with pytest.raises(ManifestError, match="most_shift"):
        Manifest.from_json(whole.to_json().replace(b'"most_shift": 0.01,', b""))
