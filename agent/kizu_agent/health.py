"""Is the service alive? Progress of each stage, the systemd watchdog, and metrics for those who ask."""

import os
import socket
import time
from collections.abc import Callable, Iterator, Mapping, Sequence

from prometheus_client import CollectorRegistry, start_http_server
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

_NOTIFY_S = 1.0

Progress = Callable[[], int]
"""`time.monotonic_ns()` of a stage's last progress."""


class Health:
    """Knows every stage's last progress and which of them are stuck; feeds the watchdog only when none is."""

    def __init__(self) -> None:
        self._stages: dict[str, tuple[Progress, float]] = {}
        self._next_feed_mono_ns = 0

    def watch(self, name: str, progress: Progress, limit_s: float) -> None:
        """Take the stage `name` as stuck when it makes no progress for `limit_s`."""
        self._stages[name] = (progress, limit_s)

    def stuck(self) -> list[str]:
        """Name the stages without progress, each with its seconds."""
        now = time.monotonic_ns()
        ages = ((name, (now - progress()) / 1e9, limit_s) for name, (progress, limit_s) in self._stages.items())
        return [f"{name} ({age_s:.0f} s)" for name, age_s, limit_s in ages if age_s > limit_s]

    def feed_watchdog(self) -> None:
        """Tell systemd that the service is alive, twice in each watchdog period; call it only when nothing is stuck.

        Periods below two seconds are too short for a caller that comes round twice a second.
        """
        period_us = int(os.environ.get("WATCHDOG_USEC", "0"))
        now = time.monotonic_ns()
        if period_us and now >= self._next_feed_mono_ns:
            notify("WATCHDOG=1")
            self._next_feed_mono_ns = now + period_us * 500


def notify(message: str) -> None:
    """Send `message` to systemd where it listens (sd_notify(3)); nothing otherwise."""
    address = os.environ.get("NOTIFY_SOCKET")
    if not address:
        return
    if address.startswith("@"):
        address = "\0" + address[1:]
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as out:
        out.settimeout(_NOTIFY_S)  # a full buffer must not hang the service
        try:
            out.sendto(message.encode(), address)
        except OSError:
            return  # systemd notices a silent service by itself


Figures = Mapping[str, Sequence[tuple[Mapping[str, str], float]]]
"""Name → its (labels, number) series; a name that ends in `_total` is a counter."""


class _FigureCollector(Collector):
    def __init__(self, read: Callable[[], Figures]) -> None:
        self._read = read

    def collect(self) -> Iterator[Metric]:
        """Read the pipeline's figures at the moment somebody asks."""
        for name, series in self._read().items():
            kind = CounterMetricFamily if name.endswith("_total") else GaugeMetricFamily
            labels = sorted({label for labelled, _ in series for label in labelled})
            family = kind(f"kizu_{name}", name.replace("_", " "), labels=labels)
            for labelled, number in series:
                family.add_metric([labelled.get(label, "") for label in labels], number)
            yield family


class MetricsServer:
    """Prometheus metrics on loopback, read when scraped."""

    def __init__(self, port: int, read: Callable[[], Figures]) -> None:
        """Serve what `read` gives on 127.0.0.1:`port`. Raises OSError when the port is taken."""
        registry = CollectorRegistry()
        registry.register(_FigureCollector(read))
        self._server, self._thread = start_http_server(port, addr="127.0.0.1", registry=registry)

    def close(self) -> None:
        """Stop serving."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join(5)
