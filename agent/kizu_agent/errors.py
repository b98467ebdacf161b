"""The agent's errors: a class exists only where the reaction differs.

AgentError
├── ConfigError     cannot start (exit 3); all problems in one message
├── EngineError     the graph cannot be loaded or run
├── ModelError      a model is not taken into service; the old one goes on
├── CameraError     a camera cannot be opened or was lost: reconnect
│   └── CameraEnded     a file or folder is through: do not reconnect
├── OutboxError     a commit did not happen: nothing of it was kept; `cause` decides whether to try again
└── CommandError    a command is refused; the answer says why
"""

from collections.abc import Iterable

from kizu_contract.errors import KizuError


class AgentError(KizuError):
    """Base of everything the agent raises on purpose."""


class ConfigError(AgentError):
    """The configuration cannot be used; the message lists every problem found."""


class EngineError(AgentError):
    """The scorer graph cannot be loaded or run here."""


class ModelError(AgentError):
    """A model is refused; the one in service stays."""


class CameraError(AgentError):
    """A camera cannot be opened or was lost. `cause` is a short stable word for counters, e.g. `unreachable`."""

    def __init__(self, cause: str, message: str) -> None:
        super().__init__(message)
        self.cause = cause


class CameraEnded(CameraError):  # noqa: N818 - an end is no error, yet it leaves `read` the same way
    """A file or folder has no more pictures."""

    def __init__(self, message: str) -> None:
        super().__init__("ended", message)


class OutboxError(AgentError):
    """The outbox could not commit, and kept nothing of that transaction.

    `cause`: `disk_full` (room must come first), `corrupt` (a fresh database is ready, the same transaction can be
    run again), `io` (anything else the disk or the database refused) or `closed`.
    """

    def __init__(self, cause: str, message: str) -> None:
        super().__init__(message)
        self.cause = cause


class CommandError(AgentError):
    """A command is refused. `code` is a short stable word, e.g. `invalid`."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code


def unknown_camera(name: str, known: Iterable[str]) -> CommandError:
    """The refusal of a command for a camera `name` that is not among the `known` ones."""
    return CommandError("unknown_camera", f"there is no camera {name[:64]!r}; there are {', '.join(known)}")
