"""From a torch scorer to an ONNX model: one traced graph, its interface spelled out, nothing of this machine in it."""

import tempfile
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path

import onnx
import torch
from torch import Tensor, nn

from kizu_contract.manifest import Graph
from kizu_export.errors import ExportError
from kizu_export.simplify import (
    cast_first,
    choose_rows,
    fold_constants,
    fold_shapes,
    merge_constants,
    spell_out_softplus,
)

OPSET = 17
"""Taken by onnxruntime >= 1.18 and TensorRT >= 8.5, and the newest that torch's tracing exporter writes natively
without axes that became inputs later."""
Shapes = Mapping[str, Sequence[int]]
"""Sizes of `frame`, `score` and `map` of a graph of whole frames."""
_BATCH = "N"
_INFER_OPTIONS = {"check_type": True, "strict_mode": True, "data_prop": True}


class ScorerGraph(nn.Module):
    """What ships: `tiles` uint8 [N, T, T, C] → `score` float32 [N], `map` float32 [N, T/m, T/m].

    Detectors that learn each place take `position` int64 [N] too.
    """

    def __init__(self, scorer: nn.Module, graph: Graph) -> None:
        super().__init__()
        self.scorer = scorer
        self.side = graph.tile_px // graph.map_cell_px

    def forward(self, *inputs: Tensor) -> tuple[Tensor, Tensor]:
        """Score tiles; the reshapes only write the interface's shapes into the graph."""
        score, cells = self.scorer(*inputs)
        return score.float().reshape(-1), cells.float().reshape(-1, self.side, self.side)


def export_graph(scorer: nn.Module, graph: Graph) -> onnx.ModelProto:
    """Trace `scorer` (eval mode, on the CPU) into a checked ONNX model of opset 17 with a dynamic batch only.

    torch's tracing exporter is used on purpose: its graph holds plain operators (one Softplus where the newer exporter
    writes four), takes a tenth of the time, and needs no onnxscript. Raises ExportError when tracing fails.
    """
    pixels = torch.arange(2 * graph.tile_px**2 * graph.channels).reshape(2, graph.tile_px, graph.tile_px, -1)
    # Two tiles of the first place: every frame has one.
    example = (pixels.to(torch.uint8), torch.zeros(2, dtype=torch.int64))[: len(graph.inputs)]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "scorer.onnx"
        _trace(ScorerGraph(scorer, graph).eval(), example, graph.inputs, path, _BATCH)
        return finish_model(onnx.load(path), graph)


def export_frame_graph(module: nn.Module, shapes: Shapes) -> onnx.ModelProto:
    """Trace a module of whole frames (eval mode, on the CPU): one `frame` in, `score` and `map` out, all sizes fixed.

    Raises ExportError when tracing fails or the sizes are others than `shapes`.
    """
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "frame.onnx"
        _trace(module, (torch.zeros(shapes["frame"], dtype=torch.uint8),), ("frame",), path, None)
        return finish_frame_model(onnx.load(path), shapes)


def _trace(
    module: nn.Module, example: tuple[Tensor, ...], inputs: tuple[str, ...], path: Path, batch: str | None
) -> None:
    outputs = ("score", "map")
    try:
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the exporter announces its successor and every traced shape
            torch.onnx.export(
                module,
                example,
                path,
                input_names=list(inputs),
                output_names=list(outputs),
                dynamic_axes={name: {0: batch} for name in (*inputs, *outputs) if batch is not None},
                opset_version=OPSET,
                dynamo=False,
            )
    except (RuntimeError, ValueError, TypeError) as exc:
        raise ExportError(f"torch cannot export this detector's scorer to ONNX: {exc}") from exc


def finish_model(model: onnx.ModelProto, graph: Graph) -> onnx.ModelProto:
    """Write the interface's shapes, strip what varies between machines, infer all types and shapes.

    Raises ExportError when the graph contradicts the interface.
    """
    side = graph.tile_px // graph.map_cell_px
    shapes = {"tiles": [graph.tile_px, graph.tile_px, graph.channels], "map": [side, side]}
    names = (*graph.inputs, "score", "map")
    return _finish(model, graph.inputs, {name: [_BATCH, *shapes.get(name, [])] for name in names})


def finish_frame_model(model: onnx.ModelProto, shapes: Shapes) -> onnx.ModelProto:
    """As `finish_model`, for a graph of whole frames; weights that several parts of it use are kept once."""
    finished = _finish(model, ("frame",), shapes)
    # Sizes that torch computes from shapes are known here; each round reveals the shapes behind the last one.
    while fold_shapes(finished):
        finished = _finish(finished, ("frame",), shapes)
    merge_constants(finished.graph)
    return finished


def _finish(
    model: onnx.ModelProto, inputs: Sequence[str], shapes: Mapping[str, Sequence[int | str]]
) -> onnx.ModelProto:
    found = [value.name for value in model.graph.input]
    if found != list(inputs):
        raise ExportError(f"the exported graph takes {found}, not {list(inputs)}: it ignores what is not listed")
    for value in (*model.graph.input, *model.graph.output):
        _write_shape(value, shapes[value.name])
    _strip(model)
    fold_constants(model)
    cast_first(model.graph)
    spell_out_softplus(model.graph)
    choose_rows(model.graph)
    try:
        inferred = onnx.shape_inference.infer_shapes(model, **_INFER_OPTIONS)
        onnx.checker.check_model(inferred)
    except (onnx.shape_inference.InferenceError, onnx.checker.ValidationError) as exc:
        raise ExportError(f"the exported graph contradicts itself or its interface: {exc}") from exc
    return inferred


def to_bytes(model: onnx.ModelProto) -> bytes:
    """Serialise for a bundle: without the inferred shapes inside, the same model always gives the same bytes."""
    slim = onnx.ModelProto()
    slim.CopyFrom(model)
    del slim.graph.value_info[:]
    return bytes(slim.SerializeToString(deterministic=True))


def _write_shape(value: onnx.ValueInfoProto, lengths: Sequence[int | str]) -> None:
    shape = value.type.tensor_type.shape
    del shape.dim[:]
    for length in lengths:
        if isinstance(length, str):
            shape.dim.add().dim_param = length
        else:
            shape.dim.add().dim_value = length


def _strip(model: onnx.ModelProto) -> None:
    """Drop doc strings, metadata and producer, which hold versions and sometimes source paths."""
    model.producer_name, model.producer_version = "kizu", ""
    model.domain, model.doc_string, model.model_version = "", "", 0
    model.graph.name, model.graph.doc_string = "scorer", ""
    del model.metadata_props[:]
    for value in (*model.graph.input, *model.graph.output, *model.graph.initializer, *model.graph.node):
        value.doc_string = ""
        del value.metadata_props[:]
