"""(d) What a plant feels: from capture to subscriber at 30 frames a second, memory, start to first result.

Pictures for the latency are so small, and the model trained on such, that one core manages 30 of them a second.

The clock is this machine's monotonic one: the agent's `captured_at`, in whole milliseconds UTC and so up to 1 ms too
early, is brought to it by the difference of the two clocks, which must not change meanwhile.
"""

import statistics
import time
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path

from harness import Row
from service import Arrival, Memory, Service, Subscriber, broker, wait_for
from speed_common import FAST, Request, percentile
from speed_models import pictures, write_pictures

AIM_OVER_MS, AIM_MIB, AIM_START_S = 10.0, 250e6 / 2**20, 1.5
RATE = 30
_STEP_S = 0.002
_WIDTH, _HEIGHT = 1920, 1200
_SIDE = 128
_LEAST_MIB = 60.0
"""Less, and a capture process has not imported what it needs yet."""


def measure(request: Request) -> list[Row]:
    """All rows of this family, with the fast default on the CPU."""
    bundle, small = request.models.path(FAST), request.models.path(FAST, _SIDE)
    with broker(request.work / "broker") as port:
        return [
            *_latency(small, request.work / "latency", port, 8.0 if request.is_quick else 60.0),
            *_starts(bundle, request.work / "start", port, 3 if request.is_quick else 7),
            *_memories(bundle, request.work, port, 5 if request.is_quick else 60),
        ]


def _camera(source: str) -> str:
    return f'[[cameras]]\nname = "cam1"\nsource = "{source}"\n'


def _latency(bundle: Path, work: Path, port: int, seconds: float) -> list[Row]:
    with (
        Subscriber(port, f"bench/{work.name}/cam1/result") as subscriber,
        Service(work, port, bundle, _camera(f"sim:plates?rate={RATE}&width={_SIDE}&height={_SIDE}")) as service,
    ):
        service.await_results(subscriber, RATE)
        before, began = _clocks_differ_s(), time.monotonic()
        time.sleep(seconds)
        arrivals = subscriber.between(began, time.monotonic())
        if abs(_clocks_differ_s() - before) > _STEP_S:
            raise SystemExit("the wall clock was set while latency was measured: try again")
    return latency_rows(arrivals, before, f"fast default, {_SIDE} × {_SIDE} at {RATE}/s")


def latency_rows(arrivals: Sequence[Arrival], differ_s: float, name: str) -> list[Row]:
    """Capture → subscriber, and what of it is not scoring, frame by frame; `differ_s` of UTC and monotonic clock."""
    latency = [(heard.at - (_utc_s(heard.json["captured_at"]) - differ_s)) * 1e3 for heard in arrivals]
    scoring = [heard.json["timing"]["scoring_ms"] for heard in arrivals]
    over = [whole - part for whole, part in zip(latency, scoring, strict=True)]
    return [
        Row(f"{name}: results", float(len(arrivals)), ""),
        Row(f"{name}: capture → subscriber, p50", percentile(latency, 50), "ms"),
        Row(f"{name}: capture → subscriber, p99", percentile(latency, 99), "ms"),
        Row(f"{name}: scoring, p50", percentile(scoring, 50), "ms"),
        Row(f"{name}: scoring, p99", percentile(scoring, 99), "ms"),
        Row(f"{name}: over the scoring time, p50", percentile(over, 50), "ms"),
        Row(f"{name}: over the scoring time, p99", percentile(over, 99), "ms", AIM_OVER_MS, at_most=True),
    ]


def _clocks_differ_s() -> float:
    return time.time() - time.monotonic()


def _utc_s(text: str) -> float:
    return datetime.fromisoformat(text.replace("Z", "+00:00")).timestamp()


def _starts(bundle: Path, work: Path, port: int, times: int) -> list[Row]:
    """From the start of the process to the first result heard; the model is stored and everything is in the cache."""
    service = Service(work, port, bundle, _camera("sim:plates?rate=100&width=256&height=256"))
    found = []
    with Subscriber(port, f"bench/{work.name}/cam1/result") as subscriber:
        for _ in range(times + 1):  # the first one proves and stores the model
            subscriber.arrivals.clear()
            began = time.monotonic()
            with service:
                service.await_results(subscriber, 1)
                found.append(subscriber.arrivals[0].at - began)
    name = "fast default: start of the process → first result"
    return [
        Row(f"{name}, with a new model to prove", found[0], "s"),
        Row(f"{name}, warm, median of {times}", statistics.median(found[1:]), "s", AIM_START_S, at_most=True),
        Row(f"{name}, warm, slowest", max(found[1:]), "s"),
    ]


def _memories(bundle: Path, work: Path, port: int, results: int) -> list[Row]:
    """With a camera that draws its pictures, and with one that decodes them, as most do: drawing takes memory too."""
    folder = write_pictures(work / "large", pictures("rgb", 2, _WIDTH, _HEIGHT), ".jpg")
    cameras = {
        "simulated": f"sim:plates?rate=2&width={_WIDTH}&height={_HEIGHT}",
        "folder of JPEG files": f"folder:{folder}?rate=2&loop=true",
    }
    return [
        row
        for index, (kind, source) in enumerate(cameras.items())
        for row in _memory(bundle, work / f"memory{index}", port, results, kind, source)
    ]


def _memory(bundle: Path, work: Path, port: int, results: int, kind: str, source: str) -> list[Row]:
    """As memory stands after some results."""
    with (
        Subscriber(port, f"bench/{work.name}/cam1/result") as subscriber,
        Service(work, port, bundle, _camera(source)) as service,
    ):
        service.await_results(subscriber, results)
        # On a machine that is too busy a capture process may be cut off as hanging, and is started again.
        wait_for(lambda: service.memory()["capture"].rss > _LEAST_MIB, 120, "a capture process at work")
        found = service.memory()
    whole = Memory(*(sum(column) for column in zip(*found.values(), strict=True)))
    name = f"fast default, one camera of {_WIDTH} × {_HEIGHT} ({kind})"
    return [
        Row(f"{name}: RSS of agent and capture process", whole.rss, "MiB", AIM_MIB, at_most=True),
        Row(f"{name}: PSS of agent and capture process", whole.pss, "MiB", AIM_MIB, at_most=True),
        *(
            Row(f"{name}: RSS of the {part} process", each.rss, "MiB", AIM_MIB, at_most=True)
            for part, each in found.items()
        ),
        *(Row(f"{name}: PSS of the {part} process", each.pss, "MiB") for part, each in found.items()),
    ]
