"""TLS towards the broker: one context for each set of files, at least TLS 1.2, the broker's name always checked."""

import socket
import ssl
import sys
from collections.abc import Callable
from pathlib import Path

from kizu_agent.errors import AgentError
from kizu_agent.settings import TlsConfig


class _TlsSocket(ssl.SSLSocket):
    """Closes itself when the handshake fails, where paho leaves the socket to the garbage collector."""

    def do_handshake(self, block: bool = False) -> None:
        try:
            super().do_handshake(block)
        except BaseException:
            self.close()
            raise


class _Context(ssl.SSLContext):
    """Expects the certificate of `server_name`, where that is another than the host that is connected to.

    Not of `ssl.create_default_context`: that writes the keys of all sessions into $SSLKEYLOGFILE.
    """

    server_name: str | None = None

    def wrap_socket(
        self,
        sock: socket.socket,
        server_side: bool = False,
        do_handshake_on_connect: bool = True,
        suppress_ragged_eofs: bool = True,
        server_hostname: str | bytes | None = None,
        session: ssl.SSLSession | None = None,
    ) -> ssl.SSLSocket:
        name = self.server_name or server_hostname
        return super().wrap_socket(sock, server_side, do_handshake_on_connect, suppress_ragged_eofs, name, session)


def make_context(config: TlsConfig) -> ssl.SSLContext:
    """Make the context that `config` describes. Raises AgentError that names the file and what is wrong with it."""
    context = _Context(ssl.PROTOCOL_TLS_CLIENT)
    context.server_name = config.server_name
    context.sslsocket_class = _TlsSocket
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    if sys.version_info >= (3, 13):  # as ssl.create_default_context has it from then on: strictly by RFC 5280
        context.verify_flags |= ssl.VERIFY_X509_STRICT | ssl.VERIFY_X509_PARTIAL_CHAIN
    _load_authorities(context, config.ca_file)
    if config.cert_file is not None and config.key_file is not None:
        _load_pair(context, config.cert_file, config.key_file)
    return context


def read_file(path: Path) -> bytes:
    """Read a file of credentials. Raises AgentError that names it."""
    try:
        return path.read_bytes()
    except OSError as exc:
        raise AgentError(f"{path}: cannot be read: {exc.strerror or exc}") from exc


def _load_authorities(context: ssl.SSLContext, path: Path) -> None:
    data = read_file(path)
    try:
        context.load_verify_locations(cadata=data.decode("ascii", "ignore"))
    except (ssl.SSLError, ValueError) as exc:
        raise AgentError(f"{path}: holds no certificate of an authority in PEM form") from exc


def _load_pair(context: ssl.SSLContext, cert_file: Path, key_file: Path) -> None:
    for path in (cert_file, key_file):
        read_file(path)  # Python's own error would not name the file
    try:
        context.load_cert_chain(cert_file, key_file, _refuse_passphrase(key_file))
    except ssl.SSLError as exc:
        if exc.reason == "KEY_VALUES_MISMATCH":
            raise AgentError(f"{key_file}: is not the key of the certificate in {cert_file}") from exc
        raise AgentError(f"{cert_file} and {key_file}: are no certificate and key in PEM form, or not whole") from exc
    except OSError as exc:
        raise AgentError(f"{cert_file}, {key_file}: cannot be read: {exc.strerror or exc}") from exc


def _refuse_passphrase(key_file: Path) -> Callable[[], str]:
    """What OpenSSL asks for a passphrase: without it, it would ask at the terminal and wait."""

    def refuse() -> str:
        raise AgentError(f"{key_file}: has a passphrase; a service needs a key without one, readable by it alone")

    return refuse
