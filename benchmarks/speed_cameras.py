"""(f) 1 to 16 simulated cameras on one engine, at a rate that overfills it: shares, staleness, drops, throughput.

The cameras together ask for the same share too much however many they are, since drawing their pictures takes CPU time
of the same cores: hence the accurate default, which takes ten times as long for a picture as drawing it. Pictures have
one tile each: many frames in little time.
"""

import statistics
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from harness import Row
from service import Arrival, Service, Subscriber, broker
from speed_common import ACCURATE, Request, engine_config, paced, percentile
from speed_models import pictures

from kizu_agent.inspector import load_inspector
from kizu_contract.bundle import read_bundle

AIM_FAIR, AIM_KEPT = 0.9, 0.9
COUNTS, _QUICK_COUNTS = (1, 2, 4, 8, 16), (1, 4, 16)
_SIDE = 256
_TOO_MUCH = 1.6
_LEAST_RESULTS = 50
"""Of each camera, so that counting whole frames does not look like an unequal share."""
_MOST_S = 60.0
Drops = dict[str, float]


class Served(NamedTuple):
    """What so many cameras got: the results heard in so many `seconds`, and the frames dropped meanwhile by cause."""

    cameras: int
    offered: float
    seconds: float
    arrivals: Sequence[Arrival]
    drops: Drops


def measure(request: Request) -> list[Row]:
    """All rows of this family."""
    bundle = request.models.path(ACCURATE, _SIDE)
    capacity = _capacity(request)
    rows = [Row("bare inspector, frames of one tile", capacity, "frames/s")]
    served = []
    with broker(request.work / "broker") as port:
        for count in _QUICK_COUNTS if request.is_quick else COUNTS:
            served.append(_serve(bundle, request.work / f"cameras{count}", port, count, capacity, request.is_quick))
            rows += served_rows(served[-1])
    first, last = (len(each.arrivals) / each.seconds for each in (served[0], served[-1]))
    rows.append(Row(f"throughput with {served[-1].cameras} ÷ with {served[0].cameras}", last / first, "", AIM_KEPT))
    return rows


def _capacity(request: Request) -> float:
    """Frames a second that the engine takes with nothing else to do."""
    bundle = read_bundle(request.models.path(ACCURATE, _SIDE))
    images = pictures(bundle.manifest.colour, 8, _SIDE, _SIDE)
    inspector = load_inspector(bundle, engine_config("cpu"))

    def work() -> int:
        inspector.inspect(images)
        return len(images)

    work()
    pace = paced(work, 2 * request.seconds)
    inspector.close()
    return pace.rate


def _serve(bundle: Path, work: Path, port: int, count: int, capacity: float, is_quick: bool) -> Served:
    rate = round(_TOO_MUCH * capacity / count, 2)
    query = f"rate={rate}&width={_SIDE}&height={_SIDE}&defects=0"
    cameras = "".join(f'[[cameras]]\nname = "c{n:02}"\nsource = "sim:plates?seed={n}&{query}"\n' for n in range(count))
    seconds = min(_MOST_S, max(4.0 if is_quick else 20.0, _LEAST_RESULTS * count / capacity * 1.5))
    with (
        Subscriber(port, f"bench/{work.name}/+/result") as subscriber,
        Service(work, port, bundle, cameras) as service,
    ):
        service.await_results(subscriber, 1)
        _await_all(service, subscriber, count)
        before, began = _drops(service), time.monotonic()
        time.sleep(seconds)
        ended, after = time.monotonic(), _drops(service)
        arrivals = subscriber.between(began, ended)
    drops = {cause: number - before.get(cause, 0.0) for cause, number in after.items()}
    return Served(count, rate, ended - began, arrivals, drops)


def _await_all(service: Service, subscriber: Subscriber, count: int) -> None:
    """Wait until every camera runs and has had some results: starting processes takes the engine's cores."""
    while True:
        heard = Counter(arrival.topic for arrival in list(subscriber.arrivals))
        if len(heard) == count and min(heard.values()) >= 5:
            return
        service.await_results(subscriber, 1)


def _drops(service: Service) -> Drops:
    found: Drops = {}
    for (_, cause), number in service.metric("dropped_frames_total", "camera", "cause").items():
        found[cause] = found.get(cause, 0.0) + number
    return found


def served_rows(served: Served) -> list[Row]:
    """Rates, shares, staleness at commit (now − captured) and drops."""
    name = f"{served.cameras} cameras" if served.cameras > 1 else "1 camera"
    stale: dict[str, list[float]] = {}
    for arrival in served.arrivals:
        result = arrival.json
        stale.setdefault(result["camera"], []).append(result["timing"]["total_ms"])
    counts = [len(values) for values in stale.values()]
    medians = [statistics.median(values) for values in stale.values()]
    late = [percentile(values, 99) for values in stale.values()]
    rows = [
        Row(f"{name}: offered, each", served.offered, "frames/s"),
        Row(f"{name}: served, all together", sum(counts) / served.seconds, "frames/s"),
        Row(f"{name}: served, the least", min(counts) / served.seconds, "frames/s"),
        Row(f"{name}: served, the most", max(counts) / served.seconds, "frames/s"),
        Row(f"{name}: age at commit, p50, freshest camera", min(medians), "ms"),
        Row(f"{name}: age at commit, p50, stalest camera", max(medians), "ms"),
        Row(f"{name}: age at commit, p99, freshest camera", min(late), "ms"),
        Row(f"{name}: age at commit, p99, stalest camera", max(late), "ms"),
        *(Row(f"{name}: dropped, {k}", n / served.seconds, "frames/s") for k, n in sorted(served.drops.items()) if n),
    ]
    if served.cameras > 1:
        silent = served.cameras - len(counts)
        share = 0.0 if silent else min(counts) / max(counts)
        rows.append(Row(f"{name}: least ÷ most served", share, "", AIM_FAIR))
        rows.append(Row(f"{name}: median age, freshest ÷ stalest camera", min(medians) / max(medians), "", AIM_FAIR))
    return rows
