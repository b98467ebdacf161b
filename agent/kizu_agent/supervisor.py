"""Signals, deadlines, exit codes: the only place that decides to die."""

import faulthandler
import gc
import logging
import os
import signal
import sys
import threading
from collections.abc import Callable
from types import FrameType
from typing import Any

import structlog

from kizu_agent.allocator import share_pools
from kizu_agent.config import Config
from kizu_agent.errors import ConfigError
from kizu_agent.health import Health, MetricsServer, notify
from kizu_agent.pipeline import Pipeline
from kizu_agent.redaction import REDACTOR
from kizu_agent.settings import AgentConfig

EXIT_STOPPED, EXIT_FAILED, EXIT_USAGE, EXIT_CANNOT_START = 0, 1, 2, 3
"""The service's exit codes; systemd restarts on 1 and must not on 3."""
_TICK_S = 0.5
STALL_S = 60.0
"""So long may a round of the supervisor itself take; then the process ends."""
_SWITCH_S = 0.0001
"""A thread that computes lets another one in after this long, not Python's 5 ms: between a trigger and its answer are a
dozen hand-offs."""
_GRACE_S = 5.0
"""So long a stop may pass its deadline."""
_Handler = Callable[[int, FrameType | None], Any] | int | None

log = structlog.get_logger(__name__)


def run(config: Config, *, until_ended: bool = False) -> int:
    """Run the service until a signal, a dead or stuck stage, or (`until_ended`) until every camera has ended.

    A first SIGTERM or SIGINT drains by `agent.stop_deadline_s`; a second one ends at once.
    """
    sys.setswitchinterval(_SWITCH_S)
    share_pools()
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
        self._pipeline = Pipeline(config, self._health, wake=self._wake.set)

    def ask_to_stop(self) -> None:
        """Ask for an orderly stop; returns at once."""
        self._stop_asked.set()
        self._wake.set()

    def run(self) -> int:
        """Start, supervise, stop; gives the exit code. Raises ConfigError when the metrics port is not to be had."""
        metrics = self._serve_metrics(self._config.agent.metrics_port)
        try:
            _end_unless_within(STALL_S)
            self._pipeline.start()
            # What is there now stays: the garbage collector need not look through all of it, holding every thread up.
            gc.freeze()
            notify("READY=1\nSTATUS=inspecting")
            log.info("started", agent=self._config.agent.name, cameras=len(self._config.cameras))
            code = self._supervise_or_give_up()
            notify("STOPPING=1")
            return self._stop(code)
        finally:
            faulthandler.cancel_dump_traceback_later()
            if metrics is not None:
                metrics.close()

    def _serve_metrics(self, port: int) -> MetricsServer | None:
        try:
            return MetricsServer(port, self._pipeline.figures) if port else None
        except OSError as exc:
            raise ConfigError(f"agent.metrics_port {port}: cannot be served: {exc.strerror}") from exc

    def _supervise_or_give_up(self) -> int:
        try:
            return self._supervise()
        except Exception:
            log.critical("giving up, to be started again: the supervisor itself failed", exc_info=True)
            return EXIT_FAILED

    def _supervise(self) -> int:
        while True:
            self._wake.wait(_TICK_S)
            self._wake.clear()
            _end_unless_within(STALL_S)
            failed, stuck = self._pipeline.failures(), self._health.stuck()
            if failed or stuck:
                dead = {name: f"{type(error).__name__}: {error}" for name, error in failed.items()}
                log.critical("giving up, to be started again", dead=dead, stuck=stuck)
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
        deadline_s = self._config.agent.stop_deadline_s
        _end_unless_within(deadline_s + _GRACE_S)
        left = self._pipeline.stop(deadline_s)
        if left:
            # A thread inside a native call cannot be joined; the outbox is on disk, so leaving loses nothing.
            log.error("stages did not stop by the deadline", left=left)
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(EXIT_FAILED)
        log.info("stopped", code=code)
        return code


def _end_unless_within(seconds: float) -> None:
    """End the process with 1, showing where its threads are, unless this is called again or cancelled in time.

    Every lock may be held by something that hangs. This needs no lock, not even the interpreter's.
    """
    faulthandler.dump_traceback_later(seconds, exit=True, file=sys.__stderr__ or 2)


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
    """Log to stderr: coloured lines or one JSON object a line, UTC times; secrets masked.

    Tracebacks come without the values of variables: those may hold a camera's URL.
    """
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
            structlog.processors.format_exc_info,
            renderer,
            REDACTOR,
        ],
        wrapper_class=structlog.make_filtering_bound_logger(logging.INFO),
        logger_factory=structlog.WriteLoggerFactory(sys.stderr),
        cache_logger_on_first_use=True,
    )
