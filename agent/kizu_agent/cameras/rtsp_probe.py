"""Why an RTSP camera cannot be opened: FFmpeg knows, but OpenCV does not pass it on, so ask the camera ourselves.

One DESCRIBE (RFC 2326, 10.2) as FFmpeg would send it, and once more with user and password where the camera asks for
them: Basic (RFC 7617) or Digest with MD5 (RFC 7616), as FFmpeg can.
"""

import contextlib
import hashlib
import secrets
import socket
import ssl
import time
from base64 import b64encode
from urllib.parse import unquote
from urllib.request import parse_http_list, parse_keqv_list

PROBE_S = 3.0
"""Longest that the questions may take together: they come on top of a failed opening."""
_MAX_ANSWER = 64 * 1024
_METHOD = "DESCRIBE"

Challenge = tuple[str, dict[str, str]]
"""Scheme in lower case and parameters of a `WWW-Authenticate` header."""


def describe_status(url: str, timeout_s: float = PROBE_S) -> int | None:
    """Ask for `url` and give the RTSP status, 200 to 599 (401: wrong user or password); None where none came."""
    deadline = time.monotonic() + timeout_s
    with contextlib.suppress(OSError, ValueError):
        return _describe(url, deadline)
    return None


def _describe(url: str, deadline: float) -> int | None:
    target = _Target(url)
    with _connect(target, deadline) as link:
        status, challenges = _ask(link, target, 1, None, deadline)
        answer = next(filter(None, (_answer(challenge, target) for challenge in challenges)), None)
        if status == 401 and answer is not None:
            status, _ = _ask(link, target, 2, answer, deadline)
        elif status == 401 and target.user is not None:
            return None  # a scheme that is unknown here, maybe not to FFmpeg: nothing is known of user and password
        return status


class _Target:
    """A URL taken apart as FFmpeg does: what goes before the last `@` of the host part is user and password."""

    def __init__(self, url: str) -> None:
        scheme, _, rest = url.partition("://")
        ends = [at for at in map(rest.find, "/?#") if at >= 0]
        cut = min(ends, default=len(rest))
        info, at, place = rest[:cut].rpartition("@")
        user, _, password = info.partition(":")
        self.user: str | None = unquote(user) if at else None
        self.password = unquote(password)
        self.is_encrypted = scheme.lower() == "rtsps"
        self.host, port = _split_place(place)
        self.port = int(port) if port else (322 if self.is_encrypted else 554)
        self.uri = f"{scheme}://{place}{rest[cut:]}"


def _split_place(place: str) -> tuple[str, str]:
    if place.startswith("["):  # an IPv6 address
        host, _, port = place[1:].partition("]")
        return host, port.removeprefix(":")
    host, _, port = place.partition(":")
    return host, port


def _connect(target: _Target, deadline: float) -> socket.socket:
    link = socket.create_connection((target.host, target.port), _left(deadline))
    if not target.is_encrypted:
        return link
    # Cameras sign their certificates themselves, and FFmpeg has just shown the same host the same password.
    context = ssl.create_default_context()
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    return context.wrap_socket(link, server_hostname=target.host)


def _ask(
    link: socket.socket, target: _Target, number: int, authorization: str | None, deadline: float
) -> tuple[int | None, list[Challenge]]:
    lines = [f"{_METHOD} {target.uri} RTSP/1.0", f"CSeq: {number}", "User-Agent: kizu", "Accept: application/sdp"]
    lines += [f"Authorization: {authorization}"] if authorization else []
    link.settimeout(_left(deadline))
    link.sendall("\r\n".join([*lines, "", ""]).encode())
    return _parse(_receive(link, deadline))


def _receive(link: socket.socket, deadline: float) -> str:
    """The head of an answer; what it describes is not read unless it came along."""
    head = b""
    while b"\r\n\r\n" not in head and len(head) < _MAX_ANSWER:
        link.settimeout(_left(deadline))
        part = link.recv(4096)
        if not part:
            break
        head += part
    return head.partition(b"\r\n\r\n")[0].decode("utf-8", "replace")


def _parse(head: str) -> tuple[int | None, list[Challenge]]:
    first, *lines = head.split("\r\n")
    version, _, rest = first.partition(" ")
    if not version.startswith("RTSP/") or not rest[:3].isdigit():
        return None, []
    headers = [(name.strip().lower(), value.strip()) for name, _, value in (line.partition(":") for line in lines)]
    return int(rest[:3]), [_challenge(value) for name, value in headers if name == "www-authenticate"]


def _challenge(text: str) -> Challenge:
    scheme, _, rest = text.partition(" ")
    parameters = [item for item in parse_http_list(rest) if "=" in item]
    return scheme.lower(), {key.lower(): value for key, value in parse_keqv_list(parameters).items()}


def _answer(challenge: Challenge, target: _Target) -> str | None:
    """The `Authorization` for a challenge; None without user, and for schemes that are unknown here."""
    scheme, parameters = challenge
    if target.user is None:
        return None
    if scheme == "basic":
        return f"Basic {b64encode(f'{target.user}:{target.password}'.encode()).decode()}"
    is_md5 = parameters.get("algorithm", "MD5").upper() == "MD5"
    return _digest(parameters, target.user, target) if scheme == "digest" and is_md5 else None


def _digest(parameters: dict[str, str], user: str, target: _Target) -> str:
    realm, nonce = parameters.get("realm", ""), parameters.get("nonce", "")
    secret, request = _md5(f"{user}:{realm}:{target.password}"), _md5(f"{_METHOD}:{target.uri}")
    fields = {"username": user, "realm": realm, "nonce": nonce, "uri": target.uri}
    if "qop" in parameters:
        once = secrets.token_hex(8)
        response = _md5(f"{secret}:{nonce}:00000001:{once}:auth:{request}")
        more = f', response="{response}", qop=auth, nc=00000001, cnonce="{once}"'
    else:
        more = f', response="{_md5(f"{secret}:{nonce}:{request}")}"'
    if "opaque" in parameters:
        more += f', opaque="{parameters["opaque"]}"'
    return "Digest " + ", ".join(f'{key}="{value}"' for key, value in fields.items()) + more


def _md5(text: str) -> str:
    return hashlib.md5(text.encode(), usedforsecurity=False).hexdigest()


def _left(deadline: float) -> float:
    left_s = deadline - time.monotonic()
    if left_s <= 0:
        raise TimeoutError("the camera did not answer in time")
    return left_s
