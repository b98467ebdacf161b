"""A bundle for people to read, and as JSON."""

import json
from dataclasses import asdict

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from kizu_contract.bundle import Bundle
from kizu_contract.manifest import PrecisionLoss
from kizu_export.checks import GraphFacts, graph_facts


def as_json(bundle: Bundle) -> str:
    """Manifest, graph facts, hash and golden count as one JSON object."""
    whole = {
        "manifest": json.loads(bundle.manifest.to_json()),
        "graph_facts": asdict(graph_facts(bundle.scorer)),
        "frame_graph_facts": asdict(graph_facts(bundle.frame_graph)) if bundle.frame_graph is not None else None,
        "golden_tiles": len(bundle.golden.tiles),
        "preview_bytes": len(bundle.preview),
        "sha256": bundle.sha256,
        "is_signed": bundle.is_signed,
        "signed_by": bundle.signed_by,
    }
    return json.dumps(whole, indent=2, ensure_ascii=False, allow_nan=False)


def print_bundle(bundle: Bundle, console: Console) -> None:
    """Print what matters of a bundle, the rest is in `as_json`. Raises ExportError when the graph is not ONNX."""
    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    for name, text in _rows(bundle, graph_facts(bundle.scorer)):
        table.add_row(f"[bold]{name}[/]", escape(text))
    console.print(table)


def _rows(bundle: Bundle, facts: GraphFacts) -> list[tuple[str, str]]:
    manifest = bundle.manifest
    graph, grid, limits, origin = manifest.graph, manifest.grid, manifest.thresholds, manifest.provenance
    cells = graph.tile_px // graph.map_cell_px
    batch = graph.batch
    return [
        ("model", f"{manifest.name} {manifest.version}, made {manifest.created}"),
        ("content", bundle.sha256),
        ("signed", _signature(bundle)),
        ("input", f"tiles uint8 [N, {graph.tile_px}, {graph.tile_px}, {graph.channels}] ({manifest.colour})"),
        ("output", f"score float32 [N], map float32 [N, {cells}, {cells}] (cells of {graph.map_cell_px} px)"),
        ("batch", f"{batch.min} / {batch.opt} / {batch.max} tiles (min / opt / max)"),
        ("graph", f"{graph.precision}, opset {facts.opset}, {facts.parameters:,} numbers, {facts.bytes:,} bytes"),
        ("precision", _precision(graph.precision, manifest.precision)),
        ("operators", ", ".join(f"{name} ×{count}" for name, count in facts.operators.items())),
        ("grid", f"tiles every {grid.stride_px} px, margin {grid.margin_px} px"),
        ("frames", "of any size" if manifest.frame is None else f"of {manifest.frame} pixels only"),
        ("frame graph", _frame_graph(bundle)),
        ("frame score", f"{manifest.reduction.kind}, smoothed by {manifest.reduction.smooth_sigma_px:g} px"),
        ("warn", f"{limits.warn:.4g} (1 false alarm in {1 / limits.warn_rate:.0f} good frames)"),
        ("reject", f"{limits.reject:.4g} (1 false alarm in {1 / limits.reject_rate:.0f} good frames)"),
        ("calibrated", f"on {manifest.calibration.frames} held-out good pictures"),
        (
            "trained",
            f"{origin.detector}, {origin.train_pictures} pictures, seed {origin.seed}, kizu {origin.kizu_version}",
        ),
        ("golden", f"{len(bundle.golden.tiles)} tiles"),
        *(("metric", f"{name} {value:.4g}") for name, value in sorted(origin.metrics.items())),
    ]


def _frame_graph(bundle: Bundle) -> str:
    record = bundle.manifest.frame_graph
    if record is None or bundle.frame_graph is None:
        return "none: every frame is cut into tiles"
    how = "overlaps computed once" if record.form == "shared" else "tiles cut inside"
    times = f"{record.speedup:g} times as fast as tiles where it was exported"
    return f"{record.size} whole, {how}, {times}, {len(bundle.frame_graph):,} bytes"


def loss_in_words(loss: PrecisionLoss) -> str:
    """What a lower precision costs, in one line."""
    on = "test pictures" if loss.measured_on == "tests" else "pictures, flaws planted"
    pictures = f"{loss.good_pictures} good and {loss.defective_pictures} defective {on}"
    kept = f", {loss.layers_kept} layers left in fp32" if loss.layers_kept else ""
    return (
        f"image AUROC {loss.image_auroc_after:.4f}, in fp32 {loss.image_auroc_before:.4f}, on {pictures}; good scores "
        f"and their threshold moved by at most {loss.most_shift:.3f} of it{kept}"
    )


def _precision(kind: str, loss: PrecisionLoss | None) -> str:
    if loss is not None:
        return f"{kind}: {loss_in_words(loss)}"
    return kind if kind == "fp32" else f"{kind}; nobody measured what it loses"


def _signature(bundle: Bundle) -> str:
    """A signature does not tell its key: only those that are given can be tried."""
    if not bundle.is_signed:
        return "no"
    return f"by the key {bundle.signed_by}" if bundle.signed_by else "yes; give --key PUB to see whether by that key"
