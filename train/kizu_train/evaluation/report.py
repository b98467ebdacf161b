"""The evaluation as one HTML page for people: everything inside, no script, nothing fetched."""

import base64
from collections.abc import Mapping, Sequence
from html import escape
from importlib.resources import files
from pathlib import Path

from kizu_contract.bundle import write_atomically
from kizu_train.evaluation.charts import histogram, roc
from kizu_train.evaluation.metrics import wilson_interval
from kizu_train.evaluation.records import Evaluation, Example, KindRow
from kizu_train.evaluation.table import figure, percent

_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
# OpenCV's turbo at the ends and quarters of the range in which the overlay colours.
_KEY = "linear-gradient(90deg, #30123b, #4686fb, #1ae4b6, #a2fc3c, #faba39, #e4460a, #7a0403)"


def write_report(
    path: Path,
    evaluation: Evaluation,
    *,
    title: str = "Evaluation",
    facts: Mapping[str, str] | None = None,
    provenance: Mapping[str, str] | None = None,
) -> None:
    """Write `evaluation` to `path` as one self-contained HTML file of a few megabytes at most.

    `facts` stand under the title (model, version, data …), `provenance` at the foot of the page, both in their order.
    Raises OSError when the disk refuses.
    """
    write_atomically(path, render(evaluation, title, facts or {}, provenance or {}).encode())


def render(evaluation: Evaluation, title: str, facts: Mapping[str, str], provenance: Mapping[str, str]) -> str:
    """Give the page as text."""
    style = files("kizu_train.evaluation").joinpath("report.css").read_text(encoding="utf-8")
    sections = [
        _header(evaluation, title, facts),
        _tiles(evaluation),
        _charts(evaluation),
        _kinds(evaluation.kinds),
        _galleries(evaluation),
        _problems(evaluation),
        _footer(evaluation, provenance),
    ]
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">'
        f"<title>{escape(title)}</title><style>\n{style}</style></head>\n<body><main>\n"
        + "\n".join(section for section in sections if section)
        + "\n</main></body></html>\n"
    )


def _header(evaluation: Evaluation, title: str, facts: Mapping[str, str]) -> str:
    reject = evaluation.reject
    shown = {
        **facts,
        "Test pictures": f"{reject.good} good, {reject.defective} defective",
        "Measured": f"{evaluation.evaluated[:10]} {evaluation.evaluated[11:16]} UTC",
    }
    return f'<header><span class="brand">kizu inspection report</span><h1>{escape(title)}</h1>{_facts(shown)}</header>'


def _facts(facts: Mapping[str, str]) -> str:
    rows = "".join(f"<div><dt>{escape(name)}</dt><dd>{escape(value)}</dd></div>" for name, value in facts.items())
    return f'<dl class="facts">{rows}</dl>'


def _tiles(evaluation: Evaluation) -> str:
    reject, warn, image, pixel = evaluation.reject, evaluation.warn, evaluation.image, evaluation.pixel
    found, speed = reject.defective - reject.missed, evaluation.timing
    tiles = []
    if reject.defective:
        tiles += [
            _tile(
                "Defects caught",
                percent(found / reject.defective),
                f"{_of(found, reject.defective)} · warn or worse: {warn.defective - warn.missed}",
                f"Share of defective pictures held back at the reject threshold; the rest, "
                f"{percent(reject.escape_rate)}, would escape.",
            )
        ]
    if reject.good:
        tiles += [
            _tile(
                "False alarms",
                percent(reject.overkill_rate),
                f"{_of(reject.false_alarms, reject.good)} · warn or worse: {warn.false_alarms}",
                "Overkill: share of good pictures held back at the reject threshold.",
            )
        ]
    if image.auroc is not None:
        tiles += [
            _tile(
                "Image AUROC",
                figure(image.auroc),
                f"average precision {figure(image.ap)}",
                "How well scores tell defective pictures from good ones at any threshold: 1 is perfect, 0.5 is chance.",
            ),
            _tile(
                "F1 at reject",
                figure(reject.f1),
                f"at warn {figure(warn.f1)}",
                "Catching defects and avoiding false alarms in one figure: 1 is perfect.",
            ),
        ]
    if pixel.auroc is not None:
        tiles += [
            _tile(
                "Pixel AUROC",
                figure(pixel.auroc),
                f"average precision {figure(pixel.ap)}",
                f"How well the heatmap tells defective from good pixels, over {evaluation.pixel_pictures} pictures.",
            ),
            _tile(
                "AU-PRO@0.3",
                figure(pixel.au_pro_30),
                f"@0.05 {figure(pixel.au_pro_05)} · {evaluation.regions} regions",
                "How much of each defect, small ones counting like large ones, the heatmap covers at few false pixels.",
            ),
        ]
    tiles += [
        _tile(
            "Time per picture",
            f"{speed.median_ms:.1f} ms",
            f"95 % within {speed.p95_ms:.1f} ms · {speed.megapixels_per_s:.2f} MP/s",
            "From pixels in memory to the finished heatmap, one picture at a time, on the machine that measured.",
        )
    ]
    return f'<section class="tiles">{"".join(tiles)}</section>'


def _tile(name: str, value: str, more: str, why: str) -> str:
    return (
        f'<div class="tile"><span class="name">{escape(name)}</span><b>{escape(value)}</b>'
        f'<span class="more">{escape(more)}</span><p class="why">{escape(why)}</p></div>'
    )


def _of(count: int, of: int) -> str:
    """Count and what it may be in the long run: few pictures prove little, and the page says so."""
    interval = wilson_interval(count, of)
    if interval is None:
        return "none"
    return f"{count} of {of} (95 %: {100 * interval[0]:.0f}–{100 * interval[1]:.0f} %)"


def _charts(evaluation: Evaluation) -> str:
    charts = [
        _chart(
            "Scores and thresholds",
            "Right of the reject line a picture is held back; each row has its own scale of counts.",
            histogram(evaluation.pictures, evaluation.thresholds),
        )
    ]
    if evaluation.reject.good and evaluation.reject.defective:
        charts.append(
            _chart(
                "Caught defects against false alarms",
                f"ROC over all possible thresholds; area {figure(evaluation.image.auroc)}.",
                roc(evaluation.pictures, evaluation.warn, evaluation.reject),
            )
        )
    return f'<h2>How scores separate</h2><section class="charts">{"".join(charts)}</section>'


def _chart(title: str, note: str, svg: str) -> str:
    caption = f"<figcaption><b>{escape(title)}</b>{escape(note)}</figcaption>"
    return f'<figure class="card">{caption}{svg}</figure>'


def _kinds(kinds: Sequence[KindRow]) -> str:
    names = ("Kind", "Pictures", "Rejected", "Warn or reject", "AUROC", "Pixel AUROC", "AU-PRO@0.3", "AU-PRO@0.05")
    head = "".join(f"<th>{escape(name)}</th>" for name in names)
    return (
        "<h2>By kind</h2>"
        '<p class="note">Each kind of defect is measured against all good pictures; '
        "pixel figures need pictures with a drawn mask.</p>"
        f'<div class="card scroll"><table><thead><tr>{head}</tr></thead><tbody>{"".join(map(_row, kinds))}</tbody>'
        "</table></div>"
    )


def _row(row: KindRow) -> str:
    cells = (
        row.kind,
        str(row.pictures),
        f"{row.rejected} ({percent(row.rejected / row.pictures)})",
        f"{row.flagged} ({percent(row.flagged / row.pictures)})",
        figure(row.image.auroc),
        figure(row.pixel.auroc),
        figure(row.pixel.au_pro_30),
        figure(row.pixel.au_pro_05),
    )
    return f"<tr>{''.join(f'<td>{escape(cell)}</td>' for cell in cells)}</tr>"


def _galleries(evaluation: Evaluation) -> str:
    examples, reject = evaluation.examples, evaluation.reject
    missed = f"{reject.missed} of {reject.defective} defective pictures passed at the reject threshold; "
    alarms = f"{reject.false_alarms} of {reject.good} good pictures were held back at the reject threshold; "
    shown = [
        _gallery("Missed defects, worst first", missed + "the lowest ratios come first.", examples.misses),
        _gallery("False alarms, worst first", alarms + "the highest ratios come first.", examples.false_alarms),
        _gallery("Best catches", "The clearest defects, kinds taking turns.", examples.catches),
    ]
    if not any(shown):
        return ""
    key = (
        '<h2>Pictures</h2><p class="note">Left the input, right its heatmap. Colour means the same everywhere: none '
        "below half the warn threshold"
        f'<span class="key" style="background:{_KEY}"></span>deep red from twice the reject threshold on. '
        "An outline marks the true defect where one was drawn. Ratio is score ÷ reject threshold: 1 is the limit.</p>"
    )
    return key + "".join(shown)


def _gallery(title: str, note: str, examples: Sequence[Example]) -> str:
    if not examples:
        return ""
    figures = "".join(map(_figure, examples))
    return f'<h2>{escape(title)}</h2><p class="note">{escape(note)}</p><section class="gallery">{figures}</section>'


def _figure(example: Example) -> str:
    picture = example.picture
    name = escape(picture.path)
    verdict = picture.verdict.value
    return (
        '<figure class="card"><div class="pair">'
        f'<img alt="{name}" src="{_data_uri(example.input_jpeg)}">'
        f'<img alt="heatmap of {name}" src="{_data_uri(example.heatmap_jpeg)}"></div>'
        f'<figcaption><span class="file">{name}</span><span class="verdict {verdict}">{verdict}</span> '
        f"ratio {picture.ratio:.3f} · score {picture.score:.5g}"
        f"{'' if example.has_mask or picture.is_good else ' · no mask'}</figcaption></figure>"
    )


def _data_uri(jpeg: bytes) -> str:
    return f"data:image/jpeg;base64,{base64.b64encode(jpeg).decode()}"


def _problems(evaluation: Evaluation) -> str:
    if not evaluation.unreadable:
        return ""
    rows = "".join(f"<li><b>{escape(one.path)}</b>: {escape(one.error)}</li>" for one in evaluation.unreadable)
    return (
        "<h2>Could not be used</h2>"
        '<p class="note">These pictures are in none of the figures; a mask that is named here leaves only its '
        f'picture’s pixels out.</p><ul class="card problems">{rows}</ul>'
    )


def _footer(evaluation: Evaluation, provenance: Mapping[str, str]) -> str:
    limits = evaluation.thresholds
    lines = {"Thresholds": f"warn {limits.warn:.6g}, reject {limits.reject:.6g}", **provenance}
    left_out = evaluation.pixel_left_out
    note = (
        "Pixel figures pool all pixels at the pictures’ own size, without a grid of thresholds; AU-PRO takes "
        "8-connected regions and counts false positives over all defect-free pixels, those of good pictures included."
    )
    if left_out:
        note += f" {left_out} defective pictures have no mask, or an empty one, and are in picture figures only."
    return f'<footer><p class="note">{escape(note)}</p>{_facts(lines)}</footer>'
