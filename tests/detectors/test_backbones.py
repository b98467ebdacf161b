"""Backbones: recognised from a file's names and shapes, run with mirrored borders, in line with the pixels."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from kizu_train.errors import UsageError
from kizu_train.nets.backbone_files import read_backbone, weights_of
from kizu_train.nets.backbones import Backbone, architectures, build_backbone, wanted_shapes

PUBLISHED = {"squeezenet1_0": 735_424, "squeezenet1_1": 722_496, "mobilenet_v2": 2_223_872, "resnet18": 11_176_512}
"""Numbers of trained parameters without the classifier (1,248,424, 1,235,496, 3,504,872 and 11,689,512 with it)."""


def random_state(architecture: str) -> dict[str, Tensor]:
    """A whole network's parameters and statistics, drawn at random, with a classifier that nobody wants."""
    draw = torch.Generator().manual_seed(3)
    state = {name: 0.1 * torch.randn(shape, generator=draw) for name, shape in wanted_shapes(architecture).items()}
    spread = {name: tensor.abs() + 0.5 for name, tensor in state.items() if name.endswith("running_var")}
    return state | spread | {"classifier.1.weight": torch.zeros(4, 8), "fc.bias": torch.zeros(4)}


def built(architecture: str, borders: str = "mirror") -> Backbone:
    """A network with weights as they are drawn for training."""
    torch.manual_seed(5)
    return build_backbone(architecture, borders=borders)  # type: ignore[arg-type]


@pytest.mark.parametrize("architecture", architectures())
def test_parameters_are_the_published_ones(architecture: str) -> None:
    """As many trained numbers as torchvision's networks have."""
    shapes = {name: shape for name, shape in wanted_shapes(architecture).items() if "running" not in name}
    assert sum(torch.Size(shape).numel() for shape in shapes.values()) == PUBLISHED[architecture]


@pytest.mark.parametrize("architecture", architectures())
def test_recognised_from_a_file(architecture: str, tmp_path: Path) -> None:
    """Both kinds of file are read, the network is known by its parameters and holds their values."""
    state = random_state(architecture)
    save_file(state, tmp_path / "net.safetensors")
    torch.save(state | {"x.num_batches_tracked": torch.tensor(1)}, tmp_path / "net.pth")
    for name in ("net.safetensors", "net.pth"):
        found, backbone = read_backbone(tmp_path / name)
        assert found == architecture
        assert all(torch.equal(state[key], value) for key, value in weights_of(backbone).items())


@pytest.mark.parametrize("architecture", architectures())
def test_even_surfaces_have_no_borders(architecture: str) -> None:
    """One grey everywhere gives the same features everywhere; zero borders would show."""
    even = torch.full((1, 1, 64, 64), 0.7)
    for borders, is_even in (("mirror", True), ("zero", False)):
        for features in built(architecture, borders)(even):
            spread = (features - features.mean((2, 3), keepdim=True)).abs().max() / features.abs().max()
            assert bool(spread < 1e-4) == is_even


@pytest.mark.parametrize("architecture", architectures())
def test_cells_lie_over_their_pixels(architecture: str) -> None:
    """The centre of a spot's traces lies within 5 px of it, at every scale: cells do not drift with depth."""
    backbone = built(architecture)
    for tensor in backbone.parameters():
        if tensor.ndim == 4:  # kernels without a direction of their own, that neither blow up nor saturate
            tensor.copy_(tensor.abs() / tensor.abs().sum((1, 2, 3), keepdim=True) / 2)
    even = torch.full((1, 3, 256, 256), 0.5)
    spoilt = even.repeat(4, 1, 1, 1)
    for phase in range(4):
        at = 120 + 4 * phase
        spoilt[phase, :, at : at + 4, at : at + 4] = 1.0
    for before, after, stride in zip(backbone(even), backbone(spoilt), backbone.strides, strict=True):
        trace = (after - before).square().sum(1)
        trace = (trace / trace.sum((1, 2), keepdim=True)).mean(0)
        at = (torch.arange(len(trace)) + 0.5) * stride
        assert abs(float((trace.sum(1) * at).sum()) - 128) < 5
        assert abs(float((trace.sum(0) * at).sum()) - 128) < 5


def test_grey_is_colour_without_hue() -> None:
    """A grey picture gives the features of three equal channels."""
    grey = torch.rand(1, 1, 64, 64)
    backbone = built("squeezenet1_1")
    for ours, theirs in zip(backbone(grey), backbone(grey.expand(-1, 3, -1, -1)), strict=True):
        assert torch.equal(ours, theirs)


def test_other_files_are_refused(tmp_path: Path) -> None:
    """What is none of the networks is refused: by name and shape, with what to do."""
    torch.save({"state_dict": {}}, tmp_path / "wrapped.pth")
    (tmp_path / "text.pth").write_text("not weights")
    (tmp_path / "text.safetensors").write_text("not weights")
    deeper = random_state("resnet18")
    deeper["layer1.2.conv1.weight"] = torch.zeros(64, 64, 3, 3)
    save_file(deeper, tmp_path / "deeper.safetensors")
    wider = random_state("resnet18")
    wider["layer1.0.conv1.weight"] = torch.zeros(128, 64, 3, 3)
    save_file(wider, tmp_path / "wider.safetensors")
    for name, why in {
        "wrapped.pth": "no plain state dict",
        "text.pth": "cannot be read",
        "text.safetensors": "cannot be read",
        "deeper.safetensors": r"Nearest is resnet18, but layer1\.2\.conv1\.weight is too much",
        "wider.safetensors": r"layer1\.0\.conv1\.weight has shape \[128, 64, 3, 3\], not \[64, 64, 3, 3\]",
    }.items():
        with pytest.raises(UsageError, match=f"(?s){name}.*{why}.*torchvision"):
            read_backbone(tmp_path / name)


def test_unknown_layer_is_refused(tmp_path: Path) -> None:
    """A layer that the network does not have is named."""
    save_file(random_state("squeezenet1_1"), tmp_path / "net.safetensors")
    with pytest.raises(UsageError, match=r"backbone\.layers: squeezenet1_1 has no layer features\.99"):
        read_backbone(tmp_path / "net.safetensors", ("features.4", "features.99"))
