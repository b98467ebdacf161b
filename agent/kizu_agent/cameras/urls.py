"""Camera URLs: strict reading of their settings, and hiding what must not be logged."""

import re
from collections.abc import Callable, Mapping
from typing import Any, TypeVar
from urllib.parse import parse_qsl, unquote

from kizu_agent.errors import CameraError

T = TypeVar("T")

# A password may hold "/", "@" and blanks unescaped, so everything up to the last "@" goes, the host's path included;
# and somebody may have forgotten the slashes.
_USER_INFO = re.compile(r"(?:(?<=://)|(?<=\brtsp:)(?!//)|(?<=\brtsps:)(?!//))[^\n]*@")
_SECRET_VALUE = re.compile(r"((?:user(?:name)?|usr|pass(?:word|wd)?|pwd|token|auth)=)[^&_\s]+", re.IGNORECASE)


def redact(text: str) -> str:
    """Return `text` with the user names and passwords of URLs in it replaced by `***`."""
    return _SECRET_VALUE.sub(r"\1***", _USER_INFO.sub("***@", text))


def secrets_of(url: str) -> set[str]:
    """Give what `redact` would hide of `url`, as it stands there and decoded: user info, password, values."""
    found = {match[0][:-1] for match in _USER_INFO.finditer(url)}
    found |= {info.partition(":")[2] for info in found}
    found |= {match[0].partition("=")[2] for match in _SECRET_VALUE.finditer(url)}
    return {text for secret in found if secret for text in (secret, unquote(secret))}


def invalid(url: str, problem: str) -> CameraError:
    """Make the CameraError (cause `invalid`) that names the URL and what is wrong with it."""
    return CameraError("invalid", f"{redact(url)}: {problem}")


def split_url(url: str, known: Mapping[str, Callable[[str], Any]]) -> tuple[str, dict[str, Any]]:
    """Split `scheme:rest?key=value&…` into the percent-decoded rest and its parsed settings.

    `known` maps each allowed key to its parser, which raises ValueError with what it wants. Raises CameraError that
    lists the known keys at an unknown one, and at a key given twice or a value that cannot be parsed.
    """
    rest, _, query = url.partition(":")[2].partition("?")
    settings: dict[str, Any] = {}
    for key, value in parse_qsl(query, keep_blank_values=True):
        if key not in known:
            raise invalid(url, f"unknown setting {key!r}; known are {', '.join(sorted(known))}")
        if key in settings:
            raise invalid(url, f"setting {key!r} is given twice")
        try:
            settings[key] = known[key](value)
        except ValueError as exc:
            raise invalid(url, f"{key}={value}: {exc}") from exc
    return unquote(rest), settings


def boolean(text: str) -> bool:
    """Parse `true` or `false`."""
    if text not in ("true", "false"):
        raise ValueError("must be true or false")
    return text == "true"


def whole(low: int, high: int) -> Callable[[str], int]:
    """Make a parser of whole numbers from `low` to `high`."""

    def parse(text: str) -> int:
        if not re.fullmatch(r"\d{1,18}", text, re.ASCII) or not low <= int(text) <= high:
            raise ValueError(f"must be a whole number from {low} to {high}")
        return int(text)

    return parse


def number(low: float, high: float) -> Callable[[str], float]:
    """Make a parser of decimal numbers from `low` to `high`."""

    def parse(text: str) -> float:
        if not re.fullmatch(r"\d{0,12}\.?\d{0,12}", text, re.ASCII) or text in ("", "."):
            raise ValueError(f"must be a number from {low:g} to {high:g}")
        if not low <= float(text) <= high:
            raise ValueError(f"must lie between {low:g} and {high:g}")
        return float(text)

    return parse


def choice(options: Mapping[str, T]) -> Callable[[str], T]:
    """Make a parser of names that gives what each name stands for."""

    def parse(text: str) -> T:
        if text not in options:
            raise ValueError(f"must be one of {', '.join(sorted(options))}")
        return options[text]

    return parse
