"""The training loop of detectors that learn by gradients: nanoGPT-like, readable aloud, resumable to the bit."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from kizu_train import distributed
from kizu_train.arithmetic import Arithmetic, Compiled, Compiling, NotCompiled, Precision, choose_precision
from kizu_train.detectors.base import Session, TileSource
from kizu_train.errors import TrainError
from kizu_train.feeding import Prepare, Recipe, batches, timed

_REPORT_EVERY = 10


@dataclass(frozen=True)
class Descent:
    """Adam with a cosine learning rate: `steps` batches of `batch` tiles, from `learning_rate` down to 1 % of it.

    Small batches: 1,600 steps of 32 reach a far lower loss than 500 of 128, for less work. `precision` and `compile`
    as in `kizu_train.arithmetic`: `auto` mixes 16 bits in and compiles on GPUs alone.
    """

    steps: int = 4000
    batch: int = 32
    learning_rate: float = 2e-3
    warm_up: int = 20
    precision: Precision = "auto"
    compile: Compiling = "auto"

    def __post_init__(self) -> None:
        if not (self.steps >= 1 and self.batch >= 2 and self.learning_rate > 0 and self.warm_up >= 0):
            raise ValueError("steps >= 1, batch >= 2, learning_rate > 0 and warm_up >= 0 are needed")

    def rate_at(self, step: int) -> float:
        """Learning rate of step `step`, counted from 0."""
        if step < self.warm_up:
            return self.learning_rate * (step + 1) / (self.warm_up + 1)
        share = (step - self.warm_up) / max(1, self.steps - self.warm_up)
        return self.learning_rate * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * share)))


Loss = Callable[..., tuple[Tensor, Mapping[str, Tensor]]]
"""The tensors of a batch (tiles uint8 [B, T, T, C], or what `Prepare` made of them) and a generator on their device →
loss to descend and the terms to show, all scalars."""


@dataclass(frozen=True, eq=False)
class Turn:
    """One player's part of a step: its loss moves the weights of `module` and no others."""

    module: nn.Module
    loss: Loss
    betas: tuple[float, float] = (0.9, 0.999)


def descend(
    module: nn.Module,
    loss: Loss,
    settings: Descent,
    tiles: TileSource,
    session: Session,
    *,
    prepare: Prepare | None = None,
    can_mix: bool = False,
) -> None:
    """Train `module` on `loss`: one player, see `descend_in_turns`.

    `prepare` makes of good tiles what the loss takes, ahead of the step and off its device (see `feeding`). `can_mix`:
    the loss bears products in 16 bits.
    """
    _descend(module, (Turn(module, loss),), settings, tiles, session, prepare, can_mix=can_mix)


def descend_in_turns(
    module: nn.Module, turns: Sequence[Turn], settings: Descent, tiles: TileSource, session: Session
) -> None:
    """Train `module`, of which each player owns a part; at every step all have their turn on the same batch.

    Leaves it on the CPU, in eval mode. Raises TrainError when a loss is not finite, UsageError for a precision that
    the loss cannot be computed in.

    Batch, noise and learning rate of a step depend on the seed and the step alone, so weights and Adam's moments are
    all there is to save: a resumed run gives the weights of an uninterrupted one. torch's CPU kernels repeat to the bit
    for one number of threads; CUDA has no such kernel for the gradient of mirrored padding. Under torchrun each process
    takes its rows of every batch (see `distributed`); another number of processes is another order of sums.
    """
    _descend(module, turns, settings, tiles, session, None, can_mix=False)


def _descend(
    module: nn.Module,
    turns: Sequence[Turn],
    settings: Descent,
    tiles: TileSource,
    session: Session,
    prepare: Prepare | None,
    *,
    can_mix: bool,
) -> None:
    device = torch.device(session.device)
    arithmetic = Arithmetic(choose_precision(settings.precision, device, can_mix=can_mix), device)
    module.to(device, memory_format=arithmetic.layout).train()  # type: ignore[call-overload]  # torch forgot this form
    optimizers = [torch.optim.Adam(turn.module.parameters(), settings.learning_rate, turn.betas) for turn in turns]
    players = _Players(module, turns, optimizers, arithmetic)
    first = _restore(module, optimizers, arithmetic, session)
    rows = distributed.my_rows(settings.batch)
    recipe = Recipe(tiles, settings.batch, rows, partial(_seed_of, session.seed, distributed.rank()), prepare)
    # A step of several players cannot be taken again when the second one's part does not compile.
    wanted: Compiling = "off" if settings.compile == "auto" and len(turns) > 1 else settings.compile
    compiled = Compiled(module, wanted, device)
    with batches(recipe, first, settings.steps, device) as made:
        for step, batch in enumerate(timed(made), first):
            if session.should_stop:
                # The wish may have come after the last step offered its checkpoint.
                session.save(step, players.state)
                break
            terms = _one_step(players, compiled, batch, settings, step, session.seed)
            done = step + 1
            if done % _REPORT_EVERY == 0 or done == settings.steps:
                _report(session, done, settings.steps, terms)
            session.save(done, players.state)
    compiled.undo()
    module.to("cpu", memory_format=torch.contiguous_format).eval()  # type: ignore[call-overload]


@dataclass(frozen=True, eq=False)
class _Players:
    """Who learns in a step, and how it is computed."""

    module: nn.Module
    turns: Sequence[Turn]
    optimizers: Sequence[torch.optim.Adam]
    arithmetic: Arithmetic

    def state(self) -> dict[str, Tensor]:
        """What a checkpoint keeps."""
        return _state(self.module, self.optimizers) | self.arithmetic.tensors()


def _one_step(
    players: _Players, compiled: Compiled, batch: tuple[Tensor, ...], settings: Descent, step: int, seed: int
) -> dict[str, Tensor]:
    """All turns on one batch; the terms to show. Where compiled parts fail, once more without."""
    rate = settings.rate_at(step)
    # Every row of a batch counts alike in all processes: see `distributed.average_step`.
    share = len(batch[0]) / settings.batch
    try:
        with compiled.attempt():
            return _take_turns(players, batch, _generator(batch[0].device, seed, step), rate, share)
    except NotCompiled:
        return _take_turns(players, batch, _generator(batch[0].device, seed, step), rate, share)


def _take_turns(
    players: _Players, batch: tuple[Tensor, ...], generator: torch.Generator, rate: float, share: float
) -> dict[str, Tensor]:
    terms: dict[str, Tensor] = {}
    arithmetic = players.arithmetic
    for turn, optimizer in zip(players.turns, players.optimizers, strict=True):
        with arithmetic.mixed():
            total, shown = turn.loss(*batch, generator)
        terms |= shown
        optimizer.param_groups[0]["lr"] = rate
        optimizer.zero_grad(set_to_none=True)
        weights = [weight for weight in turn.module.parameters() if weight.requires_grad]
        arithmetic.scaled(total).backward(inputs=weights)  # type: ignore[no-untyped-call]  # torch leaves it untyped
        distributed.average_step(players.module, share)
        arithmetic.step(optimizer)
    arithmetic.update()
    return terms


def _generator(device: torch.device, seed: int, step: int) -> torch.Generator:
    """The noise of one step; each process of a team draws its own."""
    return torch.Generator(device).manual_seed(_seed_of(seed, distributed.rank(), step))


def _seed_of(seed: int, rank: int, step: int) -> int:
    return (seed * 1_000_003 + step + rank * 0x9E3779B97F4A7C15) % 2**63


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


def _restore(
    module: nn.Module, optimizers: Sequence[torch.optim.Adam], arithmetic: Arithmetic, session: Session
) -> int:
    saved = session.restore()
    if saved is None:
        return 0
    step, tensors = saved
    arithmetic.load(tensors)
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
