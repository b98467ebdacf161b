"""What ships, measured: a bundle's test pictures through the agent's own engine. Imports no torch."""

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from kizu_agent.inspector import load_inspector
from kizu_agent.settings import EngineConfig
from kizu_contract.bundle import Bundle
from kizu_contract.judging import FrameScore
from kizu_contract.manifest import Manifest
from kizu_train.data import open_data
from kizu_train.evaluation.evaluate import evaluate
from kizu_train.evaluation.records import Evaluation
from kizu_train.evaluation.report import write_report


def evaluate_bundle(bundle: Bundle, data: Path, config: EngineConfig, *, show_progress: bool = False) -> Evaluation:
    """Score the test pictures below `data` (MVTec layout) with `bundle` on the configured engine.

    Raises TrainError where there is nothing to evaluate on, EngineError when the engine refuses.
    """
    manifest = bundle.manifest
    pictures = open_data(data, manifest.colour)
    inspector = load_inspector(bundle, config)

    def score(picture: NDArray[np.uint8]) -> FrameScore:
        return inspector.inspect([picture])[0]

    try:
        thresholds = manifest.thresholds.scores()
        return evaluate(pictures, score, thresholds, colour=manifest.colour, show_progress=show_progress)
    finally:
        inspector.close()


def write_bundle_report(path: Path, evaluation: Evaluation, bundle: Bundle, data: Path, provider: str) -> None:
    """Write the HTML report of an evaluation of `bundle`. Raises OSError."""
    manifest, provenance = bundle.manifest, bundle.manifest.provenance
    write_report(
        path,
        evaluation,
        title=f"{manifest.name} {manifest.version}",
        facts={
            "Model": f"{manifest.name} {manifest.version}",
            "Pictures": data.resolve().name,
            "Engine": f"onnxruntime on {provider}, {manifest.graph.precision}",
            "Calibrated on": _calibrated_on(manifest),
        },
        provenance={
            "Bundle SHA-256": bundle.sha256,
            "Signed by": bundle.signed_by or "not checked",
            "Detector": provenance.detector,
            "Recipe": str(provenance.recipe.get("name", "")),
            "Seed": str(provenance.seed),
            "Training pictures": str(provenance.train_pictures),
            "Data fingerprint": provenance.data_fingerprint,
            "Trained with": f"kizu {provenance.kizu_version}",
            "Trained": manifest.created,
        },
    )


def _calibrated_on(manifest: Manifest) -> str:
    rate = manifest.thresholds.reject_rate
    text = f"{manifest.calibration.frames} held-out good pictures"
    if manifest.calibration.can_tell(rate):
        return text
    return f"{text}: too few for 1 in {1 / rate:.0f}, so the thresholds stand far out"
