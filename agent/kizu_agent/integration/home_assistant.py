"""Home Assistant: MQTT discovery, so that the agent and its cameras show up by themselves.

Source: Home Assistant's documentation of MQTT discovery, of the sensor, binary sensor and image platforms.
"""

import json
from typing import Any

from kizu_agent.integration.site import Site

DISCOVERY = "homeassistant"
_ONLINE = "{{ 'online' if value_json.state in ['online', 'degraded'] else 'offline' }}"
_VERDICT = "{{ value_json.verdict }}"


def discovery(site: Site, version: str) -> dict[str, str]:
    """Retained messages by topic: a problem sensor for the agent; verdict, ratio and heatmap for each camera."""
    found = {f"{DISCOVERY}/binary_sensor/{_id(site, 'problem')}/config": _problem(site, version)}
    for name, stale_after_s in site.cameras.items():
        found |= {
            f"{DISCOVERY}/sensor/{_id(site, name, 'verdict')}/config": _verdict(site, version, name, stale_after_s),
            f"{DISCOVERY}/sensor/{_id(site, name, 'ratio')}/config": _ratio(site, version, name, stale_after_s),
            f"{DISCOVERY}/image/{_id(site, name, 'heatmap')}/config": _heatmap(site, version, name),
        }
    return {topic: json.dumps(config) for topic, config in found.items()}


def _problem(site: Site, version: str) -> dict[str, Any]:
    return _entity(site, version, "Problem", "problem") | {
        "state_topic": site.topics.status,
        "value_template": "{{ 'OFF' if value_json.state == 'online' else 'ON' }}",
        "device_class": "problem",
        "json_attributes_topic": site.topics.status,
    }


def _verdict(site: Site, version: str, camera: str, stale_after_s: float) -> dict[str, Any]:
    return _entity(site, version, f"{camera} verdict", camera, "verdict") | {
        "state_topic": site.topics.state(camera),
        "value_template": _VERDICT,
        "json_attributes_topic": site.topics.state(camera),
        "device_class": "enum",
        "options": ["ok", "warn", "reject", "unknown"],
        # A verdict that is not renewed is not shown: a stale ok is none.
        "expire_after": max(1, round(stale_after_s + 1)),
    }


def _ratio(site: Site, version: str, camera: str, stale_after_s: float) -> dict[str, Any]:
    return _entity(site, version, f"{camera} ratio", camera, "ratio") | {
        "state_topic": site.topics.state(camera),
        "value_template": "{{ value_json.ratio }}",
        "state_class": "measurement",
        "expire_after": max(1, round(stale_after_s + 1)),
    }


def _heatmap(site: Site, version: str, camera: str) -> dict[str, Any]:
    return _entity(site, version, f"{camera} heatmap", camera, "heatmap") | {
        "image_topic": site.topics.heatmap(camera),
        "content_type": "image/jpeg",
    }


def _entity(site: Site, version: str, name: str, *parts: str) -> dict[str, Any]:
    """What every entity has: its name and id, the device it belongs to, and when it is there at all."""
    device = {
        "identifiers": [_id(site)],
        "name": f"kizu {site.topics.agent}",
        "manufacturer": "kizu",
        "sw_version": version,
    }
    return {
        "name": name,
        "unique_id": _id(site, *parts),
        "device": device,
        "availability": [{"topic": site.topics.status, "value_template": _ONLINE}],
    }


def _id(site: Site, *parts: str) -> str:
    return "_".join(["kizu", *site.topics.base.split("/"), *parts])
