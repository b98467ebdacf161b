"""What `kizu-agent check` found; and what it looks at for security: certificates, and who may read what is private."""

import stat
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from kizu_agent.cameras.urls import secrets_of
from kizu_agent.certificates import exposed
from kizu_agent.config import Config
from kizu_agent.credentials import CredentialKeeper, private_files


@dataclass(frozen=True)
class Finding:
    """One thing that was tried: `is_well`, or what is wrong in `text`; with `is_warning` it works all the same."""

    subject: str
    is_well: bool
    text: str
    is_warning: bool = False


def certificate_findings(keeper: CredentialKeeper) -> Iterator[Finding]:
    """Until when each certificate holds that `keeper` has met."""
    for role, validity in keeper.validities().items():
        problem, is_over = validity.problem(), validity.unusable() is not None
        text = problem or f"{validity} holds until {validity.ends:%Y-%m-%d}, {validity.days_left()} days"
        yield Finding(f"certificate ({role})", problem is None, text, is_warning=problem is not None and not is_over)


def exposure_findings(config: Config, config_file: Path | None) -> Iterator[Finding]:
    """Files that too many people may read or change; one finding each, one that all is well where there is none."""
    found = [*_exposed_secrets(config, config_file), *_changeable_keys(config), *_open_state(config)]
    for text in found:
        yield Finding("file permissions", is_well=False, text=text, is_warning=True)
    if not found:
        yield Finding("file permissions", is_well=True, text="passwords and keys are not open to others")


def _exposed_secrets(config: Config, config_file: Path | None) -> Iterator[str]:
    has_secrets = config.mqtt.password is not None or any(secrets_of(camera.source) for camera in config.cameras)
    files = private_files(config.mqtt) + ([config_file] if config_file is not None and has_secrets else [])
    yield from filter(None, map(exposed, files))


def _changeable_keys(config: Config) -> Iterator[str]:
    """Whoever may write here decides whose models serve."""
    revoked = config.models.revoked_keys_file
    for path in (*config.models.trusted_keys, *([revoked] if revoked is not None else [])):
        if _mode(path) & stat.S_IWOTH:
            yield f"{path} can be changed by everybody on this box: chmod o-w"


def _open_state(config: Config) -> Iterator[str]:
    if _mode(config.agent.state_dir) & stat.S_IRWXO:
        yield f"{config.agent.state_dir} is open to everybody on this box: chmod o-rwx"


def _mode(path: Path) -> int:
    try:
        return stat.S_IMODE(path.stat().st_mode)
    except OSError:
        return 0  # whoever uses it says so
