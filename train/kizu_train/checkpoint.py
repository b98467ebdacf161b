"""Checkpoints: one safetensors file and one JSON that names it, so that a kill at any moment leaves a whole pair."""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from kizu_contract.bundle import write_atomically
from kizu_contract.errors import ManifestError
from kizu_contract.strict_json import parse_json, parse_record, to_plain
from kizu_train.errors import TrainError

CHECKPOINT = "checkpoint.json"
_TENSORS = "checkpoint-{step:08d}.safetensors"


@dataclass(frozen=True)
class Checkpoint:
    """What must be equal for a run to go on, and how far it is.

    Randomness derives from seed and step, so no generator's state is kept. `threads` because sums on a CPU depend on
    how they are split. `fingerprints`: SHA-256 of the pictures and of each extra that is learned from.
    """

    step: int
    seconds: float
    seed: int
    threads: int
    recipe: dict[str, Any]
    fingerprints: dict[str, str]
    tensors: str
    sha256: str


def save_checkpoint(run: Path, checkpoint: Checkpoint, tensors: dict[str, Tensor]) -> None:
    """Write tensors, then the JSON that points to them, then remove older tensors; each step is atomic.

    `tensors` and `sha256` of `checkpoint` are filled in here.
    """
    data = pack(tensors)
    name = _TENSORS.format(step=checkpoint.step)
    write_atomically(run / name, data)
    record = to_plain(checkpoint) | {"tensors": name, "sha256": hashlib.sha256(data).hexdigest()}
    write_atomically(run / CHECKPOINT, json.dumps(record, indent=2, sort_keys=True).encode() + b"\n")
    _remove_tensors(run, keep=name)


def load_checkpoint(run: Path) -> tuple[Checkpoint, dict[str, Tensor]] | None:
    """The checkpoint in `run`, None where there is none. Raises TrainError where it is damaged."""
    path = run / CHECKPOINT
    if not path.exists():
        return None
    try:
        checkpoint = parse_record(Checkpoint, parse_json(path.read_bytes(), CHECKPOINT), "checkpoint")
        data = (run / checkpoint.tensors).read_bytes()
    except (OSError, ManifestError) as exc:
        raise TrainError(f"{path}: cannot be resumed from: {exc}; start again with another --out") from exc
    if hashlib.sha256(data).hexdigest() != checkpoint.sha256:
        raise TrainError(f"{run / checkpoint.tensors}: is damaged; start again with another --out")
    return checkpoint, unpack(data, run / checkpoint.tensors)


def drop_checkpoint(run: Path) -> None:
    """Remove the checkpoint of a run that is through."""
    (run / CHECKPOINT).unlink(missing_ok=True)
    _remove_tensors(run, keep=None)


def pack(tensors: dict[str, Tensor]) -> bytes:
    """Tensors as safetensors bytes."""
    return save({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()})


def unpack(data: bytes, where: Path) -> dict[str, Tensor]:
    """Safetensors bytes as tensors on the CPU. Raises TrainError that names `where`."""
    try:
        return load(data)
    except SafetensorError as exc:
        raise TrainError(f"{where}: is not a whole safetensors file: {exc}") from exc


def _remove_tensors(run: Path, keep: str | None) -> None:
    for path in run.glob("checkpoint-*.safetensors"):
        if path.name != keep:
            path.unlink()
