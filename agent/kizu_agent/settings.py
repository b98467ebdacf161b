"""The tables of the agent's configuration, but for the cameras' (see `camera_settings`)."""

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, SecretStr, field_validator, model_validator

from kizu_contract.manifest import NAME_PATTERN

Name = Annotated[str, Field(pattern=rf"^{NAME_PATTERN}$")]


class Section(BaseModel):
    """Base of every table: unknown keys are errors, values do not change after loading."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    @field_validator("*")
    @classmethod
    def _is_a_path(cls, value: Any) -> Any:
        """No system call takes a path with a NUL: it would raise wherever it is first used."""
        values = value if isinstance(value, tuple) else (value,)
        if any(isinstance(item, Path) and "\0" in str(item) for item in values):
            raise ValueError("a path cannot hold a NUL character")
        return value


class AgentConfig(Section):
    """Who this agent is and where it keeps its state."""

    name: Name
    prefix: Annotated[str, Field(pattern=rf"^{NAME_PATTERN}(/{NAME_PATTERN})*$")]
    state_dir: Path = Path("/var/lib/kizu")
    stop_deadline_s: Annotated[float, Field(gt=0, le=300)] = 10.0
    log_format: Literal["console", "json"] = "console"
    metrics_port: Annotated[int, Field(ge=0, le=65535)] = 0
    """TCP port of the Prometheus metrics on loopback; 0: none."""


class TlsConfig(Section):
    """TLS towards the broker; a client certificate where the broker asks for one."""

    ca_file: Path
    cert_file: Path | None = None
    key_file: Path | None = None
    server_name: Annotated[str, Field(min_length=1, max_length=253)] | None = None
    """The name in the broker's certificate, where it is not that of `host`."""

    @model_validator(mode="after")
    def _both_or_none(self) -> "TlsConfig":
        if (self.cert_file is None) != (self.key_file is None):
            raise ValueError("cert_file and key_file go together")
        return self


class MqttConfig(Section):
    """The plant's broker."""

    host: str = "127.0.0.1"
    port: Annotated[int, Field(ge=1, le=65535)] = 1883
    protocol: Literal["5", "3.1.1"] = "5"
    username: str | None = None
    password: SecretStr | None = None
    password_file: Path | None = None
    """Comes before `password`, and is read anew when it changes."""
    tls: TlsConfig | None = None
    keepalive_s: Annotated[int, Field(ge=5, le=3600)] = 15
    heatmap_expiry_s: Annotated[int, Field(ge=1)] = 86_400
    home_assistant: bool = False
    """Announce agent and cameras to Home Assistant (MQTT discovery)."""
    json_topics: bool = True
    """Off: results, states and commands by Sparkplug alone."""


class OutboxConfig(Section):
    """The durable queue: what goes first when it is full or old, and how fast a backlog is sent.

    Over `max_bytes` the oldest heatmaps go, then ok results, then those that warn; events and rejects may take
    `reserve_bytes` more, and have no age.
    """

    max_bytes: Annotated[int, Field(ge=2**20)] = 512 * 2**20
    reserve_bytes: Annotated[int, Field(ge=0)] = 64 * 2**20
    max_age_s: Annotated[int, Field(ge=60)] = 7 * 86_400
    replay_per_s: Annotated[float, Field(gt=0, le=1e6)] = 500.0
    """Messages of a backlog a second, at most; live ones go before them."""
    sync_s: Annotated[float, Field(ge=0, le=60)] = 1.0
    """A power cut may take what was committed so long ago, never an event or a reject; 0: every commit is synced."""


class ProbationConfig(Section):
    """How long a new model is watched, and what sends it back; 0 frames: not at all."""

    frames: Annotated[int, Field(ge=0, le=1_000_000)] = 200
    """It lasts for so many frames of each camera, …"""
    least_s: Annotated[float, Field(ge=0, le=86_400)] = 60.0
    """… and at least so long after the first of them, …"""
    most_s: Annotated[float, Field(gt=0, le=604_800)] = 1800.0
    """… but never longer than this."""
    unknown_share: Annotated[float, Field(gt=0, lt=1)] = 0.05
    latency_ms: Annotated[float, Field(gt=0)] | None = None
    """Largest median of a frame's scoring; None: only the factor counts."""
    latency_factor: Annotated[float, Field(ge=1)] = 5.0
    reject_factor: Annotated[float, Field(ge=1)] = 3.0

    @model_validator(mode="after")
    def _rising(self) -> "ProbationConfig":
        if self.least_s > self.most_s:
            raise ValueError(f"least_s {self.least_s:g} is more than most_s {self.most_s:g}")
        return self


class CommandsConfig(Section):
    """How many commands are carried out; each name has its own allowance, `inspect` a larger one."""

    per_s: Annotated[float, Field(gt=0, le=10_000)] = 10.0
    burst: Annotated[int, Field(ge=1, le=10_000)] = 20
    inspect_per_s: Annotated[float, Field(gt=0, le=10_000)] = 200.0
    remembered: Annotated[int, Field(ge=0, le=100_000)] = 1000
    """Requests whose ids are known: one that comes again is answered as before, and changes nothing."""


class ModelsConfig(Section):
    """Where models are dropped and what they must prove."""

    drop_dir: Path = Path("/var/lib/kizu/drop")
    trusted_keys: tuple[Path, ...] = ()
    """Public keys, or folders of them (`*.pem`)."""
    revoked_keys_file: Path | None = None
    """Fingerprints of keys that are trusted no more, one a line."""
    require_signature: bool = False
    self_test_timeout_s: Annotated[float, Field(gt=0, le=3600)] = 60.0
    self_test_tolerance: Annotated[float, Field(gt=0, le=0.1)] = 1e-3
    """Largest relative deviation from the golden scores; other processors round differently."""
    probation: ProbationConfig = ProbationConfig()
    max_loaded: Annotated[int, Field(ge=1, le=1000)] = 8
    """At most so many models are kept loaded: one for each that cameras and products ask for."""

    @model_validator(mode="after")
    def _revoked_of_trusted(self) -> "ModelsConfig":
        if self.revoked_keys_file is not None and not self.trusted_keys:
            raise ValueError("revoked_keys_file goes with trusted_keys: without them no signature is looked at")
        return self


Provider = Literal["cpu", "cuda", "tensorrt", "openvino"]


class EngineConfig(Section):
    """What runs the graph."""

    provider: Provider = "cpu"
    on_missing_provider: Literal["fail", "degrade"] = "fail"
    threads: Annotated[int, Field(ge=0, le=256)] = 0
    """Threads that score; 0: one for each core."""
    streams: Annotated[int, Field(ge=0, le=256)] = 0
    """Batches scored side by side, on the CPU alone; 0: one for each thread, eight at most."""
    batch: Literal["auto"] | Annotated[int, Field(ge=1, le=65536)] = "auto"
    """Tiles a batch, within the bundle's bounds; "auto": what was measured to be best on this machine."""
    cache_dir: Path | None = None
    """What was compiled and measured for this machine; the agent's own default is `engines` in its state directory."""
    cache_max_bytes: Annotated[int, Field(ge=2**20)] = 2 * 2**30
    """What was used longest ago goes first."""
    build_timeout_s: Annotated[float, Field(gt=0, le=86_400)] = 1800.0
    """So much longer may a self-test take that compiles the graph first (TensorRT)."""
