import re
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree as ET

import cv2
import numpy as np
import pytest
from numpy.typing import NDArray

from kizu_contract.judging import FrameScore, Thresholds, Verdict
from kizu_train.data import open_data
from kizu_train.evaluation.charts import histogram, roc
from kizu_train.evaluation.evaluate import evaluate
from kizu_train.evaluation.gallery import THUMBNAIL_PX, make_example
from kizu_train.evaluation.masks import read_mask
from kizu_train.evaluation.records import Operating, ScoredPicture
from kizu_train.evaluation.report import write_report

LIMITS = Thresholds(100.0, 150.0)
Score = Callable[[NDArray[np.uint8]], FrameScore]
VOID = {"meta", "img", "link", "br", "rect", "line", "circle", "polyline", "polygon"}


class Page(HTMLParser):
    """Reads a page: its text, its addresses, and whether every element is closed in order."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.addresses: list[str] = []
        self.words = ""
        self.tags: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.addresses += [value or "" for name, value in attrs if name in {"src", "href", "action", "data"}]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, _attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag not in VOID:
            assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words += data


@pytest.fixture
def page(tmp_path: Path, draw: Callable[..., Path], brightness: Score) -> Page:
    """A report on pictures of which one has a hostile name."""
    draw("good", "a", 30)
    draw("good", "b", 160)
    draw("dent", "a", 200, mask=True)
    draw("dent", "<script>alert('1')<&>", 90, mask=True)
    (tmp_path / "test/dent/torn.png").write_bytes(b"torn")
    found = evaluate(open_data(tmp_path), brightness, LIMITS, colour="grey")
    write_report(
        tmp_path / "r.html", found, title="Gears & <bolts>", facts={"Model": "gears 1.2"}, provenance={"S": "7"}
    )
    text = (tmp_path / "r.html").read_text(encoding="utf-8")
    assert "<script" not in text
    return Page(text)


def test_the_page_is_well_formed_and_says_what_was_measured(page: Page):
    """Title, model, figures, unreadable pictures and hostile file names stand there as text."""
    assert page.open == []
    for words in ("Gears & <bolts>", "gears 1.2", "Image AUROC", "<script>alert('1')<&>", "torn.png", "1 of 2"):
        assert words in page.words


def test_the_page_needs_nothing_from_outside(page: Page):
    """Every picture is a data URI; there is no script, link or style sheet to fetch."""
    assert page.addresses
    assert all(address.startswith("data:image/jpeg;base64,") for address in page.addresses)
    assert not {"script", "link", "iframe"} & set(page.tags)
    assert page.tags.count("svg") == 2


def test_a_report_on_good_pictures_alone(tmp_path: Path, draw: Callable[..., Path], brightness: Score):
    """Without defective pictures there is no ROC and no made-up figure, and the page still stands."""
    draw("good", "a", 30)
    found = evaluate(open_data(tmp_path), brightness, LIMITS, colour="grey")
    write_report(tmp_path / "r.html", found)
    page = Page((tmp_path / "r.html").read_text(encoding="utf-8"))
    assert page.tags.count("svg") == 1
    assert "AUROC" not in page.words.partition("By kind")[0].rpartition("</style>")[2].partition("False alarms")[2]
    assert "Missed defects" not in page.words


def scored(score: float, *, is_good: bool) -> ScoredPicture:
    """A picture of that score."""
    return ScoredPicture("x", "k", is_good, score, score / LIMITS.reject, LIMITS.verdict(score), 1, 1)


@pytest.mark.parametrize("levels", [(1.0,), (0.0, -3.0), (1e-9, 1e9), (149.0, 150.0, 151.0), (5.0, 500.0, 9.0)])
def test_charts_are_whole_for_any_scores(levels: tuple[float, ...]):
    """One score, equal ones, negative ones and a wide range all give SVG whose bars add up and lie inside."""
    pictures = tuple(scored(level, is_good=good) for level in levels for good in (True, False))
    chart = ET.fromstring(histogram(pictures, LIMITS))  # noqa: S314 - our own chart
    tips = [bar.find("title").text for bar in chart.iter("rect")]
    assert sum(int(tip.split()[0]) for tip in tips) == len(pictures)
    for bar in chart.iter("rect"):
        assert 0 <= float(bar.get("x")) <= 560
        assert float(bar.get("width")) > 0
        assert 0 <= float(bar.get("y")) <= 330
    curve = roc(pictures, Operating.at(LIMITS.warn, pictures), Operating.at(LIMITS.reject, pictures))
    assert not re.search("nan|inf", curve)


@pytest.mark.parametrize("size", [(28, 28), (1, 700), (70000, 1), (900, 300), (160, 161), (2000, 3000)])
@pytest.mark.parametrize("channels", [1, 3])
def test_thumbnails_are_bounded(size: tuple[int, int], channels: int):
    """Both thumbnails of any picture are colour pictures of one size, at most 320 px a side."""
    rng = np.random.default_rng(1)
    picture = rng.integers(0, 256, (*size, channels), np.uint8)
    mask = np.zeros(size, bool)
    mask[0, 0] = True
    frame_map = rng.random(size, np.float32) * 300
    example = make_example(scored(200.0, is_good=False), picture, frame_map, mask, LIMITS)
    shapes = [cv2.imdecode(np.frombuffer(j, np.uint8), 1).shape for j in (example.input_jpeg, example.heatmap_jpeg)]
    assert shapes[0] == shapes[1]
    assert max(shapes[0]) <= THUMBNAIL_PX
    assert example.picture.verdict is Verdict.REJECT


def test_a_one_pixel_defect_is_outlined_in_a_shrunk_picture():
    """The outline of a single defective pixel of a large picture is still drawn, around it."""
    picture, mask = np.full((960, 960, 1), 128, np.uint8), np.zeros((960, 960), bool)
    mask[481, 481] = True
    cold = np.zeros((960, 960), np.float32)
    example = make_example(scored(200.0, is_good=False), picture, cold, mask, LIMITS)
    heat = cv2.imdecode(np.frombuffer(example.heatmap_jpeg, np.uint8), 0)
    assert heat[150:170, 150:170].max() > 220
    assert abs(int(heat[20, 20]) - 128) < 5


@pytest.mark.parametrize("value", [1, 255, 256, 65535])
def test_any_value_above_zero_is_defective(tmp_path: Path, value: int):
    """Masks of 8 and 16 bits, with class numbers or full scale, mark the same pixels."""
    mask = np.zeros((4, 5), np.uint16 if value > 255 else np.uint8)
    mask[1, 2] = value
    path = tmp_path / "m.png"
    path.write_bytes(bytes(cv2.imencode(".png", mask)[1]))
    assert np.argwhere(read_mask(path, 4, 5)).tolist() == [[1, 2]]


def test_an_opaque_mask_is_not_defective_all_over(tmp_path: Path):
    """The alpha channel of a colour mask is no ground truth."""
    mask = np.zeros((4, 5, 4), np.uint8)
    mask[:, :, 3] = 255
    path = tmp_path / "m.png"
    path.write_bytes(bytes(cv2.imencode(".png", mask)[1]))
    assert not read_mask(path, 4, 5).any()
