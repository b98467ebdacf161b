"""What a camera says about why it cannot be opened."""

import hashlib
import re
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress

import pytest

from kizu_agent.cameras.registry import open_camera
from kizu_agent.cameras.rtsp_probe import describe_status
from kizu_agent.errors import CameraError

BASIC = "Basic realm=x"
DIGEST = 'Digest realm="a, b", nonce="n1", algorithm=MD5'
DIGEST_QOP = 'Digest realm="a", nonce="n1", qop="auth", opaque="o"'


class Speaker:
    """Answers RTSP requests one after the other, and keeps them."""

    def __init__(self, answer: Callable[[str], bytes]) -> None:
        self.requests: list[str] = []
        self._answer = answer
        self._listening = socket.create_server(("127.0.0.1", 0))
        self.port = self._listening.getsockname()[1]
        self._thread = threading.Thread(target=self._serve)
        self._thread.start()

    def close(self) -> None:
        with suppress(OSError):
            self._listening.shutdown(socket.SHUT_RDWR)
        self._listening.close()
        self._thread.join(5)

    def _serve(self) -> None:
        with suppress(OSError):
            while True:
                link, _ = self._listening.accept()
                with link, suppress(OSError):
                    link.settimeout(5)
                    while request := link.recv(4096).decode():
                        self.requests.append(request)
                        link.sendall(self._answer(request))


@pytest.fixture
def speaker() -> Iterator[Callable[..., Speaker]]:
    speakers: list[Speaker] = []

    def start(answer: Callable[[str], bytes]) -> Speaker:
        speakers.append(Speaker(answer))
        return speakers[-1]

    yield start
    for each in speakers:
        each.close()


def status(code: int, *headers: str) -> bytes:
    return "\r\n".join([f"RTSP/1.0 {code} Whatever", "CSeq: 1", *headers, "", ""]).encode()


def md5(text: str) -> str:
    return hashlib.md5(text.encode(), usedforsecurity=False).hexdigest()


def guard(challenge: str, user: str, password: str) -> Callable[[str], bytes]:
    """Answer 200 to whoever proves, as the RFC says, to know user and password, else 401 with `challenge`."""

    def answer(request: str) -> bytes:
        found = re.search(r"^Authorization: (.*?)\r$", request, re.MULTILINE)
        is_known = found is not None and _is_proof(found[1], request.split()[1], user, password)
        return status(200) if is_known else status(401, f"WWW-Authenticate: {challenge}")

    return answer


def _is_proof(said: str, uri: str, user: str, password: str) -> bool:
    if said.startswith("Basic"):
        return said == {"admin:pass word": "Basic YWRtaW46cGFzcyB3b3Jk"}.get(f"{user}:{password}")
    fields = dict(re.findall(r'(\w+)="?([^",]*)"?', said.replace("a, b", "a; b")))
    realm = fields["realm"].replace(";", ",")
    secret, request = md5(f"{user}:{realm}:{password}"), md5(f"DESCRIBE:{uri}")
    middle = f"{fields['nonce']}:{fields['nc']}:{fields['cnonce']}:auth" if "qop" in fields else fields["nonce"]
    return (
        fields["username"] == user
        and fields["uri"] == uri
        and fields["response"] == md5(f"{secret}:{middle}:{request}")
    )


@pytest.mark.parametrize("challenge", [BASIC, DIGEST, DIGEST_QOP])
def test_user_and_password_are_tried(speaker: Callable[..., Speaker], challenge: str) -> None:
    """Asked for them, user and password of the URL are given once, in the scheme that the camera wants."""
    camera = speaker(guard(challenge, "admin", "pass word"))
    assert describe_status(f"rtsp://admin:pass%20word@127.0.0.1:{camera.port}/live?a=b") == 200
    assert len(camera.requests) == 2
    assert camera.requests[0].startswith(f"DESCRIBE rtsp://127.0.0.1:{camera.port}/live?a=b RTSP/1.0\r\n")
    assert describe_status(f"rtsp://admin:wrong@127.0.0.1:{camera.port}/live") == 401
    assert len(camera.requests) == 4
    assert describe_status(f"rtsp://127.0.0.1:{camera.port}/live") == 401
    assert len(camera.requests) == 5


def test_scheme_that_is_unknown_says_nothing(speaker: Callable[..., Speaker]) -> None:
    """Where FFmpeg might know more than we do, user and password are not called wrong."""
    camera = speaker(guard('Digest realm="a", nonce="n", algorithm=SHA-256', "admin", "x"))
    assert describe_status(f"rtsp://admin:x@127.0.0.1:{camera.port}/live") is None


@pytest.mark.parametrize(
    ("code", "cause"), [(401, "unauthorised"), (403, "unauthorised"), (404, "not_found"), (453, "unreachable")]
)
def test_camera_that_refuses_is_named(speaker: Callable[..., Speaker], code: int, cause: str) -> None:
    """A camera that cannot be opened is lost for what it says itself."""
    camera = speaker(lambda _: status(code, *([f"WWW-Authenticate: {BASIC}"] if code == 401 else [])))
    with pytest.raises(CameraError, match=str(code)) as caught:
        open_camera(f"rtsp://u:hush@127.0.0.1:{camera.port}/live", 5, 1).open()
    assert caught.value.cause == cause
    assert "hush" not in str(caught.value)


@pytest.mark.parametrize("answer", [b"HTTP/1.1 200 OK\r\n\r\n", b"\xff\r\n\r\n", b"RTSP/1.0 x\r\n\r\n"])
def test_whatever_else_answers_is_no_status(speaker: Callable[..., Speaker], answer: bytes) -> None:
    """What does not speak RTSP has no status."""
    camera = speaker(lambda _: answer)
    assert describe_status(f"rtsp://127.0.0.1:{camera.port}/live") is None


def test_nobody_there_and_silence_are_no_status() -> None:
    """Nobody there, a port that makes no sense, and a camera that says nothing are known within the limit."""
    began = time.monotonic()
    assert describe_status("rtsp://127.0.0.1:1/live") is None
    assert describe_status("rtsp://127.0.0.1:x/live") is None
    with socket.create_server(("127.0.0.1", 0)) as silent:
        assert describe_status(f"rtsp://127.0.0.1:{silent.getsockname()[1]}/live", 0.3) is None
    assert time.monotonic() - began < 3
