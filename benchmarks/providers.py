"""Providers against each other: the same bundles under several installations of onnxruntime, in turn, in one run.

    python benchmarks/providers.py cpu=.venv/bin/python openvino=.venv-openvino/bin/python --bundle FILE.kizu …

Packages of onnxruntime exclude each other, hence one interpreter for each provider (`kizu[cpu]`, `kizu[openvino]`).
What counts is CPU seconds for each tile, of all threads together: they bear a busy machine, a clock on the wall does
not. Each interpreter is started `--rounds` times for each bundle, in turn; the least of its figures holds, and ratios
are to the first interpreter. The largest relative difference of the golden scores is shown too.
"""

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

from kizu_agent.engine import Engine
from kizu_agent.inspector import self_test
from kizu_agent.settings import EngineConfig
from kizu_contract.bundle import read_bundle

CHILD_S = 120.0


def main() -> int:
    """Measure and print a table, or one figure as a child."""
    options = _parse()
    if options.child:
        print(json.dumps(_measure(options.child, options.bundle[0], options.threads, options.seconds)))
        return 0
    names = [pair.partition("=")[0] for pair in options.interpreter]
    titles = ("ms CPU a tile", f"{names[0]} ÷ it", "deviation", "open s")
    print(f"{'bundle':24} {'provider':10} {'batch':>5}" + "".join(f" {title:>14}" for title in titles))
    for bundle in options.bundle:
        rounds = [_round(options, bundle) for _ in range(options.rounds)]
        base = min(found[names[0]]["cpu_ms"] for found in rounds)
        for name in names:
            best = min((found[name] for found in rounds), key=lambda figures: figures["cpu_ms"])
            figures = (best["cpu_ms"], base / best["cpu_ms"], best["deviation"], best["open_s"])
            row = "".join(f" {figure:14.3g}" for figure in figures)
            print(f"{bundle.stem[:24]:24} {name:10} {best['batch']:5.0f}{row}", flush=True)
    return 0


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("interpreter", nargs="*", metavar="PROVIDER=PYTHON")
    parser.add_argument("--bundle", type=Path, nargs="+", required=True, metavar="FILE.kizu")
    parser.add_argument("--threads", type=int, default=1, metavar="N", help="of the engine (1)")
    parser.add_argument("--rounds", type=int, default=3, metavar="N", help="starts of each interpreter (3)")
    parser.add_argument("--seconds", type=float, default=1.0, metavar="S", help="of measuring in each start (1)")
    parser.add_argument("--child", metavar="PROVIDER", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if not options.child and not all("=" in pair for pair in options.interpreter or [""]):
        parser.error("name at least one PROVIDER=PYTHON")
    return options


def _round(options: argparse.Namespace, bundle: Path) -> dict[str, dict[str, float]]:
    found = {}
    for pair in options.interpreter:
        name, _, python = pair.partition("=")
        command = [python, __file__, "--child", name, "--bundle", str(bundle)]
        command += ["--threads", str(options.threads), "--seconds", str(options.seconds)]
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, timeout=CHILD_S)
        found[name] = json.loads(done.stdout.splitlines()[-1])
    return found


def _measure(provider: str, path: Path, threads: int, seconds: float) -> dict[str, float]:
    """Least CPU milliseconds for a tile over batches of the bundle's usual size, and what else the table shows."""
    bundle = read_bundle(path)
    graph, started = bundle.manifest.graph, time.monotonic()
    config = EngineConfig.model_validate({"provider": provider, "threads": threads})
    with Engine(bundle.scorer, graph, config) as engine:
        open_s, size = time.monotonic() - started, graph.batch.opt
        shape = (size, graph.tile_px, graph.tile_px, graph.channels)
        tiles = np.random.default_rng(0).integers(0, 256, shape, np.uint8)
        places, best, end = np.zeros(size, np.int64), float("inf"), time.monotonic() + seconds
        while best == float("inf") or time.monotonic() < end:
            before = time.process_time()
            engine.run(tiles, places)
            best = min(best, time.process_time() - before)
        deviation = self_test(bundle, engine, 1.0)
    return {"batch": size, "cpu_ms": best / size * 1e3, "deviation": deviation, "open_s": open_s}


if __name__ == "__main__":
    sys.exit(main())
