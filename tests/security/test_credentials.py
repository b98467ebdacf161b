"""What connections sign on with: files that are right, wrong, renewed, about to expire."""

import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    PrivateFormat,
    load_pem_private_key,
)
from structlog.testing import capture_logs

from kizu_agent.certificates import Validity, exposed
from kizu_agent.connection import greet_broker, try_broker
from kizu_agent.credentials import CredentialKeeper, load_credentials, password_source
from kizu_agent.errors import AgentError
from kizu_agent.outbox import Outbox
from kizu_agent.publisher import Publisher
from kizu_agent.records import CommandAnswer, Message
from kizu_agent.settings import MqttConfig, OutboxConfig

NOW = datetime(2026, 6, 1, tzinfo=timezone.utc)
FIRST, SECOND = "first-password", "second-password"


def mqtt(port: int, authority: Any, pair: tuple[Path, Path] | None = None, **more: Any) -> MqttConfig:
    tls = {"ca_file": authority.ca, **({"cert_file": pair[0], "key_file": pair[1]} if pair else {})}
    tls.update(more.pop("tls", {}))
    return MqttConfig.model_validate({"port": port, "tls": tls, **more})


@pytest.fixture(autouse=True)
def _soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kizu_agent.credentials.LOOK_S", 0.05)
    monkeypatch.setattr("kizu_agent.credentials.STABLE_S", 0.2)


@pytest.mark.parametrize(
    ("lives", "left", "words"),
    [
        (365, 31, None),
        (365, 29.5, "expires in 29 days, on 2026-06-30"),
        (365, 0.5, "expires in 0 days"),
        (365, -2, "expired on 2026-05-30, 2 days ago"),
        (9, 4, None),
        (9, 2.5, "expires in 2 days"),
    ],
)
def test_the_end_is_told_ahead(lives: float, left: float, words: str | None) -> None:
    """A certificate is a problem from 30 days before its end, a short-lived one in its last third, and afterwards."""
    ends = NOW + timedelta(days=left)
    problem = Validity("client", "CN=box1", ends - timedelta(days=lives), ends).problem(NOW)
    assert problem is None if words is None else words in (problem or "")


def test_a_certificate_of_tomorrow() -> None:
    """One that is not valid yet is unusable, and the box's clock is the first suspect."""
    begins = NOW + timedelta(hours=1)
    assert "clock" in (Validity("client", "CN=x", begins, begins + timedelta(days=9)).unusable(NOW) or "")


def _encrypt(key: Path) -> None:
    private = load_pem_private_key(key.read_bytes(), None)
    key.write_bytes(private.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, BestAvailableEncryption(b"x")))


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda ca, cert, key: ca.unlink(), "ca.crt: cannot be read: No such file"),  # noqa: ARG005
        (lambda ca, cert, key: ca.write_text("none"), "ca.crt: holds no certificate"),  # noqa: ARG005
        (lambda ca, cert, key: cert.write_bytes(cert.read_bytes()[:300]), "box1.crt: holds no certificate"),  # noqa: ARG005
        (lambda ca, cert, key: key.write_bytes(key.read_bytes()[:99]), "or not whole"),  # noqa: ARG005
        (lambda ca, cert, key: key.unlink(), "box1.key: cannot be read"),  # noqa: ARG005
        (lambda ca, cert, key: shutil.copy(ca.parent / "other.key", key), "is not the key of the certificate"),  # noqa: ARG005
        (lambda ca, cert, key: _encrypt(key), "has a passphrase"),  # noqa: ARG005
    ],
)
def test_unusable_files_are_named(authority: Any, spoil: Callable[..., object], words: str) -> None:
    """Whatever is wrong with a file, the message names it, and holds nothing of a key."""
    pair = authority.issue("box1")
    authority.issue("other")
    secret = "".join(pair[1].read_text().splitlines()[1:-1])
    spoil(authority.ca, *pair)
    with pytest.raises(AgentError) as caught:
        load_credentials(mqtt(1, authority, pair))
    assert words in str(caught.value)
    assert secret[:20] not in str(caught.value)


def test_the_brokers_name_is_checked(broker: Any, authority: Any) -> None:
    """A host name that the certificate lacks is refused, and `server_name` says which name it has instead."""
    pair = authority.issue("box1")
    here = {"host": "localhost"}  # the certificate names broker.plant and 127.0.0.1
    with pytest.raises(AgentError, match=r"CERTIFICATE_VERIFY_FAILED.*localhost"):
        try_broker(mqtt(broker.port, authority, pair, **here))
    assert "TLSv1." in try_broker(mqtt(broker.port, authority, pair, tls={"server_name": "broker.plant"}, **here))
    with pytest.raises(AgentError, match="CERTIFICATE_VERIFY_FAILED"):
        try_broker(mqtt(broker.port, authority, pair, tls={"server_name": "other.plant"}, **here))


def test_a_refused_client_certificate_is_suspected(broker: Any, authority: Any) -> None:
    """Where the broker hangs up on an expired certificate, or on none, the message points at the certificate."""
    for pair in (authority.issue("box1", days=-1, begins=-9), None):
        with pytest.raises(AgentError, match="does the broker take this certificate"):
            try_broker(mqtt(broker.port, authority, pair))


def test_all_three_certificates_are_known(broker: Any, authority: Any) -> None:
    """After one connection the ends of client's, authority's and broker's certificate are known."""
    keeper = CredentialKeeper(mqtt(broker.port, authority, authority.issue("box1", days=10, begins=-350)))
    try_broker(keeper._config, keeper)
    assert set(keeper.ends()) == {"client", "ca", "broker"}
    assert ["client certificate CN=box1 expires in 9 days" in text for text in keeper.expiries()] == [True]


def test_an_old_authority_beside_a_new_one_is_no_problem(
    tmp_path: Path, broker: Any, authority: Any, make_authority: Any
) -> None:
    """While authorities change the file holds both: the end of the one that the broker does not use is not told."""
    old = make_authority(tmp_path / "old", "old", days=3)
    pair = authority.issue("box1")
    authority.ca.write_bytes(old.ca.read_bytes() + authority.ca.read_bytes())
    keeper = CredentialKeeper(mqtt(broker.port, authority, pair))
    try_broker(keeper._config, keeper)
    assert keeper.expiries() == []
    assert keeper.validities()["ca"].subject == "CN=plant CA"


def test_a_brokers_renewed_certificate_is_learnt(
    broker: Any, authority: Any, monkeypatch: pytest.MonkeyPatch, wait_until: Callable[..., None]
) -> None:
    """A broker whose certificate was about to expire is asked again: the warning goes without a reconnection."""
    config = mqtt(broker.port, authority, authority.issue("box1"))
    keeper = CredentialKeeper(config, lambda found: greet_broker(config, found).certificate)
    expiring = authority.issue("broker", days=3, begins=-360, file="expiring")[0]
    keeper.take()
    keeper.note_broker(_der(expiring))
    assert "broker's certificate CN=broker expires in 2 days" in keeper.expiries()[0]
    monkeypatch.setattr(keeper, "_ask_mono_s", 0.0)
    keeper.start()
    try:
        wait_until(lambda: not keeper.expiries(), "the broker's present certificate")
    finally:
        assert keeper.stop(10)


def _der(path: Path) -> bytes:
    from cryptography import x509

    return x509.load_pem_x509_certificate(path.read_bytes()).public_bytes(Encoding.DER)


@pytest.mark.parametrize(("mode", "is_exposed"), [(0o600, False), (0o640, False), (0o644, True), (0o660, True)])
def test_exposed_keys_are_told(tmp_path: Path, mode: int, is_exposed: bool) -> None:
    """A private file that others may read, or a group may change, is told."""
    path = tmp_path / "box.key"
    path.touch()
    path.chmod(mode)
    assert (exposed(path) is not None) is is_exposed


class PasswordBroker:
    """Mosquitto with one user, whose password can be changed."""

    def __init__(self, folder: Path) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = int(free.getsockname()[1])
        self._passwords = folder / "passwords"
        self.process: subprocess.Popen[bytes] | None = None
        self.set_password(FIRST)
        config = folder / "mosquitto.conf"
        config.write_text(
            f"listener {self.port} 127.0.0.1\nallow_anonymous false\npassword_file {self._passwords}\nuser root\n"
        )
        self.process = subprocess.Popen(["mosquitto", "-c", config], stderr=subprocess.DEVNULL)

    def set_password(self, password: str) -> None:
        """Change it, as the plant's administrator does."""
        command = ["mosquitto_passwd", "-c", "-b", self._passwords, "box1", password]
        subprocess.run(command, check=True, capture_output=True)
        if self.process is not None:
            self.process.send_signal(signal.SIGHUP)

    def close(self) -> None:
        """End it."""
        if self.process is not None:
            self.process.terminate()
            self.process.wait(10)


@pytest.fixture
def password_broker(tmp_path: Path) -> Iterator[PasswordBroker]:
    found = PasswordBroker(tmp_path)
    yield found
    found.close()


def test_a_password_is_rotated_live(
    tmp_path: Path, password_broker: PasswordBroker, wait_until: Callable[..., None]
) -> None:
    """A changed password file is not taken up while the broker refuses it, and is when the broker knows it."""
    file = tmp_path / "password"
    file.write_text(f"{FIRST}\n")
    config = MqttConfig(port=password_broker.port, username="box1", password_file=file)
    keeper = CredentialKeeper(config, lambda found: greet_broker(config, found).certificate)
    outbox = Outbox(tmp_path / "outbox.sqlite3", OutboxConfig())
    will = Message("a/b/box1/status", b"{}", retain=True)
    publisher = Publisher(config, "box1", "a/b/box1", will, outbox, lambda _: CommandAnswer(b""), credentials=keeper)
    publisher.start()
    keeper.start()
    try:
        wait_until(lambda: publisher.is_connected, "the first password")
        file.write_text(f"{SECOND}\n")
        wait_until(lambda: keeper.problem, "the refusal")
        assert "rejects" in (keeper.problem or "")
        assert SECOND not in (keeper.problem or "")
        assert publisher.is_connected
        password_broker.set_password(SECOND)
        outbox.put([Message("a/b/box1/cam/result", b"{}")])
        publisher.wake()
        wait_until(lambda: keeper.renewals["taken"] == 1 and publisher.is_connected, "the second password")
        wait_until(lambda: outbox.depth() == 0, "the result")
        assert keeper.problem is None
    finally:
        keeper.stop(10)
        publisher.stop(2.0)
        outbox.close()
    assert (publisher.failure, keeper.failure) == (None, None)


def test_an_empty_password_file_is_not_taken_up(tmp_path: Path) -> None:
    """A password file that is being written is no password, and the one of before goes on."""
    file = tmp_path / "password"
    file.write_text(FIRST)
    keeper = CredentialKeeper(MqttConfig(username="box1", password_file=file))
    before = keeper.take()
    file.write_text("")
    with capture_logs() as logs:
        deadline = time.monotonic() + 5
        while keeper.problem is None and time.monotonic() < deadline:
            keeper.look()
            time.sleep(0.02)
    assert "holds no password" in (keeper.problem or "")
    assert keeper.is_current(before)
    assert len(logs) == 1
    file.write_text(FIRST)  # put right: nothing has changed after all
    while keeper.problem is not None and time.monotonic() < deadline:
        keeper.look()
        time.sleep(0.02)
    assert keeper.problem is None
    assert keeper.is_current(before)


def test_the_credential_file_is_read_again_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A password that came as a credential file is rotated there, unless the environment has one."""
    (tmp_path / "mqtt__password").write_text(FIRST)
    monkeypatch.setenv("CREDENTIALS_DIRECTORY", str(tmp_path))
    assert password_source(MqttConfig()) == tmp_path / "mqtt__password"
    monkeypatch.setenv("KIZU_MQTT__PASSWORD", SECOND)
    assert password_source(MqttConfig()) is None
    assert os.environ["CREDENTIALS_DIRECTORY"]


def test_the_password_file_comes_first(tmp_path: Path) -> None:
    """Where there is a password file as well as a password, the file holds."""
    (tmp_path / "password").write_text(SECOND)
    found = load_credentials(MqttConfig(password=FIRST, password_file=tmp_path / "password"))  # type: ignore[arg-type]
    assert found.password is not None
    assert found.password.get_secret_value() == SECOND
