"""`kizu-agent demo`: the whole main job on a simulated line, in one terminal.

pictures → kizu-train → kizu-export → broker → agent → verdicts over MQTT → a second model dropped in. Each step runs
the very command a user would type, as a process of its own; the verdicts come from a subscriber that knows MQTT only.
"""

import json
import queue
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import paho.mqtt.client as mqtt
from paho.mqtt.enums import CallbackAPIVersion
from rich.console import Console
from rich.live import Live
from rich.table import Table

from kizu_agent.errors import AgentError
from kizu_agent.simulation import SimulatedLine, write_dataset

PREFIX, AGENT, CAMERA = "demo/site/area/line1", "box1", "cam1"
GOOD_PICTURES, FRAMES_PER_S, DEFECT_RATE, SEVERITY, PICTURE_PX, STRIDE_PX = 120, 4, 0.15, 1.2, 256, 16
NEEDED_CAUGHT, ALLOWED_FALSE_ALARMS = 0.9, 0.05
"""The demo succeeds when at least this share of defects, and at most this share of good parts, is flagged."""
_ROWS = 12


@dataclass(frozen=True)
class DemoOptions:
    """Where the demo works, how long the line runs (None: until Ctrl-C) and how many training steps each model gets."""

    out: Path
    seconds: float | None
    part: str = "plates"
    steps: tuple[int, int] = (800, 1200)


@dataclass
class Tally:
    """What the subscriber has counted against the simulator's truth."""

    inspected: int = 0
    caught: int = 0
    missed: int = 0
    false_alarms: int = 0
    good: int = 0
    rejected_good: int = 0
    rejected_defects: int = 0
    unknown: int = 0
    lost: int = 0
    heatmaps: int = 0
    last_seq: int | None = None
    by_model: dict[str, int] = field(default_factory=dict)
    dropped_at: float | None = None
    swap_s: float | None = None

    def succeeded(self) -> bool:
        """Tell whether defects were caught, good parts ok, no result lost or unknown, and the model swapped."""
        defects = self.caught + self.missed
        return (
            defects > 0
            and self.good > 0
            and self.lost == 0
            and self.unknown == 0
            and self.swap_s is not None
            and self.caught >= NEEDED_CAUGHT * defects
            and self.false_alarms <= ALLOWED_FALSE_ALARMS * self.good
        )


def run_demo(options: DemoOptions) -> int:
    """Run the demo; 0 when `Tally.succeeded`, 1 otherwise. Raises AgentError when a step cannot be taken."""
    missing = [name for name in ("torch", "onnx", "onnxruntime", "amqtt") if find_spec(name) is None]
    if missing:
        raise AgentError(f"the demo needs {', '.join(missing)}: pip install 'kizu[demo]', or run scripts/demo")
    console = Console()
    out = options.out.resolve()
    _clear(out)
    line = SimulatedLine.from_url(_line_url(options, seed=1))
    with ExitStack() as stack:
        models = _train_two(console, out, line, options)
        port = _free_port()
        stack.enter_context(_process([sys.executable, "-m", "kizu_agent.demo_broker", str(port)], "ready"))
        subscriber = stack.enter_context(_Subscriber(port, out / "heatmaps"))
        shutil.copy(models[0], out / "drop" / models[0].name)
        config = _write_config(out, port, options)
        log = stack.enter_context((out / "agent.log").open("wb"))
        command = [sys.executable, "-m", "kizu_agent", "run", "--config", str(config)]
        agent = stack.enter_context(_process(command, None, log))
        _say_where(console, out, port)
        tally = _watch(console, subscriber, agent, models[1], options)
        if tally.inspected == 0:
            raise AgentError(f"nothing was inspected; {out / 'agent.log'} may say why")
    return _sum_up(console, tally, out)


def _line_url(options: DemoOptions, seed: int) -> str:
    size = f"width={PICTURE_PX}&height={PICTURE_PX}"
    return f"sim:{options.part}?rate={FRAMES_PER_S}&seed={seed}&defects={DEFECT_RATE}&severity={SEVERITY}&{size}"


def _clear(out: Path) -> None:
    """Begin afresh, and never delete a folder that is not a demo's."""
    marker = out / ".kizu-demo"
    if out.exists() and not out.is_dir():
        raise AgentError(f"{out}: is not a folder; choose another with --out")
    out.mkdir(parents=True, exist_ok=True)
    entries = list(out.iterdir())
    if entries and not marker.exists():
        raise AgentError(f"{out}: is not empty and not a demo's folder; choose another with --out")
    marker.touch()  # first: what is interrupted here must be known as a demo's the next time
    for entry in entries:
        if entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry)
        elif entry != marker:
            entry.unlink()
    for name in ("drop", "heatmaps", "state"):
        (out / name).mkdir()


def _train_two(console: Console, out: Path, line: SimulatedLine, options: DemoOptions) -> list[Path]:
    console.rule("[bold]1  pictures of good parts")
    began = time.monotonic()
    write_dataset(out / "pictures", line, good=GOOD_PICTURES)
    console.print(f"{GOOD_PICTURES} good {options.part} drawn in {time.monotonic() - began:.1f} s → {out / 'pictures'}")
    models = []
    for version, steps in enumerate(options.steps, start=1):
        console.rule(f"[bold]{version + 1}  train and export model {version} ({steps} steps)")
        run, model = out / f"run{version}", out / f"{options.part}-{version}.kizu"
        fit = ["kizu_train", "fit", "patch_vae", "--data", str(out / "pictures"), "--out", str(run)]
        settings = ["--set", f"train.steps={steps}", "--set", f"grid.stride_px={STRIDE_PX}"]
        _command([*fit, *settings, "--seed", str(version)])
        _command(["kizu_export", str(run), "--out", str(model), "--name", options.part, "--version", str(version)])
        models.append(model)
    return models


def _command(arguments: list[str]) -> None:
    done = subprocess.run([sys.executable, "-m", *arguments], check=False)
    if done.returncode:
        raise AgentError(f"{' '.join(arguments)} ended with {done.returncode}; see its output above")


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextmanager
def _process(command: list[str], ready: str | None, output: Any = subprocess.PIPE) -> Iterator[subprocess.Popen[bytes]]:
    """A process that is up while the block runs: waits for its `ready` line, ends it with SIGTERM, then SIGKILL."""
    process = subprocess.Popen(command, stdout=output, stderr=None if ready else subprocess.STDOUT)
    try:
        if ready and process.stdout and ready not in process.stdout.readline().decode():
            raise AgentError(f"{' '.join(command)} did not start")
        yield process
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(15)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        if process.stdout:
            process.stdout.close()


def _write_config(out: Path, port: int, options: DemoOptions) -> Path:
    config = out / "agent.toml"
    config.write_text(
        f"""# Written by kizu-agent demo. The truth of each frame is known to the demo only, not to the agent.
[agent]
name = "{AGENT}"
prefix = "{PREFIX}"
state_dir = {_toml(out / "state")}
log_format = "json"

[mqtt]
host = "127.0.0.1"
port = {port}
protocol = "3.1.1"

[models]
drop_dir = {_toml(out / "drop")}

[[cameras]]
name = "{CAMERA}"
source = "{_line_url(options, seed=2)}"

[cameras.heatmap]
when = "warn"
"""
    )
    return config


def _toml(path: Path) -> str:
    """A TOML string; JSON's is one."""
    return json.dumps(str(path), ensure_ascii=False)


def _say_where(console: Console, out: Path, port: int) -> None:
    console.rule("[bold]4  the line runs")
    console.print(f"[bold]The same in another terminal:[/] mosquitto_sub -p {port} -t '{PREFIX}/#' -v", soft_wrap=True)
    console.print(f"Heatmaps: {out / 'heatmaps'}   Agent's log: {out / 'agent.log'}", soft_wrap=True)


class _Subscriber:
    """An MQTT client that knows the topics only; results come out of `results`, heatmaps land in a folder."""

    def __init__(self, port: int, heatmaps: Path) -> None:
        self.results: queue.SimpleQueue[dict[str, Any]] = queue.SimpleQueue()
        self.heatmaps = 0
        self._folder = heatmaps
        self._port = port
        self._client = mqtt.Client(CallbackAPIVersion.VERSION2, client_id="kizu-demo")
        self._client.on_connect = self._on_connect
        self._client.on_message = self._on_message

    def __enter__(self) -> "_Subscriber":  # noqa: PYI034 - Self needs Python 3.11
        self._client.connect("127.0.0.1", self._port)
        self._client.loop_start()
        return self

    def __exit__(self, *_: object) -> None:
        self._client.disconnect()
        self._client.loop_stop()

    def _on_connect(self, client: mqtt.Client, *_: object) -> None:
        base = f"{PREFIX}/{AGENT}/{CAMERA}"
        client.subscribe([(f"{base}/result", 1), (f"image/{base}/heatmap", 1)])

    def _on_message(self, _client: object, _data: object, message: mqtt.MQTTMessage) -> None:
        if message.topic.endswith("/heatmap"):
            self.heatmaps += 1
            (self._folder / f"{self.heatmaps:04d}.jpg").write_bytes(message.payload)
        else:
            self.results.put(json.loads(message.payload))


def _watch(
    console: Console,
    subscriber: _Subscriber,
    agent: "subprocess.Popen[bytes]",
    second: Path,
    options: DemoOptions,
) -> Tally:
    """Follow the results until the time is over or the agent is gone, dropping the `second` model half-way."""
    truth = SimulatedLine.from_url(_line_url(options, seed=2))
    tally, rows = Tally(), list[tuple[str, ...]]()
    seconds = options.seconds
    began = time.monotonic()
    drop_after_s = min(20.0, (seconds or 40.0) / 2)
    with Live(_table(rows, tally, 0), console=console, refresh_per_second=4) as live, _interruptible() as stopped:
        while not stopped() and agent.poll() is None and (seconds is None or time.monotonic() - began < seconds):
            if tally.dropped_at is None and time.monotonic() - began > drop_after_s and tally.inspected:
                _drop(second, second.parent / "drop")
                tally.dropped_at = time.monotonic()
            try:
                result = subscriber.results.get(timeout=0.25)
            except queue.Empty:
                continue
            rows.append(_count(tally, result, truth))
            tally.heatmaps = subscriber.heatmaps
            live.update(_table(rows[-_ROWS:], tally, time.monotonic() - began))
    return tally


def _drop(model: Path, drop: Path) -> None:
    """Copy beside, then rename: the agent never sees half a file."""
    temporary = drop / f".{model.name}.part"
    shutil.copy(model, temporary)
    temporary.rename(drop / model.name)


@contextmanager
def _interruptible() -> Iterator[Callable[[], bool]]:
    """Ctrl-C ends the watching, not the demo: the summary still comes."""
    stops: list[int] = []
    before = signal.signal(signal.SIGINT, lambda number, _frame: stops.append(number))
    try:
        yield lambda: bool(stops)
    finally:
        signal.signal(signal.SIGINT, before)


def _count(tally: Tally, result: dict[str, Any], truth: SimulatedLine) -> tuple[str, ...]:
    """Count one result against the truth and give its table row."""
    defect = truth.defect_of(result["frame"])
    is_flagged = result["verdict"] in ("warn", "reject")
    is_right = is_flagged if defect else result["verdict"] == "ok"
    if tally.last_seq is not None and result["seq"] <= tally.last_seq:
        return _row(result, defect, is_right=is_right)  # QoS 1: it may come twice
    tally.inspected += 1
    if tally.last_seq is not None:
        tally.lost += result["seq"] - tally.last_seq - 1
    tally.last_seq = result["seq"]
    tally.unknown += result["verdict"] == "unknown"
    if defect:
        tally.caught += is_flagged
        tally.missed += not is_flagged
        tally.rejected_defects += result["verdict"] == "reject"
    else:
        tally.good += 1
        tally.false_alarms += is_flagged
        tally.rejected_good += result["verdict"] == "reject"
    version = result["model"]["version"]
    tally.by_model[version] = tally.by_model.get(version, 0) + 1
    if tally.dropped_at is not None and tally.swap_s is None and version == "2":
        tally.swap_s = time.monotonic() - tally.dropped_at
    return _row(result, defect, is_right=is_right)


_COLOURS = {"ok": "green", "warn": "yellow", "reject": "red", "unknown": "magenta"}


def _row(result: dict[str, Any], defect: str | None, *, is_right: bool) -> tuple[str, ...]:
    verdict = str(result["verdict"])
    timing = result["timing"]
    return (
        str(result["camera"]),
        str(result["frame"]),
        f"[{_COLOURS[verdict]}]{verdict}[/]",
        f"{result['score']:.3f}" if result["score"] is not None else "–",
        f"{result['ratio']:.2f}" if result["ratio"] is not None else "–",
        f"{timing['scoring_ms']:.0f}",
        f"model {result['model']['version']}",
        defect or "good",
        "[green]✓[/]" if is_right else "[bold red]✗[/]",
    )


def _table(rows: list[tuple[str, ...]], tally: Tally, elapsed_s: float) -> Table:
    table = Table(title=f"{elapsed_s:.0f} s · {tally.inspected} inspected · {tally.caught} caught", title_style="bold")
    for name in ("camera", "frame", "verdict", "score", "ratio", "ms", "model", "truth", ""):
        table.add_column(name, justify="right" if name in ("frame", "score", "ratio", "ms") else "left")
    for row in rows:
        table.add_row(*row)
    return table


def _sum_up(console: Console, tally: Tally, out: Path) -> int:
    console.rule("[bold]summary")
    defects = tally.caught + tally.missed
    swap = (
        "the second model was not taken" if tally.swap_s is None else f"{tally.swap_s:.1f} s from drop to first result"
    )
    models = ", ".join(f"model {version}: {count}" for version, count in sorted(tally.by_model.items()))
    for name, text in (
        ("frames inspected", f"{tally.inspected} ({models}), {tally.lost} results lost, {tally.unknown} unknown"),
        (
            "defects caught",
            f"{tally.caught} of {defects} ({tally.rejected_defects} rejected, others warned), {tally.missed} missed",
        ),
        (
            "false alarms",
            f"{tally.false_alarms} of {tally.good} good ({tally.rejected_good} rejected, others warned)",
        ),
        ("model swap", swap),
        ("heatmaps", f"{tally.heatmaps} in {out / 'heatmaps'}"),
        ("everything else", f"{out} (pictures, runs, bundles, agent.toml, agent.log)"),
    ):
        console.print(f"  [bold]{name:18}[/] {text}", soft_wrap=True)
    if tally.succeeded():
        console.print("[bold green]The line was watched as it should be.[/]")
        return 0
    console.print(
        f"[bold red]Not as it should be[/]: wanted at least {NEEDED_CAUGHT:.0%} of defects caught, at most "
        f"{ALLOWED_FALSE_ALARMS:.0%} of good parts flagged, no result lost or unknown, and the model swapped.",
        soft_wrap=True,
    )
    return 1
