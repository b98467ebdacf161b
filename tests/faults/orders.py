"""Scenarios of what the plant orders: products that change under load, and commands that mean no good."""

import json
import random
import time
from collections import Counter
from collections.abc import Iterator
from datetime import datetime
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

from faults.commander import Commander, commander
from faults.plant import (
    BASE,
    Heard,
    Outcome,
    Plant,
    brightness_bundle,
    give,
    longest_pause_s,
    pictures,
    plant,
    settle,
    wait_for,
)

from kizu_contract.judging import Thresholds

_FAST = "[commands]\nper_s = 10000.0\nburst = 10000\n"
_RATES = {"a": None, "b": (0.02, 0.002), "c": (0.005, 0.0005)}
_MODELS = {"a": "plates", "b": "bolts", "c": "bolts"}
_MARGIN_S = 0.02
"""Times in results have milliseconds, and the commander's clock is read before and after."""
_PACED_PER_S = 400.0


class _Change(NamedTuple):
    """A change that was carried out: its product, and the wall clock before the command and after its answer."""

    product: str
    sent: float
    answered: float


def product_changes(folder: Path, changes: int = 1000, seed: int = 1) -> Outcome:
    """Set one product after the other while the camera gives frames: each result is judged by its own product alone.

    Its batch names the change; model, thresholds and product must be those of that change, and a frame that was
    captured between two changes must have the batch of the first of them.
    """
    shots = pictures(folder / "pictures")
    camera = f'[[cameras]]\nname = "cam1"\nsource = "folder:{shots}?loop=true&rate=60"\nqueue_frames = 8\n'
    with plant(folder, camera + _products(), _FAST) as site:
        give(site.agent, brightness_bundle(name="bolts"))
        site.begin(0)
        with commander(site.broker.port) as client:
            client.until_ok("product", {"product": "b", "batch": "first"})
            client.until_ok("product", {"product": "a", "batch": "first"})
            wait_for(site.subscriber.results, 20, "the first results")
            done = _change_all(client, changes, seed)
            wait_for(lambda: _batches(site)[str(changes - 1)] > 0, 20, "a result of the last change")
        account = settle(site)
    results = [heard.json for heard in site.subscriber.results()]
    problems = [problem for result in results if (problem := _misjudged(result, done))]
    seen = {result["batch"] for result in results}
    if len(seen) < changes / 4:
        problems.append(f"only {len(seen)} of {changes} changes had a frame")
    took = sorted(change.answered - change.sent for change in done)
    return account.outcome(
        "product changes under load",
        f"{changes} changes among {len(_MODELS)} products",
        problems[:3],
        note=f"{len(results)} results, {len(seen)} batches among them, {len(problems)} misjudged; a change took "
        f"{took[len(took) // 2] * 1000:.0f} ms (median), {took[-1] * 1000:.0f} ms at most",
    )


def _products() -> str:
    text = ""
    for name, rates in _RATES.items():
        text += f'[[products]]\nname = "{name}"\nmodel = "{_MODELS[name]}"\n'
        if rates is not None:
            text += f"[products.thresholds]\nwarn_rate = {rates[0]}\nreject_rate = {rates[1]}\n"
    return text


def _change_all(client: Commander, changes: int, seed: int) -> list[_Change]:
    choice, done = random.Random(seed), []
    for number in range(changes):
        product, sent = choice.choice(list(_MODELS)), time.time()
        answer = client.ask("product", {"product": product, "batch": str(number), "request_id": f"change-{number}"})
        assert answer["ok"], answer
        done.append(_Change(product, sent, time.time()))
        time.sleep(choice.random() * 0.03)
    return done


def _batches(site: Plant) -> Counter[str]:
    return Counter(heard.json["batch"] for heard in site.subscriber.results()[-200:])


def _misjudged(result: dict[str, Any], done: list[_Change]) -> str:
    """What is wrong with a result; empty where nothing is."""
    batch, product = result["batch"], result["product"]
    at = datetime.fromisoformat(result["captured_at"].replace("Z", "+00:00")).timestamp()
    between = [
        number
        for number, (change, following) in enumerate(pairwise(done))
        if change.answered + _MARGIN_S < at < following.sent - _MARGIN_S
    ]
    if between and batch != str(between[0]):
        return f"captured after change {between[0]}, and has batch {batch}"
    if batch is None or not batch.isdigit():
        return "" if product in (None, "a", "b") else f"batch {batch} with product {product}"
    if done[int(batch)].product != product:
        return f"batch {batch} is of {done[int(batch)].product}, and the result says {product}"
    bundle = brightness_bundle(name=_MODELS[product])
    rates, name = _RATES[product], result["model"]["name"]
    limits = bundle.manifest.thresholds.scores() if rates is None else bundle.manifest.calibration.thresholds(*rates)
    judged = Thresholds(**result["thresholds"])
    if (name, judged) != (_MODELS[product], limits):
        return f"product {product} was judged by {name} with {judged}"
    return "" if result["verdict"] == limits.verdict(result["score"]).value else f"{result['score']} is no {judged}"


# -- commands that mean no good --------------------------------------------------------------------------------------


class Hostile(NamedTuple):
    """A message: on which topic below the agent's, what, and whether it is retained; `counts`: the agent hears it."""

    topic: str
    payload: bytes
    is_retained: bool = False
    counts: bool = True


def hostile_messages(count: int, seed: int) -> Iterator[Hostile]:
    """So many commands, none of which may change anything."""
    choice = random.Random(seed)
    for number in range(count):
        yield _hostile(choice, number)


_NAMES = ("ping", "status", "inspect", "thresholds", "product", "model", "pause", "resume", "snapshot", "rebirth")
_ODD: tuple[Any, ...] = (None, True, -1, 2**62, 1.5, "", "x" * 5000, "\x00", "../../x", [], {}, [[]], {"a": {}}, "傷")


def _hostile(choice: random.Random, number: int) -> Hostile:
    topic = f"cmd/{choice.choice(_NAMES)}"
    name = choice.choice(("x" * 200, "Ping", "ping ", "..", "傷", "__class__", "cmd"))
    elsewhere = choice.choice(("cmd", "cmd/ping/more", "cam1/cmd/pause", "response/pause"))
    odd = {f"key{number}": choice.choice(_ODD), "request_id": f"r{number}"}
    wrong = {**_wrong_types(choice), "camera": choice.choice((5, None, "nowhere"))}
    kinds = (
        Hostile(topic, json.dumps(wrong).encode()),
        Hostile(topic, json.dumps(odd).encode()),
        Hostile(topic, b"\xff" + choice.randbytes(choice.choice((1, 100, 5000)))),
        Hostile(topic, b'{"camera": "cam1", "action": "set", "warn_rate": 0.0'[: choice.randrange(2, 50)]),
        Hostile(topic, choice.choice((b"[", b'{"a":')) * choice.choice((50, 1000, 10_000))),
        Hostile(topic, b'{"camera": "cam1", "product": "a", "product": "b", "camera": "cam1"}'),
        Hostile(topic, b'{"request_id": "' + b"x" * choice.choice((66_000, 200_000)) + b'"}'),
        Hostile("cmd/thresholds", b'{"action": "set", "camera": "cam1", "warn": NaN, "reject": 1e999}'),
        Hostile(f"cmd/{name}", b"{}"),
        Hostile("cmd/pause", b"{}", is_retained=True),
        Hostile(elsewhere, b"{}", counts=False),
        Hostile("cmd/pause", b'{"camera": "cam1", "expires_at": "never"}'),
    )
    return choice.choice(kinds)


def _wrong_types(choice: random.Random) -> dict[str, Any]:
    """Members whose values cannot be right, for whatever command; one of them is unknown to all."""
    keys = ("action", "product", "batch", "warn_rate", "sha256", "deadline_ms", "width_px", "request_id")
    return {**{key: choice.choice(_ODD) for key in choice.sample(keys, 3)}, "colour": 1}


def hostile_commands(folder: Path, count: int = 10_000, seed: int = 1) -> Outcome:
    """Send commands that mean no good: four fifths at a pace at which each is looked at, the rest in one flood."""
    shots = pictures(folder / "pictures")
    camera = f'[[cameras]]\nname = "cam1"\nsource = "folder:{shots}?loop=true&rate=20"\n'
    table = '[[products]]\nname = "a"\nmodel = "plates"\n'
    with plant(folder, camera + table, "[commands]\nper_s = 500.0\nburst = 500\n") as site:
        site.begin(0)
        with commander(site.broker.port) as client:
            client.until_ok("product", {"product": "a", "batch": "17"})
            wait_for(lambda: len(site.subscriber.results()) >= 20, 20, "the first results")
            return _attack(site, client, count, seed)


def _attack(site: Plant, client: Commander, count: int, seed: int) -> Outcome:
    agent = site.agent
    assert agent.process is not None
    before, files = _settings(client), _files(agent.state)
    began, rss_mib, counted = time.monotonic(), _rss_mib(agent.process.pid), agent.metric("commands_total") or 0.0
    sent = _send_all(client, count, seed)
    wait_for(lambda: (agent.metric("commands_total") or 0.0) - counted >= sent, 60, f"{sent} commands to be counted")
    took_s, grown_mib = time.monotonic() - began, _rss_mib(agent.process.pid) - rss_mib
    outcomes = (agent.metric("commands_total") or 0.0) - counted
    time.sleep(1.1)  # the allowance of a second
    after = _settings(client)
    heard: list[Heard] = [each for each in site.subscriber.results() if each.at >= began]
    pause_s, audits = longest_pause_s(heard), len(site.subscriber.of("/audit"))
    began_audits = 1  # the product that was set first
    account = settle(site)
    problems = [] if before == after and files == _files(agent.state) else ["something was changed"]
    problems += [] if outcomes == sent else [f"{sent} were sent, {outcomes:.0f} counted"]
    problems += [] if audits == began_audits else [f"{audits - began_audits} changes were told"]
    problems += [f"results paused for {pause_s:.1f} s"] if pause_s > 3.0 or not heard else []
    problems += [f"it grew by {grown_mib:.0f} MiB"] if grown_mib > 64 else []
    return account.outcome(
        "hostile commands",
        f"{count} sent in {took_s:.0f} s, a fifth of them in one flood",
        problems,
        note=f"{outcomes:.0f} counted, none changed anything, {count - sent} went to topics that are no commands; the "
        f"agent grew by {grown_mib:.0f} MiB; longest pause between two results {pause_s:.2f} s",
    )


def _send_all(client: Commander, count: int, seed: int) -> int:
    """Send them; gives how many the agent hears of."""
    heard, began, paced = 0, time.monotonic(), count * 4 // 5
    for number, message in enumerate(hostile_messages(count, seed)):
        if number < paced:
            time.sleep(max(0.0, began + number / _PACED_PER_S - time.monotonic()))
        client.publish(f"{BASE}/{message.topic}", message.payload, retain=message.is_retained)
        heard += message.counts
    return heard


def _settings(client: Commander) -> list[Any]:
    """All that a command could change, as the agent tells it."""
    product, thresholds = client.ask("product"), client.ask("thresholds", {"camera": "cam1"})
    model, status = client.ask("model"), client.ask("status")["status"]
    cameras = {name: camera["paused"] for name, camera in status["cameras"].items()}
    return [product["new"], product["cameras"], thresholds["new"], model["slots"], cameras]


def _files(state: Path) -> dict[str, bytes]:
    """What the agent keeps of what commands set."""
    names = ("thresholds.json", "product.json", "paused.json", "requests.json")
    return {name: (state / name).read_bytes() for name in names if (state / name).exists()}


def _rss_mib(pid: int) -> float:
    line = next(line for line in Path(f"/proc/{pid}/status").read_text().splitlines() if line.startswith("VmRSS"))
    return int(line.split()[1]) / 1024
