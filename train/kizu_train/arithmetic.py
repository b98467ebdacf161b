"""How a step computes: in which precision, compiled or not, in which layout of memory.

Letters: N tiles; C channels; H, W sides. Source of the scheme: Micikevicius et al., "Mixed Precision Training", 2018;
torch.amp. Weights, moments and batch norm's statistics stay float32, convolutions and matrix products take and give
16 bits; what must not (likelihoods, variances, small differences) says `exact` or is left to fp32 altogether.
"""

import logging
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Literal

import torch
from torch import Tensor, nn

from kizu_train.errors import UsageError

Precision = Literal["auto", "fp32", "bf16", "fp16"]
Compiling = Literal["auto", "on", "off"]

_LOG = logging.getLogger(__name__)
_TYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
_SCALER = "scaler."


def exact(tensor: Tensor) -> Tensor:
    """`tensor` as float32, for what 16 bits are too coarse for; the very same where it is."""
    # Asked here rather than left to `float`, which would put a cast of fp32 to fp32 into exported graphs.
    return tensor if tensor.dtype == torch.float32 else tensor.float()


def choose_precision(wanted: Precision, device: torch.device, *, can_mix: bool) -> torch.dtype:
    """The type of products: `auto` is fp32 on CPUs and wherever a loss `can_mix` nothing, else bf16, else fp16.

    Raises UsageError where 16 bits are asked for and the detector's loss needs fp32.
    """
    if wanted in ("bf16", "fp16") and not can_mix:
        raise UsageError(f"train.precision = {wanted}: this detector's loss needs fp32; leave it out or set auto")
    if wanted != "auto":
        return _TYPES[wanted]
    if device.type != "cuda" or not can_mix:
        return torch.float32
    return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float16


class Arithmetic:
    """How the steps of one descent compute: `dtype` of products, a scaler of losses for fp16."""

    def __init__(self, dtype: torch.dtype, device: torch.device) -> None:
        self.dtype, self._device = dtype, device
        self._scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)

    @property
    def layout(self) -> torch.memory_format:
        """Of weights and features: channels last suits 16-bit convolutions, whose hardware sums over channels."""
        return torch.contiguous_format if self.dtype == torch.float32 else torch.channels_last

    def mixed(self) -> AbstractContextManager[object]:
        """Inside it products are computed in `dtype`."""
        if self.dtype == torch.float32:
            return nullcontext()
        return torch.autocast(self._device.type, dtype=self.dtype)

    def scaled(self, loss: Tensor) -> Tensor:
        """The loss to take gradients of."""
        return self._scaler.scale(loss)

    def step(self, optimizer: torch.optim.Optimizer) -> None:
        """Move weights; in fp16 a step whose gradients overflowed is left out, as amp does."""
        self._scaler.step(optimizer)

    def update(self) -> None:
        """A step is through for all players: fit the scale to what overflowed."""
        self._scaler.update()

    def tensors(self) -> dict[str, Tensor]:
        """What a resumed fit needs: the scale, where there is one."""
        state = self._scaler.state_dict()
        return {f"{_SCALER}{name}": torch.tensor(state[name]) for name in ("scale", "_growth_tracker") if state}

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Take up what `tensors` gave."""
        found = {name[len(_SCALER) :]: part.item() for name, part in tensors.items() if name.startswith(_SCALER)}
        if found and self._scaler.is_enabled():
            self._scaler.load_state_dict(self._scaler.state_dict() | found)


class Compiled:
    """The parts of `module` compiled, until `undo`; the first step that fails shows that they cannot be."""

    def __init__(self, module: nn.Module, wanted: Compiling, device: torch.device) -> None:
        is_wanted = wanted == "on" or (wanted == "auto" and device.type == "cuda")
        # Losses may call a network's parts rather than itself; those that learn nothing are not worth it.
        self._parts = [part for part in module.children() if is_wanted and any(True for _ in part.parameters())]
        self._has_worked = False
        for part in self._parts:
            part.compile()

    def undo(self) -> None:
        """Leave the parts as they were."""
        for part in self._parts:
            part._compiled_call_impl = None  # noqa: SLF001 - torch has no way back from `compile`
        self._parts = []

    @contextmanager
    def attempt(self) -> Iterator[None]:
        """Raise `NotCompiled`, once, where what is done inside fails with compiled parts."""
        try:
            yield
        except Exception as exc:
            if not self._parts or self._has_worked:
                raise
            self.undo()
            _LOG.warning("torch.compile fails here, training goes on without: %s", _first_line(exc))
            raise NotCompiled from exc
        self._has_worked = True


class NotCompiled(Exception):  # noqa: N818 - no error: the step is taken again
    """A step failed with compiled parts, which are plain now."""


def _first_line(exc: Exception) -> str:
    lines = str(exc).splitlines() or [""]
    return f"{type(exc).__name__}: {lines[0]}"
