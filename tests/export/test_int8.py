"""Eight bits: the form that TensorRT takes, fused by onnxruntime, near fp32, and the same bytes every time."""

from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from onnx import TensorProto, numpy_helper
from torch import Tensor, nn

from kizu_agent.engine import Engine
from kizu_agent.settings import EngineConfig
from kizu_contract.manifest import BatchProfile, Graph
from kizu_contract.onnx_wire import ACTIVATION_ZERO, as_unsigned
from kizu_export.checks import check_graph
from kizu_export.errors import ExportError
from kizu_export.gathers import moves_as_gathers
from kizu_export.graph import export_graph, finish_model, to_bytes
from kizu_export.layers import layers_of
from kizu_export.quantise import quantise
from kizu_export.ranges import measure_ranges
from kizu_export.subpixels import as_convolutions

TILE_PX = 32
GRAPH = Graph(17, "int8", ("tiles",), TILE_PX, 1, 4, BatchProfile(1, 8, 16))


class Mirrored(nn.Module):
    """A small U-Net of what detectors are made of: mirrored borders, ReLUs, a way round, enlargements, products."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = self._layer(1, 8, 5, 2)
        self.down = self._layer(8, 16, 3, 2)
        self.middle = nn.Sequential(nn.Linear(16 * 8 * 8, 12), nn.ReLU(), nn.Linear(12, 16 * 8 * 8))
        self.up = nn.ConvTranspose2d(16, 8, 2, 2)
        self.norm = nn.BatchNorm2d(8)
        self.join = self._layer(16, 8, 3, 1)
        self.head = nn.ConvTranspose2d(8, 1, 4, 2, 3)

    def forward(self, tiles: Tensor) -> tuple[Tensor, Tensor]:
        """Tiles uint8 [N, 32, 32, 1] → score [N], map [N, 8, 8]."""
        pixels = tiles.float().permute(0, 3, 1, 2) / 255
        fine = self.stem(pixels)
        coarse = self.down(fine)
        coarse = coarse + 0.1 * self.middle(coarse.flatten(1)).reshape(coarse.shape)
        both = torch.cat(
            [torch.relu(self.norm(self.up(coarse))), nn.functional.interpolate(coarse, scale_factor=2.0)], 1
        )
        joined = self.join(both[:, :16] + 0)
        whole = self.head(nn.functional.pad(joined, (1, 1, 1, 1), mode="reflect"))
        cells = nn.functional.avg_pool2d((whole - pixels).square(), 4)[:, 0]
        return cells.amax((1, 2)), cells

    def _layer(self, low: int, high: int, kernel: int, stride: int) -> nn.Module:
        reach = kernel // 2
        return nn.Sequential(
            nn.ReflectionPad2d(reach), nn.Conv2d(low, high, kernel, stride), nn.BatchNorm2d(high), nn.ReLU()
        )


@pytest.fixture(scope="module")
def tiles() -> np.ndarray:
    """Smooth tiles with a little noise, uint8 [16, 32, 32, 1]."""
    draw = np.random.default_rng(0)
    coarse = draw.normal(128, 40, (16, 4, 4, 1)).repeat(8, 1).repeat(8, 2)
    return (coarse + draw.normal(0, 5, coarse.shape)).clip(0, 255).astype(np.uint8)


@pytest.fixture(scope="module")
def plain() -> onnx.ModelProto:
    """The network in fp32."""
    with torch.random.fork_rng():
        torch.manual_seed(5)
        network = Mirrored().eval()
        network.norm.running_mean.normal_(0, 0.1)
        return export_graph(network, GRAPH)


@pytest.fixture(scope="module")
def small(plain: onnx.ModelProto, tiles: np.ndarray) -> onnx.ModelProto:
    """The network in eight bits."""
    model = as_convolutions(plain)
    return finish_model(quantise(model, measure_ranges(model, [{"tiles": tiles}])), GRAPH)


def run(model: onnx.ModelProto | bytes, tiles: np.ndarray) -> np.ndarray:
    data = model if isinstance(model, bytes) else to_bytes(model)
    session = ort.InferenceSession(data, providers=["CPUExecutionProvider"])
    return np.asarray(session.run(["map"], {"tiles": tiles})[0])


def fused(data: bytes, folder: Path) -> Counter[str]:
    options = ort.SessionOptions()
    options.optimized_model_filepath = str(folder / "fused.onnx")
    options.log_severity_level = 3
    ort.InferenceSession(data, options, providers=["CPUExecutionProvider"])
    return Counter(node.op_type for node in onnx.load(folder / "fused.onnx").graph.node)


def test_numbers_are_near_those_of_fp32(plain: onnx.ModelProto, small: onnx.ModelProto, tiles: np.ndarray) -> None:
    """Maps of eight bits differ from fp32's by little of what they vary by, and do differ."""
    wanted, found = run(plain, tiles), run(small, tiles)
    assert 0 < np.abs(found - wanted).max() < 0.1 * wanted.std()


def test_layers_are_all_that_multiply_much(plain: onnx.ModelProto) -> None:
    """Convolutions, transposed ones and matrix products are layers; the first one, which reads pixels, is none."""
    found = layers_of(as_convolutions(plain))
    assert len(found) == 6
    assert not any("stem" in name for name in found)


def test_form_is_symmetric_and_int8(small: onnx.ModelProto) -> None:
    """Every quantised tensor is int8 with zero points of 0, every weight of a layer too, and the check agrees."""
    check_graph(small)
    constants = {tensor.name: tensor for tensor in small.graph.initializer}
    pairs = [node for node in small.graph.node if node.op_type in ("QuantizeLinear", "DequantizeLinear")]
    zeros = [constants[node.input[2]] for node in pairs]
    assert {zero.data_type for zero in zeros} == {TensorProto.INT8}
    assert not any(numpy_helper.to_array(zero).any() for zero in zeros)
    weights = [constants[node.input[0]] for node in pairs if node.input[0] in constants]
    assert len(weights) == 6
    assert {tensor.data_type for tensor in weights} == {TensorProto.INT8}
    assert max(int(np.abs(numpy_helper.to_array(tensor)).max()) for tensor in weights) == 63


def test_onnxruntime_computes_in_eight_bits(small: onnx.ModelProto, tmp_path: Path) -> None:
    """On the CPU each convolution and product becomes an eight-bit kernel; nothing goes back to floats in between."""
    kinds = fused(as_unsigned(to_bytes(small)), tmp_path)
    assert kinds["QLinearConv"] == 4
    assert kinds["MatMulIntegerToFloat"] == 2
    assert kinds["Conv"] + kinds["FusedConv"] == 1  # the stem
    assert kinds["ConvTranspose"] == 0


def test_unsigned_form_is_the_same_graph(small: onnx.ModelProto, tiles: np.ndarray) -> None:
    """Counting activations from 0 changes one byte of type and one of value, and no number."""
    signed = to_bytes(small)
    unsigned = as_unsigned(signed)
    assert sum(a != b for a, b in zip(signed, unsigned, strict=True)) == 2
    zero = next(t for t in onnx.load_from_string(unsigned).graph.initializer if t.name == ACTIVATION_ZERO)
    assert (zero.data_type, numpy_helper.to_array(zero).item()) == (TensorProto.UINT8, 128)
    np.testing.assert_allclose(run(unsigned, tiles), run(signed, tiles), rtol=1e-3, atol=1e-5)


def test_other_graphs_are_left_alone(plain: onnx.ModelProto) -> None:
    """A graph of floats has no zero point to move."""
    assert as_unsigned(to_bytes(plain)) == to_bytes(plain)


def test_engine_takes_it(small: onnx.ModelProto, tiles: np.ndarray) -> None:
    """The agent's engine runs the graph, batch by batch, with the numbers of onnxruntime."""
    with Engine(to_bytes(small), GRAPH, EngineConfig(threads=1)) as engine:
        found = engine.run(tiles)[1]
    np.testing.assert_allclose(found, run(small, tiles), rtol=1e-3, atol=1e-5)


def test_same_graph_gives_same_bytes(plain: onnx.ModelProto, small: onnx.ModelProto, tiles: np.ndarray) -> None:
    """Ranges measured twice and rounded twice give the same bytes."""
    model = as_convolutions(plain)
    again = finish_model(quantise(model, measure_ranges(model, [{"tiles": tiles}])), GRAPH)
    assert to_bytes(again) == to_bytes(small)


def test_layers_can_be_kept(plain: onnx.ModelProto, tiles: np.ndarray, tmp_path: Path) -> None:
    """A layer that is kept is computed in floats, and with all of them kept the numbers are fp32's."""
    model = as_convolutions(plain)
    ranges, layers = measure_ranges(model, [{"tiles": tiles}]), layers_of(model)
    but_one = finish_model(quantise(model, ranges, layers[:1]), GRAPH)
    assert fused(as_unsigned(to_bytes(but_one)), tmp_path)["QLinearConv"] == 3
    np.testing.assert_allclose(run(quantise(model, ranges, layers), tiles), run(plain, tiles), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("last", [nn.ReLU(), nn.Softplus()])
@pytest.mark.parametrize(("kernel", "stride", "cut", "side"), [(2, 2, 0, 4), (4, 2, 3, 6), (3, 3, 0, 5), (6, 2, 5, 7)])
def test_transposed_convolutions_are_the_same_sums(
    kernel: int, stride: int, cut: int, side: int, last: nn.Module
) -> None:
    """Written as plain ones, with their norm and their ReLU, they give the same numbers.

    A ReLU that is not alone in reading one, such as the softplus has, stays where it is.
    """
    with torch.random.fork_rng():
        torch.manual_seed(1)
        up = nn.Sequential(nn.ConvTranspose2d(1, 2, kernel, stride, cut), nn.BatchNorm2d(2), last).eval()
        up[1].running_var.uniform_(0.5, 2)
    wide = side * stride if kernel == stride else stride * (side - 1) + kernel - 2 * cut
    graph = Graph(17, "fp32", ("tiles",), side, 1, side, BatchProfile(1, 4, 4))
    model = export_graph(_Enlarging(up, wide), graph)
    rewritten = as_convolutions(model)
    kinds = Counter(node.op_type for node in rewritten.graph.node)
    assert (kinds["ConvTranspose"], kinds["BatchNormalization"], kinds["Conv"]) == (0, 0, 1)
    tiles = np.random.default_rng(2).integers(0, 256, (4, side, side, 1), np.uint8)
    np.testing.assert_allclose(run(rewritten, tiles), run(model, tiles), rtol=1e-4, atol=1e-4)


class _Enlarging(nn.Module):
    """Weighs each enlarged pixel differently, so that none may stand in another's place."""

    def __init__(self, up: nn.Module, wide: int) -> None:
        super().__init__()
        self.up = up
        self.register_buffer("weights", torch.linspace(0.5, 2, 2 * wide * wide).reshape(1, 2, wide, wide))

    def forward(self, tiles: Tensor) -> tuple[Tensor, Tensor]:
        weighed = (self.up(tiles.float().permute(0, 3, 1, 2)) * self.weights).sum((1, 2, 3))
        return weighed, weighed[:, None, None]


def test_transposed_convolution_over_its_edge_is_left_alone() -> None:
    """One that reads zeros from beyond its input stays as it is."""
    up = nn.Sequential(nn.ConvTranspose2d(1, 2, 4, 2, 1), nn.ReLU()).eval()
    graph = Graph(17, "fp32", ("tiles",), 4, 1, 4, BatchProfile(1, 4, 4))
    rewritten = as_convolutions(export_graph(_Enlarging(up, 8), graph))
    assert Counter(node.op_type for node in rewritten.graph.node)["ConvTranspose"] == 1


def test_mirrored_borders_and_enlargements_are_choices(plain: onnx.ModelProto, tiles: np.ndarray) -> None:
    """Written as Gathers, Pads and Resizes move the same values to the same places."""
    moved = {node.output[0] for node in plain.graph.node if node.op_type in ("Pad", "Resize")}
    rewritten = moves_as_gathers(plain, moved)
    assert not {"Pad", "Resize"} & {node.op_type for node in rewritten.graph.node}
    np.testing.assert_array_equal(run(rewritten, tiles), run(plain, tiles))


def test_zero_points_other_than_0_are_refused(small: onnx.ModelProto) -> None:
    """TensorRT takes symmetric scales only: the check says so, whoever made the graph."""
    model = onnx.ModelProto()
    model.CopyFrom(small)
    zero = next(tensor for tensor in model.graph.initializer if tensor.name == ACTIVATION_ZERO)
    zero.CopyFrom(numpy_helper.from_array(np.array(3, np.int8), ACTIVATION_ZERO))
    with pytest.raises(ExportError, match="zero point of int8 zeros"):
        check_graph(model)


def test_eight_bits_are_for_layers_only(small: onnx.ModelProto) -> None:
    """An operator that reads a quantised tensor without turning it back is refused."""
    model = onnx.ModelProto()
    model.CopyFrom(small)
    quantised = next(node.output[0] for node in model.graph.node if node.op_type == "QuantizeLinear")
    reader = next(node for node in model.graph.node if node.op_type == "Gather")
    reader.input[0] = quantised
    with pytest.raises(ExportError, match="works on INT8"):
        check_graph(onnx.shape_inference.infer_shapes(model))
