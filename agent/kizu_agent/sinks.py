"""Where results, events, states and the status go: the seam between what the agent knows and how a plant hears of it.

Delivery and the state board know no protocol; each protocol is a sink: JSON topics here, Sparkplug B in `sparkplug/`.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from kizu_agent.config import Config
from kizu_agent.encoding import to_bytes
from kizu_agent.held import Outcome, Thumbnail
from kizu_agent.outbox_transaction import Transaction
from kizu_agent.payloads import EventPayload, ResultPayload, StatePayload, StatusPayload
from kizu_agent.records import Message, Priority
from kizu_agent.topics import Topics

PublishRetained = Callable[[str, bytes], None]
"""Takes topic and payload, and does not wait."""


@dataclass(frozen=True)
class Numbered:
    """A frame's outcome with its numbers, on its way to the disk; `priority` is the result's."""

    result: ResultPayload
    event: EventPayload | None
    thumbnail: Thumbnail | None
    priority: Priority

    @classmethod
    def of(cls, outcome: Outcome, transaction: Transaction) -> "Numbered":
        """Give `outcome` the next numbers of its camera."""
        camera = outcome.result.camera
        seq = transaction.next_seq(camera)
        event = outcome.event
        if event is not None:
            # Events have numbers of their own: a subscriber of one topic can see its gaps.
            numbers = {"seq": transaction.next_seq(f"{camera}/event"), "result_seq": seq}
            event = event.model_copy(update=numbers)
        return cls(outcome.result.model_copy(update={"seq": seq}), event, outcome.thumbnail, outcome.priority)


class Sink(Protocol):
    """One way to tell the plant. All but `commit` come from any thread and must not wait."""

    def commit(self, numbered: Numbered, transaction: Transaction) -> None:
        """Make `numbered` durable, within the outbox's `transaction` or in a store of its own.

        Raises OutboxError: then nothing of it is committed anywhere that counts, and it comes again.
        """

    def state(self, state: StatePayload) -> None:
        """Tell what holds now for a camera."""

    def status(self, status: StatusPayload) -> None:
        """Tell how the agent is."""

    def wake(self) -> None:
        """Hear that something was committed."""


class JsonSink:
    """The JSON topics: durable messages into the outbox, states and status retained by way of `publish`."""

    def __init__(self, config: Config, publish: PublishRetained, wake: Callable[[], None] = lambda: None) -> None:
        self._topics = Topics(config.agent.prefix, config.agent.name)
        self._heatmap_expiry_s = config.mqtt.heatmap_expiry_s
        self._heatmaps = {camera.name: camera.heatmap for camera in config.cameras}
        self._publish, self._wake = publish, wake

    def commit(self, numbered: Numbered, transaction: Transaction) -> None:
        """Put event, result and heatmap into `transaction`."""
        camera, topics = numbered.result.camera, self._topics
        if numbered.event is not None:
            event = to_bytes(numbered.event)
            transaction.put([Message(topics.event(camera), event, priority=Priority.EVENT)])
        result = to_bytes(numbered.result)
        transaction.put([Message(topics.result(camera), result, priority=numbered.priority)])
        if numbered.thumbnail is not None:
            transaction.put([self._heatmap(numbered.thumbnail, camera, numbered.result.heatmap.content_type)])

    def state(self, state: StatePayload) -> None:
        """Publish `state` retained."""
        self._publish(self._topics.state(state.camera), to_bytes(state))

    def status(self, status: StatusPayload) -> None:
        """Publish `status` retained."""
        self._publish(self._topics.status, to_bytes(status))

    def wake(self) -> None:
        """Wake the publisher."""
        self._wake()

    def _heatmap(self, thumbnail: Thumbnail, camera: str, content_type: str | None) -> Message:
        return Message(
            self._topics.heatmap(camera),
            thumbnail.jpeg,
            qos=self._heatmaps[camera].qos,
            content_type=content_type or "",
            expiry_s=self._heatmap_expiry_s,
            priority=Priority.HEATMAP,
        )
