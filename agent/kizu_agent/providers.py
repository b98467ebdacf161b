"""Which provider of onnxruntime runs a graph, with which options, and what holds when it is missing.

A missing provider is never passed over in silence: opening fails, or says why less than what was asked for runs.
onnxruntime holds Python's lock while it opens a session: what takes long (TensorRT) must happen in another process.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import onnxruntime as ort

from kizu_agent.batch_sizes import BatchChoice, tuning_key
from kizu_agent.engine_cache import CacheEntry, openvino_entry, tensorrt_entry, timing_entry
from kizu_agent.errors import EngineError
from kizu_agent.machine import cpu_name, gpu, tensorrt_version
from kizu_agent.settings import EngineConfig, Provider
from kizu_agent.threads import budget
from kizu_contract.manifest import Graph
from kizu_contract.onnx_wire import as_unsigned

_ORT_NAMES = {
    "cpu": "CPUExecutionProvider",
    "cuda": "CUDAExecutionProvider",
    "tensorrt": "TensorrtExecutionProvider",
    "openvino": "OpenVINOExecutionProvider",
}
# What a provider cannot run falls to the next in its chain: onnxruntime wants the CPU last.
_CHAINS = {
    "cpu": ("cpu",),
    "cuda": ("cuda", "cpu"),
    "tensorrt": ("tensorrt", "cuda", "cpu"),
    "openvino": ("openvino", "cpu"),
}
_EXTRAS = {"cpu": "cpu", "cuda": "gpu", "tensorrt": "gpu", "openvino": "openvino"}
_LOG_ERRORS = 3
# The smallest ONNX model: y = Identity(x), one float; opset 17.
_IDENTITY = (
    b'\x08\x08\x12\x00:7\n\x10\n\x01x\x12\x01y"\x08Identity\x12\x01gZ\x0f\n\x01x\x12\n\n\x08\x08\x01\x12\x04\n\x02\x08\x01'
    b"b\x0f\n\x01y\x12\n\n\x08\x08\x01\x12\x04\n\x02\x08\x01B\x04\n\x00\x10\x11"
)

Chain = Sequence[tuple[str, dict[str, str]]]


@dataclass(frozen=True)
class Opened:
    """A session, the provider that really runs it, and why that is not the one asked for (None: it is).

    `caches` are what the provider keeps of it on disk, to be marked as whole once it has run.
    """

    session: ort.InferenceSession
    provider: Provider
    degraded_reason: str | None
    caches: Sequence[CacheEntry] = ()


def available_providers() -> tuple[str, ...]:
    """Names of the providers that this installation of onnxruntime was built with, the best first."""
    built = set(ort.get_available_providers())
    return tuple(name for name in ("tensorrt", "cuda", "openvino", "cpu") if _ORT_NAMES[name] in built)


def runtime_version() -> str:
    """Version of onnxruntime: kernels, and with them the best batch, change with it."""
    return str(ort.__version__)


def device_of(provider: str) -> str:
    """What `provider` runs on, in words."""
    if provider in ("cuda", "tensorrt"):
        return str(gpu() or "a GPU that the CUDA driver does not name")
    return cpu_name()


def open_session(
    scorer: bytes,
    config: EngineConfig,
    graph: Graph,
    on_build: Callable[[], None] = lambda: None,
    *,
    is_tiled: bool = True,
) -> Opened:
    """Open a graph on the configured provider; `on_build` is called before it is compiled, which takes minutes.

    `is_tiled`: it takes tiles in batches, as `graph` says; one that takes whole frames has fixed shapes.

    Raises EngineError when the graph does not load, or the provider is missing and the configuration says fail.
    """
    caches = _caches(scorer, config, graph) if config.provider in available_providers() else ()
    if needs_building(scorer, config, graph):
        on_build()
    for entry in caches:
        entry.begin()
    options = {"tensorrt": tensorrt_options(graph, caches, is_tiled=is_tiled)} if config.provider == "tensorrt" else {}
    if config.provider == "openvino":
        options["openvino"] = openvino_options(config, caches)
    session, provider, reason = _start(scorer, config if is_tiled else _one_stream(config), options)
    return Opened(session, provider, reason, caches if reason is None else ())


def try_provider(config: EngineConfig) -> tuple[Provider, str | None]:
    """Start the configured provider on a graph of nothing: the one that really runs, and why it is another.

    Raises EngineError where it is missing and the configuration says fail.
    """
    _, provider, reason = _start(_IDENTITY, config, {"openvino": openvino_options(config, ())})
    return provider, reason


def _start(
    scorer: bytes, config: EngineConfig, options: Mapping[str, dict[str, str]]
) -> tuple[ort.InferenceSession, Provider, str | None]:
    wanted = config.provider
    if wanted in available_providers():
        chain: Chain = [(_ORT_NAMES[name], options.get(name, {})) for name in _CHAINS[wanted]]
        session = _load(scorer, chain, config)
        # A provider whose libraries do not load is dropped by onnxruntime with no more than a log line.
        if session.get_providers()[0] == _ORT_NAMES[wanted]:
            return session, wanted, None
        reason = f"{wanted} did not start: its libraries or its device are missing or do not fit"
    else:
        reason = f"this onnxruntime was built without {wanted}; install the {_EXTRAS[wanted]} extra"
    if config.on_missing_provider == "fail":
        raise EngineError(f"{reason}; or set engine.on_missing_provider = 'degrade' to go on with the CPU")
    session = _load(scorer, [(_ORT_NAMES["cpu"], {})], config)
    return session, "cpu", f"{wanted} was asked for, cpu runs: {reason}"


def _one_stream(config: EngineConfig) -> EngineConfig:
    return config.model_copy(update={"streams": 1})


def choose_batch(scorer: bytes, graph: Graph, config: EngineConfig, provider: Provider) -> BatchChoice:
    """Choose the batch size for a graph that runs on `provider`: as set, as measured here, or the bundle's own."""
    share = budget(provider, config.threads, config.streams)
    threads = f"{share.engine} threads in {share.streams} streams"
    what = f"{provider} with {threads} on {device_of(provider)}, onnxruntime {runtime_version()}"
    key = tuning_key(scorer, graph, what)
    return BatchChoice(config.batch, config.cache_dir, key, graph.batch, what, share.streams)


def needs_building(scorer: bytes, config: EngineConfig, graph: Graph) -> bool:
    """Whether opening this graph means to compile it first, for minutes."""
    if config.provider != "tensorrt" or "tensorrt" not in available_providers():
        return False
    return not any(entry.is_whole for entry in _caches(scorer, config, graph)[:1])


def first_line(exc: Exception) -> str:
    """Give what onnxruntime says, without the trace that follows."""
    return str(exc).strip().partition("\n")[0]


def _load(scorer: bytes, chain: Chain, config: EngineConfig) -> ort.InferenceSession:
    options = ort.SessionOptions()
    names = [name for name, _ in chain]
    provider = "cpu" if names == [_ORT_NAMES["cpu"]] else config.provider
    options.intra_op_num_threads = budget(provider, config.threads, config.streams).operator
    options.inter_op_num_threads = 1
    options.execution_mode = ort.ExecutionMode.ORT_SEQUENTIAL
    options.log_severity_level = _LOG_ERRORS
    # Threads that spin between batches would take the cores from capture, cutting and stitching.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    # Kernels of the CPU want eight bits unsigned, all others signed; the numbers are the same.
    scorer = as_unsigned(scorer) if provider == "cpu" else scorer
    try:
        session = ort.InferenceSession(scorer, options, providers=list(chain))
    except Exception as exc:  # onnxruntime's errors share no base but Exception
        raise EngineError(f"onnxruntime does not load the graph: {first_line(exc)}") from exc
    session.disable_fallback()
    return session


def _caches(scorer: bytes, config: EngineConfig, graph: Graph) -> tuple[CacheEntry, ...]:
    """What is kept on disk for this graph, the graph's own first; nothing without a folder for it."""
    if config.cache_dir is None:
        return ()
    if config.provider == "tensorrt":
        version, device = tensorrt_version(), gpu()
        own = tensorrt_entry(config.cache_dir, scorer, graph, version, device)
        return own, timing_entry(config.cache_dir, version, device)
    if config.provider == "openvino":
        return (openvino_entry(config.cache_dir, scorer, graph, runtime_version(), cpu_name()),)
    return ()


def tensorrt_options(graph: Graph, caches: Sequence[CacheEntry], *, is_tiled: bool = True) -> dict[str, str]:
    """Options of the TensorRT provider: onnxruntime.ai/docs/execution-providers/TensorRT-ExecutionProvider.html."""
    batch = graph.batch
    profile = {
        "trt_profile_min_shapes": _shapes(graph, batch.min),
        "trt_profile_opt_shapes": _shapes(graph, batch.opt),
        "trt_profile_max_shapes": _shapes(graph, batch.max),
    }
    options = {
        **(profile if is_tiled else {}),
        # Only what the export has measured: a graph of fp32 is not rounded further here.
        "trt_fp16_enable": str(graph.precision == "fp16"),
        "trt_int8_enable": str(graph.precision == "int8"),
    }
    if caches:
        own, timing = caches
        options |= {"trt_engine_cache_enable": "True", "trt_engine_cache_path": str(own.folder)}
        options |= {"trt_timing_cache_enable": "True", "trt_timing_cache_path": str(timing.folder)}
    return options


def openvino_options(config: EngineConfig, caches: Sequence[CacheEntry]) -> dict[str, str]:
    """Options of the OpenVINO provider: onnxruntime.ai/docs/execution-providers/OpenVINO-ExecutionProvider.html."""
    options = {
        "device_type": "CPU",
        "num_of_threads": str(budget(config.provider, config.threads).engine),
        # Left to itself it computes in bfloat16 where the processor can: the golden tiles would deviate.
        "precision": "ACCURACY",
    }
    return options | ({"cache_dir": str(caches[0].folder)} if caches else {})


def _shapes(graph: Graph, count: int) -> str:
    """The inputs' shapes for `count` tiles, as TensorRT's profile wants them: `tiles:4x64x64x3,position:4`."""
    tile = f"{graph.tile_px}x{graph.tile_px}x{graph.channels}"
    shapes = {"tiles": f"{count}x{tile}", "position": str(count)}
    return ",".join(f"{name}:{shapes[name]}" for name in graph.inputs)
