"""Keeps secrets out of what others may read: log lines, and the environment of child processes."""

import json
import os
from typing import Any
from urllib.parse import quote

MIN_SECRET = 4
"""Shorter secrets are not looked for: every other word would be blackened."""
MASK = "***"


class Redactor:
    """Masks every secret that it was told of, however it is written; safe to use from any thread."""

    def __init__(self) -> None:
        self._texts: tuple[str, ...] = ()

    def hide(self, *secrets: str) -> None:
        """Mask `secrets` from now on: as they are, as JSON writes them, and as a URL does."""
        wanted = [secret for secret in secrets if len(secret) >= MIN_SECRET]
        forms = {form for text in wanted for form in (text, json.dumps(text)[1:-1], quote(text, safe=""))}
        # The longest first: one secret may begin with another.
        self._texts = tuple(sorted({*self._texts, *forms}, key=len, reverse=True))

    def clean(self, text: str) -> str:
        """Give `text` with every secret in it masked."""
        for secret in self._texts:
            text = text.replace(secret, MASK)
        return text

    def __call__(self, _logger: object, _method: str, line: Any) -> str:
        """Clean a rendered log line; the last of structlog's processors."""
        return self.clean(line)


REDACTOR = Redactor()
"""The process's own, as its log is."""


def inherited_environment() -> dict[str, str]:
    """The environment for child processes: without the configuration, whose secrets they do not need."""
    return {
        name: value
        for name, value in os.environ.items()
        if name != "CREDENTIALS_DIRECTORY" and not name.upper().startswith("KIZU_")
    }
