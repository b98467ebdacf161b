"""From the trigger to the answer, over a private Mosquitto, against the scoring time itself in the same run.

A client of its own sends the command `inspect` at a steady rate and takes the time until the answer is there. What is
over and above the scoring of that very picture counts: both ways over the broker, the making of the picture, queues,
threads, JSON. The camera is a folder of small pictures, the nearest to a sensor that is exposed at once: reading and
decoding one takes a fraction of a millisecond, and is counted against us too.
"""

import os
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from harness import Row, parser, publish

ROOT = Path(__file__).parents[1]
sys.path[0] = str(ROOT / "tests")  # in the place of this folder, whose faults.py would hide the package there

from faults.commander import Commander, commander  # noqa: E402
from faults.plant import Agent, Broker, brightness_bundle, give, pictures, wait_for  # noqa: E402

AIM_MS = 10.0
_CAMERA = """[[cameras]]
name = "cam1"
source = "folder:{}?loop=true"
trigger = "mqtt"
"""
_SIDE_PX = 128


class Timed(NamedTuple):
    """One trigger: its latency as its sender saw it, and its answer."""

    latency_ms: float
    answer: dict[str, Any]

    @property
    def overhead_ms(self) -> float:
        """What is not scoring."""
        return self.latency_ms - (self.answer["scoring_ms"] or 0.0)


def main() -> int:
    """Measure and print."""
    options = parser("trigger")
    options.add_argument("--rate", type=float, default=30.0, help="triggers a second")
    asked = options.parse_args()
    seconds = 5.0 if asked.quick else 60.0
    with tempfile.TemporaryDirectory(prefix="kizu-bench-") as folder:
        before = stolen_s()
        timed = measure(Path(folder), asked.rate, seconds)
        stolen = (stolen_s() - before) / seconds
    told = rows(timed, asked.rate, seconds)
    return publish("trigger", [*told, Row("taken by the host's other guests, of one core", stolen, "")], asked.json)


def measure(folder: Path, rate: float, seconds: float) -> list[Timed]:
    """Trigger so many times a second for so long, on an agent of its own."""
    broker = Broker(folder / "broker", "set_tcp_nodelay true")
    broker.start()
    # More than are asked for: beginning the folder anew takes milliseconds, and is no part of a trigger.
    shots = pictures(folder / "pictures", count=round(rate * seconds) + 100, high=_SIDE_PX, wide=_SIDE_PX)
    agent = Agent(folder / "agent", broker.port, _CAMERA.format(shots))
    give(agent, brightness_bundle())
    agent.start()
    try:
        with commander(broker.port) as client:
            client.until_ok("inspect", {"camera": "cam1"})
            return _trigger(client, rate, round(rate * seconds))
    finally:
        agent.stop()
        broker.close()


def _trigger(client: Commander, rate: float, count: int) -> list[Timed]:
    sent: dict[bytes, float] = {}
    began = time.monotonic() + 0.1
    for number in range(count):
        time.sleep(max(0.0, began + number / rate - time.monotonic()))
        at = time.monotonic()
        sent[client.send("inspect", {"camera": "cam1", "part_id": f"part-{number}"})] = at
    wait_for(lambda: sent.keys() <= client.answers.keys(), 30, "the answers")
    answers = {correlation: client.answers[correlation][0] for correlation in sent}
    return [Timed((answers[key].at - at) * 1000, answers[key].answer) for key, at in sent.items()]


def rows(timed: Sequence[Timed], rate: float, seconds: float) -> list[Row]:
    """The figures with their aims."""
    latency = [each.latency_ms for each in timed]
    overhead = [each.overhead_ms for each in timed]
    scoring = [each.answer["scoring_ms"] or 0.0 for each in timed]
    inside = [each.answer["elapsed_ms"] for each in timed]
    picture = [each.answer["picture_ms"] or 0.0 for each in timed]
    without = sum(each.answer["verdict"] == "unknown" for each in timed)
    title = f"at {rate:g}/s for {seconds:g} s"
    return [
        Row(f"triggers {title}", float(len(timed)), ""),
        Row("answered without a verdict", float(without), "", 0.0, at_most=True),
        Row("trigger → answer, p50", percentile(latency, 50), "ms"),
        Row("trigger → answer, p99", percentile(latency, 99), "ms"),
        Row("scoring, p50", percentile(scoring, 50), "ms"),
        Row("scoring, p99", percentile(scoring, 99), "ms"),
        Row("over the scoring time, p50", percentile(overhead, 50), "ms"),
        Row("over the scoring time, p99", percentile(overhead, 99), "ms", AIM_MS, at_most=True),
        Row("of that, arrival → picture made, p50", percentile(picture, 50), "ms"),
        Row("of that, arrival → picture made, p99", percentile(picture, 99), "ms"),
        Row("inside the agent (arrival → answer), p50", percentile(inside, 50), "ms"),
        Row("inside the agent (arrival → answer), p99", percentile(inside, 99), "ms"),
        Row("slowest answer", max(latency), "ms"),
    ]


def stolen_s() -> float:
    """Seconds that a hypervisor gave to others while this machine wanted to run, all cores together; proc(5), steal."""
    first = Path("/proc/stat").read_text().splitlines()[0].split()
    return int(first[8]) / os.sysconf("SC_CLK_TCK")


def percentile(values: Sequence[float], percent: int) -> float:
    """The value that so many percent lie at or below."""
    return statistics.quantiles(values, n=100, method="inclusive")[percent - 1]


if __name__ == "__main__":
    raise SystemExit(main())
