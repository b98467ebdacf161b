"""One Sparkplug session: births first, one sequence, and only what has changed."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace

from kizu_agent.records import Message
from kizu_agent.sparkplug.ids import EdgeNode
from kizu_agent.sparkplug.metrics import BD_SEQ, REBIRTH, Values, now_ms
from kizu_agent.sparkplug.payload import DataType, Metric, encode

CONTENT_TYPE = "application/x-protobuf"

Send = Callable[[Message], bool]
"""Hands a message to the connection; tells whether it can carry it."""


def death(node: EdgeNode, bd_seq: int) -> Message:
    """The NDEATH that belongs to the births with `bd_seq`: will, and last word of an orderly end; without seq."""
    now = now_ms()
    metric = Metric(BD_SEQ, DataType.INT64, bd_seq, now)
    return Message(node.topic("NDEATH"), encode([metric], now, None), 1, content_type=CONTENT_TYPE)


class Session:
    """From an NBIRTH on; a rebirth goes on with the same `bd_seq`. Used by one thread.

    `node_values` and `device_values` are what hosts were told; they are the caller's, for they outlive the session.
    """

    def __init__(
        self,
        node: EdgeNode,
        bd_seq: int,
        send: Send,
        has_datatypes: bool,
        node_values: Values,
        device_values: dict[str, Values],
    ) -> None:
        self._node, self._bd_seq, self._send = node, bd_seq, send
        self._has_datatypes = has_datatypes
        self._node_values, self._device_values = node_values, device_values
        self._seq = 0
        self.devices: set[str] = set()
        """Devices that are born and not dead."""

    def begin(self, devices: Iterable[str]) -> None:
        """Send NBIRTH and at once the DBIRTH of each of `devices`, with all current values."""
        self._seq = 0
        self.devices.clear()
        now = now_ms()
        own = [
            Metric(BD_SEQ, DataType.INT64, self._bd_seq, now),
            Metric(REBIRTH, DataType.BOOLEAN, value=False, timestamp_ms=now),
        ]
        self._publish(self._node.topic("NBIRTH"), [*own, *self._node_values.values()], has_datatypes=True)
        for device in devices:
            self.birth(device)

    def birth(self, device: str) -> None:
        """Send a DBIRTH: the device is there, or there again."""
        topic = self._node.device_topic("DBIRTH", device)
        self._publish(topic, list(self._device_values[device].values()), has_datatypes=True)
        self.devices.add(device)

    def death(self, device: str) -> None:
        """Send a DDEATH: the device is lost."""
        self._publish(self._node.device_topic("DDEATH", device), [], has_datatypes=True)
        self.devices.discard(device)

    def node_data(self, metrics: Iterable[Metric]) -> None:
        """Send what has changed of the node."""
        if changed := _update(self._node_values, metrics):
            self._publish(self._node.topic("NDATA"), changed, self._has_datatypes)

    def device_data(self, device: str, metrics: Iterable[Metric]) -> bool:
        """Send what has changed of a device that is born; False: a message that the connection cannot carry."""
        changed = _update(self._device_values[device], metrics)
        return not changed or self.device_answer(device, changed)

    def device_answer(self, device: str, metrics: Sequence[Metric]) -> bool:
        """Send `metrics` whether or not they have changed, so that who wrote them sees what holds."""
        _update(self._device_values[device], metrics)
        return self._publish(self._node.device_topic("DDATA", device), metrics, self._has_datatypes)

    def device_history(self, device: str, metrics: Iterable[Metric]) -> bool:
        """Send what is not current any more; False as in `device_data`."""
        late = [replace(metric, is_historical=True) for metric in metrics]
        return self._publish(self._node.device_topic("DDATA", device), late, self._has_datatypes)

    def _publish(self, topic: str, metrics: Sequence[Metric], has_datatypes: bool) -> bool:
        payload = encode(metrics, now_ms(), self._seq, has_datatypes)
        if not self._send(Message(topic, payload, 0, content_type=CONTENT_TYPE)):
            return False
        self._seq = (self._seq + 1) % 256
        return True


def _update(values: Values, metrics: Iterable[Metric]) -> list[Metric]:
    """Take over `metrics`; those whose value has changed (report by exception)."""
    changed = [metric for metric in metrics if metric.value != values[metric.name].value]
    # Pictures are no state: in births they would make every session begin with them, and a broker that takes none that
    # large would never see one.
    values.update({metric.name: metric for metric in changed if metric.datatype is not DataType.BYTES})
    return changed
