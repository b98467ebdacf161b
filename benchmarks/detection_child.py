"""One cell of the detection bench, in a process of its own: fit, export, evaluate the bundle, time it.

Called with one argument, JSON as `detection_cells.Bench` writes it.
"""

import json
import logging
import shutil
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from detection_cells import Figures
from numpy.typing import NDArray

from kizu_agent.inspector import Inspector, load_inspector
from kizu_agent.settings import EngineConfig
from kizu_contract.bundle import Bundle, read_bundle, write_bundle
from kizu_contract.errors import KizuError
from kizu_contract.pictures import read_picture
from kizu_export.build import build_bundle
from kizu_export.evaluate import evaluate_bundle
from kizu_train.data import open_data
from kizu_train.detectors.base import Extras
from kizu_train.errors import UsageError
from kizu_train.evaluation.records import Evaluation
from kizu_train.fit import FitRequest, fit
from kizu_train.recipes import resolve_recipe
from kizu_train.runs import RUN, open_run

_SIDE = 256
_TIMED_S, _TIMED_AT_LEAST = 2.0, 5


Train = Callable[[dict[str, Any], Path, Path], Path]
"""An order, where its run goes and its pictures → where the run is."""


def main(train: Train | None = None) -> int:
    """Measure the cell; 0 done, 1 failed with the reason as the last line."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    order = json.loads(sys.argv[1])
    torch.set_num_threads(order["threads"])
    try:
        found = _timed(order) if order["only_time_of"] else _measure(order, train or _train).__dict__
    except (KizuError, OSError) as exc:
        print(" ".join(str(exc).split()))
        return 1
    Path(order["out"]).write_text(json.dumps(found), encoding="utf-8")
    return 0


def _timed(order: dict[str, Any]) -> dict[str, float]:
    """The times alone, of the bundle that is there."""
    score = order["score"] or resolve_recipe(order["recipe"], order["overrides"]).score
    path = Path(order["folder"]) / f"{score}.kizu"
    if path.stat().st_size != order["only_time_of"]:
        raise UsageError(f"{path} is not the bundle that was measured")
    ms_256, cpu_ms_256 = _time(read_bundle(path), Path(order["data"]))
    return {"ms_256": ms_256, "cpu_ms_256": cpu_ms_256}


def _measure(order: dict[str, Any], train: Train) -> Figures:
    folder, data = Path(order["folder"]), Path(order["data"])
    run = open_run(train(order, folder / "run", data), order["score"])
    built = build_bundle(run)
    path = folder / f"{run.score}.kizu"
    write_bundle(built.bundle, path)
    bundle = read_bundle(path)
    engine = EngineConfig(threads=order["threads"])
    found = evaluate_bundle(bundle, data, engine)
    ms_256, cpu_ms_256 = _time(bundle, data)
    parity = max(built.parity.score, built.parity.map)
    return replace(_figures(bundle, found, ms_256, path.stat().st_size, parity), cpu_ms_256=cpu_ms_256)


def _train(order: dict[str, Any], out: Path, data: Path) -> Path:
    """The run that other kinds of score may have trained already; one of other settings or code makes place."""
    key = out.with_name("training.json")
    wanted = json.dumps(order["training"], sort_keys=True)
    if not (key.is_file() and key.read_text(encoding="utf-8") == wanted):
        shutil.rmtree(out, ignore_errors=True)
        key.write_text(wanted, encoding="utf-8")
    recipe = resolve_recipe(order["recipe"], order["overrides"])
    extras = Extras(backbone=Path(order["backbone"]) if order["backbone"] else None)
    resume = out.is_dir() and (out / RUN).is_file()
    if out.is_dir() and not resume:
        shutil.rmtree(out)  # cut off: its seconds would not be those of a whole training
    fit(FitRequest(recipe, data, out, "auto", order["seed"], resume=resume, extras=extras))
    return out


def _figures(bundle: Bundle, found: Evaluation, ms_256: float, size: int, parity: float) -> Figures:
    manifest = bundle.manifest
    metrics = manifest.provenance.metrics
    return Figures(
        image_auroc=found.image.auroc,
        pixel_auroc=found.pixel.auroc,
        au_pro_30=found.pixel.au_pro_30,
        au_pro_05=found.pixel.au_pro_05,
        reject_escape=found.reject.escape_rate,
        reject_overkill=found.reject.overkill_rate,
        warn_escape=found.warn.escape_rate,
        warn_overkill=found.warn.overkill_rate,
        good=found.reject.good,
        reject_false_alarms=found.reject.false_alarms,
        overkill_asked=manifest.thresholds.reject_rate,
        training_s=metrics["training_s"],
        ms_256=ms_256,
        bundle_bytes=size,
        parity=parity,
        train_pictures=manifest.provenance.train_pictures,
        calibrated_on=manifest.calibration.frames,
        is_fixtured="position" in manifest.graph.inputs,
    )


def _time(bundle: Bundle, data: Path) -> tuple[float, float]:
    """Median milliseconds, of the clock and of the CPU, for a picture of 256 × 256 of the set, host memory to map.

    On one CPU thread.
    """
    pictures = open_data(data, bundle.manifest.colour)
    whole = read_picture(pictures.train[0], bundle.manifest.colour)
    # A detector that learns each place takes pictures of one size: its own, counted per 256 × 256 pixels.
    is_fixtured = "position" in bundle.manifest.graph.inputs
    picture = whole if is_fixtured else _square(whole)
    share = _SIDE**2 / (picture.shape[0] * picture.shape[1])
    inspector = load_inspector(bundle, EngineConfig(threads=1))
    try:
        times = _times_ms(inspector, picture)
        clock, cpu = (share * statistics.median(column) for column in zip(*times, strict=True))
        return clock, cpu
    finally:
        inspector.close()


def _times_ms(inspector: Inspector, picture: NDArray[np.uint8]) -> list[tuple[float, float]]:
    inspector.inspect([picture])
    times: list[tuple[float, float]] = []
    began = time.perf_counter()
    while len(times) < _TIMED_AT_LEAST or time.perf_counter() - began < _TIMED_S:
        started, busy = time.perf_counter(), time.process_time()
        inspector.inspect([picture])
        times.append(((time.perf_counter() - started) * 1000, (time.process_time() - busy) * 1000))
    return times


def _square(picture: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """The middle 256 × 256 pixels; a smaller picture is mirrored outwards first."""
    height, width, channels = picture.shape
    down, right = max(0, _SIDE - height), max(0, _SIDE - width)
    grown = cv2.copyMakeBorder(picture, 0, down, 0, right, cv2.BORDER_REFLECT) if down or right else picture
    top, left = (grown.shape[0] - _SIDE) // 2, (grown.shape[1] - _SIDE) // 2
    cut = grown[top : top + _SIDE, left : left + _SIDE].reshape(_SIDE, _SIDE, channels)
    return np.ascontiguousarray(cut, np.uint8)


if __name__ == "__main__":
    raise SystemExit(main())
