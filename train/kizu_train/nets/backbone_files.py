"""Backbone weights from a file of the user's: read without running anything, recognised by names and shapes."""

from collections.abc import Mapping
from pathlib import Path
from pickle import UnpicklingError

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from kizu_train.errors import UsageError
from kizu_train.nets.backbones import COUNTER, Backbone, Borders, architectures, build_backbone, wanted_shapes

_HEADS = ("classifier.", "fc.")
HOW_TO_GET = (
    "give --backbone FILE: the ImageNet weights of squeezenet1_0, squeezenet1_1, mobilenet_v2 or resnet18 under "
    "torchvision's names, .safetensors or .pth; where torchvision is installed, torch.save(torchvision.models."
    "resnet18(weights='DEFAULT').state_dict(), 'resnet18.pth') writes one. kizu never downloads weights"
)


def read_backbone(path: Path, layers: tuple[str, ...] = (), borders: Borders = "mirror") -> tuple[str, Backbone]:
    """The architecture and the network, with weights, of the file at `path`.

    Raises UsageError for a file that cannot be read, is none of the architectures, or lacks one of `layers`.
    """
    state = _read(path)
    architecture = recognise(state, path)
    try:
        backbone = build_backbone(architecture, layers, borders)
    except ValueError as exc:
        raise UsageError(f"recipe.backbone.layers: {exc}; leave it out to take the usual ones") from exc
    take_weights(backbone, state)
    return architecture, backbone


def recognise(state: Mapping[str, Tensor], path: Path) -> str:
    """The architecture whose parameters, but for the classifier's, are exactly those of `state`; else a UsageError."""
    found = {name: tuple(t.shape) for name, t in state.items() if not name.startswith(_HEADS) and COUNTER not in name}
    wanted = {name: wanted_shapes(name) for name in architectures()}
    for name, shapes in wanted.items():
        if found == shapes:
            return name
    nearest = max(wanted, key=lambda name: len(found.items() & wanted[name].items()))
    why = f"Nearest is {nearest}, but {_difference(found, wanted[nearest])}"
    raise UsageError(f"--backbone {path}: is none of {', '.join(wanted)}. {why}; {HOW_TO_GET}")


def take_weights(backbone: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Copy from `state` what `backbone` holds. Raises KeyError for what is missing, RuntimeError for other shapes."""
    held = [name for name in backbone.state_dict() if not name.endswith(COUNTER)]
    backbone.load_state_dict({name: state[name].float() for name in held}, strict=False)


def weights_of(backbone: nn.Module) -> dict[str, Tensor]:
    """What `take_weights` needs."""
    return {name: tensor for name, tensor in backbone.state_dict().items() if not name.endswith(COUNTER)}


def _read(path: Path) -> dict[str, Tensor]:
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        # weights_only refuses everything that would run code.
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, SafetensorError, UnpicklingError, RuntimeError, EOFError, ValueError) as exc:
        raise UsageError(f"--backbone {path}: cannot be read as weights: {_first_line(exc)}; {HOW_TO_GET}") from exc
    if not isinstance(state, Mapping) or not all(isinstance(tensor, Tensor) for tensor in state.values()):
        raise UsageError(f"--backbone {path}: is no plain state dict (parameter name → tensor); {HOW_TO_GET}")
    return dict(state)


def _first_line(exc: Exception) -> str:
    return (str(exc) or type(exc).__name__).splitlines()[0]


def _difference(found: Mapping[str, tuple[int, ...]], wanted: Mapping[str, tuple[int, ...]]) -> str:
    """The first parameter that differs, in words."""
    for name, shape in wanted.items():
        if name not in found:
            return f"{name} is missing"
        if found[name] != shape:
            return f"{name} has shape {list(found[name])}, not {list(shape)}"
    return f"{min(found.keys() - wanted.keys())} is too much"
