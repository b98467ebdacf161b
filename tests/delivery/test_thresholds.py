"""The thresholds that judge a camera."""

from pathlib import Path

import pytest

from kizu_agent.camera_settings import CameraConfig, ThresholdRates
from kizu_agent.config import Config
from kizu_agent.errors import CommandError
from kizu_agent.thresholds import ScoreThresholds, ThresholdBook
from kizu_contract.judging import Thresholds
from kizu_contract.manifest import Manifest

SHA256, OTHER = "ab" * 32, "cd" * 32
RATES = ThresholdRates(warn_rate=0.05, reject_rate=0.02)
SCORES = ScoreThresholds(warn=3.0, reject=4.0, model_sha256=SHA256)


@pytest.fixture
def book(tmp_path: Path, config: Config) -> ThresholdBook:
    """A book without anything set."""
    return ThresholdBook(tmp_path, config.cameras)


def test_without_anything_set_the_bundle_decides(book: ThresholdBook, manifest: Manifest) -> None:
    """Defaults are the manifest's scores and rates."""
    setting = book.describe("top", manifest, SHA256)
    assert (setting.origin, setting.thresholds) == ("bundle", Thresholds(1.0, 2.0))
    assert setting.rates == ThresholdRates(warn_rate=0.01, reject_rate=0.001)


def test_configured_rates_go_through_the_calibration(tmp_path: Path, manifest: Manifest) -> None:
    """A camera's configured rates become scores of the model in service."""
    camera = CameraConfig(name="top", source="sim:gears", thresholds=RATES)
    setting = ThresholdBook(tmp_path, [camera]).describe("top", manifest, SHA256)
    assert (setting.origin, setting.thresholds) == ("config", manifest.calibration.thresholds(0.05, 0.02))


@pytest.mark.parametrize("override", [RATES, SCORES])
def test_what_is_set_holds_at_once_and_after_a_restart(
    tmp_path: Path, config: Config, book: ThresholdBook, manifest: Manifest, override: ThresholdRates | ScoreThresholds
) -> None:
    """Set thresholds judge the next frame of that camera only, and a new book on the same folder knows them."""
    before = book.get("top", manifest, SHA256)
    book.set("top", override, manifest, SHA256)
    after = book.get("top", manifest, SHA256)
    assert after != before
    assert book.get("side", manifest, SHA256) == before
    assert ThresholdBook(tmp_path, config.cameras).describe("top", manifest, SHA256).origin == "command"
    assert ThresholdBook(tmp_path, config.cameras).get("top", manifest, SHA256) == after
    book.reset("top")
    assert book.get("top", manifest, SHA256) == before
    assert ThresholdBook(tmp_path, config.cameras).get("top", manifest, SHA256) == before


def test_revert_takes_the_last_change_back(
    tmp_path: Path, config: Config, book: ThresholdBook, manifest: Manifest
) -> None:
    """And once more the taking back, after a restart too; each product by itself; refused where nothing was changed."""
    with pytest.raises(CommandError, match="no command has changed"):
        book.revert("top")
    book.set("top", RATES, manifest, SHA256)
    book.set("top", SCORES, manifest, SHA256)
    with pytest.raises(CommandError, match="no command has changed"):
        book.revert("top", "gears_m4")
    again = ThresholdBook(tmp_path, config.cameras)
    again.revert("top")
    assert again.describe("top", manifest, SHA256).rates == RATES
    again.revert("top")
    assert again.get("top", manifest, SHA256) == Thresholds(3.0, 4.0)
    again.reset("top")
    again.revert("top")
    assert again.get("top", manifest, SHA256) == Thresholds(3.0, 4.0)


def test_scores_are_not_applied_to_another_model(book: ThresholdBook, manifest: Manifest) -> None:
    """Another model is judged by its defaults and the setting says why; the first model gets its scores back."""
    book.set("top", SCORES, manifest, SHA256)
    other = book.describe("top", manifest, OTHER)
    assert (other.origin, other.thresholds) == ("bundle", Thresholds(1.0, 2.0))
    assert other.note is not None
    assert SHA256[:12] in other.note
    assert book.get("top", manifest, SHA256) == Thresholds(3.0, 4.0)


@pytest.mark.parametrize("damage", [b"", b"{", b"[]", b'{"schema_version":2,"cameras":{}}', b"\xff" * 100])
def test_a_damaged_file_is_moved_aside_and_reported(
    tmp_path: Path, config: Config, manifest: Manifest, damage: bytes
) -> None:
    """Defaults hold, the damaged file is kept for whoever wants to look, and the book can be written again."""
    (tmp_path / "thresholds.json").write_bytes(damage)
    book = ThresholdBook(tmp_path, config.cameras)
    assert book.problem is not None
    assert "thresholds.json" in book.problem
    assert (tmp_path / "thresholds.json.damaged").read_bytes() == damage
    assert book.get("top", manifest, SHA256) == Thresholds(1.0, 2.0)
    book.set("top", RATES, manifest, SHA256)
    assert ThresholdBook(tmp_path, config.cameras).problem is None


def test_what_the_disk_refuses_is_not_in_effect(tmp_path: Path, config: Config, manifest: Manifest) -> None:
    """Thresholds that cannot be kept do not judge until the next restart either."""
    book = ThresholdBook(tmp_path / "gone", config.cameras)
    with pytest.raises(OSError, match="No such file"):
        book.set("top", RATES, manifest, SHA256)
    assert book.describe("top", manifest, SHA256).origin == "bundle"


@pytest.mark.parametrize(
    "override",
    [ScoreThresholds(warn=4.0, reject=3.0, model_sha256=SHA256), ScoreThresholds(warn=1, reject=2, model_sha256=OTHER)],
)
def test_thresholds_that_the_model_cannot_use_are_refused(
    tmp_path: Path, book: ThresholdBook, manifest: Manifest, override: ScoreThresholds
) -> None:
    """A warn score above the reject score, or scores of another model, change nothing."""
    with pytest.raises(CommandError, match="do not fit"):
        book.set("top", override, manifest, SHA256)
    assert not (tmp_path / "thresholds.json").exists()


def test_an_unknown_camera_is_refused_by_name(book: ThresholdBook, manifest: Manifest) -> None:
    """The error names the camera and those there are."""
    with pytest.raises(CommandError, match=r"'bottom'; there are side, top"):
        book.set("bottom", RATES, manifest, SHA256)
    with pytest.raises(CommandError, match="bottom"):
        book.reset("bottom")
