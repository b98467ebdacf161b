"""Whether the primary host application is there, as its retained STATE says."""

import json
from typing import Any

import structlog

log = structlog.get_logger(__name__)


class PrimaryHost:
    """Reads STATE messages of `host_id`; used by one thread. Without one (None) it is always online.

    A message older than the one before is ignored: a will that comes late must not undo a newer birth
    (message-flow-edge-node-birth-publish-phid-wait-timestamp, -phid-offline).
    """

    def __init__(self, host_id: str | None) -> None:
        self._host_id = host_id
        self._timestamp_ms: int | None = None
        self._told: set[str] = set()
        self.is_online = host_id is None

    def disconnected(self) -> None:
        """Forget whether it is online: the next connection tells. The age of its last word is not forgotten."""
        self.is_online = self._host_id is None

    def hear(self, payload: bytes) -> None:
        """Take a STATE message."""
        found = _parse(payload)
        if found is None:
            self._tell_once("STATE ignored: not the JSON of Sparkplug 3.0; hosts of 2.2 say ONLINE or OFFLINE", payload)
            return
        is_online, timestamp_ms = found
        if self._timestamp_ms is not None and timestamp_ms < self._timestamp_ms:
            self._tell_once("STATE ignored: older than the one before; did the host's clock go back?", payload)
            return
        self._timestamp_ms = timestamp_ms
        if is_online != self.is_online:
            log.info("primary host is online" if is_online else "primary host is offline", host=self._host_id)
        self.is_online = is_online

    def _tell_once(self, event: str, payload: bytes) -> None:
        if event not in self._told:
            self._told.add(event)
            log.warning(event, host=self._host_id, payload=payload[:80].decode(errors="replace"))


def _parse(payload: bytes) -> tuple[bool, int] | None:
    """Online and timestamp in ms; None where the payload is not what the specification says."""
    try:
        state: Any = json.loads(payload)
    except (ValueError, RecursionError):
        return None
    if not isinstance(state, dict):
        return None
    is_online, timestamp_ms = state.get("online"), state.get("timestamp")
    if not isinstance(is_online, bool) or not isinstance(timestamp_ms, int) or isinstance(timestamp_ms, bool):
        return None
    return is_online, timestamp_ms
