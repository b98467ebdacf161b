"""What connections to the broker sign on with: read from files, and read anew when the files change.

Renewed files are taken up only when they are whole, fit each other, hold now, and, where there is a connection that
could be lost, when the broker took them on a second one. Whatever is wrong with them, the connection goes on with those
of before, and the agent's status says so.
"""

import hashlib
import os
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from datetime import datetime
from pathlib import Path
from ssl import SSLContext

import structlog
from cryptography import x509
from pydantic import SecretStr

from kizu_agent.certificates import Role, Validity, exposed, issuer_of, latest, parse_certificates
from kizu_agent.errors import AgentError
from kizu_agent.redaction import REDACTOR
from kizu_agent.settings import MqttConfig
from kizu_agent.stages import Stage
from kizu_agent.tls import make_context, read_file

LOOK_S = 1.0
STABLE_S = 1.0
"""Files are read when they have not changed for so long: certificate and key are written one after the other."""
RETRY_S = 60.0
"""What was refused is tried again: the broker may learn of it later, or a clock be put right."""
ASK_BROKER_S = 3600.0
"""So often a broker whose certificate is about to expire is asked for the present one."""

_SALT = os.urandom(16)
"""A digest of a password that anybody could compute would let passwords be guessed."""

Fingerprint = tuple[tuple[int, int, int] | None, ...]

log = structlog.get_logger(__name__)


@dataclass(frozen=True, eq=False)
class Credentials:
    """One set of them; a connection uses the same from its beginning to its end. `digest` tells sets apart."""

    username: str | None
    password: SecretStr | None
    context: SSLContext | None
    client: Validity | None
    authorities: tuple[x509.Certificate, ...]
    digest: bytes = field(repr=False)


def load_credentials(config: MqttConfig) -> Credentials:
    """Read the files that `config` names. Raises AgentError that names the file and what is wrong with it."""
    tls, password, source = config.tls, config.password, password_source(config)
    seen = hashlib.sha256(_SALT)
    if source is not None:
        password = SecretStr(_read_password(source))
        seen.update(password.get_secret_value().encode() + b"\0")
    plain = Credentials(config.username, password, None, None, (), seen.digest())
    if tls is None:
        return plain
    authorities = tuple(parse_certificates(tls.ca_file, read_file(tls.ca_file)))
    for path in _tls_files(config):
        seen.update(read_file(path))
    client = None
    if tls.cert_file is not None:
        client = Validity.of("client", parse_certificates(tls.cert_file, read_file(tls.cert_file))[0])
    return replace(plain, context=make_context(tls), client=client, authorities=authorities, digest=seen.digest())


def password_source(config: MqttConfig) -> Path | None:
    """The file that the password comes from: `password_file`, or the credential file unless the environment has one."""
    folder = os.environ.get("CREDENTIALS_DIRECTORY")
    if config.password_file is not None or folder is None or "KIZU_MQTT__PASSWORD" in map(str.upper, os.environ):
        return config.password_file
    path = Path(folder) / "mqtt__password"
    return path if path.is_file() else None


def private_files(config: MqttConfig) -> list[Path]:
    """Files that nobody else should read."""
    key = config.tls.key_file if config.tls is not None else None
    return [path for path in (key, password_source(config)) if path is not None]


class CredentialKeeper:
    """Keeps what connections sign on with; a thread of its own looks after the files.

    `try_out` signs on at the broker beside the connections that there are, and gives the broker's certificate (DER,
    None without TLS); it raises AgentError or OSError where that does not work.
    """

    def __init__(
        self,
        config: MqttConfig,
        try_out: Callable[[Credentials], bytes | None] | None = None,
        on_failure: Callable[[], None] = lambda: None,
    ) -> None:
        self.renewals: Counter[str] = Counter(taken=0, refused=0)
        """Changes of the files since the start: `taken` up, or `refused`."""
        self._config, self._try_out = config, try_out
        self._files = [*_tls_files(config), *filter(None, [password_source(config)])]
        self._lock = threading.Lock()
        self._current: Credentials | None = None
        self._broker: x509.Certificate | None = None
        self._validities: Mapping[Role, Validity] = {}
        self._refusal: str | None = None
        self._users: list[tuple[Callable[[], bool], Callable[[], None]]] = []
        self._seen: Fingerprint = ()
        self._handled: Fingerprint = ()
        self._seen_mono_s = self._retry_mono_s = self._ask_mono_s = 0.0
        self._stopping = threading.Event()
        self._stage = Stage("credentials", self._work, on_failure)

    def attach(self, is_connected: Callable[[], bool], on_change: Callable[[], None]) -> None:
        """Make a connection's owner known: `on_change` is called when `take` gives something new."""
        self._users.append((is_connected, on_change))

    def start(self) -> None:
        """Start looking after the files; idempotent."""
        self._warn_of_exposed()
        self._stage.start()

    def stop(self, deadline_s: float) -> bool:
        """Stop; idempotent. Tell whether the thread is gone."""
        self._stopping.set()
        return self._stage.stop(deadline_s)

    @property
    def failure(self) -> BaseException | None:
        """What killed the thread; None while it is well."""
        return self._stage.failure

    @property
    def progress_mono_ns(self) -> int:
        """When the thread last came round; trying the broker takes it up to half a minute."""
        return self._stage.progress_mono_ns

    def take(self) -> Credentials:
        """What to sign on with now. Raises AgentError while the files cannot be used and never could."""
        with self._lock:
            if self._current is None:
                self._seen = self._handled = self._fingerprint()
                self._seen_mono_s = time.monotonic()
                self._current = load_credentials(self._config)
                self._find_validities()
            return self._current

    def is_current(self, credentials: Credentials | None) -> bool:
        """Tell whether `credentials` are what `take` would give."""
        return self._current is credentials

    def note_broker(self, certificate: bytes | None) -> None:
        """Take the certificate (DER) that the broker showed."""
        if certificate is None:
            return
        try:
            self._broker = x509.load_der_x509_certificate(certificate)
        except ValueError:
            self._broker = None  # OpenSSL took it; its end is not known here
        self._ask_mono_s = time.monotonic() + ASK_BROKER_S
        self._find_validities()

    def validities(self) -> Mapping[Role, Validity]:
        """Of each certificate that is known: until when it holds."""
        return self._validities

    def ends(self) -> dict[Role, datetime]:
        """When each certificate that is known ends."""
        return {role: validity.ends for role, validity in self._validities.items()}

    def expiries(self) -> list[str]:
        """Certificates that have expired or will soon, in words."""
        return [problem for validity in self.validities().values() if (problem := validity.problem())]

    @property
    def problem(self) -> str | None:
        """Why renewed files are not taken up; None while nothing is wrong."""
        return self._refusal

    def look(self) -> None:
        """Take the files up when they have changed and come to rest; never raises for what they hold."""
        now, found = time.monotonic(), self._fingerprint()
        if self._current is None:
            return
        if found != self._seen:
            self._seen, self._seen_mono_s = found, now
        # Without a connection there is none to be careful of: what the broker refused before may be right by now.
        is_again = self._refusal is not None and (now >= self._retry_mono_s or not self._is_connected())
        is_due = found != self._handled or is_again
        if is_due and now - self._seen_mono_s >= STABLE_S:
            self._renew(found)

    def _work(self) -> None:
        self._stopping.wait(LOOK_S)
        if not self._stopping.is_set():
            self.look()
            self._ask_broker()

    def _find_validities(self) -> None:
        current, broker = self._current, self._broker
        if current is None:
            return
        # A file of authorities may hold old ones beside the new: what counts is the broker's, else the last to end.
        issuer = issuer_of(broker, current.authorities) if broker is not None else None
        authority = issuer or latest(current.authorities)
        found = [current.client] if current.client is not None else []
        roles: tuple[tuple[Role, x509.Certificate | None], ...] = (("ca", authority), ("broker", broker))
        found += [Validity.of(role, certificate) for role, certificate in roles if certificate is not None]
        self._validities = {validity.role: validity for validity in found}

    def _renew(self, found: Fingerprint) -> None:
        self._retry_mono_s = time.monotonic() + RETRY_S
        try:
            credentials = load_credentials(self._config)
            if self._fingerprint() != found:
                return  # it was being written: next time
            self._handled = found
            if self._current is not None and credentials.digest != self._current.digest:
                self._check(credentials)
                self._take_up(credentials)
            self._refusal = None
        except (AgentError, OSError, ValueError) as exc:
            self._handled = found
            self._refuse(str(exc))

    def _check(self, credentials: Credentials) -> None:
        """Raise AgentError or OSError where a connection that there is would be lost for nothing."""
        if credentials.client is not None and (unusable := credentials.client.unusable()):
            raise AgentError(unusable)
        if self._try_out is not None and self._is_connected():
            self.note_broker(self._try_out(credentials))

    def _is_connected(self) -> bool:
        return any(is_connected() for is_connected, _ in self._users)

    def _take_up(self, credentials: Credentials) -> None:
        with self._lock:
            self._current = credentials
            self._find_validities()
        self.renewals["taken"] += 1
        log.info("renewed credentials are taken up", client=str(credentials.client) if credentials.client else None)
        self._warn_of_exposed()
        for _, on_change in self._users:
            on_change()

    def _warn_of_exposed(self) -> None:
        for path in private_files(self._config):
            if found := exposed(path):
                log.warning("a secret is exposed", problem=found)

    def _refuse(self, reason: str) -> None:
        refusal = f"renewed credentials are not taken up, the connection goes on with those of before: {reason}"
        if refusal != self._refusal:
            self.renewals["refused"] += 1
            log.warning("renewed credentials are not taken up", reason=reason)
        self._refusal = refusal

    def _ask_broker(self) -> None:
        """Learn of a broker's renewed certificate: the connection there is knows the one of its beginning."""
        broker = self.validities().get("broker")
        if broker is None or broker.problem() is None or self._try_out is None or time.monotonic() < self._ask_mono_s:
            return
        self._ask_mono_s = time.monotonic() + ASK_BROKER_S
        try:
            self.note_broker(self._try_out(self.take()))
        except (AgentError, OSError) as exc:
            log.info("the broker's present certificate cannot be learnt", reason=str(exc))

    def _fingerprint(self) -> Fingerprint:
        return tuple(_stamp(path) for path in self._files)


def _stamp(path: Path) -> tuple[int, int, int] | None:
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_mtime_ns, found.st_size, found.st_ino


def _tls_files(config: MqttConfig) -> list[Path]:
    tls = config.tls
    return [] if tls is None else [path for path in (tls.ca_file, tls.cert_file, tls.key_file) if path is not None]


def _read_password(path: Path) -> str:
    """The password in `path`, without the line's end. Raises AgentError, never telling what is in it."""
    try:
        password = read_file(path).decode().strip()
    except UnicodeDecodeError:
        password = ""
    if not password:
        raise AgentError(f"{path}: holds no password (one line of UTF-8)")
    REDACTOR.hide(password)
    return password
