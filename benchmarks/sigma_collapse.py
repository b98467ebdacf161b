"""Does σ collapse on parts that are rebuilt almost perfectly, and what helps? A study of the patch VAE.

python benchmarks/sigma_collapse.py [--data DIR] [--quick] [--json FILE]

White gears on plain ground, drawn without noise, are learned to near zero error. Nothing then keeps σ from falling, and
M = ½ Σ (x − μ)² / σ² makes much of nothing: good parts fire. Each row is one remedy: the smallest σ that good parts of
the test see, the share of their pixels whose σ lies within a tenth of its floor, how many unseen good parts are
rejected (as drawn, and four grey levels darker, as on a darker day) at the threshold for one in a thousand, and the
image AUROC on planted defects. `--data DIR`: another product in MVTec layout, whose defective pictures serve instead.
"""

import argparse
import json
import statistics
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import cv2
import numpy as np
import torch
from harness import commit, machine
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

from kizu_agent.simulated_parts import BODY, gear
from kizu_contract.pictures import read_picture
from kizu_train.data import open_data
from kizu_train.detectors.patch_vae import PatchVaeScorer
from kizu_train.evaluation.metrics import image_auroc
from kizu_train.fit import FitRequest, fit
from kizu_train.nets.layers import to_pixels
from kizu_train.recipes import resolve_recipe
from kizu_train.runs import Run, open_run
from kizu_train.scoring import frame_scorer

Picture = NDArray[np.uint8]
_NO_FLOOR, _GREY_LEVEL = "network.sigma_floor=0.000001", "network.sigma_floor=0.00392"
_NO_SALT = "augment.salt_and_pepper=0.0"
REMEDIES: dict[str, tuple[str, ...]] = {
    "plain (no floor)": (_NO_FLOOR, _NO_SALT),
    "salt and pepper 0.4 %": (_NO_FLOOR,),
    "darkened copies, six times the data": (_NO_FLOOR, _NO_SALT, "augment.darken=[2,4,6,8,10]"),
    "floor of one grey level (0.0039)": (_GREY_LEVEL, _NO_SALT),
    "floor 0.03": (_NO_SALT,),
    "floor 0.03 and salt and pepper (the recipe)": (),
    "calibrated sigma": ("network.variance=calibrated", _NO_SALT),
}
_SMALL = (
    "grid.tile_px=16",
    "grid.stride_px=8",
    "grid.margin_px=8",
    "network.widths=[16,32]",
    "network.decoder_start=32",
    "network.decoder_widths=[16]",
    "network.latent=8",
    "reduction.smooth_sigma_px=2.0",
)
"""A network that comes to near zero error in minutes."""
_DARKER = 4
_GEAR_PX = 192


@dataclass(frozen=True)
class Size:
    """How much is drawn and learned."""

    train: int
    tests: int
    steps: int
    seeds: int


@dataclass(frozen=True)
class Found:
    """What one training showed; σ in grey levels of 255."""

    smallest_sigma: float
    at_floor: float
    false_alarms: float
    false_alarms_darker: float
    auroc: float


def main() -> int:
    """Train every remedy with every seed, print the table, write the JSON."""
    options = _options()
    size = Size(24, 24, 2000, 1) if options.quick else Size(60, 60, 8000, 3)
    with tempfile.TemporaryDirectory(prefix="kizu-sigma-") as folder:
        work = Path(folder)
        data = options.data or _draw_gears(work / "gears", size)
        rows = {
            name: [_study(data, work / f"{index}-{seed}", overrides, size, seed) for seed in range(size.seeds)]
            for index, (name, overrides) in enumerate(REMEDIES.items())
        }
    means = {name: _mean(found) for name, found in rows.items()}
    _print(means)
    if options.json is not None:
        _write(options.json, rows)
    return 0


def _options() -> argparse.Namespace:
    options = argparse.ArgumentParser(prog="python benchmarks/sigma_collapse.py")
    options.add_argument("--data", type=Path, metavar="DIR", help="another product, in MVTec layout")
    options.add_argument("--quick", action="store_true", help="under five minutes on 2 cores")
    options.add_argument("--json", type=Path, metavar="FILE", help="write the rows as JSON")
    return options.parse_args()


def _draw_gears(folder: Path, size: Size) -> Path:
    """The upper rim of fixtured gears, in MVTec layout: moved by up to a pixel; no noise, shading or texture."""
    for index in range(size.train + size.tests):
        place = "train/good" if index < size.train else "test/good"
        _save(folder / place / f"{index:03}.png", _rim(np.random.default_rng(index)))
    for index in range(size.tests):
        random = np.random.default_rng(10_000 + index)
        kind = ("scratch", "stain")[index % 2]
        _save(folder / f"test/{kind}/{index:03}.png", _spoilt(_rim(random), kind, random))
    return folder


def _rim(random: np.random.Generator) -> Picture:
    """A picture of 64 × 64, white on dark grey."""
    cover = gear(_GEAR_PX, _GEAR_PX).layers[:, :, BODY]
    # Whole pixels: a fraction would blur each picture's edges differently, and nothing would come to zero error.
    y, x = random.integers(-1, 2, 2)
    seen = cover[6 + y : 70 + y, _GEAR_PX // 2 - 32 + x : _GEAR_PX // 2 + 32 + x]
    return np.round(30 + 200 * np.clip(seen, 0, 1)).astype(np.uint8)


def _spoilt(picture: Picture, kind: str, random: np.random.Generator) -> Picture:
    """A grey hairline, or a stain with grain of its own, somewhere on the gear or beside it."""
    drawn, (x, y) = picture.copy(), random.integers(12, 52, 2).tolist()
    turn = random.uniform(0, np.pi)
    if kind == "scratch":
        ends = [(round(x + far * np.cos(turn)), round(y + far * np.sin(turn))) for far in (-9, 9)]
        cv2.line(drawn, ends[0], ends[1], 128, 1, cv2.LINE_AA)
        return drawn
    mask = cv2.ellipse(np.zeros_like(drawn), (x, y), (6, 4), np.degrees(turn), 0, 360, 1, -1)
    stained = drawn + mask * random.normal(0, 30, drawn.shape)
    return np.clip(np.round(stained), 0, 255).astype(np.uint8)


def _save(path: Path, picture: Picture) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(cv2.imencode(".png", picture)[1].tobytes())


def _study(data: Path, out: Path, overrides: Sequence[str], size: Size, seed: int) -> Found:
    recipe = resolve_recipe("patch_vae", (*_SMALL, f"train.steps={size.steps}", *overrides))
    fit(FitRequest(recipe, data, out, device="cpu", seed=seed))
    run = open_run(out)
    pictures = open_data(data, run.colour)
    good = [read_picture(test.path, run.colour) for test in pictures.tests if test.is_good]
    bad = [read_picture(test.path, run.colour) for test in pictures.tests if not test.is_good]
    score = frame_scorer(run.scorer, run.grid, run.reduction)
    of_good, of_bad = (np.array([score(picture).score for picture in group]) for group in (good, bad))
    of_darker = np.array([score(cv2.subtract(picture, _DARKER).reshape(picture.shape)).score for picture in good])
    smallest, at_floor = _sigmas(run, good)
    rejected = run.thresholds.reject
    alarms, darker = (float((scores >= rejected).mean()) for scores in (of_good, of_darker))
    return Found(smallest, at_floor, alarms, darker, image_auroc(of_bad, of_good) or 0.0)


def _sigmas(run: Run, pictures: Sequence[Picture]) -> tuple[float, float]:
    """The smallest σ of all pixels in grey levels, and the share of them within a tenth of the floor."""
    scorer = run.scorer
    assert isinstance(scorer, PatchVaeScorer)
    tiles = np.concatenate([run.grid.layout(*picture.shape[:2]).cut(picture) for picture in pictures])
    with torch.inference_mode():
        parts = [
            scorer.vae.decode(scorer.vae.encode(to_pixels(torch.from_numpy(part)))[0])[1].sqrt()
            for part in np.array_split(tiles, max(1, len(tiles) // 256))
        ]
    sigma = torch.cat([part.reshape(-1) for part in parts])
    floor = scorer.vae.network.lowest_sigma
    return float(sigma.min()) * 255, float((sigma < 1.1 * floor).float().mean())


def _mean(found: Sequence[Found]) -> Found:
    columns = zip(*(asdict(one).values() for one in found), strict=True)
    return Found(*(statistics.fmean(column) for column in columns))


def _print(rows: dict[str, Found]) -> None:
    table = Table(title="σ collapse of the patch VAE")
    for name in ("remedy", "smallest σ (of 255)", "at floor", "rejected good", "the same, darker", "image AUROC"):
        table.add_column(name, justify="left" if name == "remedy" else "right")
    for name, found in rows.items():
        shares = (f"{share:.1%}" for share in (found.at_floor, found.false_alarms, found.false_alarms_darker))
        table.add_row(name, f"{found.smallest_sigma:.3g}", *shares, f"{found.auroc:.3f}")
    Console(width=120).print(table)


def _write(target: Path, rows: dict[str, list[Found]]) -> None:
    report = {
        "bench": "sigma_collapse",
        "commit": commit(),
        "machine": machine(),
        "command": "python benchmarks/sigma_collapse.py " + " ".join(sys.argv[1:]),
        "rows": [
            {"name": name, "mean": asdict(_mean(found)), "runs": [asdict(one) for one in found]}
            for name, found in rows.items()
        ],
    }
    target.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    sys.exit(main())
