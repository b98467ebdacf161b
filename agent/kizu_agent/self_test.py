"""Proving a bundle in a process of its own: reading, checksums, signature, and its golden tiles on the real engine.

A hostile or broken file may eat memory, burn time or crash the process; it does so here, under limits, and never in
the process that inspects. `prove` is the agent's side, `main` the child's (`python -m kizu_agent.self_test`): a
Request as JSON on its standard input, on its standard output a line of JSON when it begins to compile the graph, and
another with its answer.
"""

import contextlib
import ctypes
import json
import os
import resource
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any, NamedTuple

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

from kizu_agent.engine import Engine
from kizu_agent.errors import ModelError
from kizu_agent.inspector import load_inspector, self_test
from kizu_agent.providers import choose_batch
from kizu_agent.records import ModelId
from kizu_agent.redaction import inherited_environment
from kizu_agent.settings import EngineConfig, Provider
from kizu_agent.threads import available_cores, child_environment, limit
from kizu_contract.bundle import Bundle, read_bundle
from kizu_contract.errors import KizuError

BASE_MEMORY_BYTES = 2 * 2**30
"""Address space that a self-test may add to what the interpreter and the libraries take, on the CPU."""
MEMORY_PER_FILE_BYTE = 6
"""More of it for a larger file: its bytes, the unpacked graph, onnxruntime's copy, and room to run."""
MAX_WRITTEN_BYTES = 64 * 2**20
TUNE_CPU_S = 5
"""CPU seconds of each core for the measurement of batches, beside the proof's own."""
_NICE = 10
_POLL_S = 0.2
_PR_SET_PDEATHSIG = 1
_WORST_OOM_SCORE = "1000"
_BUILDS = b'{"builds": true}\n'


@dataclass(frozen=True)
class Request:
    """What to prove, and against what. `trusted_keys` as hex of 32 bytes each, `revoked` as fingerprints."""

    path: str
    trusted_keys: Sequence[str]
    require_signature: bool
    engine: EngineConfig
    tolerance: float
    timeout_s: float
    revoked: Sequence[str] = ()

    def to_json(self) -> bytes:
        """Write for the child."""
        return json.dumps({**vars(self), "engine": self.engine.model_dump(mode="json")}).encode()

    @classmethod
    def from_json(cls, data: bytes) -> "Request":
        """Read what `to_json` wrote."""
        raw = json.loads(data)
        return cls(**{**raw, "engine": EngineConfig(**raw["engine"])})


@dataclass(frozen=True)
class Proof:
    """A bundle that passed: whose it is, how long it took, and how far its scores were off (relative).

    `created` by its manifest, UTC text; `signed_by` the fingerprint of a trusted key.
    """

    name: str
    version: str
    sha256: str
    created: str
    verify_s: float
    self_test_s: float
    deviation: float
    signed_by: str | None = None

    @property
    def model(self) -> ModelId:
        """The model that was proven."""
        return ModelId(self.name, self.version, self.sha256)


class ProofInterrupted(Exception):  # noqa: N818 - the service stops; nothing is wrong with the bundle
    """The service stopped before the proof was through."""


def prove(request: Request, keep_waiting: Callable[[], bool], on_build: Callable[[], None] = lambda: None) -> Proof:
    """Prove the bundle in a child process. `keep_waiting` is asked about five times a second.

    `on_build` is called once when the child begins to compile the graph; it may take `build_timeout_s` longer then.
    Raises ModelError with the reason when the bundle fails, and ProofInterrupted when `keep_waiting` says no.
    """
    with tempfile.TemporaryFile() as errors, tempfile.TemporaryFile() as answers:
        child = subprocess.Popen(
            [sys.executable, "-m", "kizu_agent.self_test"],
            stdin=subprocess.PIPE,
            stdout=answers,
            stderr=errors,
            cwd="/",
            env={**inherited_environment(), **child_environment(), "MALLOC_ARENA_MAX": "2"},
            start_new_session=True,
        )
        try:
            _converse(child, request, keep_waiting, _Builds(answers, on_build), answers)
        finally:
            child.kill()
            child.communicate()
        return _judge(child.returncode, _last_line(answers), errors)


class _Builds:
    """Looks in a child's answers for the word that it compiles the graph; says so once."""

    def __init__(self, answers: IO[bytes], on_build: Callable[[], None]) -> None:
        self._answers, self._on_build = answers, on_build
        self.has_begun = False

    def look(self) -> None:
        """Look; quick."""
        if not self.has_begun and os.pread(self._answers.fileno(), len(_BUILDS), 0) == _BUILDS:
            self.has_begun = True
            self._on_build()


def _converse(
    child: "subprocess.Popen[bytes]",
    request: Request,
    keep_waiting: Callable[[], bool],
    builds: _Builds,
    answers: IO[bytes],
) -> None:
    started = time.monotonic()
    pending: bytes | None = request.to_json()
    while True:
        try:
            child.communicate(pending, timeout=_POLL_S)
        except subprocess.TimeoutExpired:
            pending = None
        else:
            return
        builds.look()
        limit_s = request.timeout_s + (request.engine.build_timeout_s if builds.has_begun else 0.0)
        if time.monotonic() > started + limit_s:
            line = _last_line(answers)
            if line.endswith(b"}") and line != _BUILDS.strip():
                return  # it is proven; what goes on for too long is the measurement of batches
            raise ModelError(f"the self-test took more than {limit_s:g} s and was stopped")
        if not keep_waiting():
            raise ProofInterrupted


def _last_line(answers: IO[bytes]) -> bytes:
    answers.seek(0)
    return answers.read(MAX_WRITTEN_BYTES).strip().rpartition(b"\n")[2]


def _judge(code: int, output: bytes, errors: IO[bytes]) -> Proof:
    try:
        answer = json.loads(output)
        if "refused" not in answer:
            return Proof(**answer)
    except (ValueError, TypeError) as exc:
        how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
        raise ModelError(f"the self-test process {how}{_last_words(errors)}") from exc
    raise ModelError(answer["refused"])


def _last_words(errors: IO[bytes]) -> str:
    size = errors.seek(0, os.SEEK_END)
    errors.seek(max(0, size - 1000))
    lines = errors.read().decode(errors="replace").strip().splitlines()
    return f": {lines[-1][:300]}" if lines else ""


def main() -> int:
    """Prove the bundle that standard input asks for and answer on standard output."""
    request = Request.from_json(sys.stdin.buffer.read())
    with os.fdopen(os.dup(1), "w") as out:
        os.dup2(2, 1)  # whatever a native library prints must not mix with the answer
        _confine(request)
        limit()
        tested: _Tested | None = None
        try:
            tested = _prove(request, lambda: _tell_build(out))
            answer = asdict(tested.proof)
        except KizuError as exc:
            # The path is that of the agent's private copy: it would tell a reader nothing.
            answer = {"refused": str(exc).removeprefix(f"{request.path}: ")}
        except MemoryError:
            answer = {"refused": "the bundle needs more memory than a self-test may use"}
        json.dump(answer, out)
        out.flush()  # whatever becomes of the measurement, this holds
        if tested is not None:
            _tune(tested.bundle, request.engine, tested.provider)
    return 0


def _tell_build(out: IO[str]) -> None:
    out.write(_BUILDS.decode())
    out.flush()


class _Tested(NamedTuple):
    """What was proven, and the provider that really ran it."""

    proof: Proof
    bundle: Bundle
    provider: Provider


def _prove(request: Request, on_build: Callable[[], None] = lambda: None) -> _Tested:
    started = time.monotonic()
    keys = [Ed25519PublicKey.from_public_bytes(bytes.fromhex(key)) for key in request.trusted_keys]
    signatures: dict[str, Any] = {"require_signature": request.require_signature, "revoked": request.revoked}
    bundle = read_bundle(Path(request.path), keys, **signatures)
    verified = time.monotonic()
    # One thread: the line is being inspected meanwhile.
    inspector = load_inspector(bundle, request.engine.model_copy(update={"threads": 1}), on_build)
    deviation = self_test(bundle, inspector.engine, request.tolerance)
    provider = inspector.engine.provider
    inspector.close()
    done = time.monotonic()
    manifest = bundle.manifest
    took = (verified - started, done - verified)
    who = (manifest.name, manifest.version, bundle.sha256, manifest.created)
    return _Tested(Proof(*who, *took, deviation, bundle.signed_by), bundle, provider)


def _tune(bundle: Bundle, config: EngineConfig, provider: Provider) -> None:
    """Leave the best batch size for the agent, which is to run as many threads as it does here; no part of the proof.

    Here and not there: it takes a second, and this process gives way to the inspection.
    """
    graph = bundle.manifest.graph
    if config.cache_dir is None or not choose_batch(bundle.scorer, graph, config, provider).is_open:
        return
    with contextlib.suppress(KizuError, OSError, MemoryError), Engine(bundle.scorer, graph, config) as engine:
        engine.tune()


def _confine(request: Request) -> None:
    """Take the limits of this process, and make it the first to go when the machine runs out of memory."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    os.nice(_NICE)
    with contextlib.suppress(OSError):  # a hardened container may forbid it; the limits below hold all the same
        Path("/proc/self/oom_score_adj").write_text(_WORST_OOM_SCORE)
    seconds = int(request.timeout_s) + 5
    if request.engine.provider == "tensorrt":  # each core counts, and compiling takes them all
        seconds += int(request.engine.build_timeout_s) * available_cores()
    seconds += TUNE_CPU_S * available_cores()
    _limit(resource.RLIMIT_CORE, 0)
    _limit(resource.RLIMIT_CPU, seconds)
    if request.engine.provider == "cpu":  # the others write what they compiled
        _limit(resource.RLIMIT_FSIZE, MAX_WRITTEN_BYTES)
    if request.engine.provider in ("cpu", "openvino"):
        # CUDA reserves address space far beyond what it uses.
        more = BASE_MEMORY_BYTES + MEMORY_PER_FILE_BYTE * Path(request.path).stat().st_size
        _limit(resource.RLIMIT_AS, _address_space() + more)


def _address_space() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    return pages * resource.getpagesize()


def _limit(kind: int, value: int) -> None:
    _, hard = resource.getrlimit(kind)
    value = value if hard == resource.RLIM_INFINITY else min(value, hard)
    resource.setrlimit(kind, (value, value))


if __name__ == "__main__":
    sys.exit(main())
