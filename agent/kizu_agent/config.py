"""The agent's configuration: a TOML file, KIZU_… environment variables and credential files, checked as a whole.

Precedence: environment, then credential files, then the TOML file. Nested names join with two underscores:
KIZU_MQTT__HOST. A credential is a file named `mqtt__password` in $CREDENTIALS_DIRECTORY (systemd LoadCredential=).
"""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal, cast

from pydantic import BaseModel, ConfigDict, Field, SecretStr, ValidationError, field_validator, model_validator
from pydantic.fields import FieldInfo
from pydantic_settings import (
    BaseSettings,
    EnvSettingsSource,
    NestedSecretsSettingsSource,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
    SettingsError,
    TomlConfigSettingsSource,
)

from kizu_agent.cameras.registry import check_url
from kizu_agent.errors import CameraError, ConfigError
from kizu_contract.manifest import NAME_PATTERN

RESERVED_CAMERA_NAMES = frozenset({"status", "cmd", "response", "model"})
"""Topic levels of the agent itself, beside which cameras stand."""

_MESSAGES = {
    "extra_forbidden": "there is no such key",
    "missing": "is required",
    "tuple_type": "must be a list; in an environment variable, a list in JSON",
    "model_type": "must be a table; in an environment variable, an object in JSON",
}

Name = Annotated[str, Field(pattern=rf"^{NAME_PATTERN}$")]
Rate = Annotated[float, Field(gt=0, lt=1)]


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
    tls: TlsConfig | None = None
    keepalive_s: Annotated[int, Field(ge=5, le=3600)] = 15
    heatmap_expiry_s: Annotated[int, Field(ge=1)] = 86_400


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


class ModelsConfig(Section):
    """Where models are dropped and what they must prove."""

    drop_dir: Path = Path("/var/lib/kizu/drop")
    trusted_keys: tuple[Path, ...] = ()
    require_signature: bool = False
    self_test_timeout_s: Annotated[float, Field(gt=0, le=3600)] = 60.0
    self_test_tolerance: Annotated[float, Field(gt=0, le=0.1)] = 1e-3
    """Largest relative deviation from the golden scores; other processors round differently."""
    probation: ProbationConfig = ProbationConfig()


class EngineConfig(Section):
    """What runs the graph."""

    provider: Literal["cpu", "cuda", "tensorrt"] = "cpu"
    on_missing_provider: Literal["fail", "degrade"] = "fail"
    threads: Annotated[int, Field(ge=0, le=256)] = 0
    """Threads inside an operator; 0: one for each core."""


class EventsConfig(Section):
    """When an anomaly opens and closes.

    It opens when `open_n` of the last `open_m` verdicts are at least `at`, and closes after `close_n` verdicts in a
    row below it whose score lies below `hysteresis` times that threshold: scores about a limit would flutter.
    """

    at: Literal["warn", "reject"] = "reject"
    open_n: Annotated[int, Field(ge=1, le=1000)] = 1
    open_m: Annotated[int, Field(ge=1, le=1000)] = 1
    close_n: Annotated[int, Field(ge=1, le=1000)] = 3
    hysteresis: Annotated[float, Field(gt=0, le=1)] = 0.9

    @model_validator(mode="after")
    def _n_of_m(self) -> "EventsConfig":
        if self.open_n > self.open_m:
            raise ValueError(f"open_n {self.open_n} is more than open_m {self.open_m}")
        return self


class HeatmapConfig(Section):
    """Which inspections get a heatmap thumbnail, and how it looks."""

    when: Literal["always", "every_nth", "warn", "reject", "never"] = "warn"
    every_n: Annotated[int, Field(ge=1)] = 10
    width_px: Annotated[int, Field(ge=16, le=4096)] = 320
    quality: Annotated[int, Field(ge=1, le=100)] = 80
    qos: Literal[0, 1] = 1


class Region(Section):
    """The part of the frame that is inspected, in pixels from its upper left corner."""

    x: Annotated[int, Field(ge=0)]
    y: Annotated[int, Field(ge=0)]
    width: Annotated[int, Field(ge=1)]
    height: Annotated[int, Field(ge=1)]


class FrameSize(Section):
    """Size of a live camera's pictures in pixels; one of another size is not judged."""

    width: Annotated[int, Field(ge=1, le=65536)]
    height: Annotated[int, Field(ge=1, le=65536)]


class ThresholdRates(Section):
    """Thresholds as false alarm rates among good frames; the model's calibration turns them into scores."""

    warn_rate: Rate = 0.01
    reject_rate: Rate = 0.001

    @model_validator(mode="after")
    def _rising(self) -> "ThresholdRates":
        if self.reject_rate > self.warn_rate:
            raise ValueError(f"reject_rate {self.reject_rate} is above warn_rate {self.warn_rate}")
        return self


class CameraConfig(Section):
    """One camera. `source`: sim:…, folder:…, video:…, rtsp://…, rtsps://… or v4l2:… (docs/operations.md)."""

    name: Name
    source: str
    model: Name | None = None
    """Take only bundles of this name; None: any bundle that no other camera asks for by name."""
    region: Region | None = None
    thresholds: ThresholdRates | None = None
    """None: the bundle's own."""
    stale_after_s: Annotated[float, Field(gt=0, le=86_400)] = 5.0
    """Without a new inspection for this long, the state is unknown."""
    open_timeout_s: Annotated[float, Field(gt=0, le=300)] = 10.0
    read_timeout_s: Annotated[float, Field(gt=0, le=300)] = 5.0
    size: FrameSize | None = None
    """None: that of the first picture since the agent started. For live cameras only, as the four below."""
    frozen_after_s: Annotated[float, Field(ge=0, le=86_400)] = 10.0
    black_after_s: Annotated[float, Field(ge=0, le=86_400)] = 2.0
    white_after_s: Annotated[float, Field(ge=0, le=86_400)] = 0.0
    black_level: Annotated[int, Field(ge=0, le=254)] = 16
    unauthorised_retry_s: Annotated[float, Field(ge=1, le=86_400)] = 600.0
    """Pause after a camera has refused user and password: a few refusals more would lock the account."""
    queue_frames: Annotated[int, Field(ge=1, le=1000)] = 4
    events: EventsConfig = EventsConfig()
    heatmap: HeatmapConfig = HeatmapConfig()

    @field_validator("name")
    @classmethod
    def _not_reserved(cls, name: str) -> str:
        if name in RESERVED_CAMERA_NAMES:
            raise ValueError(f"{name!r} is a topic of the agent itself; choose another name")
        return name

    @field_validator("source")
    @classmethod
    def _makes_sense(cls, source: str) -> str:
        try:
            check_url(source)
        except CameraError as exc:
            raise ValueError(str(exc)) from exc
        return source


class Config(BaseSettings):
    """The whole configuration; see deploy/agent.example.toml."""

    model_config = SettingsConfigDict(
        env_prefix="KIZU_",
        env_nested_delimiter="__",
        extra="forbid",
        frozen=True,
        nested_model_default_partial_update=True,
    )

    agent: AgentConfig
    mqtt: MqttConfig = MqttConfig()
    outbox: OutboxConfig = OutboxConfig()
    models: ModelsConfig = ModelsConfig()
    engine: EngineConfig = EngineConfig()
    cameras: Annotated[tuple[CameraConfig, ...], Field(min_length=1)]

    @model_validator(mode="after")
    def _distinct_names(self) -> "Config":
        names = [camera.name for camera in self.cameras]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ValueError(f"cameras share a name: {', '.join(twice)}")
        return self


def load_config(path: Path | None) -> Config:
    """Load and check the configuration from the TOML file at `path` (None: environment and credentials only).

    Raises ConfigError that lists every problem at once, by its place.
    """
    where = str(path) if path else "configuration"
    if path is not None:
        _check_file(path)
    unknown = _unknown_variables()
    try:
        config = _sourced_from(path)()
    except ValidationError as exc:
        raise ConfigError(_list_problems(where, [*_problems(exc), *unknown])) from exc
    except (ValueError, SettingsError, OSError) as exc:  # TOML that does not parse, files that cannot be read
        raise ConfigError(_list_problems(where, [str(exc), *unknown])) from exc
    if unknown:
        raise ConfigError(_list_problems(where, unknown))
    return config


def _check_file(path: Path) -> None:
    try:
        if path.is_file():
            return
    except OSError as exc:
        raise ConfigError(f"{path}: cannot be read: {exc.strerror}") from exc
    found = "is not a file" if path.exists() else "there is no such file"
    raise ConfigError(f"{path}: {found}; deploy/agent.example.toml is one to start from")


class _Environment(EnvSettingsSource):
    """Leaves what should be JSON and is not to validation, which names its place and finds the other problems too."""

    def decode_complex_value(self, field_name: str, field: FieldInfo, value: Any) -> Any:
        try:
            return super().decode_complex_value(field_name, field, value)
        except ValueError:
            return value


def _sourced_from(path: Path | None) -> Callable[[], Config]:
    """Config, reading from environment, credentials and `path`, in this precedence."""

    class Sourced(Config):
        @classmethod
        def settings_customise_sources(
            cls,
            settings_cls: type[BaseSettings],
            init_settings: PydanticBaseSettingsSource,  # noqa: ARG003 - the signature is pydantic's
            env_settings: PydanticBaseSettingsSource,  # noqa: ARG003
            dotenv_settings: PydanticBaseSettingsSource,  # noqa: ARG003
            file_secret_settings: PydanticBaseSettingsSource,
        ) -> tuple[PydanticBaseSettingsSource, ...]:
            credentials = NestedSecretsSettingsSource(
                file_secret_settings,
                secrets_dir=os.environ.get("CREDENTIALS_DIRECTORY"),
                secrets_dir_missing="ok",
                secrets_prefix="",
                secrets_nested_delimiter="__",
            )
            return (_Environment(settings_cls), credentials, TomlConfigSettingsSource(settings_cls, toml_file=path))

    return cast("Callable[[], Config]", Sourced)


def _unknown_variables() -> list[str]:
    """KIZU_… variables that look like SECTION__KEY and are not: slips that would otherwise go unnoticed."""
    found = ((name, _slip(name.upper().removeprefix("KIZU_"))) for name in sorted(os.environ) if _is_ours(name))
    return [f"environment variable {name}: {slip}" for name, slip in found if slip]


def _is_ours(name: str) -> bool:
    return name.upper().startswith("KIZU_")


def _slip(name: str) -> str | None:
    """What is wrong with a variable's `name` (in capitals, without KIZU_); None where nothing is, or it is not ours."""
    sections = {section.upper() for section in Config.model_fields}
    section, nesting, _ = name.partition("__")
    if nesting:
        return None if section in sections else f"there is no section {section.lower()!r}"
    first, single, rest = name.partition("_")
    return f"did you mean KIZU_{first}__{rest}?" if single and first in sections else None


def _problems(error: ValidationError) -> list[str]:
    found = error.errors(include_url=False, include_input=False)
    # A list whose entries fail is reported as too short as well: that would send the reader astray.
    failing_lists = {problem["loc"][:1] for problem in found if len(problem["loc"]) > 1}
    return [
        f"{'.'.join(map(str, problem['loc'])) or 'configuration'}: "
        f"{_MESSAGES.get(problem['type'], problem['msg'].removeprefix('Value error, '))}"
        for problem in found
        if not (problem["type"] == "too_short" and problem["loc"] in failing_lists)
    ]


def _list_problems(where: str, problems: list[str]) -> str:
    lines = "".join(f"\n  - {problem}" for problem in problems)
    return f"{where}: {len(problems)} problem{'s' if len(problems) != 1 else ''}:{lines}"
