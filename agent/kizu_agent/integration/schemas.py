"""The published JSON Schemas of every message and request, made from the models that write and read them.

Draft 2020-12, as pydantic writes it. A message has every key always (see payloads.py), so all of them are required.
"""

import json
from typing import Any, Literal, NamedTuple

from pydantic import BaseModel

from kizu_agent.answers import (
    Answer,
    InspectAnswer,
    ModelAnswer,
    PauseAnswer,
    PingAnswer,
    ProductAnswer,
    RebirthAnswer,
    SnapshotAnswer,
    StatusAnswer,
    ThresholdsAnswer,
    ZonesAnswer,
)
from kizu_agent.basic_commands import PingRequest, RebirthRequest, StatusRequest
from kizu_agent.inspect_command import InspectRequest
from kizu_agent.model_command import ModelRequest
from kizu_agent.pause_command import PauseRequest
from kizu_agent.payloads import (
    AuditPayload,
    EventPayload,
    ModelReportPayload,
    Payload,
    ProductPayload,
    ResultPayload,
    StatePayload,
    StatusPayload,
)
from kizu_agent.product_command import ProductRequest
from kizu_agent.requests import Request
from kizu_agent.snapshot_command import SnapshotRequest
from kizu_agent.thresholds_command import ThresholdsRequest
from kizu_agent.zones_command import ZonesRequest

DIALECT = "https://json-schema.org/draft/2020-12/schema"


class Published(NamedTuple):
    """One kind of message: its model, and the topic below `<prefix>/<agent>` where it goes."""

    model: type[BaseModel]
    topic: str


MESSAGES = {
    "status": Published(StatusPayload, "status"),
    "model": Published(ModelReportPayload, "model"),
    "product": Published(ProductPayload, "product"),
    "audit": Published(AuditPayload, "audit"),
    "state": Published(StatePayload, "<camera>/state"),
    "result": Published(ResultPayload, "<camera>/result"),
    "event": Published(EventPayload, "<camera>/event"),
    "answer": Published(Answer, "response/<name>"),
    "answer_ping": Published(PingAnswer, "response/ping"),
    "answer_status": Published(StatusAnswer, "response/status"),
    "answer_thresholds": Published(ThresholdsAnswer, "response/thresholds"),
    "answer_model": Published(ModelAnswer, "response/model"),
    "answer_inspect": Published(InspectAnswer, "response/inspect"),
    "answer_product": Published(ProductAnswer, "response/product"),
    "answer_zones": Published(ZonesAnswer, "response/zones"),
    "answer_pause": Published(PauseAnswer, "response/pause, response/resume"),
    "answer_snapshot": Published(SnapshotAnswer, "response/snapshot"),
    "answer_rebirth": Published(RebirthAnswer, "response/rebirth"),
    "request_ping": Published(PingRequest, "cmd/ping"),
    "request_status": Published(StatusRequest, "cmd/status"),
    "request_thresholds": Published(ThresholdsRequest, "cmd/thresholds"),
    "request_model": Published(ModelRequest, "cmd/model"),
    "request_inspect": Published(InspectRequest, "cmd/inspect"),
    "request_product": Published(ProductRequest, "cmd/product"),
    "request_zones": Published(ZonesRequest, "cmd/zones"),
    "request_pause": Published(PauseRequest, "cmd/pause, cmd/resume"),
    "request_snapshot": Published(SnapshotRequest, "cmd/snapshot"),
    "request_rebirth": Published(RebirthRequest, "cmd/rebirth"),
}
"""Everything that goes over MQTT as JSON, by the name of its schema."""


def schema_of(name: str) -> dict[str, Any]:
    """The JSON Schema `name`. Raises KeyError where there is none."""
    published = MESSAGES[name]
    mode: Literal["validation", "serialization"] = (
        "validation" if issubclass(published.model, Request) else "serialization"
    )
    found = published.model.model_json_schema(by_alias=True, mode=mode)
    _tidy(found, all_required=mode == "serialization")
    head = {"$schema": DIALECT, "title": name, "$comment": f"<prefix>/<agent>/{published.topic}"}
    return head | found


def schema_text(name: str) -> str:
    """The JSON Schema `name` as a file holds it."""
    return json.dumps(schema_of(name), indent=2, ensure_ascii=False) + "\n"


def _tidy(schema: dict[str, Any], *, all_required: bool) -> None:
    """Drop titles that only repeat the key, and the models' own names.

    With `all_required` every key of every object is: a default is what is written where nothing is known.
    """
    for part in (schema, *schema.get("$defs", {}).values()):
        part.pop("title", None)
        for member in part.get("properties", {}).values():
            member.pop("title", None)
        if all_required and "properties" in part:
            part["required"] = list(part["properties"])


def all_models() -> set[type[BaseModel]]:
    """Every message and request that the code knows, published or not: what the table must hold."""
    return {
        kind
        for base in (Payload, Request)
        for kind in _below(base)
        if "schema_version" in kind.model_fields or issubclass(kind, Request)
    }


def _below(kind: type[BaseModel]) -> set[type[BaseModel]]:
    return {found for child in kind.__subclasses__() for found in {child} | _below(child)}
