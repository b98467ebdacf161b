"""Lower precisions: how much faster, and what they lose (see speed_precision)."""

import tempfile
from pathlib import Path

from harness import parser, publish
from speed_precision import FULL, QUICK, RECIPES, measure


def main() -> int:
    """Train throw-away models, export each in all precisions, measure, print."""
    options = parser("precision")
    options.add_argument("--recipes", default=",".join(RECIPES), metavar="A,B", help="those to measure, by name")
    given = options.parse_args()
    with tempfile.TemporaryDirectory(prefix="kizu-bench-") as folder:
        rows = measure(Path(folder), given.recipes.split(","), QUICK if given.quick else FULL)
    return publish("precision", rows, given.json)


if __name__ == "__main__":
    raise SystemExit(main())
