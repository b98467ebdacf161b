"""One cell of a joint recipe: as any other of the detection bench, but what a member learned for one cell serves all.

A member learns as it would inside the joint fit, from the same windows with the same seed: what is kept is what that
fit would have given. Called with one argument, as `detection_child`.
"""

import hashlib
import json
import shutil
import time
from pathlib import Path
from typing import Any

from detection_cells import learning_fingerprint
from detection_child import main
from torch import Tensor

from kizu_train.checkpoint import pack, unpack
from kizu_train.data import hold_out, open_data
from kizu_train.detectors.base import Extras
from kizu_train.detectors.joint import JointDetector, Member, uses_of
from kizu_train.errors import UsageError
from kizu_train.fit import FitRequest, FitSession, choose_device, finish
from kizu_train.progress import FitProgress
from kizu_train.quiet_session import QuietSession
from kizu_train.recipes import resolve_recipe
from kizu_train.runs import build_detector
from kizu_train.tile_pool import TilePool
from kizu_train.tile_size import fit_tiles


def train(order: dict[str, Any], out: Path, data: Path) -> Path:
    """The run of the order's joint recipe at `out`, made of members that are learned once for all cells."""
    shutil.rmtree(out, ignore_errors=True)
    pictures = open_data(data, with_tests=False)
    recipe = fit_tiles(resolve_recipe(order["recipe"], order["overrides"]), pictures)
    settings, seed = recipe.data, order["seed"]
    split = hold_out(pictures, seed, settings.held_out_share, settings.held_out_at_least)
    detector = build_detector(recipe, pictures.colour, seed)
    if not isinstance(detector, JointDetector):
        raise UsageError(f"recipe {recipe.name} joins no members")
    tiles = TilePool(split.learn, recipe.grid, pictures.colour, seed, settings.cache_mb)
    extras = Extras(backbone=Path(order["backbone"]) if order["backbone"] else None)
    device = choose_device("auto")
    common = {
        "data": order["training"]["data"],
        "code": learning_fingerprint(),
        "seed": seed,
        "grid": str(recipe.grid),
        # What of the pictures is learned from, and how it is kept, is the joint recipe's.
        "pool": [pictures.colour, settings.held_out_share, settings.held_out_at_least, settings.cache_mb],
        "device": device,
    }
    seconds = 0.0
    for member in detector.members:
        takes = "backbone" in uses_of(member.recipe)
        own = common | ({"backbone": order["training"]["backbone"]} if takes else {})
        learned, took_s = _learn(member, tiles, own, extras if takes else Extras(), _members(out))
        detector.adopt(member.name, learned)
        seconds += took_s
    out.mkdir(parents=True)
    request = FitRequest(recipe, data, out, device, seed, extras=extras, metrics={"training_s": round(seconds, 1)})
    session = FitSession(request, device, {"pictures": pictures.fingerprint}, FitProgress(), lambda: False)
    finish(request, pictures, split, detector, session)
    return out


def _learn(
    member: Member, tiles: TilePool, common: dict[str, Any], extras: Extras, kept: Path
) -> tuple[dict[str, Tensor], float]:
    """What the member learns, from its file where it has learned, and the seconds that took."""
    core = {"recipe": {**member.recipe.to_dict(), "name": "", "about": ""}, "windows": str(member.shape), **common}
    name = hashlib.sha256(json.dumps(core, sort_keys=True).encode()).hexdigest()[:32]
    file, note = kept / f"{name}.safetensors", kept / f"{name}.json"
    if not note.is_file():
        began = time.monotonic()
        member.detector.fit(member.source(tiles), QuietSession(common["seed"], common["device"], extras))
        took_s = time.monotonic() - began
        kept.mkdir(parents=True, exist_ok=True)
        partial = file.with_suffix(".partial")
        partial.write_bytes(pack(member.detector.tensors()))
        partial.replace(file)
        note.write_text(json.dumps({"training_s": took_s, "member": member.name}), encoding="utf-8")
    return unpack(file.read_bytes(), file), float(json.loads(note.read_text(encoding="utf-8"))["training_s"])


def _members(out: Path) -> Path:
    """Beside all runs: …/members for …/runs/SET/POINT/run."""
    return out.parents[3] / "members"


if __name__ == "__main__":
    raise SystemExit(main(train))
