"""Certificates made at test time, and the plant's own TLS configuration of Mosquitto with them."""

import contextlib
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from datetime import datetime, timedelta, timezone
from ipaddress import IPv4Address
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from cryptography.x509.oid import NameOID

DEPLOY = Path(__file__).parents[2] / "deploy" / "mosquitto"
LINE = "acme/osaka/press/line2"
_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"


def program(name: str) -> str:
    """Where a program of Mosquitto's is."""
    path = shutil.which(name, path=_PATH)
    if path is None:
        pytest.fail(f"these tests need {name}: apt-get install mosquitto mosquitto-clients")
    return path


class Authority:
    """A private certificate authority on disk; `issue` makes `NAME.crt` and `NAME.key` in its folder."""

    def __init__(self, folder: Path, name: str = "plant", days: float = 3650) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self.ca, self.crl = folder, folder / "ca.crt", folder / "ca.crl"
        self._key = ec.generate_private_key(ec.SECP256R1())
        self._name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, f"{name} CA")])
        usage = x509.KeyUsage(
            digital_signature=False,
            content_commitment=False,
            key_encipherment=False,
            data_encipherment=False,
            key_agreement=False,
            key_cert_sign=True,
            crl_sign=True,
            encipher_only=False,
            decipher_only=False,
        )
        builder = self._builder(self._name, self._key.public_key(), days, -1).add_extension(usage, critical=True)
        builder = builder.add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        self.ca.write_bytes(builder.sign(self._key, hashes.SHA256()).public_bytes(Encoding.PEM))
        self.revoke()

    def issue(self, name: str, days: float = 365, begins: float = -1, file: str | None = None) -> tuple[Path, Path]:
        """Certificate and key for the common `name`, valid from `begins` to `days` from now."""
        key = ec.generate_private_key(ec.SECP256R1())
        subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
        names = x509.SubjectAlternativeName([x509.DNSName(f"{name}.plant"), x509.IPAddress(IPv4Address("127.0.0.1"))])
        own = x509.AuthorityKeyIdentifier.from_issuer_public_key(self._key.public_key())
        builder = self._builder(subject, key.public_key(), days, begins)
        builder = builder.add_extension(names, critical=False).add_extension(own, critical=False)
        cert = self.folder / f"{file or name}.crt"
        cert.write_bytes(builder.sign(self._key, hashes.SHA256()).public_bytes(Encoding.PEM))
        return cert, self._write_key(cert.with_suffix(".key"), key)

    def revoke(self, *certificates: Path) -> None:
        """Write the list of revoked certificates anew."""
        now = datetime.now(timezone.utc)
        builder = x509.CertificateRevocationListBuilder().issuer_name(self._name)
        builder = builder.last_update(now - timedelta(days=1)).next_update(now + timedelta(days=30))
        for path in certificates:
            serial = x509.load_pem_x509_certificate(path.read_bytes()).serial_number
            entry = x509.RevokedCertificateBuilder().serial_number(serial).revocation_date(now - timedelta(hours=1))
            builder = builder.add_revoked_certificate(entry.build())
        self.crl.write_bytes(builder.sign(self._key, hashes.SHA256()).public_bytes(Encoding.PEM))

    def _builder(
        self, subject: x509.Name, key: ec.EllipticCurvePublicKey, days: float, begins: float
    ) -> x509.CertificateBuilder:
        now = datetime.now(timezone.utc)
        builder = x509.CertificateBuilder().subject_name(subject).issuer_name(self._name).public_key(key)
        builder = builder.serial_number(x509.random_serial_number()).add_extension(
            x509.SubjectKeyIdentifier.from_public_key(key), critical=False
        )
        return builder.not_valid_before(now + timedelta(days=begins)).not_valid_after(now + timedelta(days=days))

    def _write_key(self, path: Path, key: ec.EllipticCurvePrivateKey) -> Path:
        path.touch(0o600)
        path.write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
        return path


class PlantBroker:
    """Mosquitto on deploy/mosquitto/kizu-tls.conf and kizu.acl: only paths and port are this test's."""

    def __init__(self, folder: Path, authority: Authority, broker: tuple[Path, Path] | None = None) -> None:
        self.authority, self.log = authority, folder / "mosquitto.log"
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = int(free.getsockname()[1])
        certs = folder / "certs"
        certs.mkdir(parents=True)
        self._install(certs, broker or authority.issue("broker"))
        text = (DEPLOY / "kizu-tls.conf").read_text()
        assert "\nlistener 8883\n" in text
        text = text.replace("\nlistener 8883\n", f"\nlistener {self.port} 127.0.0.1\n")
        self._config = folder / "mosquitto.conf"
        self._config.write_text(
            f"user root\npersistence_location {folder}/\n{text.replace('/etc/mosquitto', str(folder))}"
        )
        shutil.copy(DEPLOY / "kizu.acl", folder / "kizu.acl")
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start it and wait until it listens."""
        with self.log.open("ab") as out:
            self.process = subprocess.Popen([program("mosquitto"), "-c", self._config], stdout=out, stderr=out)
        deadline = time.monotonic() + 10
        while not self._listens():
            assert self.process.poll() is None, self.log.read_text()
            assert time.monotonic() < deadline
            time.sleep(0.02)

    def reload(self) -> None:
        """Have it read certificates and the revoked ones again; a refused client shows when that is done."""
        shutil.copy(self.authority.crl, self._certs / "ca.crl")
        assert self.process is not None
        self.process.send_signal(signal.SIGHUP)

    def stop(self) -> None:
        """End it."""
        if self.process is not None:
            self.process.terminate()
            self.process.wait(10)
            self.process = None

    def client(
        self, name: str, who: tuple[Path, Path] | None, *options: str, ca: Path | None = None
    ) -> "subprocess.CompletedProcess[str]":
        """Run mosquitto_pub or mosquitto_sub with the certificate of `who`."""
        login = ["--cert", str(who[0]), "--key", str(who[1])] if who else []
        address = ["-h", "127.0.0.1", "-p", str(self.port), "--cafile", str(ca or self.authority.ca)]
        command = [program(name), "-V", "5", *address, *login, *options]
        return subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)

    def may_say(self, who: tuple[Path, Path] | None, topic: str, **more: Path) -> bool:
        """Tell whether `who` is let in and may publish on `topic`."""
        said = self.client("mosquitto_pub", who, "-q", "1", "-t", topic, "-m", "x", **more)
        return said.returncode == 0 and "Not authorized" not in said.stderr

    def may_hear(self, who: tuple[Path, Path], topic: str) -> bool:
        """Tell whether `who` receives the retained message on `topic`."""
        return self.client("mosquitto_sub", who, "-q", "1", "-t", topic, "-C", "1", "-W", "1").stdout == "x\n"

    def _install(self, certs: Path, broker: tuple[Path, Path]) -> None:
        self._certs = certs
        for source, name in (
            (self.authority.ca, "ca.crt"),
            (self.authority.crl, "ca.crl"),
            *zip(broker, ("broker.crt", "broker.key"), strict=True),
        ):
            shutil.copy(source, certs / name)

    def _listens(self) -> bool:
        with contextlib.suppress(OSError):
            socket.create_connection(("127.0.0.1", self.port), 0.2).close()
            return True
        return False


@pytest.fixture(scope="session")
def make_authority() -> type[Authority]:
    """The maker of certificates."""
    return Authority


@pytest.fixture(scope="session")
def make_plant_broker() -> type[PlantBroker]:
    """The maker of the plant's broker."""
    return PlantBroker


@pytest.fixture
def authority(tmp_path: Path) -> Authority:
    """The plant's authority."""
    return Authority(tmp_path / "ca")


@pytest.fixture
def broker(tmp_path: Path, authority: Authority) -> Iterator[PlantBroker]:
    """The plant's broker, running."""
    found = PlantBroker(tmp_path / "broker", authority)
    found.start()
    yield found
    found.stop()


@pytest.fixture
def wait_until() -> Callable[..., None]:
    """Give a function that waits until a condition holds."""

    def wait(is_true: Callable[[], object], what: str = "it", timeout_s: float = 20) -> None:
        deadline = time.monotonic() + timeout_s
        while not is_true():
            assert time.monotonic() < deadline, f"waited {timeout_s} s for {what}"
            time.sleep(0.02)

    return wait
