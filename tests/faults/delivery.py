"""Scenarios of delivery: kills of agent and broker, long outages, a full disk."""

import random
import statistics
import time
from datetime import datetime
from pathlib import Path

from faults.plant import Outcome, Plant, pictures, plant, settle, wait_for, waiting_ids

LONGEST_LIVE_DELAY_S = 2.0
_FEW = 30
"""Messages on their way at any moment."""


def kills(
    folder: Path,
    agent_kills: int = 100,
    broker_kills: int = 30,
    results: int = 30_000,
    rate: float = 160.0,
    seed: int = 0,
    most_duplicates: float = 0.01,
) -> Outcome:
    """SIGKILL agent and broker in turns, at random, under load: nothing committed is lost, order holds.

    Each fault may repeat what was on its way: `most_duplicates`, a share of all results, is for that many of them.
    """
    choice = random.Random(seed)
    faults = ["agent"] * agent_kills + ["broker"] * broker_kills
    choice.shuffle(faults)
    shots = pictures(folder / "pictures")
    cameras = "".join(
        f'[[cameras]]\nname = "cam{number}"\nsource = "folder:{shots}?loop=true&rate={rate / 2}"\n' for number in (1, 2)
    )
    with plant(folder, cameras) as site:
        return _kill_in_turns(faults, results, most_duplicates, choice, site)


def _kill_in_turns(
    faults: list[str], results: int, most_duplicates: float, choice: random.Random, site: Plant
) -> Outcome:
    broker, gate, agent, subscriber = site
    site.begin()
    must_come: set[str] = set()
    recoveries = {"agent": [0.0], "broker": [0.0]}
    for number, fault in enumerate(faults, 1):
        due = round(results * number / (len(faults) + 1) * choice.uniform(0.97, 1.0))
        wait_for(lambda due=due: len(subscriber.results()) >= due, 120, "results")
        time.sleep(choice.uniform(0, 0.05))
        if fault == "agent":
            agent.kill()
            must_come |= waiting_ids(agent.state)
            agent.start()
        else:
            broker.kill()
            gate.shut()
            time.sleep(choice.uniform(0, 0.5))
            broker.start()
            subscriber.await_subscribed(broker.port)
            gate.open()
        seen = len(subscriber.results())
        took_s = wait_for(lambda n=seen: len(subscriber.results()) > n, 60, f"results after the {fault}'s end")
        recoveries[fault].append(took_s)
    wait_for(lambda: len(subscriber.results()) >= results, 120, "the last results")
    told = settle(site)
    missing = must_come - {heard.json["id"] for heard in subscriber.results()}
    problems = [f"{len(missing)} ids that lay in the outbox at a kill never came"] if missing else []
    problems += [f"{told.duplicated} duplicates"] if told.duplicated > most_duplicates * told.committed else []
    return told.outcome(
        "kills of agent and broker",
        f"{len(recoveries['agent']) - 1} SIGKILLs of the agent, {len(recoveries['broker']) - 1} of the broker",
        problems,
        recovered_s=max(recoveries["agent"] + recoveries["broker"]),
        note=f"agent back in {max(recoveries['agent']):.1f} s, broker in {max(recoveries['broker']):.1f} s, at worst",
    )


def outage(folder: Path, backlog: int = 18_000, rate: float = 30.0) -> Outcome:
    """A broker that is away for ten minutes of thirty results a second, and back: live results do not wait."""
    shots = pictures(folder / "pictures")
    cameras = (
        f'[[cameras]]\nname = "past"\nsource = "sim:plates?count={backlog}&rate=0&width=48&height=32"\n'
        f'[[cameras]]\nname = "live"\nsource = "folder:{shots}?loop=true&rate={rate}"\n'
    )
    with plant(folder, cameras) as site:
        return _come_back(backlog, site)


def _come_back(backlog: int, site: Plant) -> Outcome:
    agent, subscriber = site.agent, site.subscriber
    agent.start()
    began = time.monotonic()
    wait_for(lambda: (agent.metric("inspected_frames_total") or 0) >= backlog, 600, "the backlog")
    away_s = time.monotonic() - began
    site.gate.open()
    wait_for(subscriber.results, 60, "the agent's return")
    back = time.monotonic()
    wait_for(lambda: (agent.metric("outbox_messages") or backlog) < _FEW, 600, "the backlog's end")
    drained_s = time.monotonic() - back
    told = settle(site)
    live = [heard for heard in subscriber.results() if not heard.json["replayed"]]
    delays = [_delay_s(heard.json["captured_at"], heard.at_utc) for heard in live]
    worst = max(delays, default=float("inf"))
    return told.outcome(
        "broker away, then back",
        f"{backlog} results while it was away, in {away_s:.0f} s",
        [f"a live result came {worst:.1f} s late"] if worst > LONGEST_LIVE_DELAY_S else [],
        recovered_s=drained_s,
        note=f"live results came {statistics.median(delays):.3f} s (median), {worst:.2f} s (longest) after capture",
    )


def _delay_s(captured_at: str, heard_utc: float) -> float:
    return heard_utc - datetime.fromisoformat(captured_at.replace("Z", "+00:00")).timestamp()
