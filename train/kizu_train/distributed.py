"""Several processes that train one model together, started by torchrun; a single process is a team of one.

Every process takes its rows of each batch (rank::world), gradients are averaged, and all hold the same weights after
each step. The first process alone writes files and speaks. Sources: torch.distributed; the scheme is that of data-
parallel SGD (Li et al., "PyTorch Distributed", 2020) with one flat all-reduce a step: our networks are small.
"""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from kizu_train.errors import TrainError, UsageError

_STEP_LIMIT = timedelta(minutes=10)
"""A process that answers no sooner hangs; one that ends is noticed at once."""
_WAIT_LIMIT = timedelta(days=1)
"""How long the others wait while the first one calibrates; torchrun ends them where it fails."""

Found = TypeVar("Found")


@dataclass(frozen=True, eq=False)
class _Team:
    """A process group for steps, another for long waits, and where tensors must lie for the first one."""

    steps: Any
    waits: Any
    device: torch.device


_team: _Team | None = None


def rank() -> int:
    """Which process of the team this is, from 0."""
    return dist.get_rank() if _team is not None else 0


def world() -> int:
    """How many processes train together."""
    return dist.get_world_size() if _team is not None else 1


def is_first() -> bool:
    """Whether this process writes files and speaks."""
    return rank() == 0


def is_launched() -> bool:
    """Whether torchrun (or what sets the same variables) started this process as one of several."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1 and {"RANK", "MASTER_ADDR", "MASTER_PORT"} <= os.environ.keys()


@contextmanager
def joined(device: str) -> Iterator[None]:
    """Join the team that torchrun started, over gloo on `cpu` and NCCL on `cuda`; nothing happens outside torchrun.

    On GPUs each process takes that of its local rank. Raises UsageError where there are fewer of them.
    """
    global _team  # noqa: PLW0603 - a process is in one team at most, as torch has it
    if not is_launched() or _team is not None:
        yield
        return
    place = _place(device)
    backend = "nccl" if place.type == "cuda" else "gloo"
    dist.init_process_group(backend, timeout=_STEP_LIMIT)
    try:
        _team = _Team(dist.group.WORLD, dist.new_group(backend="gloo", timeout=_WAIT_LIMIT), place)
        yield
    finally:
        _team = None
        dist.destroy_process_group()


def _place(device: str) -> torch.device:
    if device != "cuda":
        return torch.device("cpu")
    local = int(os.environ.get("LOCAL_RANK", "0"))
    if local >= torch.cuda.device_count():
        raise UsageError(f"process {local} has no GPU: there are {torch.cuda.device_count()}; start no more processes")
    torch.cuda.set_device(local)
    return torch.device("cuda", local)


def from_first(work: Callable[[], Found]) -> Found:
    """What `work` gives in the first process, for every process; the others only wait. Its TrainError is raised by all.

    Objects travel pickled, between processes of one training only.
    """
    if _team is None:
        return work()
    box: list[Any] = [None, None]
    failure: Exception | None = None
    if is_first():
        try:
            box[0] = work()
        except Exception as exc:  # noqa: BLE001 - whatever it is, the others must not wait for it
            failure = exc
            box[1] = exc if isinstance(exc, TrainError) else TrainError(f"the first process failed: {exc}")
    _checked(lambda team: dist.broadcast_object_list(box, src=0, group=team.waits))
    if failure is not None:
        raise failure
    if box[1] is not None:
        raise box[1]
    found: Found = box[0]
    return found


def wait_for_all() -> None:
    """Return once every process has come here."""
    agree(flag=False)


def agree(*, flag: bool) -> bool:
    """Whether `flag` is set in any process: a decision that all must take alike."""
    if _team is None:
        return flag
    votes = torch.tensor([float(flag)], device=_team.device)
    _checked(lambda team: dist.all_reduce(votes, op=dist.ReduceOp.MAX, group=team.steps))
    return bool(votes.item() > 0)


def my_rows(count: int) -> slice:
    """The rows of a batch of `count` that this process takes. Raises TrainError where one would get fewer than two."""
    if count < 2 * world():
        raise TrainError(f"a batch of {count} is too small for {world()} processes; set train.batch={2 * world()}")
    return slice(rank(), None, world())


def average_step(module: nn.Module, share: float) -> None:
    """Add up gradients and running statistics of `module` over the team, each process weighing with its `share`.

    `share` is the part of the batch's rows that this process took, so that gradients are those of the whole batch.
    """
    if _team is None:
        return
    grads = [weight.grad for weight in module.parameters() if weight.grad is not None]
    norms = [layer for layer in module.modules() if isinstance(layer, _BatchNorm)]
    running = [part for layer in norms for part in (layer.running_mean, layer.running_var) if part is not None]
    average([*grads, *running], share)


def average(tensors: list[Tensor], share: float) -> None:
    """Replace `tensors` float32, in place, by their sum over the team weighted with each process's `share`."""
    if _team is None or not tensors:
        return
    with torch.no_grad():
        flat = torch.cat([tensor.reshape(-1) for tensor in tensors]).to(_team.device) * share
        _checked(lambda team: dist.all_reduce(flat, group=team.steps))
        parts = flat.split([tensor.numel() for tensor in tensors])  # type: ignore[no-untyped-call]  # torch leaves it
        for tensor, part in zip(tensors, parts, strict=True):
            tensor.copy_(part.view_as(tensor))


def _checked(exchange: Callable[[_Team], Any]) -> None:
    assert _team is not None  # noqa: S101 - for the type checker: callers asked
    try:
        exchange(_team)
    except RuntimeError as exc:
        raise TrainError(f"process {rank()}: another process of this training ended or hangs; see its message") from exc
