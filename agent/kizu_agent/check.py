"""`kizu-agent check`: try everything the service will need, and say what is wrong and what to do."""

import contextlib
import time
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import structlog
from rich.console import Console
from rich.markup import escape

from kizu_agent.camera_settings import CameraConfig
from kizu_agent.cameras.urls import redact
from kizu_agent.capture import Capture
from kizu_agent.capture_process import START_S
from kizu_agent.config import Config
from kizu_agent.connection import try_broker
from kizu_agent.credentials import CredentialKeeper
from kizu_agent.errors import AgentError
from kizu_agent.findings import Finding, certificate_findings, exposure_findings
from kizu_agent.frame_engine import open_engine
from kizu_agent.inspector import self_test
from kizu_agent.mailbox import Mailbox
from kizu_agent.model_keys import KeyRing
from kizu_agent.model_store import ModelStore
from kizu_agent.pipeline import make_state_dir
from kizu_agent.providers import available_providers, device_of, runtime_version, try_provider
from kizu_agent.records import ModelId
from kizu_agent.settings import ModelsConfig
from kizu_agent.slot_names import route
from kizu_agent.threads import budget
from kizu_contract.bundle import Bundle
from kizu_contract.errors import KizuError

log = structlog.get_logger(__name__)


@dataclass(frozen=True)
class _Less:
    """What works, but with less than the configuration asks for."""

    text: str


def check(config: Config, config_file: Path | None = None) -> int:
    """Try directories, engine, models, broker and each camera; print a line each. 0 when all works, else 1.

    `config_file` is where the configuration came from: it may hold passwords.
    """
    console = Console()
    findings = []
    for finding in _findings(config, config_file):
        bad_mark = "[bold yellow]WARN[/]" if finding.is_warning else "[bold red]FAIL[/]"
        mark = "[green]ok  [/]" if finding.is_well else bad_mark
        console.print(f"{mark} {escape(finding.subject)}: {escape(finding.text)}", soft_wrap=True)
        findings.append(finding)
    wrong = sum(not (finding.is_well or finding.is_warning) for finding in findings)
    warnings = sum(finding.is_warning for finding in findings)
    well = f"[bold yellow]all works, {warnings} warnings[/]" if warnings else "[bold green]all is well[/]"
    console.print(f"[bold red]{wrong} of {len(findings)} things are wrong[/]" if wrong else well)
    return 1 if wrong else 0


def _findings(config: Config, config_file: Path | None) -> Iterator[Finding]:
    yield _tried("state directory", lambda: _state_dir(config))
    yield _tried("drop directory", lambda: _drop_dir(config))
    yield _tried("engine", lambda: _engine(config))
    yield from _models(config)
    keeper = CredentialKeeper(config.mqtt)
    yield _tried(f"broker {config.mqtt.host}:{config.mqtt.port}", lambda: try_broker(config.mqtt, keeper))
    yield from certificate_findings(keeper)
    yield from exposure_findings(config, config_file)
    for camera in config.cameras:
        yield _tried(f"camera {camera.name} ({redact(camera.source)})", partial(_camera, camera))


def _tried(subject: str, attempt: Callable[[], str | _Less]) -> Finding:
    try:
        found = attempt()
    except (KizuError, OSError) as exc:
        return Finding(subject, is_well=False, text=str(exc))
    if isinstance(found, _Less):
        return Finding(subject, is_well=False, text=found.text, is_warning=True)
    return Finding(subject, is_well=True, text=found)


def _state_dir(config: Config) -> str:
    make_state_dir(config.agent.state_dir)
    return f"{config.agent.state_dir} is writable"


def _drop_dir(config: Config) -> str:
    folder = config.models.drop_dir
    if not folder.is_dir():
        return f"{folder} will be made at the start"
    return f"{folder} holds {len(_waiting(folder))} models that wait"


def _engine(config: Config) -> str | _Less:
    """Which provider is asked for, which there are, which one starts and on what; and how the cores are divided."""
    engine = config.engine_here
    there = f"onnxruntime {runtime_version()} here has {', '.join(available_providers())}"
    started, reason = try_provider(engine)
    threads = budget(started, engine.threads, engine.streams)
    text = f"{engine.provider} is asked for, {there}; {started} runs on {device_of(started)}; {threads}"
    return text if reason is None else _Less(f"DEGRADED: {reason}; {text}")


def _models(config: Config) -> Iterator[Finding]:
    """Every slot that cameras ask for: the model in service, or one that waits for it; then all that wait."""
    store = ModelStore(config.agent.state_dir)
    entries = store.current()
    if entries is None:
        yield Finding("models", is_well=False, text="models/current.json is damaged; the newest models would be used")
    waiting = _waiting(config.models.drop_dir)
    slots = {camera.model for camera in config.cameras} | {product.slot for product in config.products}
    coming = set(_slots_of(waiting, config.models, slots))
    for slot in sorted(slots, key=lambda slot: slot or ""):
        name = f"model {slot}" if slot else "model"
        entry = (entries or {}).get(slot)
        if entry is not None:
            yield _tried(name, partial(_model, config, store.path_of(entry.file)))
        elif slot not in coming:
            text = f"none yet; move a bundle into {config.models.drop_dir}. Until then the state is unknown"
            yield Finding(name, is_well=False, text=text)
    for path in waiting:
        yield _tried(f"waiting model {path.name}", partial(_waiting_model, config, path, slots))


def _waiting(folder: Path) -> list[Path]:
    return sorted(path for path in folder.glob("*.kizu") if not path.name.startswith("."))


def _read(path: Path, config: ModelsConfig) -> Bundle:
    return KeyRing(config).trust.read(path)


def _slot_of(path: Path, config: ModelsConfig, slots: Collection[str | None]) -> str | None:
    """The slot that the bundle at `path` is for. Raises KizuError where no camera asks for it, or it is no bundle."""
    bundle = _read(path, config)
    return route(ModelId(bundle.manifest.name, bundle.manifest.version, bundle.sha256), slots)


def _slots_of(paths: Iterable[Path], config: ModelsConfig, slots: Collection[str | None]) -> Iterator[str | None]:
    for path in paths:
        with contextlib.suppress(KizuError, OSError):
            yield _slot_of(path, config, slots)


def _waiting_model(config: Config, path: Path, slots: Collection[str | None]) -> str | _Less:
    _slot_of(path, config.models, slots)
    return _model(config, path)


def _model(config: Config, path: Path) -> str | _Less:
    """Load and run a model as the service would; a graph that must be compiled for it is, and stays compiled."""
    bundle = _read(path, config.models)
    started, built = time.monotonic(), list[float]()
    with open_engine(bundle, config.engine_here, lambda: _tell_build(built, path)) as engine:
        ready_s = time.monotonic() - started
        deviation = self_test(bundle, engine, config.models.self_test_tolerance)
        text = (
            f"{bundle.manifest.name} {bundle.manifest.version} runs on {engine.provider}"
            f"{f', compiled in {ready_s:.0f} s' if built else ''}; "
            f"batches of {engine.batch.size} tiles ({engine.batch.why}); golden tiles within {deviation:.1g}"
        )
        return text if engine.degraded_reason is None else _Less(f"DEGRADED: {engine.degraded_reason}; {text}")


def _tell_build(built: list[float], path: Path) -> None:
    built.append(time.monotonic())
    log.info("compiling the graph for this machine's GPU: takes minutes, once", file=path.name)


def _camera(config: CameraConfig) -> str:
    """Open the camera as the service does, in a process that can be killed, and wait for one frame."""
    mailbox = Mailbox()
    capture = Capture(config, mailbox)
    # As long again as for opening: the first picture may take that.
    patience_s = START_S + config.open_timeout_s + max(config.open_timeout_s, config.read_timeout_s)
    deadline = time.monotonic() + patience_s
    capture.start()
    try:
        while time.monotonic() < deadline:
            # Asked before the mailbox: a frame that came just before the end counts.
            status = capture.status()
            for frame in mailbox.take(1, 0.2):
                height, width, channels = frame.image.shape
                return f"{width} × {height} pixels, {'grey' if channels == 1 else 'colour'}"
            if status.condition == "idle":
                return "is open and waits for its trigger"
            if status.condition in ("lost", "ended"):
                raise AgentError(f"{status.condition}: {status.cause}")
        raise AgentError(f"no picture within {patience_s:g} s")
    finally:
        mailbox.close()
        capture.stop(2.0)
