"""The agent's tiles per second, from folder to subscriber, against the bare engine on the same tiles, in one run.

Both use the same bundle, engine settings and cores. They run in turn (bare, agent, bare, agent, …), so that a machine
that slows down slows both; each ratio is of neighbours.
"""

import json
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import paho.mqtt.client as mqtt
from harness import Row, parser, publish
from numpy.typing import NDArray
from paho.mqtt.enums import CallbackAPIVersion

from kizu_agent.inspector import load_inspector
from kizu_agent.settings import EngineConfig
from kizu_agent.simulation import SimulatedLine, write_dataset
from kizu_contract.bundle import Bundle, read_bundle
from kizu_contract.pictures import list_pictures, read_picture

AIM = 0.9
_LIMIT_S = 300.0


def main() -> int:
    """Train a throw-away model, measure, print."""
    options = parser("agent").parse_args()
    frames, pairs = (60, 3) if options.quick else (200, 5)
    with tempfile.TemporaryDirectory(prefix="kizu-bench-") as folder:
        work = Path(folder)
        bundle_path, pictures = _prepare(work, frames)
        bundle = read_bundle(bundle_path)
        tiles = _cut(bundle, pictures)
        with _broker(work) as port:
            rates = [
                (_bare_rate(bundle, tiles), _agent_rate(work / str(pair), bundle_path, pictures, port, len(tiles)))
                for pair in range(pairs)
            ]
    bare, agent = [statistics.median(column) for column in zip(*rates, strict=True)]
    ratios = sorted(mine / theirs for theirs, mine in rates)
    rows = [
        Row("bare engine", bare, "tiles/s"),
        Row("agent, folder to subscriber", agent, "tiles/s"),
        Row("agent ÷ bare engine, median of pairs", statistics.median(ratios), "", AIM),
        Row("agent ÷ bare engine, worst pair", ratios[0], ""),
        Row("agent ÷ bare engine, best pair", ratios[-1], ""),
        Row("tiles a frame", len(tiles) / frames, "tiles"),
    ]
    return publish("agent", rows, options.json)


def _prepare(work: Path, frames: int) -> tuple[Path, Path]:
    line = SimulatedLine("plates", seed=5)
    write_dataset(work / "train", line, good=24)
    write_dataset(work / "frames", line, good=frames, first=10_000)
    for command in (
        ["kizu_train", "fit", "patch_vae", "--data", "train", "--out", "run", "--set", "train.steps=30"],
        ["kizu_export", "run", "--out", "bench.kizu"],
    ):
        subprocess.run([sys.executable, "-m", *command], cwd=work, check=True, stdout=subprocess.DEVNULL)
    return work / "bench.kizu", work / "frames" / "train" / "good"


def _cut(bundle: Bundle, pictures: Path) -> NDArray[np.uint8]:
    """All tiles of all pictures, in memory."""
    manifest = bundle.manifest
    images = [read_picture(path, manifest.colour) for path in list_pictures(pictures)]
    return np.concatenate([manifest.grid.layout(*image.shape[:2]).cut(image) for image in images])


def _bare_rate(bundle: Bundle, tiles: NDArray[np.uint8]) -> float:
    inspector = load_inspector(bundle, EngineConfig())
    chunk = len(tiles) // 8
    began = time.monotonic()
    for start in range(0, len(tiles), chunk):
        inspector.engine.run(tiles[start : start + chunk])
    took_s = time.monotonic() - began
    inspector.close()
    return len(tiles) / took_s


def _agent_rate(work: Path, bundle: Path, pictures: Path, port: int, tiles: int) -> float:
    """Run the service once over the folder; tiles a second between the first and the last result received."""
    (work / "drop").mkdir(parents=True)
    (work / "drop" / bundle.name).write_bytes(bundle.read_bytes())
    name = f"bench{work.name}"
    config = work / "agent.toml"
    config.write_text(
        f'[agent]\nname = "{name}"\nprefix = "bench"\nstate_dir = "{work / "state"}"\n'
        f'[mqtt]\nport = {port}\n[models]\ndrop_dir = "{work / "drop"}"\n'
        f'[[cameras]]\nname = "cam1"\nsource = "folder:{pictures}"\n'
    )
    count = len(list_pictures(pictures))
    arrivals: list[float] = []
    complete = threading.Event()

    def on_message(_client: object, _data: object, message: mqtt.MQTTMessage) -> None:
        json.loads(message.payload)
        arrivals.append(time.monotonic())
        if len(arrivals) == count:
            complete.set()

    client = mqtt.Client(CallbackAPIVersion.VERSION2)
    client.on_message = on_message
    client.connect("127.0.0.1", port)
    client.subscribe(f"bench/{name}/cam1/result", 1)
    client.loop_start()
    command = [sys.executable, "-m", "kizu_agent", "run", "--config", str(config), "--until-ended"]
    with (work / "agent.log").open("wb") as log:
        agent = subprocess.Popen(command, stdout=log, stderr=log)
        try:
            if not complete.wait(_LIMIT_S):
                raise SystemExit(f"only {len(arrivals)} of {count} results came:\n{(work / 'agent.log').read_text()}")
        finally:
            agent.terminate()
            agent.wait(30)
            client.disconnect()
            client.loop_stop()
    # Frames are inspected some at a time: the first arrivals belong to work done before the clock was started.
    first = next(i for i, at in enumerate(arrivals) if at > arrivals[0] + 0.02)
    return tiles / count * (count - first) / (arrivals[-1] - arrivals[first - 1])


@contextmanager
def _broker(work: Path) -> Iterator[int]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = int(probe.getsockname()[1])
    config = work / "mosquitto.conf"
    config.write_text(f"listener {port} 127.0.0.1\nallow_anonymous true\n")
    broker = subprocess.Popen(["/usr/sbin/mosquitto", "-c", str(config)], stderr=subprocess.DEVNULL)
    try:
        _await_port(port)
        yield port
    finally:
        broker.terminate()
        broker.wait(10)


def _await_port(port: int) -> None:
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        try:
            socket.create_connection(("127.0.0.1", port), 0.2).close()
        except OSError:
            time.sleep(0.05)
        else:
            return
    raise SystemExit("mosquitto did not start: apt-get install mosquitto")


if __name__ == "__main__":
    raise SystemExit(main())
