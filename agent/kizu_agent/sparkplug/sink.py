"""What the node shall tell, collected from the threads that know it."""

import threading
from collections.abc import Callable, Mapping

from kizu_agent.config import Config
from kizu_agent.outbox_transaction import Transaction
from kizu_agent.payloads import StatePayload, StatusPayload
from kizu_agent.records import Priority
from kizu_agent.sinks import Numbered
from kizu_agent.sparkplug.metrics import of_image, of_result
from kizu_agent.sparkplug.payload import Metric
from kizu_agent.sparkplug.store import Store


class SparkplugSink:
    """Commits results to the node's store and keeps the latest of everything for births.

    Results are committed inside the outbox's transaction, before it: a process that dies between the two has a result
    too many in the store, never one too few.
    """

    def __init__(self, config: Config, store: Store, wake: Callable[[], None]) -> None:
        self._has_images = config.sparkplug.images
        self._expiry_s = config.mqtt.heatmap_expiry_s
        self._store = store
        self._wake = wake
        self._committing = threading.Lock()
        self._lock = threading.Lock()
        self._latest: dict[str, list[Metric]] = {}
        self._states: dict[str, StatePayload] = {}
        self._status: StatusPayload | None = None

    def commit(self, numbered: Numbered, transaction: Transaction) -> None:
        """Make result, event and, where asked for, heatmap durable. Raises OutboxError."""
        del transaction  # the store is a file of its own
        result, metrics = numbered.result, of_result(numbered.result, numbered.event)
        # As the outbox does: what belongs to an event must outlive ok results, and be on the disk at once.
        priority = numbered.priority if numbered.event is None else Priority.EVENT
        rows: list[tuple[list[Metric], Priority, int | None]] = [(metrics, priority, None)]
        if self._has_images and numbered.thumbnail is not None:
            rows.append((of_image(result, numbered.thumbnail.jpeg), Priority.HEATMAP, self._expiry_s))
        with self._committing:
            self._store.put(result.camera, rows)
            self._latest[result.camera] = metrics

    def state(self, state: StatePayload) -> None:
        """Keep the camera's state."""
        with self._lock:
            self._states[state.camera] = state
        self._wake()

    def status(self, status: StatusPayload) -> None:
        """Keep the agent's status."""
        with self._lock:
            self._status = status
        self._wake()

    def wake(self) -> None:
        """Wake the node."""
        self._wake()

    def latest(self) -> tuple[int, Mapping[str, list[Metric]]]:
        """The newest row's id and the last result of each camera, which is in no row after it."""
        with self._committing:
            return self._store.last_id, dict(self._latest)

    def states(self) -> tuple[dict[str, StatePayload], StatusPayload | None]:
        """The last states and the last status."""
        with self._lock:
            return dict(self._states), self._status
