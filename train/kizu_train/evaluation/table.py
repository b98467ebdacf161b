"""The evaluation on a terminal."""

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from kizu_train.evaluation.records import Evaluation, KindRow, Operating


def print_evaluation(evaluation: Evaluation, console: Console) -> None:
    """Print headline figures, the table of kinds and what could not be used."""
    image, pixel = evaluation.image, evaluation.pixel
    console.print(f"image   AUROC {figure(image.auroc)}   AP {figure(image.ap)}")
    console.print(
        f"pixel   AUROC {figure(pixel.auroc)}   AP {figure(pixel.ap)}   "
        f"AU-PRO@0.3 {figure(pixel.au_pro_30)}   AU-PRO@0.05 {figure(pixel.au_pro_05)}"
    )
    console.print(_at("reject", evaluation.reject))
    console.print(_at("warn", evaluation.warn))
    speed = evaluation.timing
    console.print(
        f"speed   {speed.median_ms:.1f} ms a picture (median; 95 % within {speed.p95_ms:.1f}), "
        f"{speed.megapixels_per_s:.2f} megapixels/s"
    )
    console.print(_table(evaluation.kinds))
    if evaluation.pixel_left_out:
        console.print(f"{evaluation.pixel_left_out} defective pictures without a mask: in image figures only")
    for problem in evaluation.unreadable:
        console.print(f"[red]{escape(problem.path)}[/]: {escape(problem.error)}", highlight=False)


def figure(value: float | None) -> str:
    """Write a figure between 0 and 1 with four digits, or a dash where there is none."""
    return "–" if value is None else f"{value:.4f}"


def percent(value: float | None) -> str:
    """Write a share as a percentage, or a dash where there is none."""
    return "–" if value is None else f"{100 * value:.1f} %"


def _at(name: str, point: Operating) -> str:
    return (
        f"{name:<7} escape {percent(point.escape_rate)} ({point.missed} of {point.defective})   "
        f"overkill {percent(point.overkill_rate)} ({point.false_alarms} of {point.good})   F1 {figure(point.f1)}"
    )


def _table(kinds: tuple[KindRow, ...]) -> Table:
    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    table.add_column("kind", overflow="fold")
    for name in ("pictures", "reject", "≥ warn", "AUROC", "px AUROC", "PRO@0.3", "@0.05"):
        table.add_column(name, justify="right", no_wrap=True)
    for row in kinds:
        figures = (row.image.auroc, row.pixel.auroc, row.pixel.au_pro_30, row.pixel.au_pro_05)
        counts = (row.pictures, row.rejected, row.flagged)
        table.add_row(escape(row.kind), *map(str, counts), *map(figure, figures))
    return table
