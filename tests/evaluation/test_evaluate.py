import io
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from rich.console import Console

from kizu_contract.judging import FrameScore, Thresholds, Verdict
from kizu_train.data import PictureSet, TestPicture, open_data
from kizu_train.errors import DataError
from kizu_train.evaluation.evaluate import evaluate
from kizu_train.evaluation.records import Evaluation
from kizu_train.evaluation.table import print_evaluation

LIMITS = Thresholds(100.0, 150.0)
Score = Callable[[NDArray[np.uint8]], FrameScore]


@pytest.fixture
def evaluation(tmp_path: Path, draw: Callable[..., Path], brightness: Score) -> Evaluation:
    """Three good pictures (one a false alarm) and four defective ones of two kinds (one missed, one only warned of)."""
    for name, level in (("a", 30), ("b", 110), ("c", 160)):
        draw("good", name, level)
    draw("dent", "a", 200, mask=True)
    draw("dent", "b", 120, mask=True)
    draw("dent", "c", 155, mask=False)
    draw("scratch", "a", 90)
    return evaluate(open_data(tmp_path), brightness, LIMITS, colour="grey")


def test_scores_ratios_and_verdicts(evaluation: Evaluation):
    """Each picture is listed under its path in the data folder with score, ratio, verdict and size."""
    found = {p.path: (p.score, p.ratio, p.verdict, p.width, p.height) for p in evaluation.pictures}
    assert found["test/dent/a.png"] == (200.0, 200 / 150, Verdict.REJECT, 60, 40)
    assert found["test/dent/b.png"] == (120.0, 120 / 150, Verdict.WARN, 60, 40)
    assert found["test/good/a.png"] == (30.0, 30 / 150, Verdict.OK, 60, 40)
    assert len(found) == 7


def test_rates_at_the_thresholds(evaluation: Evaluation):
    """Escape, overkill and F1 are those of the verdicts, at reject and at warn."""
    reject, warn = evaluation.reject, evaluation.warn
    assert (reject.missed, reject.false_alarms) == (2, 1)
    assert (reject.escape_rate, reject.overkill_rate) == (0.5, pytest.approx(1 / 3))
    assert reject.f1 == pytest.approx(2 * 2 / (2 * 2 + 2 + 1))
    assert (warn.escape_rate, warn.overkill_rate) == (0.25, pytest.approx(2 / 3))


def test_a_score_at_the_threshold_is_held_back(tmp_path: Path, draw: Callable[..., Path], brightness: Score):
    """The rates agree with the verdict of a score that equals the limit."""
    draw("dent", "a", 150, mask=True)
    found = evaluate(open_data(tmp_path), brightness, LIMITS, colour="grey")
    assert (found.pictures[0].verdict, found.reject.missed) == (Verdict.REJECT, 0)


def test_image_figures(evaluation: Evaluation):
    """200, 120, 155 and 90 outrank 3, 2, 2 and 1 of the good 30, 110 and 160: 8 of 12 pairs."""
    assert evaluation.image.auroc == pytest.approx((3 + 2 + 2 + 1) / 12)


def test_pictures_without_mask_are_left_out_of_pixel_figures_only(evaluation: Evaluation):
    """An empty mask and a missing one are counted; the other pictures and all good ones make the pixel figures."""
    assert (evaluation.pixel_left_out, evaluation.pixel_pictures, evaluation.regions) == (2, 5, 2)
    good, dent, scratch = evaluation.kinds
    assert (good.kind, dent.kind, scratch.kind) == ("good", "dent", "scratch")
    assert (dent.pictures, dent.rejected, dent.flagged, dent.masked) == (3, 2, 3, 2)
    assert (scratch.image.auroc, scratch.pixel.auroc) == (pytest.approx(1 / 3), None)
    # Of 5 · 2400 - 128 defect-free pixels, 64 (160) lie above the 64 pixels at 200 in none and at 120 in one picture.
    negatives = 5 * 2400 - 128
    assert dent.pixel.auroc == pytest.approx(1 - (64 / negatives) / 2)
    assert evaluation.pixel == dent.pixel


def test_good_pictures_alone_give_the_overkill_rate(tmp_path: Path, draw: Callable[..., Path], brightness: Score):
    """Without defective pictures all figures but the false alarms are null."""
    draw("good", "a", 30)
    draw("good", "b", 180)
    found = evaluate(open_data(tmp_path), brightness, LIMITS, colour="grey")
    assert found.headline() == {"overkill_rate": 0.5}
    assert found.reject.escape_rate is None


def test_what_cannot_be_used_is_named(tmp_path: Path, draw: Callable[..., Path], brightness: Score):
    """A damaged picture, one that vanished, and a mask of another size are listed with their reason."""
    draw("good", "a", 30)
    draw("dent", "small", 200, mask=True)
    smaller = draw("other", "x", 99, mask=True, size=(20, 60))
    (tmp_path / "ground_truth/dent/small_mask.png").write_bytes(
        (tmp_path / "ground_truth/other/x_mask.png").read_bytes()
    )
    (tmp_path / "test/dent/torn.png").write_bytes(b"\x89PNG torn")
    pictures = open_data(tmp_path)
    smaller.unlink()
    found = evaluate(pictures, brightness, LIMITS, colour="grey")
    problems = {problem.path: problem.error for problem in found.unreadable}
    assert set(problems) == {"test/dent/torn.png", "test/other/x.png", "ground_truth/dent/small_mask.png"}
    assert "60 × 20" in problems["ground_truth/dent/small_mask.png"]
    assert [picture.path for picture in found.pictures] == ["test/dent/small.png", "test/good/a.png"]
    assert found.pixel_left_out == 1


def test_a_score_that_is_not_finite_is_no_verdict(tmp_path: Path, draw: Callable[..., Path], brightness: Score):
    """A picture whose score is NaN is listed and left out of every figure."""
    draw("good", "a", 30)
    draw("good", "b", 66)

    def broken(picture: NDArray[np.uint8]) -> FrameScore:
        found = brightness(picture)
        return FrameScore(float("nan"), found.map) if found.score == 66 else found

    found = evaluate(open_data(tmp_path), broken, LIMITS, colour="grey")
    assert [problem.path for problem in found.unreadable] == ["test/good/b.png"]
    assert len(found.pictures) == 1


def test_nothing_to_evaluate_is_an_error(tmp_path: Path, brightness: Score):
    """Where no test picture can be scored, the message names the folder and what it should hold."""
    empty = PictureSet(tmp_path, (), (), "grey", "", (), (), ())
    with pytest.raises(DataError, match=r"test/good"):
        evaluate(empty, brightness, LIMITS, colour="grey")
    gone = TestPicture(tmp_path / "test/good/a.png", "good", is_good=True, mask=None)
    with pytest.raises(DataError, match=r"1 failed, the first: test/good/a\.png"):
        evaluate(PictureSet(tmp_path, (), (gone,), "grey", "", (), (), ()), brightness, LIMITS, colour="grey")


def test_json_has_a_fixed_shape(evaluation: Evaluation):
    """The JSON form has the documented keys, nulls where there is no figure, and no picture bytes."""
    found = json.loads(evaluation.to_json(), parse_constant=pytest.fail)
    assert list(found) == [
        *("schema", "evaluated", "thresholds", "image", "pixel", "regions", "pixel_pictures", "pixel_left_out"),
        *("reject", "warn", "kinds", "timing", "pictures", "unreadable"),
    ]
    assert found["pictures"][0] == {
        "path": "test/dent/a.png",
        "kind": "dent",
        "is_good": False,
        "score": 200.0,
        "ratio": 200 / 150,
        "verdict": "reject",
        "width": 60,
        "height": 40,
    }
    assert found["kinds"][0]["image"] == {"auroc": None, "ap": None}


def test_examples_are_the_extremes(evaluation: Evaluation):
    """Misses come lowest ratio first, false alarms highest first; both are thumbnails that can be shown."""
    examples = evaluation.examples
    assert [e.picture.score for e in examples.misses] == [90.0, 120.0, 155.0, 200.0]
    assert [e.picture.score for e in examples.false_alarms] == [160.0, 110.0, 30.0]
    assert all(e.input_jpeg[:2] == e.heatmap_jpeg[:2] == b"\xff\xd8" for e in examples.misses)


def test_few_examples_are_kept(tmp_path: Path, draw: Callable[..., Path], brightness: Score):
    """Only the wanted number is kept; catches take turns over the kinds and repeat no miss."""
    for number in range(6):
        draw("dent", f"d{number}", 160 + number, mask=True)
        draw("hole", f"h{number}", 200 + number, mask=True)
    draw("good", "a", 30)
    kept = evaluate(open_data(tmp_path), brightness, LIMITS, colour="grey", examples=2).examples
    assert [e.picture.score for e in kept.misses] == [160.0, 161.0]
    assert [e.picture.score for e in kept.catches] == [165.0, 205.0]
    assert all(e.has_mask for e in kept.catches)


def test_the_scorer_is_warmed_up_once(tmp_path: Path, draw: Callable[..., Path], brightness: Score):
    """The first picture is scored once more, untimed; times are those of the others."""
    draw("good", "a", 30)
    draw("good", "b", 40)
    calls = []

    def counted(picture: NDArray[np.uint8]) -> FrameScore:
        calls.append(picture.max())
        return brightness(picture)

    found = evaluate(open_data(tmp_path), counted, LIMITS, colour="grey")
    assert calls == [30, 30, 40]
    assert 0 < found.timing.median_ms <= found.timing.p95_ms


def test_a_map_of_the_wrong_size_is_a_bug_that_shows(tmp_path: Path, draw: Callable[..., Path]):
    """A scorer whose map is not the picture's size is stopped by name, not measured wrongly."""
    draw("good", "a", 30)
    with pytest.raises(ValueError, match=r"test/good/a\.png"):
        evaluate(open_data(tmp_path), lambda p: FrameScore(1.0, p[::2, ::2, 0] * np.float32(1)), LIMITS, colour="grey")


def test_the_table_fits_a_terminal(evaluation: Evaluation):
    """Figures, kinds and what was left out are printed within 80 columns."""
    page = io.StringIO()
    print_evaluation(evaluation, Console(file=page, width=80))
    text = page.getvalue()
    assert "scratch" in text
    assert "escape 50.0 % (2 of 4)" in text
    assert "2 defective pictures without a mask" in text
    assert max(map(len, text.splitlines())) <= 80


def test_no_torch_is_imported():
    """Evaluation, table and report work where torch is not installed."""
    code = (
        "import sys; sys.modules['torch'] = None\n"
        "import kizu_train.evaluation.evaluate, kizu_train.evaluation.report, kizu_train.evaluation.table"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
