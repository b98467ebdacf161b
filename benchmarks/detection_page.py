"""docs/detection.md: the tables of the bench, with the words that stand around them."""

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from detection_tables import Defaults, Spread, Summary, accuracy

_HEAD = """# Detection, measured

<!-- Written by scripts/bench detection; the words stand in benchmarks/detection_page.py. Do not edit by hand. -->

Every figure is that of the **exported bundle** on the agent's own engine (onnxruntime, CPU): what ships is what was
measured. Made with

    {command}

at {commits} on {machine}; {seeds}. What each method is stands in [methods.md](methods.md).{missing}

How to read the tables:

- *image AUROC*: the chance that a defective picture scores higher than a good one. *pixel AUROC*: the same of pixels.
  *AU-PRO*: how much of each defect region is found, up to a false positive rate of 0.3 and of 0.05, so that small
  defects count as much as large ones. 1 is perfect; 0.5 is chance for the AUROCs.
- *escape / overkill*: share of defective pictures that pass and of good ones held back at the shipped threshold, set on
  held-out good pictures for {asked} false alarms (`reject`; `warn` is laxer). With few good pictures thresholds stand
  far out: overkill is low and escapes are many until good pictures are added.
- *training*: seconds to learn, on {threads}. *ms*: for a picture of 256 × 256 pixels on one CPU thread, from host
  memory to map. Other work on the machine lengthens both: compare them roughly, or in one run.
- ± is the deviation over seeds. **Bold** is the best of a column. The last column says what a method is only for.
- `+backbone`: with pretrained weights given by the user; kizu ships none. `@l`: another kind of score of the same
  training.
"""

_DEFAULTS = """
## The three defaults

Chosen by the mean of image AUROC and AU-PRO@0.3 over all sets of this page. No test picture took part in training, but
they did in this choice: on other products the order may differ. `kizu-train fit auto` chooses without any, by planted
flaws in your own good pictures.

| | method | image AUROC | AU-PRO@0.3 | ms |
|---|---|---|---|---|
"""

_SMALL = """
## The published small experiments

Parameters as published (see methods.md). Made with

    {command}

at commit `{commit}`.

| what | measured | unit | aim | met |
|---|---|---|---|---|
"""

_COLUMNS = (
    ("image_auroc", "image AUROC", 1.0, 3),
    ("pixel_auroc", "pixel AUROC", 1.0, 3),
    ("au_pro_30", "AU-PRO@0.3", 1.0, 3),
    ("au_pro_05", "AU-PRO@0.05", 1.0, 3),
    ("reject_escape", "escape %, reject", 100.0, 1),
    ("reject_overkill", "overkill %, reject", 100.0, 1),
    ("warn_escape", "escape %, warn", 100.0, 1),
    ("warn_overkill", "overkill %, warn", 100.0, 1),
    ("training_s", "training s", 1.0, 0),
    ("ms_256", "ms", 1.0, 1),
    ("bundle_bytes", "bundle MB", 1e-6, 2),
)
_HIGHER_IS_BETTER = ("image_auroc", "pixel_auroc", "au_pro_30", "au_pro_05")


def write_page(
    path: Path,
    *,
    facts: dict[str, str],
    per_set: dict[str, Sequence[Summary]],
    means: Sequence[Summary],
    defaults: Defaults,
    small: Path,
) -> None:
    """Write the page: `facts` fill the head, `per_set` and `means` the tables, `small` is the other bench's JSON."""
    text = _HEAD.format(**facts)
    text += _defaults(defaults)
    text += "\n## Mean over the sets\n\n" + _table(means)
    for name, rows in per_set.items():
        text += f"\n## {name}\n\n{_about(rows)}" + _table(rows)
    if small.is_file():
        text += _small(json.loads(small.read_text(encoding="utf-8")))
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")


def _about(rows: Sequence[Summary]) -> str:
    done = next((row for row in rows if row.figures), None)
    if done is None:
        return ""
    learned, held = (done.figures[name].mean for name in ("train_pictures", "calibrated_on"))
    return f"Learned from {learned:.0f} good pictures, thresholds set on {held:.0f} others.\n\n"


def _table(rows: Sequence[Summary]) -> str:
    lines = [
        "| method | " + " | ".join(title for _, title, _, _ in _COLUMNS) + " | only for |",
        "|---|" + "---:|" * len(_COLUMNS) + "---|",
    ]
    best = {name: _best(rows, name) for name in _HIGHER_IS_BETTER}
    for row in sorted(rows, key=accuracy, reverse=True):
        if row.figures:
            lines.append(_line(row, best))
        else:
            lines.append(f"| {row.method} | failed: {_safe(row.failed or '')} |" + " |" * len(_COLUMNS))
    return "\n".join(lines) + "\n"


def _line(row: Summary, best: dict[str, float | None]) -> str:
    cells = []
    for name, _, factor, digits in _COLUMNS:
        spread = row.figures.get(name)
        text = "–" if spread is None else _number(spread, factor, digits)
        is_best = spread is not None and best.get(name) is not None and spread.mean == best[name]
        cells.append(f"**{text}**" if is_best else text)
    failed = f" (some seeds failed: {_safe(row.failed)})" if row.failed else ""
    only = "parts in a fixture" if row.is_fixtured else ""
    return f"| {row.method}{failed} | " + " | ".join(cells) + f" | {only} |"


def _number(spread: Spread, factor: float, digits: int) -> str:
    mean = f"{spread.mean * factor:.{digits}f}"
    if spread.deviation is None or spread.deviation * factor < 0.5 * 10**-digits:
        return mean
    return f"{mean} ± {spread.deviation * factor:.{digits}f}"


def _best(rows: Sequence[Summary], name: str) -> float | None:
    values = [row.figures[name].mean for row in rows if name in row.figures]
    return max(values, default=None)


def _defaults(found: Defaults) -> str:
    named = (
        ("most accurate without weights", found.best),
        ("fastest within two points of it", found.fastest),
        ("most accurate with a backbone", found.with_backbone),
    )
    lines = []
    for what, row in named:
        figures = [] if row is None else [(row.figures["image_auroc"], 3), (row.figures["au_pro_30"], 3)]
        shown = " | ".join(_number(spread, 1.0, digits) for spread, digits in figures) or "– | –"
        speed = "–" if row is None else _number(row.figures["ms_256"], 1.0, 1)
        lines.append(f"| {what} | {row.method if row else 'none measured'} | {shown} | {speed} |")
    return _DEFAULTS + "\n".join(lines) + "\n"


def _small(report: dict[str, Any]) -> str:
    lines = []
    for row in report["rows"]:
        sign = "≤" if row.get("at_most") else "≥"
        aim = "" if row["aim"] is None else f"{sign} {row['aim']:g}"
        met = {None: "", True: "yes", False: "no"}[row["met"]]
        lines.append(f"| {_safe(row['name'])} | {row['value']:.4g} | {row['unit']} | {aim} | {met} |")
    return _SMALL.format(command=report["command"], commit=report["commit"]) + "\n".join(lines) + "\n"


def _safe(text: str) -> str:
    """Text for a table's cell; of a path of this machine only the file's name."""
    return re.sub(r"(?<!\S)/(?:[^\s/]+/)+", "", text).replace("|", "/").replace("\n", " ")
