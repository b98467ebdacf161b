"""The commands of docs/security.md, run as they are written there, and what comes of them."""

import re
import ssl
import subprocess
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from kizu_agent.connection import greet_broker
from kizu_agent.credentials import load_credentials
from kizu_agent.settings import MqttConfig

DOC = (Path(__file__).parents[2] / "docs" / "security.md").read_text("utf-8")
STEPS = dict(re.findall(r"<!-- tested: (\w+) -->\n```sh\n(.*?)```", DOC, re.DOTALL))
LINE = "acme/osaka/press/line2"


def run(step: str, folder: Path) -> None:
    subprocess.run(["bash", "-euc", STEPS[step]], cwd=folder, check=True, capture_output=True, timeout=60)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Where the authority's files lie after the first steps."""
    run("authority", tmp_path)
    for step in ("broker", "clients"):
        run(step, tmp_path / "plant-ca")
    return tmp_path / "plant-ca"


@pytest.fixture
def site(tmp_path: Path, folder: Path, make_plant_broker: Any) -> Iterator[Any]:
    """A broker with the authority that the page makes."""
    authority = SimpleNamespace(ca=folder / "ca.crt", crl=folder / "ca.crl", folder=folder)
    broker = make_plant_broker(tmp_path / "site", authority, (folder / "broker.crt", folder / "broker.key"))
    broker.start()
    yield broker
    broker.stop()


def test_the_pages_certificates_work(site: Any, folder: Path, wait_until: Any) -> None:
    """What the page's commands make lets each in as itself; renewed ones too, and revoked ones no more."""
    box = folder / "box1.crt", folder / "box1.key"
    assert site.may_say(box, f"{LINE}/box1/status")
    assert not site.may_say(box, f"{LINE}/box2/status")
    assert site.may_say((folder / "scada.crt", folder / "scada.key"), f"{LINE}/box1/cmd/ping")
    run("clients", folder)  # renewed
    assert site.may_say(box, f"{LINE}/box1/status")
    run("revoke", folder)
    site.reload()
    wait_until(lambda: not site.may_say(box, f"{LINE}/box1/status"), "the revocation")
    assert site.may_say((folder / "scada.crt", folder / "scada.key"), f"{LINE}/box1/cmd/ping")


def test_the_pages_certificates_are_strict_enough(site: Any, folder: Path) -> None:
    """The agent takes them, also under the strict checks that Python makes from 3.13 on."""
    files = {"ca_file": folder / "ca.crt", "cert_file": folder / "box1.crt", "key_file": folder / "box1.key"}
    config = MqttConfig.model_validate({"port": site.port, "tls": files})
    credentials = load_credentials(config)
    assert credentials.context is not None
    credentials.context.verify_flags |= ssl.VERIFY_X509_STRICT
    assert greet_broker(config, credentials).certificate is not None


def test_private_keys_are_private(folder: Path) -> None:
    """No key that the page's commands make can be read by others."""
    keys = list(folder.glob("*.key"))
    assert len(keys) == 5
    assert all(path.stat().st_mode & 0o077 == 0 for path in keys)
