"""The inspector: pictures of all sizes through shared batches give what each gives alone."""

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest

from kizu_agent.engine import Engine
from kizu_agent.errors import ModelError
from kizu_agent.inspector import Inspector, load_inspector, relative_deviation, self_test
from kizu_agent.settings import EngineConfig
from kizu_contract.bundle import Bundle
from kizu_contract.errors import PictureError
from kizu_contract.judging import FrameScore, Reduction, score_frame
from kizu_contract.manifest import BatchProfile
from kizu_contract.pictures import to_colour

SIZES = [(40, 50), (16, 16), (5, 7), (200, 33), (300, 400), (17, 90)]


def random_picture(height: int, width: int, channels: int = 1) -> np.ndarray:
    return np.random.default_rng(height * width).integers(0, 256, (height, width, channels), dtype=np.uint8)


def score_alone(inspector: Inspector, picture: np.ndarray) -> FrameScore:
    manifest = inspector.manifest
    return score_frame(to_colour(picture, "grey"), manifest.grid, manifest.reduction, inspector.engine.run)


@pytest.mark.parametrize("channels", [1, 3])
def test_pictures_together_score_as_alone(inspector: Inspector, channels: int) -> None:
    """Grey or colour, of any size, each picture gets its own score and a map of its own size, in order."""
    pictures = [random_picture(*size, channels) for size in SIZES]
    for picture, found in zip(pictures, inspector.inspect(pictures), strict=True):
        wanted = score_alone(inspector, picture)
        assert found.map.shape == picture.shape[:2]
        assert found.score == pytest.approx(wanted.score, rel=1e-5)
        np.testing.assert_allclose(found.map, wanted.map, rtol=1e-5)


@pytest.mark.parametrize("room", [1, 7, 40, 300])
def test_small_buffer_changes_nothing(
    bundle: Bundle, engine: Engine, room: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Pictures that do not fit the tile buffer, nor even one row of theirs, score the same."""
    monkeypatch.setattr("kizu_agent.inspector._BUFFER_BYTES", room * 16 * 16)
    small = replace(bundle.manifest, graph=replace(bundle.manifest.graph, batch=BatchProfile(1, 1, 256)))
    tight = Inspector(replace(bundle, manifest=small), engine)
    pictures = [random_picture(*size) for size in SIZES]
    for picture, found in zip(pictures, tight.inspect(pictures), strict=True):
        np.testing.assert_allclose(found.map, score_alone(tight, picture).map, rtol=1e-5)


def test_positions_count_along_the_grid(
    bundle: Bundle, make_scorer: Callable[..., bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A graph that takes positions gets each tile's index in its own frame, however the tiles are buffered."""
    monkeypatch.setattr("kizu_agent.inspector._BUFFER_BYTES", 70 * 16 * 16)
    old = bundle.manifest
    placed = replace(old, graph=replace(old.graph, inputs=("tiles", "position")), reduction=Reduction("tile_max", 0.0))
    inspector = load_inspector(Bundle(placed, make_scorer(placed=True), bundle.golden, b""), EngineConfig())
    frames = inspector.inspect([random_picture(100, 60), random_picture(200, 200), random_picture(40, 40)])
    inspector.close()
    counts = [placed.grid.layout(*size).count for size in ((100, 60), (200, 200), (40, 40))]
    assert [frame.score for frame in frames] == [count - 1 for count in counts]


def test_no_pictures_no_scores(inspector: Inspector) -> None:
    """Nothing in, nothing out."""
    assert inspector.inspect([]) == []


def test_picture_of_another_form_is_refused(inspector: Inspector) -> None:
    """Floats are not a picture."""
    with pytest.raises(PictureError, match="uint8"):
        inspector.inspect([np.zeros((20, 20, 1), np.float32)])  # type: ignore[list-item]


def test_not_a_number_reaches_the_score(bundle: Bundle, make_scorer: Callable[..., bytes]) -> None:
    """A scorer that gives NaN gives a frame score that judges as unknown."""
    inspector = load_inspector(replace(bundle, scorer=make_scorer(divisor=0.0)), EngineConfig())
    found = inspector.inspect([random_picture(40, 40)])[0]
    inspector.close()
    assert bundle.manifest.thresholds.scores().verdict(found.score).value == "unknown"


def test_golden_tiles_pass(bundle: Bundle, engine: Engine) -> None:
    """An engine that computes what the bundle says passes, with hardly any deviation."""
    assert self_test(bundle, engine, 1e-5) < 1e-5


@pytest.mark.parametrize("spoilt", [{"tail": "Sqrt"}, {"divisor": 250.0}, {"divisor": 0.0}])
def test_golden_tiles_refuse_another_scorer(
    bundle: Bundle, make_scorer: Callable[..., bytes], spoilt: dict[str, object]
) -> None:
    """An engine that computes something else, or no numbers at all, is refused."""
    with (
        Engine(make_scorer(**spoilt), bundle.manifest.graph, EngineConfig()) as other,
        pytest.raises(ModelError, match="golden tiles"),
    ):
        self_test(bundle, other, 1e-3)


def test_deviation_is_relative_to_size_or_mean() -> None:
    """A deviation counts against its own number, or the mean where that is larger; NaN counts as infinite."""
    wanted = np.array([0.0, 1.0, 5.0], np.float32)
    assert relative_deviation(wanted + np.array([0, 0, 0.5], np.float32), wanted) == pytest.approx(0.1)
    assert relative_deviation(wanted + np.array([0.2, 0, 0], np.float32), wanted) == pytest.approx(0.1)
    assert relative_deviation(np.array([np.nan, 1, 5], np.float32), wanted) == float("inf")
    assert relative_deviation(np.zeros(2, np.float32), np.zeros(2, np.float32)) == 0
