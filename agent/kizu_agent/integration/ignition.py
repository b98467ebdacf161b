"""Ignition: a tag import (JSON) on top of the tags that MQTT Engine makes of kizu's JSON.

MQTT Engine makes a tag of every topic level and JSON key in its own provider. The import gives them a place among the
plant's tags, with types, and adds `VerdictNow` to each camera, which is never a stale `ok`.
"""

import json
from typing import Any

from kizu_agent.integration.leaves import Leaf, LeafType, leaves
from kizu_agent.integration.schemas import schema_of
from kizu_agent.integration.site import Site

ENGINE = "[MQTT Engine]"
"""The tag provider of MQTT Engine; Cirrus Link's documentation, custom namespaces with JSON."""
_DATA_TYPES: dict[LeafType, str] = {"string": "String", "integer": "Int8", "number": "Float8", "boolean": "Boolean"}
"""Ignition's Int8 is an integer of eight bytes."""
_GRACE_S = 1.0
"""A state that holds is sent anew at least once a second."""


def ignition_tags(site: Site) -> str:
    """The tag import for `site`: JSON text, one folder for the agent."""
    base = f"{ENGINE}{site.topics.base}"
    status = _folder("status", _references(f"{base}/status", leaves(schema_of("status"))))
    cameras = [_camera(f"{base}/{name}", name, stale_after_s) for name, stale_after_s in site.cameras.items()]
    return json.dumps(_folder(site.topics.agent, [status, *cameras]), indent=2) + "\n"


def _camera(base: str, name: str, stale_after_s: float) -> dict[str, Any]:
    state = _folder("state", _references(f"{base}/state", leaves(schema_of("state"))))
    return _folder(name, [state, _verdict_now(stale_after_s)])


def _verdict_now(stale_after_s: float) -> dict[str, Any]:
    """The verdict that may be shown: what is heard of agent and camera is fresh by this gateway's own clock."""
    fresh_s = max(1, round(stale_after_s + _GRACE_S))
    expression = (
        'if(({[.]../status/state} = "online" || {[.]../status/state} = "degraded")'
        f" && secondsBetween({{[.]state/published_at.Timestamp}}, now(1000)) <= {fresh_s}"
        ' && isGood({[.]state/verdict}), {[.]state/verdict}, "unknown")'
    )
    alarms = [_alarm("Reject", "High", "reject"), _alarm("Unknown", "Medium", "unknown")]
    tag = {"name": "VerdictNow", "tagType": "AtomicTag", "valueSource": "expr", "dataType": "String"}
    return tag | {"expression": expression, "alarms": alarms}


def _alarm(name: str, priority: str, verdict: str) -> dict[str, Any]:
    active = {"bindType": "Expression", "value": f'{{[.]VerdictNow}} = "{verdict}"'}
    return {
        "name": name,
        "mode": "OnCondition",
        "priority": priority,
        "activeCondition": active,
    }


def _references(base: str, found: list[Leaf]) -> list[dict[str, Any]]:
    """Reference tags for `found`, in folders as the JSON nests."""
    tags: list[dict[str, Any]] = []
    for leaf in found:
        here = tags
        for level in leaf.path[:-1]:
            here = _folder_in(here, level)
        here.append(
            {
                "name": leaf.path[-1],
                "tagType": "AtomicTag",
                "valueSource": "reference",
                "dataType": _DATA_TYPES[leaf.type],
                "sourceTagPath": f"{base}/{'/'.join(leaf.path)}",
            }
        )
    return tags


def _folder_in(tags: list[dict[str, Any]], name: str) -> list[dict[str, Any]]:
    for tag in tags:
        if tag["name"] == name:
            inside: list[dict[str, Any]] = tag["tags"]
            return inside
    tags.append(_folder(name, []))
    return _folder_in(tags, name)


def _folder(name: str, tags: list[dict[str, Any]]) -> dict[str, Any]:
    return {"name": name, "tagType": "Folder", "tags": tags}
