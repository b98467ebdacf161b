"""Pretrained networks as feature extractors, in plain torch under torchvision's parameter names.

Sources: Iandola et al., "SqueezeNet", 2016; Sandler et al., "MobileNetV2", 2018; He et al., "Deep Residual Learning",
2015. What differs: only the part up to the deepest wanted layer is kept; borders are mirrored instead of zero-padded
(a zero border is a pattern that no product shows); and where a strided step may be shifted by a pixel without changing
what it computes, it is, so that cell i of a layer of stride s lies over pixels s·i … s·i + s - 1 within about 4 px.

Letters: N tiles; C channels; T tile side; s stride.
"""

from collections.abc import Callable, Iterator, Mapping
from itertools import pairwise
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

Borders = Literal["mirror", "zero"]

_MEAN, _DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
_FIRE_1_0 = {3: (96, 16, 64), 4: (128, 16, 64), 5: (128, 32, 128), 7: (256, 32, 128), 8: (256, 48, 192)} | {
    9: (384, 48, 192),
    10: (384, 64, 256),
    12: (512, 64, 256),
}
_FIRE_1_1 = {3: (64, 16, 64), 4: (128, 16, 64), 6: (128, 32, 128), 7: (256, 32, 128), 9: (256, 48, 192)} | {
    10: (384, 48, 192),
    11: (384, 64, 256),
    12: (512, 64, 256),
}
_MOBILE_BLOCKS = (
    (1, 16, 1, 1),
    (6, 24, 2, 2),
    (6, 32, 3, 2),
    (6, 64, 4, 2),
    (6, 96, 3, 1),
    (6, 160, 3, 2),
    (6, 320, 1, 1),
)
"""MobileNetV2's blocks: how far each expands, channels, how many, stride of the first."""


class Border(nn.Module):
    """Continue a feature map beyond its borders: mirrored, or filled with zeros as in training."""

    def __init__(self, before: int, after: int, borders: Borders) -> None:
        super().__init__()
        self.pads, self.mode = (before, after, before, after), "reflect" if borders == "mirror" else "constant"

    def forward(self, features: Tensor) -> Tensor:
        """[N, C, H, W] → [N, C, H + before + after, W + before + after]."""
        return functional.pad(features, self.pads, mode=self.mode) if any(self.pads) else features


class BorderedConv(nn.Conv2d):
    """A convolution that continues its input first; parameters are called `weight` and `bias` as in any Conv2d."""

    def __init__(
        self, low: int, high: int, kernel: int, pads: tuple[int, int], borders: Borders, *, stride: int = 1,
        groups: int = 1, bias: bool = False,
    ) -> None:  # fmt: skip
        super().__init__(low, high, kernel, stride, groups=groups, bias=bias)
        self.border = Border(*pads, borders)

    def forward(self, features: Tensor) -> Tensor:
        """[N, low, H, W] → [N, high, H / stride, W / stride] where pads sum to kernel - stride."""
        return super().forward(self.border(features))


class _Pool(nn.Sequential):
    """Maximum over 3 × 3 with stride 2."""

    def __init__(self, pads: tuple[int, int], borders: Borders) -> None:
        super().__init__(Border(*pads, borders), nn.MaxPool2d(3, 2))


class _Fire(nn.Module):
    """SqueezeNet's block: squeeze to few channels, expand by 1 × 1 and 3 × 3 side by side."""

    def __init__(self, low: int, squeezed: int, expanded: int, borders: Borders) -> None:
        super().__init__()
        self.squeeze = nn.Conv2d(low, squeezed, 1)
        self.expand1x1 = nn.Conv2d(squeezed, expanded, 1)
        self.expand3x3 = BorderedConv(squeezed, expanded, 3, (1, 1), borders, bias=True)

    def forward(self, features: Tensor) -> Tensor:
        squeezed = functional.relu(self.squeeze(features))
        return functional.relu(torch.cat([self.expand1x1(squeezed), self.expand3x3(squeezed)], 1))


class _InvertedResidual(nn.Module):
    """MobileNetV2's block: expand, filter each channel by itself, project without activation."""

    def __init__(self, low: int, high: int, expand: int, stride: int, pads: tuple[int, int], borders: Borders) -> None:
        super().__init__()
        self.is_residual = stride == 1 and low == high
        inner = low * expand
        layers: list[nn.Module] = [_conv_norm(low, inner, 1, (0, 0), borders)] if expand > 1 else []
        layers += [_conv_norm(inner, inner, 3, pads, borders, stride=stride, groups=inner)]
        self.conv = nn.Sequential(*layers, nn.Conv2d(inner, high, 1, bias=False), nn.BatchNorm2d(high))

    def forward(self, features: Tensor) -> Tensor:
        found: Tensor = self.conv(features)
        return features + found if self.is_residual else found


class _BasicBlock(nn.Module):
    """ResNet's block of two 3 × 3 convolutions beside a shortcut."""

    def __init__(self, low: int, high: int, stride: int, borders: Borders) -> None:
        super().__init__()
        # Centred on even pixels as the shortcut is: the pixel added at the right is not reached by stride 2.
        self.conv1 = BorderedConv(low, high, 3, (1, 1), borders, stride=stride)
        self.bn1 = nn.BatchNorm2d(high)
        self.conv2 = BorderedConv(high, high, 3, (1, 1), borders)
        self.bn2 = nn.BatchNorm2d(high)
        is_changed = stride != 1 or low != high
        self.downsample = (
            nn.Sequential(nn.Conv2d(low, high, 1, stride, bias=False), nn.BatchNorm2d(high)) if is_changed else None
        )

    def forward(self, features: Tensor) -> Tensor:
        found = self.bn2(self.conv2(functional.relu(self.bn1(self.conv1(features)))))
        shortcut = features if self.downsample is None else self.downsample(features)
        return functional.relu(found + shortcut)


class Backbone(nn.Module):
    """A pretrained network up to the deepest of `layers`; `strides` are theirs. It is never trained here."""

    mean: Tensor
    deviation: Tensor

    def __init__(self, steps: Iterator[tuple[str, nn.Module, int]], layers: tuple[str, ...]) -> None:
        super().__init__()
        self.layers, self._steps, found = layers, list[tuple[str, nn.Module]](), dict[str, int]()
        for name, module, stride in steps:
            _attach(self, name, module)
            self._steps.append((name, module))
            found[name] = stride
            if found.keys() >= set(layers):
                break
        self.known = tuple(found)
        self.strides = tuple(found.get(name, 0) for name in layers)
        self.register_buffer("mean", torch.tensor(_MEAN).reshape(1, 3, 1, 1), persistent=False)
        self.register_buffer("deviation", torch.tensor(_DEVIATION).reshape(1, 3, 1, 1), persistent=False)

    def forward(self, pixels: Tensor) -> list[Tensor]:
        """Pixels float32 [N, C, T, T], 0–1, C 1 or 3 → features of each layer [N, ·, T/s, T/s]."""
        colour = torch.cat([pixels] * 3, 1) if pixels.shape[1] == 1 else pixels
        features = (colour - self.mean) / self.deviation
        found = {}
        for name, module in self._steps:
            features = found[name] = module(features)
        return [found[name] for name in self.layers]


def build_backbone(architecture: str, layers: tuple[str, ...] = (), borders: Borders = "mirror") -> Backbone:
    """The network called `architecture`, without its weights, up to the deepest of `layers` (by default its own).

    Raises KeyError for an architecture, ValueError for a layer that does not exist.
    """
    steps, default = _ARCHITECTURES[architecture]
    backbone = Backbone(steps(borders), layers or default)
    if 0 in backbone.strides:
        raise ValueError(f"{architecture} has no layer {', '.join(set(layers) - set(backbone.known))}")
    return backbone.eval().requires_grad_(requires_grad=False)


def architectures() -> tuple[str, ...]:
    """The names `build_backbone` knows."""
    return tuple(_ARCHITECTURES)


def wanted_shapes(architecture: str) -> Mapping[str, tuple[int, ...]]:
    """Names and shapes of all parameters and statistics of a whole network but for its classifier."""
    with torch.device("meta"):
        whole = Backbone(_ARCHITECTURES[architecture][0]("mirror"), ("",))
    return {name: tuple(t.shape) for name, t in whole.state_dict().items() if not name.endswith(COUNTER)}


COUNTER = "num_batches_tracked"
"""Batch norms count their batches, which no result depends on."""


def _attach(parent: nn.Module, path: str, module: nn.Module) -> None:
    """Set `module` at the dotted `path`, so that its parameters get torchvision's names."""
    *outer, last = path.split(".")
    for name in outer:
        if not hasattr(parent, name):
            parent.add_module(name, nn.Module())
        parent = parent.get_submodule(name)
    parent.add_module(last, module)


def _conv_norm(
    low: int, high: int, kernel: int, pads: tuple[int, int], borders: Borders, *, stride: int = 1, groups: int = 1
) -> nn.Sequential:
    convolution = BorderedConv(low, high, kernel, pads, borders, stride=stride, groups=groups)
    return nn.Sequential(convolution, nn.BatchNorm2d(high), nn.ReLU6())


def _squeezenet(
    kernel: int, width: int, fires: Mapping[int, tuple[int, int, int]]
) -> Callable[[Borders], Iterator[tuple[str, nn.Module, int]]]:
    def steps(borders: Borders) -> Iterator[tuple[str, nn.Module, int]]:
        reach = kernel - 2
        pads = ((reach + 1) // 2, reach // 2)
        yield "features.0", BorderedConv(3, width, kernel, pads, borders, stride=2, bias=True), 2
        yield "features.1", nn.ReLU(), 2
        stride, pools = 2, 0
        for index in range(2, 13):
            if index in fires:
                yield f"features.{index}", _Fire(*fires[index], borders), stride
            else:
                stride, pools = 2 * stride, pools + 1
                yield f"features.{index}", _Pool((0, 1) if pools % 2 else (1, 0), borders), stride

    return steps


def _mobilenet(borders: Borders) -> Iterator[tuple[str, nn.Module, int]]:
    yield "features.0", _conv_norm(3, 32, 3, (1, 0), borders, stride=2), 2
    low, index, stride, halvings = 32, 1, 2, 1
    for expand, high, count, first in _MOBILE_BLOCKS:
        for block in range(count):
            step = first if block == 0 else 1
            halvings += step == 2
            pads = (1, 1) if step == 1 else ((1, 0) if halvings % 2 else (0, 1))
            stride *= step
            yield f"features.{index}", _InvertedResidual(low, high, expand, step, pads, borders), stride
            low, index = high, index + 1
    yield f"features.{index}", _conv_norm(low, 1280, 1, (0, 0), borders), stride


def _resnet18(borders: Borders) -> Iterator[tuple[str, nn.Module, int]]:
    yield "conv1", BorderedConv(3, 64, 7, (2, 3), borders, stride=2), 2
    yield "bn1", nn.BatchNorm2d(64), 2
    yield "relu", nn.ReLU(), 2
    yield "maxpool", _Pool((0, 1), borders), 4
    for index, (low, high) in enumerate(pairwise((64, 64, 128, 256, 512))):
        first = _BasicBlock(low, high, 1 if index == 0 else 2, borders)
        yield f"layer{index + 1}", nn.Sequential(first, _BasicBlock(high, high, 1, borders)), 4 << index


_ARCHITECTURES: dict[str, tuple[Callable[[Borders], Iterator[tuple[str, nn.Module, int]]], tuple[str, ...]]] = {
    "squeezenet1_0": (_squeezenet(7, 96, _FIRE_1_0), ("features.5", "features.10")),
    "squeezenet1_1": (_squeezenet(3, 64, _FIRE_1_1), ("features.4", "features.7", "features.11")),
    "mobilenet_v2": (_mobilenet, ("features.3", "features.6", "features.13")),
    "resnet18": (_resnet18, ("layer1", "layer2", "layer3")),
}
"""Architecture → its steps in order, and the layers whose features are joined: from stride 4 on, the last before each
change of scale, without the last block, which knows ImageNet's classes best and textures least."""
