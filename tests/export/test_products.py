"""Decoders of small tiles as products of matrices: the same numbers, fewer kinds of nodes, only where it pays."""

from collections import Counter

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from torch import Tensor, nn

from kizu_contract.manifest import BatchProfile, Graph
from kizu_export.graph import export_graph, finish_model, to_bytes
from kizu_export.products import as_products

SLOW = ("ConvTranspose", "BatchNormalization", "Pad")


class Decoder(nn.Module):
    """A line, blocks in blocks, and two heads that see their neighbours, as the patch VAE has them."""

    def __init__(self, side: int, *, has_norm: bool, mode: str, is_read_twice: bool = False) -> None:
        super().__init__()
        self.mode, self.is_read_twice = mode, is_read_twice
        self.first = nn.Linear(side**2, 5)
        count = 6 * (side // 4) ** 2
        self.start = nn.Sequential(
            nn.Linear(5, count, bias=not has_norm), nn.BatchNorm1d(count) if has_norm else nn.ReLU()
        )
        self.low = side // 4
        ups = [nn.ConvTranspose2d(low, high, 2, 2, bias=not has_norm) for low, high in ((6, 8), (8, 4))]
        norms = [nn.BatchNorm2d(8), nn.BatchNorm2d(4)] if has_norm else [nn.Identity(), nn.Identity()]
        self.ups = nn.Sequential(*(part for up, norm in zip(ups, norms, strict=True) for part in (up, norm, nn.ReLU())))
        self.heads = nn.ModuleList([nn.Conv2d(4, 1, 4), nn.Conv2d(4, 2, 3, padding=1)])

    def forward(self, tiles: Tensor) -> tuple[Tensor, Tensor]:
        """Tiles uint8 [N, T, T, 1] → score [N], map [N, T, T]."""
        latent = self.first(tiles.float().flatten(1) / 255)
        start = torch.relu(self.start(latent)).reshape(-1, 6, self.low, self.low)
        made = self.ups(start)
        one = self.heads[0](nn.functional.pad(made, (1, 2, 1, 2), mode=self.mode))
        two = self.heads[1](made)
        cells = one[:, 0] + 2 * two[:, 0] + 3 * two[:, 1]
        if self.is_read_twice:
            cells = cells + made.mean(1)
        return cells.square().mean((1, 2)), cells


def exported(
    side: int, *, has_norm: bool = True, mode: str = "reflect", is_read_twice: bool = False
) -> onnx.ModelProto:
    """A decoder of its own weights, as the export traces it."""
    with torch.random.fork_rng():
        torch.manual_seed(3)
        network = Decoder(side, has_norm=has_norm, mode=mode, is_read_twice=is_read_twice).eval()
        for part in network.modules():
            if isinstance(part, nn.BatchNorm1d | nn.BatchNorm2d):
                part.running_mean.normal_(0, 0.2)
                part.running_var.uniform_(0.5, 2)
                part.weight.data.uniform_(0.5, 2)
                part.bias.data.normal_(0, 0.2)
        return export_graph(network, _graph(side))


def _graph(side: int) -> Graph:
    return Graph(17, "fp32", ("tiles",), side, 1, 1, BatchProfile(1, 8, 16))


def _run(model: onnx.ModelProto, side: int) -> list[np.ndarray]:
    tiles = np.random.default_rng(4).integers(0, 256, (7, side, side, 1), np.uint8)
    session = ort.InferenceSession(to_bytes(finish_model(model, _graph(side))), providers=["CPUExecutionProvider"])
    return session.run(["score", "map"], {"tiles": tiles})


@pytest.mark.parametrize("mode", ["reflect", "constant", "replicate"])
@pytest.mark.parametrize("has_norm", [True, False])
def test_a_small_decoder_becomes_products(mode: str, has_norm: bool) -> None:
    """No transposed convolution, no norm, no border is left, and every number stays in its place."""
    model = exported(8, has_norm=has_norm, mode=mode)
    rewritten = as_products(model)
    kinds = Counter(node.op_type for node in rewritten.graph.node)
    assert not any(kinds[kind] for kind in (*SLOW, "Conv")), kinds
    for found, wanted in zip(_run(rewritten, 8), _run(model, 8), strict=True):
        np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-5)


def test_the_original_is_left_as_it_is() -> None:
    """The graph that lower precisions begin with is not touched."""
    model = exported(8)
    before = model.SerializeToString(deterministic=True)
    as_products(model)
    assert model.SerializeToString(deterministic=True) == before


def test_a_larger_map_stays_as_it_is() -> None:
    """Its heads would cost more as matrices, and moving its pixels back more than was gained."""
    model = exported(32)
    assert as_products(model) is model


def test_a_map_that_others_read_stays_as_it_is() -> None:
    """What reads blocks as a map would have to move them."""
    model = exported(8, is_read_twice=True)
    assert as_products(model) is model


def test_weights_that_others_read_stay_in_their_order() -> None:
    """A product whose numbers go elsewhere too is not turned."""
    model = exported(8)
    start = next(node for node in model.graph.node if node.op_type == "Relu")
    model.graph.node.append(onnx.helper.make_node("Neg", [start.output[0]], ["more"], name="more"))
    assert as_products(model) is model


def _graph_of(nodes: list[onnx.NodeProto], constants: dict[str, np.ndarray], x: list, y: list) -> onnx.ModelProto:
    """A model of `nodes` from `x` to `y` of those shapes, checked and with its shapes inferred."""
    tensors = [onnx.numpy_helper.from_array(value, name) for name, value in constants.items()]
    values = [onnx.helper.make_tensor_value_info(name, 1, shape) for name, shape in (("x", x), ("y", y))]
    graph = onnx.helper.make_graph(nodes, "g", values[:1], values[1:], tensors)
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 17)], ir_version=8)
    onnx.checker.check_model(model)
    return onnx.shape_inference.infer_shapes(model, data_prop=True)


@pytest.mark.parametrize(
    ("shape", "rows", "bias"), [([-1, 3, 2, 2], "N", (24,)), ([2, 3, 2, 2], 4, (6,)), ([-1, 6, 2, 2], "N", (24,))]
)
def test_maps_that_are_no_rows_and_maps_that_leave_stay_as_they_are(
    shape: list[int], rows: int | str, bias: tuple[int, ...]
) -> None:
    """Two maps of a row, a map of two rows; and one that is an output of the graph itself."""
    draw = np.random.default_rng(0)
    constants = {
        "w": draw.normal(size=(5, bias[0])).astype(np.float32),
        "b": draw.normal(size=bias).astype(np.float32),
        "shape": np.array(shape, np.int64),
        "k": draw.normal(size=(shape[1], 4, 2, 2)).astype(np.float32),
    }
    nodes = [
        onnx.helper.make_node("Gemm", ["x", "w", "b"], ["line"]),
        onnx.helper.make_node("Reshape", ["line", "shape"], ["map"]),
        onnx.helper.make_node("ConvTranspose", ["map", "k"], ["y"], strides=[2, 2]),
    ]
    model = _graph_of(nodes, constants, [rows, 5], [None, 4, 4, 4])
    assert as_products(model) is model


@pytest.mark.parametrize("bias", [(1,), (1, 24), (24,)])
@pytest.mark.parametrize(
    "options",
    [
        {"pads": [1, 0, 0, 1]},
        {"strides": [2, 2]},
        {"dilations": [2, 2]},
        {"group": 2},
        {"auto_pad": "SAME_UPPER"},
    ],
)
def test_whatever_the_convolution_is(options: dict, bias: tuple[int, ...]) -> None:
    """Its matrix is found by running it; the bias of the line before may be one number for all."""
    draw = np.random.default_rng(1)
    constants = {
        "w": draw.normal(size=(5, 24)).astype(np.float32),
        "b": draw.normal(size=bias).astype(np.float32),
        "shape": np.array([-1, 6, 2, 2], np.int64),
        "k": draw.normal(size=(6, 4, 2, 2)).astype(np.float32),
        "h": draw.normal(size=(2, 4 // options.get("group", 1), 2, 2)).astype(np.float32),
    }
    nodes = [
        onnx.helper.make_node("Gemm", ["x", "w", "b"], ["line"]),
        onnx.helper.make_node("Reshape", ["line", "shape"], ["map"]),
        onnx.helper.make_node("ConvTranspose", ["map", "k"], ["made"], strides=[2, 2]),
        onnx.helper.make_node("Conv", ["made", "h"], ["y"], **options),
    ]
    model = _graph_of(nodes, constants, ["N", 5], [None, 2, None, None])
    rewritten = as_products(model)
    assert {node.op_type for node in rewritten.graph.node} == {"Gemm", "Reshape"}
    x = draw.normal(size=(3, 5)).astype(np.float32)
    found, wanted = (
        ort.InferenceSession(one.SerializeToString(), providers=["CPUExecutionProvider"]).run(["y"], {"x": x})[0]
        for one in (rewritten, model)
    )
    np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-5)
