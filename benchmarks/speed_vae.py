"""(e) The patch VAE on 28 × 28 pictures, 8 × 8 windows every 2 px, against one call of the network for each window."""

from collections.abc import Callable

import numpy as np
import onnxruntime as ort
import speed_graph
import speed_peak
import torch
from harness import Row
from numpy.typing import NDArray
from speed_common import FAST, Pace, Request, cut_all, engine_config, in_turn, middle, paced, ratio
from speed_models import pictures_for

from kizu_agent.inspector import load_inspector
from kizu_contract.bundle import Bundle
from kizu_train.runs import open_run

RECIPE = "patch_vae_28px"
AIM = 500.0
_PICTURES = 512
_Run = Callable[[NDArray[np.uint8]], object]


def measure(request: Request) -> list[Row]:
    """All rows of this family."""
    bundle = request.models.bundle(RECIPE)
    images = pictures_for(bundle, _PICTURES)
    tiles, _ = cut_all(bundle, images)
    each = len(tiles) // len(images)
    inspector = load_inspector(bundle, engine_config("cpu"))
    loops = {"torch": _torch(request), "onnxruntime": _onnxruntime(bundle)}
    _check(tiles[:each], inspector.engine.run(tiles[:each])[0], loops)

    def mine() -> int:
        inspector.inspect(images)
        return len(images)

    def looped(run: _Run) -> Pace:
        def picture() -> int:
            for tile in tiles[:each]:
                run(tile[None])
            return 1

        return paced(picture, request.seconds)

    mine()
    works = [lambda: paced(mine, request.seconds), *(lambda run=run: looped(run) for run in loops.values())]
    found = in_turn(works, request.pairs(FAST))
    inspector.close()
    rows = [Row("kizu: pictures of 28 × 28 to maps and scores", middle(found[0]).rate, "pictures/s")]
    cost = speed_graph.count(bundle.scorer, each).flops
    bound = speed_peak.measure(speed_peak.cores()).flops_per_s / cost
    rows += [Row("kizu: windows of a picture", float(each), "")]
    rows += [Row("the same network, were every FLOP done at the machine's sgemm peak", bound, "pictures/s")]
    for name, loop in zip(loops, found[1:], strict=True):
        rows.append(Row(f"one window a call, {name}", middle(loop).rate, "pictures/s"))
        rows.append(Row(f"kizu ÷ one window a call, {name}", ratio(found[0], loop), "", AIM))
    return rows


def _torch(request: Request) -> _Run:
    scorer = open_run(request.models.run(RECIPE)).scorer
    torch.set_num_threads(1)  # for one window of 8 × 8, more threads only cost

    def run(tile: NDArray[np.uint8]) -> object:
        with torch.inference_mode():
            return scorer(torch.from_numpy(tile))[0].numpy()

    return run


def _onnxruntime(bundle: Bundle) -> _Run:
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    session = ort.InferenceSession(bundle.scorer, options, providers=["CPUExecutionProvider"])
    return lambda tile: session.run(["score", "map"], {"tiles": tile})[0]


def _check(tiles: NDArray[np.uint8], wanted: NDArray[np.float32], loops: dict[str, _Run]) -> None:
    """The loops are of the same network: they give the same scores."""
    for name, run in loops.items():
        found = np.concatenate([np.atleast_1d(np.asarray(run(tile[None]), np.float32)) for tile in tiles])
        np.testing.assert_allclose(found, wanted, rtol=1e-3, err_msg=name)
