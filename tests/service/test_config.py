"""The configuration: three sources, one list of problems."""

import contextlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kizu_agent.config import Config, load_config
from kizu_agent.errors import ConfigError

BASE = '[agent]\nname = "a"\nprefix = "plant"\n[[cameras]]\nname = "cam"\nsource = "sim:gears"\n'


@pytest.fixture
def load(tmp_path: Path) -> Callable[..., Config]:
    def load(text: str = BASE) -> Config:
        path = tmp_path / "agent.toml"
        path.write_text(text)
        return load_config(path)

    return load


@pytest.fixture
def problems(load: Callable[..., Config]) -> Callable[..., list[str]]:
    def problems(text: str = BASE) -> list[str]:
        with pytest.raises(ConfigError) as caught:
            load(text)
        first, *others = str(caught.value).splitlines()
        assert first.endswith(f"{len(others)} problem{'s' if len(others) != 1 else ''}:")
        return [line.removeprefix("  - ") for line in others]

    return problems


@pytest.fixture
def credential(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str, str], None]:
    folder = tmp_path / "credentials"
    folder.mkdir()
    monkeypatch.setenv("CREDENTIALS_DIRECTORY", str(folder))
    return lambda name, text: (folder / name).write_text(text) and None


def test_every_problem_is_told_at_once(problems, monkeypatch: pytest.MonkeyPatch) -> None:
    """File, environment and rules over several keys: one list, each problem with its place."""
    monkeypatch.setenv("KIZU_FOO__BAR", "1")
    monkeypatch.setenv("KIZU_OUTBOX__MAX_BYTES", "little")
    found = problems(
        '[agent]\nname = "a b"\n[mqtt]\nport = 0\nhots = "x"\n[mqtt.tls]\nca_file = "/ca"\ncert_file = "/cert"\n'
        '[[cameras]]\nname = "status"\nsource = "http://x"\n'
    )
    places = [problem.partition(":")[0] for problem in found]
    assert sorted(places) == [
        "agent.name",
        "agent.prefix",
        "cameras.0.name",
        "cameras.0.source",
        "environment variable KIZU_FOO__BAR",
        "mqtt.hots",
        "mqtt.port",
        "mqtt.tls",
        "outbox.max_bytes",
    ]
    assert "agent.prefix: is required" in found
    assert "mqtt.hots: there is no such key" in found
    assert "mqtt.tls: cert_file and key_file go together" in found


def test_environment_beats_credential_beats_file(load, credential, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each source overrides the one below it, key by key; a credential's last newline is not part of it."""
    text = BASE + '[mqtt]\nhost = "file"\nusername = "file"\npassword = "file"\n'
    assert load(text).mqtt.password.get_secret_value() == "file"
    credential("mqtt__password", "credential\n")
    credential("mqtt__username", "credential\n")
    credential("client.key", "is there for mqtt.tls.key_file to point at")
    monkeypatch.setenv("KIZU_MQTT__USERNAME", "environment")
    mqtt = load(text).mqtt
    assert (mqtt.host, mqtt.username) == ("file", "environment")
    assert mqtt.password.get_secret_value() == "credential"


@pytest.mark.parametrize("password", ["1234", "null", '{"a": 1}', '"quoted"', "[]"])
def test_a_password_is_never_read_as_json(load, password: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A password that happens to be JSON arrives as it was written."""
    monkeypatch.setenv("KIZU_MQTT__PASSWORD", password)
    config = load()
    assert config.mqtt.password.get_secret_value() == password
    assert password not in repr(config) or password in ("1234", "null", "[]")


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("KIZU_MQTT_HOST", "environment variable KIZU_MQTT_HOST: did you mean KIZU_MQTT__HOST?"),
        ("KIZU_MQTTT__HOST", "environment variable KIZU_MQTTT__HOST: there is no section 'mqttt'"),
        ("kizu_mqtt_host", "environment variable kizu_mqtt_host: did you mean KIZU_MQTT__HOST?"),
        ("KIZU_MQTT__HOTS", "mqtt.hots: there is no such key"),
    ],
)
def test_slips_in_variables_do_not_go_unnoticed(
    problems, name: str, told: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A variable that would change nothing is an error, with the name that was probably meant."""
    monkeypatch.setenv(name, "broker")
    assert problems() == [told]


def test_variables_of_other_tools_are_left_alone(load, monkeypatch: pytest.MonkeyPatch) -> None:
    """KIZU_VENV and the like are no settings."""
    monkeypatch.setenv("KIZU_VENV", "/venv")
    assert load().cameras[0].name == "cam"


def test_lists_come_as_json_in_the_environment(load, monkeypatch: pytest.MonkeyPatch) -> None:
    """Cameras and keys can come from the environment alone, deeper tables too."""
    monkeypatch.setenv(
        "KIZU_CAMERAS", '[{"name": "one", "source": "sim:gears"}, {"name": "two", "source": "sim:gears"}]'
    )
    monkeypatch.setenv("KIZU_MODELS__TRUSTED_KEYS", '["/key"]')
    monkeypatch.setenv("KIZU_MQTT__TLS__CA_FILE", "/ca")
    config = load()
    assert [camera.name for camera in config.cameras] == ["one", "two"]
    assert config.models.trusted_keys == (Path("/key"),)
    assert config.mqtt.tls is not None
    assert config.mqtt.tls.ca_file == Path("/ca")


def test_what_is_not_json_is_named_beside_the_other_problems(problems, monkeypatch: pytest.MonkeyPatch) -> None:
    """A half list in a variable is told with its place and hides nothing else."""
    monkeypatch.setenv("KIZU_CAMERAS", '[{"name":')
    monkeypatch.setenv("KIZU_MODELS__TRUSTED_KEYS", "/key")
    monkeypatch.setenv("KIZU_ENGINE", "cpu")
    found = sorted(problems(BASE + "[mqtt]\nport = 0\n"))
    assert [problem.partition(":")[0] for problem in found] == ["cameras", "engine", "models.trusted_keys", "mqtt.port"]
    assert all("JSON" in problem for problem in found[:3])


@pytest.mark.parametrize(
    ("path", "told"),
    [("/nowhere/agent.toml", "no such file"), ("/tmp", "not a file"), ("/" + "x" * 300, "name too long")],  # noqa: S108 - only looked at
)
def test_a_file_that_cannot_be_read_is_a_sentence(path: str, told: str) -> None:
    """Whatever is wrong with the file itself ends as ConfigError with its name."""
    with pytest.raises(ConfigError, match=f"{path}.*{told}|{path}.*{told.capitalize()}|{path}.*File {told}"):
        load_config(Path(path))


def test_a_file_whose_reading_fails_is_a_sentence() -> None:
    """An input/output error while reading is no traceback."""
    with pytest.raises(ConfigError, match="/proc/self/mem"):
        load_config(Path("/proc/self/mem"))


def test_numbers_that_are_none_are_refused(problems) -> None:
    """TOML knows nan and inf; no deadline may be one."""
    text = BASE.replace('prefix = "plant"', 'prefix = "plant"\nstop_deadline_s = inf') + "stale_after_s = nan\n"
    assert len(problems(text)) == 2


_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=5,
)


def _places(table: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Every place in a nested table."""
    found = [path] if path else []
    items = table.items() if isinstance(table, dict) else enumerate(table) if isinstance(table, list) else ()
    return found + [place for key, value in items for place in _places(value, (*path, key))]


def _toml(value: Any) -> str:
    """Write a value as TOML does inline; null has no form there and becomes a word."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{json.dumps(str(key))} = {_toml(item)}" for key, item in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(_toml, value)) + "]"
    if isinstance(value, float):
        return {"inf": "inf", "-inf": "-inf", "nan": "nan"}.get(repr(value), repr(value))
    return json.dumps(value) if isinstance(value, (str, bool, int)) else '"null"'


@given(data=st.data())
@settings(max_examples=300, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_whatever_stands_in_the_file_is_a_configuration_or_a_clear_error(tmp_path: Path, data: st.DataObject) -> None:
    """Any value at any place of a good configuration gives that configuration or ConfigError, never anything else."""
    good: dict[str, Any] = {
        "agent": {"name": "box", "prefix": "a/b", "metrics_port": 0},
        "mqtt": {"port": 1883, "tls": {"ca_file": "x"}},
        "outbox": {"max_bytes": 2**21},
        "models": {"trusted_keys": ["a.pem"], "probation": {"frames": 10}},
        "engine": {"provider": "cpu"},
        "cameras": [{"name": "cam", "source": "sim:gears", "events": {"open_n": 1}, "heatmap": {"when": "warn"}}],
    }
    place = data.draw(st.sampled_from(_places(good)))
    holder: Any = good
    for key in place[:-1]:
        holder = holder[key]
    holder[place[-1]] = data.draw(_VALUES)
    file = tmp_path / "agent.toml"
    file.write_bytes("".join(f"{key} = {_toml(value)}\n" for key, value in good.items()).encode("utf-8", "replace"))
    with contextlib.suppress(ConfigError):
        assert load_config(file).cameras


@given(st.binary(max_size=300))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_bytes_that_are_no_configuration_are_a_clear_error(tmp_path: Path, noise: bytes) -> None:
    """Noise is refused by name of the file."""
    file = tmp_path / "agent.toml"
    file.write_bytes(noise)
    with pytest.raises(ConfigError, match=r"agent\.toml"):
        load_config(file)


def test_a_path_with_a_nul_is_a_problem(problems: Callable[..., list[str]]) -> None:
    """No system call takes such a path: it would raise wherever it is first used."""
    for table, line in (("agent", r'state_dir = "a\u0000b"'), ("models", r'trusted_keys = ["a\u0000b"]')):
        text = BASE.replace("[agent]", f"[agent]\n{line}") if table == "agent" else f"{BASE}[{table}]\n{line}\n"
        assert any(found.startswith(table) and "NUL" in found for found in problems(text))


def test_engines_are_kept_in_the_state_directory(load: Callable[..., Config]) -> None:
    """Unless another folder is set; the batch is a number or measured, also by environment variable."""
    config = load(BASE.replace("[agent]", '[agent]\nstate_dir = "/srv/kizu"'))
    assert (config.engine.cache_dir, config.engine_here.cache_dir) == (None, Path("/srv/kizu/engines"))
    assert config.engine_here.batch == "auto"
    other = load(f'{BASE}[engine]\ncache_dir = "/srv/engines"\nbatch = 32\n')
    assert (other.engine_here.cache_dir, other.engine_here.batch) == (Path("/srv/engines"), 32)


def test_a_batch_may_come_by_environment(load: Callable[..., Config], monkeypatch: pytest.MonkeyPatch) -> None:
    """Text there, a number here."""
    monkeypatch.setenv("KIZU_ENGINE__BATCH", "16")
    assert load().engine.batch == 16


def test_a_batch_of_another_kind_is_a_problem(problems: Callable[..., list[str]]) -> None:
    """Neither none nor a word."""
    for value in ("0", '"large"'):
        assert all(found.startswith("engine.batch") for found in problems(f"{BASE}[engine]\nbatch = {value}\n"))
