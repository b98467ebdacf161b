"""The agent's tiles per second, from folder to subscriber, against the bare engine on the same tiles, in one run.

A thin door to the family `agent` of scripts/bench speed, for the model of small tiles, which has the most of them.
"""

import tempfile
from pathlib import Path

from harness import parser, publish
from service import broker
from speed_agent import PICTURES, compare, prepare
from speed_models import Models, pictures_for

_RECIPE = "patch_vae"


def main() -> int:
    """Train a throw-away model, measure, print."""
    options = parser("agent").parse_args()
    pairs, seconds = (3, 5.0) if options.quick else (5, 15.0)
    with tempfile.TemporaryDirectory(prefix="kizu-bench-") as folder:
        work = Path(folder)
        models = Models(work / "models")
        bundle = models.bundle(_RECIPE)
        line = prepare(models.path(_RECIPE), bundle, pictures_for(bundle, PICTURES), ".png", "cpu", work / "pictures")
        with broker(work / "broker") as port:
            rows = compare(line, _RECIPE, port, work, pairs, seconds)
    return publish("agent", rows, options.json)


if __name__ == "__main__":
    raise SystemExit(main())
