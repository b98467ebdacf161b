"""Which provider of onnxruntime runs a graph, with which options, and what holds when it is missing.

A missing provider is never passed over in silence: opening fails, or says why less than what was asked for runs.
"""

import os

import onnxruntime as ort

from kizu_agent.errors import EngineError
from kizu_agent.settings import EngineConfig

_ORT_NAMES = {
    "cpu": "CPUExecutionProvider",
    "cuda": "CUDAExecutionProvider",
    "tensorrt": "TensorrtExecutionProvider",
}
# What a provider cannot run falls to the next in its chain: onnxruntime wants the CPU last.
_CHAINS = {"cpu": ("cpu",), "cuda": ("cuda", "cpu"), "tensorrt": ("tensorrt", "cuda", "cpu")}
_LOG_ERRORS = 3


def available_providers() -> tuple[str, ...]:
    """Names of the providers that this installation of onnxruntime was built with, the best first."""
    built = set(ort.get_available_providers())
    return tuple(name for name in ("tensorrt", "cuda", "cpu") if _ORT_NAMES[name] in built)


def open_session(scorer: bytes, config: EngineConfig) -> tuple[str, str | None, ort.InferenceSession]:
    """Open a graph: the provider that really runs, why it is not the one asked for (None: it is), and the session.

    Raises EngineError when the graph does not load, or the provider is missing and the configuration says fail.
    """
    reason = None
    if config.provider not in available_providers():
        reason = f"this onnxruntime was built without {config.provider}; install the gpu extra"
    else:
        session = _load(scorer, _CHAINS[config.provider], config.threads)
        # A provider whose libraries do not load is dropped by onnxruntime with no more than a log line.
        if session.get_providers()[0] == _ORT_NAMES[config.provider]:
            return config.provider, None, session
        reason = f"{config.provider} did not start: its libraries or its device are missing or do not fit"
    if config.on_missing_provider == "fail":
        raise EngineError(f"{reason}; or set engine.on_missing_provider = 'degrade' to go on with the CPU")
    return "cpu", f"{config.provider} was asked for, cpu runs: {reason}", _load(scorer, _CHAINS["cpu"], config.threads)


def first_line(exc: Exception) -> str:
    """Give what onnxruntime says, without the trace that follows."""
    return str(exc).strip().partition("\n")[0]


def _load(scorer: bytes, chain: tuple[str, ...], threads: int) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads or _cores()
    options.inter_op_num_threads = 1
    options.execution_mode = ort.ExecutionMode.ORT_SEQUENTIAL
    options.log_severity_level = _LOG_ERRORS
    # Threads that spin between batches would take the cores from capture, cutting and stitching.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    try:
        session = ort.InferenceSession(scorer, options, providers=[_ORT_NAMES[name] for name in chain])
    except Exception as exc:  # onnxruntime's errors share no base but Exception
        raise EngineError(f"onnxruntime does not load the graph: {first_line(exc)}") from exc
    session.disable_fallback()
    return session


def _cores() -> int:
    """Cores this process may use: a container or systemd's AllowedCPUs may grant fewer than there are."""
    return len(os.sched_getaffinity(0))
