"""Signals, deadlines, exit codes: the only place that decides to die."""

import logging
import os
import signal
import sys
import threading
from collections.abc import Callable
from types import FrameType
from typing import Any

import structlog

from kizu_agent.config import AgentConfig, Config
from kizu_agent.health import Health, MetricsServer, notify
from kizu_agent.pipeline import Pipeline

EXIT_STOPPED, EXIT_FAILED, EXIT_USAGE, EXIT_CANNOT_START = 0, 1, 2, 3
"""The service's exit codes; systemd restarts on 1 and must not on 3."""
_TICK_S = 0.5
_Handler = Callable[[int, FrameType | None], Any] | int | None

log = structlog.get_logger(__name__)


def run(config: Config, *, until_ended: bool = False) -> int:
    """Run the service until a signal, a dead or stuck stage, or (`until_ended`) until every camera has ended.

    A first SIGTERM or SIGINT drains by `agent.stop_deadline_s`; a second one ends at once.
    """
    supervisor = Supervisor(config, until_ended=until_ended)
    with _Signals(supervisor.ask_to_stop):
        return supervisor.run()


class Supervisor:
    """Reads as start → wait → stop."""

    def __init__(self, config: Config, *, until_ended: bool) -> None:
        self._config = config
        self._is_until_ended = until_ended
        self._wake = threading.Event()
        self._stop_asked = threading.Event()
        self._health = Health()
        self._pipeline = Pipeline(config, self._health, on_failure=self._wake.set)

    def ask_to_stop(self) -> None:
        """Ask for an orderly stop; returns at once."""
        self._stop_asked.set()
        self._wake.set()

    def run(self) -> int:
        """Start, supervise, stop; gives the exit code."""
        port = self._config.agent.metrics_port
        metrics = MetricsServer(port, self._pipeline.figures) if port else None
        try:
            self._pipeline.start()
            notify("READY=1\nSTATUS=inspecting")
            log.info("started", agent=self._config.agent.name, cameras=len(self._config.cameras))
            code = self._supervise()
            notify("STOPPING=1")
            return self._stop(code)
        finally:
            if metrics is not None:
                metrics.close()

    def _supervise(self) -> int:
        while True:
            self._wake.wait(_TICK_S)
            self._wake.clear()
            failed, stuck = self._pipeline.failures(), self._health.stuck()
            if failed or stuck:
                log.critical("giving up: systemd shall start me again", dead=failed, stuck=stuck)
                return EXIT_FAILED
            if self._stop_asked.is_set():
                log.info("stopping", deadline_s=self._config.agent.stop_deadline_s)
                return EXIT_STOPPED
            self._pipeline.tick()
            self._health.feed_watchdog()
            if self._is_until_ended and self._pipeline.has_ended():
                log.info("every camera has ended and everything is delivered")
                return EXIT_STOPPED

    def _stop(self, code: int) -> int:
        left = self._pipeline.stop(self._config.agent.stop_deadline_s)
        if left:
            # A thread inside a native call cannot be joined; the outbox is on disk, so leaving loses nothing.
            log.error("stages did not stop by the deadline", left=left)
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(EXIT_FAILED)
        log.info("stopped", code=code)
        return code


class _Signals:
    """Handlers that only set a flag; the second signal ends the process at once."""

    def __init__(self, ask_to_stop: Callable[[], None]) -> None:
        self._ask_to_stop = ask_to_stop
        self._before: dict[int, _Handler] = {}
        self._count = 0

    def __enter__(self) -> None:
        for number in (signal.SIGTERM, signal.SIGINT):
            self._before[number] = signal.signal(number, self._handle)

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _handle(self, _number: int, _frame: FrameType | None) -> None:
        self._count += 1
        if self._count > 1:
            os._exit(EXIT_FAILED)
        self._ask_to_stop()


def configure_logging(config: AgentConfig) -> None:
    """Log to stderr: coloured lines or one JSON object a line, UTC times."""
    renderer: structlog.types.Processor = (
        structlog.processors.JSONRenderer()
        if config.log_format == "json"
        else structlog.dev.ConsoleRenderer(colors=sys.stderr.isatty())
    )
    structlog.configure(
        processors=[
            structlog.contextvars.merge_contextvars,
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            structlog.processors.StackInfoRenderer(),
            *([structlog.processors.format_exc_info] if config.log_format == "json" else []),
            renderer,
        ],
        wrapper_class=structlog.make_filtering_bound_logger(logging.INFO),
        logger_factory=structlog.WriteLoggerFactory(sys.stderr),
        cache_logger_on_first_use=True,
    )
