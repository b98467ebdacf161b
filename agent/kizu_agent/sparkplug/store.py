"""Results on their way to a Sparkplug host, on disk until the broker has read them (docs/decisions/0019)."""

from collections.abc import Collection, Sequence
from pathlib import Path

import structlog

from kizu_agent.config import Config
from kizu_agent.errors import AgentError, OutboxError
from kizu_agent.outbox import Backlog, Outbox, Stored
from kizu_agent.outbox_transaction import Losses
from kizu_agent.records import Message, Priority
from kizu_agent.settings import OutboxConfig
from kizu_agent.sparkplug.payload import Metric, encode
from kizu_agent.sparkplug.settings import SparkplugConfig

log = structlog.get_logger(__name__)

FILE_NAME = "sparkplug.sqlite3"
_BD_SEQ = "bdSeq"
_MODULUS = 256


class Store:
    """An outbox of its own, in the order of commits; a row's topic is the device, its payload metrics without seq.

    Any thread may use it. Raises OutboxError as the outbox does.
    """

    def __init__(self, state_dir: Path, config: SparkplugConfig, outbox: OutboxConfig) -> None:
        caps = {"max_bytes": config.history_max_bytes, "max_age_s": config.history_max_age_s}
        self._outbox = Outbox(state_dir / FILE_NAME, outbox.model_copy(update=caps), is_by_priority=False)
        self._last_bd_seq = -1

    def put(self, device: str, rows: Sequence[tuple[Sequence[Metric], Priority, int | None]]) -> None:
        """Commit metrics of `device`, in one transaction; each with its priority and the seconds it may wait."""
        self._outbox.put(
            [
                Message(device, encode(metrics, None, None), 0, expiry_s=expiry_s, priority=priority)
                for metrics, priority, expiry_s in rows
            ]
        )

    def next_bd_seq(self) -> int:
        """The number for the next CONNECT, 0 to 255, on disk before it is used; without a disk, the next all the same.

        It goes on over restarts: the specification ties it to the CONNECT before, and a host that still has our last
        NBIRTH would take the will of a new session for the old one's.
        """
        try:
            with self._outbox.transaction() as transaction:
                number = transaction.next_seq(_BD_SEQ) - 1
            self._outbox.sync()
        except OutboxError as exc:
            log.warning("bdSeq is not kept: the disk refuses", error=str(exc))
            number = self._last_bd_seq + 1
        self._last_bd_seq = number
        return number % _MODULUS

    def take(self, limit: int, backlog: Backlog | None, devices: Collection[str]) -> list[Stored]:
        """Lend the next rows of `devices`."""
        return self._outbox.take(limit, backlog, devices)

    def delete(self, ids: Sequence[int]) -> None:
        """The broker has read these."""
        self._outbox.delete(ids)

    def refuse(self, row: Stored, reason: str) -> None:
        """It can never be sent."""
        self._outbox.refuse(row, reason)

    def release(self) -> None:
        """Take back what was lent."""
        self._outbox.release()

    def sync(self) -> None:
        """Bring what was committed onto the disk; never raises."""
        self._outbox.sync()

    def close(self) -> None:
        """Close the file; idempotent."""
        self._outbox.close()

    @property
    def last_id(self) -> int:
        """Id of the row committed last."""
        return self._outbox.last_id

    @property
    def problem(self) -> str | None:
        """What is wrong with the disk, None where nothing is."""
        return self._outbox.sync_problem

    def depth(self) -> int:
        """Rows that wait or are on their way."""
        return self._outbox.depth()

    def losses(self) -> Losses:
        """What was given up, by cause and kind."""
        return self._outbox.losses()


def open_store(config: Config) -> Store:
    """Open the store in the state directory. Raises AgentError as for the outbox."""
    try:
        return Store(config.agent.state_dir, config.sparkplug, config.outbox)
    except OutboxError as exc:
        raise AgentError(f"{exc}; is another agent running with this agent.state_dir?") from exc
