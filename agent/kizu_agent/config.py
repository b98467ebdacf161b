"""The agent's configuration: a TOML file, KIZU_… environment variables and credential files, checked as a whole.

Precedence: environment, then credential files, then the TOML file. Nested names join with two underscores:
KIZU_MQTT__HOST. A credential is a file named `mqtt__password` in $CREDENTIALS_DIRECTORY (systemd LoadCredential=).
"""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, cast

from pydantic import Field, ValidationError, model_validator
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

from kizu_agent.camera_settings import CameraConfig
from kizu_agent.cameras.urls import secrets_of
from kizu_agent.errors import ConfigError
from kizu_agent.product_settings import ProductConfig, table_problems
from kizu_agent.redaction import REDACTOR
from kizu_agent.settings import AgentConfig, CommandsConfig, EngineConfig, ModelsConfig, MqttConfig, OutboxConfig
from kizu_agent.sparkplug.settings import SparkplugConfig

_MESSAGES = {
    "extra_forbidden": "there is no such key",
    "missing": "is required",
    "tuple_type": "must be a list; in an environment variable, a list in JSON",
    "model_type": "must be a table; in an environment variable, an object in JSON",
}


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
    sparkplug: SparkplugConfig = SparkplugConfig()
    commands: CommandsConfig = CommandsConfig()
    models: ModelsConfig = ModelsConfig()
    engine: EngineConfig = EngineConfig()
    cameras: Annotated[tuple[CameraConfig, ...], Field(min_length=1)]
    products: tuple[ProductConfig, ...] = ()

    @property
    def engine_here(self) -> EngineConfig:
        """The engine's table with its folder in the state directory, unless another one is set."""
        folder = self.engine.cache_dir or self.agent.state_dir / "engines"
        return self.engine.model_copy(update={"cache_dir": folder.absolute()})

    @model_validator(mode="after")
    def _distinct_names(self) -> "Config":
        names = [camera.name for camera in self.cameras]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ValueError(f"cameras share a name: {', '.join(twice)}")
        return self

    @model_validator(mode="after")
    def _somebody_is_told(self) -> "Config":
        if not (self.mqtt.json_topics or self.sparkplug.enabled):
            raise ValueError("mqtt.json_topics is off and sparkplug.enabled too: nobody would hear of any result")
        if self.mqtt.home_assistant and not self.mqtt.json_topics:
            raise ValueError("mqtt.home_assistant announces the JSON topics, and mqtt.json_topics is off")
        return self

    @model_validator(mode="after")
    def _distinct_devices(self) -> "Config":
        names = {camera.name.lower() for camera in self.cameras}
        if self.sparkplug.enabled and len(names) < len({camera.name for camera in self.cameras}):
            raise ValueError("camera names that differ by case alone cannot be Sparkplug devices")
        return self

    @model_validator(mode="after")
    def _products_fit(self) -> "Config":
        problems = table_problems(self.products, self.cameras)
        wanted = {camera.model for camera in self.cameras} | {product.slot for product in self.products}
        if len(wanted) > self.models.max_loaded:
            problems.append(
                f"cameras and products ask for {len(wanted)} models, and models.max_loaded is {self.models.max_loaded}"
            )
        if problems:
            raise ValueError("; ".join(problems))
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
    _hide_secrets(config)
    return config


def _hide_secrets(config: Config) -> None:
    if config.mqtt.password is not None:
        REDACTOR.hide(config.mqtt.password.get_secret_value())
    for camera in config.cameras:
        REDACTOR.hide(*secrets_of(camera.source))


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
