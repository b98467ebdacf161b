"""The training loop of detectors that learn by gradients: nanoGPT-like, readable aloud, resumable to the bit."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from kizu_train import distributed
from kizu_train.detectors.base import Session, TileSource
from kizu_train.errors import TrainError

_REPORT_EVERY = 10


@dataclass(frozen=True)
class Descent:
    """Adam with a cosine learning rate: `steps` batches of `batch` tiles, from `learning_rate` down to 1 % of it.

    Small batches: 1,600 steps of 32 reach a far lower loss than 500 of 128, for less work.
    """

    steps: int = 4000
    batch: int = 32
    learning_rate: float = 2e-3
    warm_up: int = 20

    def __post_init__(self) -> None:
        if not (self.steps >= 1 and self.batch >= 2 and self.learning_rate > 0 and self.warm_up >= 0):
            raise ValueError("steps >= 1, batch >= 2, learning_rate > 0 and warm_up >= 0 are needed")

    def rate_at(self, step: int) -> float:
        """Learning rate of step `step`, counted from 0."""
        if step < self.warm_up:
            return self.learning_rate * (step + 1) / (self.warm_up + 1)
        share = (step - self.warm_up) / max(1, self.steps - self.warm_up)
        return self.learning_rate * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * share)))


Loss = Callable[[Tensor, torch.Generator], tuple[Tensor, Mapping[str, Tensor]]]
"""Tiles uint8 [B, T, T, C] and a generator on their device → loss to descend and the terms to show, all scalars."""


@dataclass(frozen=True, eq=False)
class Turn:
    """One player's part of a step: its loss moves the weights of `module` and no others."""

    module: nn.Module
    loss: Loss
    betas: tuple[float, float] = (0.9, 0.999)


def descend(module: nn.Module, loss: Loss, settings: Descent, tiles: TileSource, session: Session) -> None:
    """Train `module` on `loss`: one player, see `descend_in_turns`."""
    descend_in_turns(module, (Turn(module, loss),), settings, tiles, session)


def descend_in_turns(
    module: nn.Module, turns: Sequence[Turn], settings: Descent, tiles: TileSource, session: Session
) -> None:
    """Train `module`, of which each player owns a part; at every step all have their turn on the same batch.

    Leaves it on the CPU, in eval mode. Raises TrainError when a loss is not finite.

    Batch, noise and learning rate of a step depend on the seed and the step alone, so weights and Adam's moments are
    all there is to save: a resumed run gives the weights of an uninterrupted one. torch's CPU kernels repeat to the bit
    for one number of threads; CUDA has no such kernel for the gradient of mirrored padding. Under torchrun each process
    takes its rows of every batch (see `distributed`); another number of processes is another order of sums.
    """
    device = torch.device(session.device)
    module.to(device).train()
    optimizers = [torch.optim.Adam(turn.module.parameters(), settings.learning_rate, turn.betas) for turn in turns]
    first = _restore(module, optimizers, session)
    for step in range(first, settings.steps):
        if session.should_stop:
            # The wish may have come after the last step offered its checkpoint.
            session.save(step, lambda: _state(module, optimizers))
            break
        rows = tiles.batch(step, settings.batch)[distributed.my_rows(settings.batch)]
        batch, generator = torch.from_numpy(rows).to(device), _generator(device, session.seed, step)
        terms: dict[str, Tensor] = {}
        for turn, optimizer in zip(turns, optimizers, strict=True):
            total, shown = turn.loss(batch, generator)
            terms |= shown
            optimizer.param_groups[0]["lr"] = settings.rate_at(step)
            optimizer.zero_grad(set_to_none=True)
            weights = [weight for weight in turn.module.parameters() if weight.requires_grad]
            total.backward(inputs=weights)  # type: ignore[no-untyped-call]  # torch leaves it untyped
            distributed.average_step(module, len(rows) / settings.batch)
            optimizer.step()
        done = step + 1
        if done % _REPORT_EVERY == 0 or done == settings.steps:
            _report(session, done, settings.steps, terms)
        session.save(done, lambda: _state(module, optimizers))
    module.cpu().eval()


def _generator(device: torch.device, seed: int, step: int) -> torch.Generator:
    """The noise of one step; each process of a team draws its own."""
    number = (seed * 1_000_003 + step + distributed.rank() * 0x9E3779B97F4A7C15) % 2**63
    return torch.Generator(device).manual_seed(number)


def _report(session: Session, step: int, steps: int, terms: Mapping[str, Tensor]) -> None:
    shown = [term.detach().float().reshape(1) for term in terms.values()]
    distributed.average(shown, 1 / distributed.world())
    losses = {name: float(term) for name, term in zip(terms, shown, strict=True)}
    if not all(math.isfinite(value) for value in losses.values()):
        raise TrainError(f"the loss at step {step} is not finite ({losses}); lower train.learning_rate")
    session.report(step, steps, losses)


def _state(module: nn.Module, optimizers: Sequence[torch.optim.Adam]) -> dict[str, Tensor]:
    state = {f"module.{name}": tensor for name, tensor in module.state_dict().items()}
    for turn, optimizer in enumerate(optimizers):
        for index, moments in optimizer.state_dict()["state"].items():
            state |= {f"adam.{turn}.{index}.{name}": tensor for name, tensor in moments.items()}
    return state


def _restore(module: nn.Module, optimizers: Sequence[torch.optim.Adam], session: Session) -> int:
    saved = session.restore()
    if saved is None:
        return 0
    step, tensors = saved
    prefix = "module."
    module.load_state_dict({name[len(prefix) :]: t for name, t in tensors.items() if name.startswith(prefix)})
    moments: list[dict[int, dict[str, Tensor]]] = [{} for _ in optimizers]
    for name, tensor in tensors.items():
        if name.startswith("adam."):
            _, turn, index, kind = name.split(".")
            moments[int(turn)].setdefault(int(index), {})[kind] = tensor
    for optimizer, found in zip(optimizers, moments, strict=True):
        optimizer.load_state_dict(optimizer.state_dict() | {"state": found})
    return step
