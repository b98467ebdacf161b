"""Eight bits: a fp32 graph in QDQ form, symmetric as TensorRT takes it, and fused whole by onnxruntime.

Weights are int8 with a scale for each output; activations are int8 with one scale for each tensor; every zero point
is 0, which TensorRT asks for, and biases stay fp32. Zero points would be wanted all the same: values behind a ReLU have
one sign, and symmetric scales would spend half of their steps on the other. So what is stored is the value less an
*offset*, the middle of its range. A layer takes the offset of its input into its bias, and that of its output off it:
no operator is added, all 256 steps are used, and a ReLU whose output begins at 0 costs nothing, since saturation at the
least step is that ReLU. Source of the scheme: Jacob et al., "Quantization and Training of Neural Networks for Efficient
Integer-Arithmetic-Only Inference", 2018; what differs is where zero points are kept.

Weights take 7 bits of their 8: processors without VNNI sum two products of 8 bits each in 16 bits, which saturates.
With 7 the sums are the same on every processor. Source: onnxruntime, "Quantize ONNX models", on reduce_range.
"""

from collections.abc import Collection, Iterator

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import helper, numpy_helper

from kizu_contract.onnx_wire import ACTIVATION_ZERO
from kizu_export.gathers import moves_as_gathers
from kizu_export.layers import Wiring
from kizu_export.ranges import Ranges

_WEIGHT_STEPS = 63
_STEPS, _HALF = 255, 128
_LEAST_SCALE = 1e-12


def quantise(model: onnx.ModelProto, ranges: Ranges, keep: Collection[str] = ()) -> onnx.ModelProto:
    """`model` (fp32, shapes inferred) in eight bits, but for the layers named in `keep` (see `layers.layers_of`).

    Shapes and types must be inferred anew. The same arguments give the same graph.
    """
    chosen = _Plan(Wiring(model.graph), keep).stored
    new = moves_as_gathers(model, chosen)
    _Rewrite(new.graph, ranges, keep).run()
    return new


class _Plan:
    """Which layers are computed and which tensors are stored in eight bits, and which of those share their scale."""

    def __init__(self, wiring: Wiring, keep: Collection[str]) -> None:
        self._wiring = wiring
        self.stored: set[str] = set()
        self._shares: dict[str, str] = {}
        nodes = [node for node in wiring.graph.node if wiring.is_layer(node) and node.output[0] not in keep]
        self.layers = {node.output[0] for node in nodes}
        for node in nodes:
            self._store(node.input[0])
            if node.op_type == "Conv":  # onnxruntime has no convolution that takes eight bits and gives floats
                self._store(wiring.relu_after(node.output[0]) or node.output[0])

    def group(self, name: str) -> str:
        """What stands for all tensors that share their scale with tensor `name`."""
        while self._shares.get(name, name) != name:
            name = self._shares[name]
        return name

    def _store(self, name: str) -> None:
        """Store a tensor, and what it is merely moved from; those share one scale."""
        if name in self.stored:
            return
        self.stored.add(name)
        maker = self._wiring.maker.get(name)
        if maker is not None and self._wiring.hands_on(maker):
            for source in self._wiring.data_inputs(maker):
                self._store(source)
                self._shares[self.group(source)] = self.group(name)


class _Rewrite:
    """One pass over the nodes, in the order in which they run."""

    def __init__(self, graph: onnx.GraphProto, ranges: Ranges, keep: Collection[str]) -> None:
        self._graph, self._wiring = graph, Wiring(graph)
        self._plan = _Plan(self._wiring, keep)
        self._spans = self._measure(ranges)
        self._new: list[onnx.TensorProto] = [numpy_helper.from_array(np.array(0, np.int8), ACTIVATION_ZERO)]
        self._gone: set[str] = set()
        self._free = {relu for name in self._plan.stored if (relu := self._saturated(name))}

    def run(self) -> None:
        """Rewrite the graph in place; constants that nobody reads any more are dropped."""
        nodes = [new for node in self._graph.node for new in self._rewritten(node)]
        used = {name for node in nodes for name in node.input}
        kept = [tensor for tensor in (*self._graph.initializer, *self._new) if tensor.name in used]
        for field, content in (("node", nodes), ("initializer", kept)):
            self._graph.ClearField(field)
            getattr(self._graph, field).extend(content)
        self._graph.ClearField("value_info")

    def _measure(self, ranges: Ranges) -> dict[str, tuple[float, float]]:
        """Scale and offset of each group: its whole range in 255 steps around the offset."""
        found: dict[str, tuple[float, float]] = {}
        for name in self._plan.stored & ranges.keys():
            group = self._plan.group(name)
            low, high = found.get(group, ranges[name])
            found[group] = min(low, ranges[name][0]), max(high, ranges[name][1])
        return {group: _span(low, high) for group, (low, high) in found.items()}

    def _span_of(self, name: str) -> tuple[float, float]:
        return self._spans[self._plan.group(name)]

    def _saturated(self, name: str) -> str | None:
        """The layer's output whose ReLU gives stored tensor `name`, where the least step is that ReLU's 0."""
        maker = self._wiring.maker.get(name)
        if maker is None or maker.op_type != "Relu" or self._wiring.relu_after(maker.input[0]) != name:
            return None
        scale, offset = self._span_of(name)
        source = self._wiring.maker.get(maker.input[0])
        can_shift = source is not None and self._wiring.is_product(source) and self._takes_shift(source, name)
        return maker.input[0] if can_shift and abs(offset - _HALF * scale) < scale / 2 else None

    def _takes_shift(self, layer: onnx.NodeProto, name: str) -> bool:
        """Whether a layer's result may be shifted: in eight bits always, in fp32 where no fp32 reader is left."""
        return layer.output[0] in self._plan.layers or not self._has_float_reader(name)

    def _has_float_reader(self, name: str) -> bool:
        if name in self._wiring.outputs:
            return True
        return any(
            node.output[0] not in self._plan.layers and not self._moves(node) for node in self._wiring.readers[name]
        )

    def _moves(self, node: onnx.NodeProto) -> bool:
        return node.output[0] in self._plan.stored and self._wiring.hands_on(node)

    def _rewritten(self, node: onnx.NodeProto) -> Iterator[onnx.NodeProto]:
        output = node.output[0]
        if node.op_type == "Relu" and node.input[0] in self._free:
            return
        if self._moves(node):
            yield from self._moved(node)
        elif self._wiring.is_product(node) and (output in self._plan.layers or output in self._free):
            yield from self._layer(node)
        else:
            yield node
            for name in node.output:
                if name in self._plan.stored:
                    yield from self._entered(name)

    def _moved(self, node: onnx.NodeProto) -> Iterator[onnx.NodeProto]:
        output, data = node.output[0], set(self._wiring.data_inputs(node))
        node.input[:] = [_back(name) if name in data else name for name in node.input]
        node.output[0] = _raw(output)
        yield node
        yield from self._stored(output, _raw(output))

    def _entered(self, name: str) -> Iterator[onnx.NodeProto]:
        """Store what fp32 gave: its offset is taken off by an operator of its own."""
        offset = self._constant(f"{name}_offset", np.float32(self._span_of(name)[1]))
        yield helper.make_node("Sub", [name, offset], [_raw(name)], name=_raw(name))
        yield from self._stored(name, _raw(name), is_known=True)

    def _stored(self, name: str, source: str, *, is_known: bool = False) -> Iterator[onnx.NodeProto]:
        """Round `source` to the steps of tensor `name`; fp32 readers get it with its offset, unless they know it."""
        scale, offset = self._span_of(name)
        pair = [self._constant(f"{name}_scale", np.float32(scale)), ACTIVATION_ZERO]
        yield helper.make_node("QuantizeLinear", [source, *pair], [f"{name}_q"], name=f"{name}_q")
        yield helper.make_node("DequantizeLinear", [f"{name}_q", *pair], [_back(name)], name=_back(name))
        if not is_known and self._has_float_reader(name):
            shift = self._constant(f"{name}_offset", np.float32(offset))
            yield helper.make_node("Add", [_back(name), shift], [name], name=f"{name}_float")

    def _layer(self, node: onnx.NodeProto) -> Iterator[onnx.NodeProto]:
        """A product: in eight bits where it is planned, else with its bias shifted only."""
        output, source = node.output[0], node.input[0]
        weights, bias = self._wiring.weights(node), self._bias(node)
        is_small = output in self._plan.layers
        if is_small:
            scales, steps = _round_weights(weights)
            yield self._weights(node, steps, scales)
            flat = (steps * scales.reshape(-1, *[1] * (steps.ndim - 1))).reshape(len(steps), -1)
            bias = bias + self._span_of(source)[1] * flat.astype(np.float64).sum(1)
            node.input[0] = _back(source)
        target = self._wiring.relu_after(output) if output in self._free else output
        assert target is not None  # noqa: S101 - what is free has a ReLU
        is_stored = target in self._plan.stored
        if is_stored:
            bias = bias - self._span_of(target)[1]
        node.output[0] = _raw(target) if is_stored else output
        yield from self._with_bias(node, bias.astype(np.float32))
        if is_stored:
            yield from self._stored(target, _raw(target))

    def _with_bias(self, node: onnx.NodeProto, bias: NDArray[np.float32]) -> Iterator[onnx.NodeProto]:
        """The product and its bias.

        That of matrices is subtracted by an operator of its own: of MatMul and Add onnxruntime makes a Gemm, and one
        that gives floats it computes in floats.
        """
        output = node.output[0]
        if node.op_type == "Conv":
            node.input[:] = [*node.input[:2], self._constant(f"{output}_bias", bias)]
            yield node
            return
        name = self._constant(f"{output}_less", -bias)
        yield helper.make_node("MatMul", node.input[:2], [f"{output}_product"], name=f"{output}_product")
        yield helper.make_node("Sub", [f"{output}_product", name], [output], name=output)

    def _bias(self, node: onnx.NodeProto) -> NDArray[np.float64]:
        count = len(self._wiring.weights(node))
        given = self._wiring.constants[node.input[2]] if len(node.input) > 2 else np.zeros(1)
        return np.broadcast_to(np.asarray(given, np.float64).reshape(-1), (count,))

    def _weights(self, node: onnx.NodeProto, steps: NDArray[np.int8], scales: NDArray[np.float32]) -> onnx.NodeProto:
        """Give `node` its rounded weights; returns what makes floats of them."""
        is_matrix = node.op_type != "Conv"
        name = f"{node.output[0]}_weights"
        inputs = [
            self._constant(f"{name}_q", np.ascontiguousarray(steps.T) if is_matrix else steps),
            self._constant(f"{name}_scale", scales),
            self._constant(f"{name}_zero", np.zeros(len(scales), np.int8)),
        ]
        node.input[1] = name
        return helper.make_node("DequantizeLinear", inputs, [name], name=name, axis=int(is_matrix))

    def _constant(self, name: str, value: "np.generic | NDArray[np.generic]") -> str:
        self._new.append(numpy_helper.from_array(np.asarray(value), name))
        return name


def _span(low: float, high: float) -> tuple[float, float]:
    """Scale and offset that lay 255 steps over a range; one of a single value gets a little width."""
    scale = max((high - low) / _STEPS, _LEAST_SCALE, abs(low) * 1e-6)
    return scale, low + _HALF * scale


def _round_weights(weights: NDArray[np.float32]) -> tuple[NDArray[np.float32], NDArray[np.int8]]:
    """Scales [O] and steps of weights [O, …]: ±63 for the largest of each output."""
    largest = np.abs(weights.reshape(len(weights), -1)).max(1)
    scales = np.maximum(largest / _WEIGHT_STEPS, _LEAST_SCALE).astype(np.float32)
    steps = np.round(weights / scales.reshape(-1, *[1] * (weights.ndim - 1)))
    return scales, np.clip(steps, -_WEIGHT_STEPS, _WEIGHT_STEPS).astype(np.int8)


def _raw(name: str) -> str:
    """Tensor `name` less its offset, before it is rounded."""
    return f"{name}_raw"


def _back(name: str) -> str:
    """Tensor `name` less its offset, rounded, as floats again."""
    return f"{name}_back"
