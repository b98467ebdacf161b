"""Scenarios of hostile input: mutated bundles, by thousands through the self-test and by hundreds through an agent."""

import hashlib
import io
import json
import random
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from faults.plant import Outcome, Subscriber, brightness_bundle, longest_pause_s, pictures, plant, wait_for

from kizu_agent.self_test import BASE_MEMORY_BYTES
from kizu_contract.archive import pack_archive, unpack_archive
from kizu_contract.bundle import LIMITS, SIGNATURE, SUMS, write_bundle

LONGEST_S = 10.0
"""A self-test of these small models takes milliseconds."""
MOST_RSS_MIB = BASE_MEMORY_BYTES / 2**20 + 512
"""What the self-test's own limit allows, and the interpreter with its libraries."""

_WORKER = """
import json, os, resource, sys
from pathlib import Path
from kizu_agent.settings import EngineConfig
from kizu_agent.self_test import Request, _confine, _prove
from kizu_contract.errors import KizuError

out = os.fdopen(os.dup(1), "w")
os.dup2(2, 1)  # as the self-test does: what a native library prints must not mix with the answer
first = True
for line in sys.stdin:
    order = json.loads(line)
    request = Request(order["path"], order["keys"], order["signed"], EngineConfig(threads=1), 1e-3, 3600.0)
    if first:
        _confine(request)
        first = False
    try:
        _prove(request)
        answer = "accepted"
    except KizuError as exc:
        answer = "refused"
    except MemoryError:
        answer = "refused"
    except Exception as exc:
        answer = f"untyped {type(exc).__name__}: {exc}"[:300]
    rss = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    print(json.dumps({"answer": answer, "rss": rss}), file=out, flush=True)
"""
"""The agent's self-test, with its limits, for one bundle after another."""


@dataclass(frozen=True)
class Mutant:
    """A changed bundle: its bytes, how it was changed, and whether its checksums were made to fit again."""

    data: bytes
    how: str
    is_resealed: bool


def mutants(whole: bytes, count: int, seed: int) -> Iterator[Mutant]:
    """Changed copies of a signed bundle, two of three changed blindly, one in its parts with checksums that fit."""
    choice = random.Random(seed)
    made = 0
    while made < count:
        data, how = _resealed(whole, choice) if made % 3 == 2 else _blind(whole, choice)
        if data != whole:
            made += 1
            yield Mutant(data, how, how.startswith("resealed"))


def _blind(whole: bytes, choice: random.Random) -> tuple[bytes, str]:
    data, how = bytearray(whole), choice.choice(("flips", "cut", "grown", "zeroed", "moved", "noise"))
    at, size = choice.randrange(len(data)), choice.choice((1, 16, 512, 4096))
    if how == "flips":
        for _ in range(choice.choice((1, 2, 50))):
            data[choice.randrange(len(data))] ^= 1 << choice.randrange(8)
    elif how == "cut":
        del data[at : at + choice.choice((size, len(data)))]
    elif how == "grown":
        data[at:at] = choice.randbytes(size)
    elif how == "zeroed":
        data[at : at + size] = bytes(len(data[at : at + size]))
    elif how == "moved":
        data = data[at:] + data[:at]
    else:
        data[at : at + size] = choice.randbytes(size)
    return bytes(data), how


def _resealed(whole: bytes, choice: random.Random) -> tuple[bytes, str]:
    """Change one part and let the checksums fit: what gets as far as the parsers behind them."""
    parts = unpack_archive(_file(whole), LIMITS)
    name = choice.choice([part for part in parts if part not in (SUMS, SIGNATURE)])
    if name == "manifest.json" and choice.random() < 0.7:
        parts[name] = json.dumps(_spoil(json.loads(parts[name]), choice)).encode()
    else:
        parts[name] = _blind(parts[name], choice)[0]
    lines = [f"{hashlib.sha256(parts[part]).hexdigest()}  {part}\n" for part in parts if part not in (SUMS, SIGNATURE)]
    parts[SUMS] = "".join(lines).encode()
    return pack_archive(parts), f"resealed {name}"


def _spoil(value: Any, choice: random.Random) -> Any:
    """Change one thing somewhere in a JSON value."""
    if isinstance(value, dict) and value:
        key = choice.choice(list(value))
        if choice.random() < 0.1:
            return {name: item for name, item in value.items() if name != key}
        return {**value, key: _spoil(value[key], choice)}
    if isinstance(value, list) and value:
        at = choice.randrange(len(value))
        return [*value[:at], _spoil(value[at], choice), *value[at + 1 :]]
    odd = (None, True, -1, 0, 1, 2**31, 2**63, 1e308, -1e-308, "", "x" * 10_000, "../../x", "\x00", [], {}, [[[]]], 0.5)
    return choice.choice(odd)


def _file(data: bytes) -> Any:
    return io.BytesIO(data)


class _Worker:
    """A self-test process that is started again when it dies."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[str] | None = None
        self.rss_mib = 0.0

    def ask(self, path: Path, keys: list[str]) -> tuple[str, float]:
        """What became of the bundle (`accepted`, `refused`, `untyped …`, `died`, `hung`), and seconds."""
        process = self._process or self._start()
        began = time.monotonic()
        watchdog = threading.Timer(LONGEST_S, process.kill)
        watchdog.start()
        try:
            assert process.stdin is not None
            assert process.stdout is not None
            process.stdin.write(json.dumps({"path": str(path), "keys": keys, "signed": bool(keys)}) + "\n")
            process.stdin.flush()
            line = process.stdout.readline()
        except BrokenPipeError:
            line = ""
        finally:
            watchdog.cancel()
        took_s = time.monotonic() - began
        if not line:
            self.close()
            return ("hung" if took_s >= LONGEST_S else "died"), took_s
        answer = json.loads(line)
        self.rss_mib = max(self.rss_mib, answer["rss"] / 1024)
        return answer["answer"], took_s

    def close(self) -> None:
        """End it."""
        if self._process is not None:
            self._process.kill()
            self._process.communicate()
            self._process = None

    def _start(self) -> "subprocess.Popen[str]":
        command = [sys.executable, "-c", _WORKER]
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        )
        return self._process


def mutated_bundles(folder: Path, count: int = 10_000, seed: int = 0) -> Outcome:
    """Give the self-test thousands of changed copies of a signed bundle, signatures required: all are refused.

    Those whose checksums fit are tried without required signatures too: what is changed may then be a good model, but
    every refusal must be typed, quick and small.
    """
    folder.mkdir(parents=True, exist_ok=True)
    key = Ed25519PrivateKey.from_private_bytes(bytes(32))  # the same mutants in every run
    public = key.public_key().public_bytes_raw().hex()
    original, changed = folder / "original.kizu", folder / "changed.kizu"
    write_bundle(brightness_bundle(), original, key)
    worker, answers, open_answers, slowest = _Worker(), Counter[str](), Counter[str](), 0.0
    try:
        assert worker.ask(original, [public])[0] == "accepted"
        for mutant in mutants(original.read_bytes(), count, seed):
            changed.write_bytes(mutant.data)
            answer, took_s = worker.ask(changed, [public])
            answers[answer] += 1
            slowest = max(slowest, took_s)
            if mutant.is_resealed:
                _unsign(changed)
                answer, took_s = worker.ask(changed, [])
                open_answers[answer] += 1
                slowest = max(slowest, took_s)
    finally:
        worker.close()
    bad = {answer: n for answer, n in answers.items() if answer != "refused"}
    bad |= {f"(unsigned) {answer}": n for answer, n in open_answers.items() if answer not in ("refused", "accepted")}
    problems = [f"{answer}: {n}" for answer, n in bad.items()]
    problems += [f"{worker.rss_mib:.0f} MiB"] if worker.rss_mib > MOST_RSS_MIB else []
    return Outcome(
        "mutated bundles, self-test",
        f"{count} changed copies of a signed bundle, {open_answers.total()} of them once more unsigned",
        note=f"refused {answers['refused']}, accepted {answers['accepted']}; slowest {slowest:.2f} s, at most "
        f"{worker.rss_mib:.0f} MiB; unsigned and resealed: refused {open_answers['refused']}, good models all the same "
        f"{open_answers['accepted']}",
        failed="; ".join(problems),
    )


def _unsign(path: Path) -> None:
    parts = unpack_archive(_file(path.read_bytes()), LIMITS)
    parts.pop(SIGNATURE, None)
    path.write_bytes(pack_archive(parts))


def mutated_drops(folder: Path, count: int = 300, seed: int = 1) -> Outcome:
    """Drop changed bundles on an agent that inspects: none is taken, it goes on, its memory stays."""
    shots = pictures(folder / "pictures")
    camera = f'[[cameras]]\nname = "cam1"\nsource = "folder:{shots}?loop=true&rate=20"\n'
    with plant(folder, camera) as site:
        site.begin()
        return _drop_all(folder, count, seed, site.agent, site.subscriber)


def _drop_all(folder: Path, count: int, seed: int, agent: Any, subscriber: Subscriber) -> Outcome:
    original = folder / "original.kizu"
    write_bundle(brightness_bundle("2"), original)
    before_mib = _rss_mib(agent.process.pid)
    began, model = time.monotonic(), subscriber.results()[-1].json["model"]
    blind = (mutant for mutant in mutants(original.read_bytes(), 2 * count, seed) if not mutant.is_resealed)
    for number, mutant in zip(range(count), blind, strict=False):
        temporary = agent.drop / f".{number}.tmp"
        temporary.write_bytes(mutant.data)
        temporary.rename(agent.drop / f"mutant-{number:05}.kizu")

    def refused() -> int:
        return sum(heard.json["kind"] == "rejected" for heard in subscriber.of("box/model"))

    wait_for(lambda: refused() >= count or agent.process.poll() is not None, 20 + 5.0 * count, "the refusals")
    took_s = time.monotonic() - began
    grown_mib = _rss_mib(agent.process.pid) - before_mib
    pause_s = longest_pause_s(subscriber.results())
    problems = [] if subscriber.results()[-1].json["model"] == model else ["another model is in service"]
    problems += [f"results paused for {pause_s:.1f} s"] if pause_s > 3.0 else []
    problems += [f"it grew by {grown_mib:.0f} MiB"] if grown_mib > 64 else []
    problems += [f"the stop gave {code}"] if (code := agent.stop()) else []
    return Outcome(
        "mutated bundles, agent",
        f"{count} dropped, {refused()} refused, in {took_s:.0f} s",
        note=f"the agent grew by {grown_mib:.0f} MiB; longest pause between two results {pause_s:.2f} s",
        failed="; ".join(problems),
    )


def _rss_mib(pid: int) -> float:
    line = next(line for line in Path(f"/proc/{pid}/status").read_text().splitlines() if line.startswith("VmRSS"))
    return int(line.split()[1]) / 1024
