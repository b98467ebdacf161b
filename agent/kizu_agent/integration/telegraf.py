"""Telegraf: every result, event and state as points in InfluxDB, typed and named after the schemas."""

from kizu_agent.integration.leaves import leaves
from kizu_agent.integration.schemas import schema_of
from kizu_agent.integration.site import Site

_TIMES = {"result": "captured_at", "event": "captured_at", "state": "published_at", "status": "published_at"}
"""Which time of a message is the point's."""
_GO_TIME = "2006-01-02T15:04:05.000Z07:00"
"""How Go writes the form of kizu's times."""
_TAGS = {
    "result": ("agent", "camera", "verdict", "model_name", "model_version"),
    "event": ("agent", "camera", "kind", "model_name", "model_version"),
    "state": ("agent", "camera"),
    "status": ("agent",),
}
"""Few values each: a tag with an id in it would grow InfluxDB's index without end."""
_HEAD = """\
# Telegraf for kizu: results, events and states over MQTT into InfluxDB 2. Made by `kizu-agent integrate telegraf`.
# Objects are flattened with `_` (model.name is model_name); nulls are left out. A result that comes twice has the same
# time and tags and overwrites itself. For TimescaleDB take outputs.postgresql instead of outputs.influxdb_v2.

[[outputs.influxdb_v2]]
  urls = ["${INFLUX_URL}"]
  token = "${INFLUX_TOKEN}"
  organization = "${INFLUX_ORG}"
  bucket = "kizu"
"""


def telegraf_conf(site: Site) -> str:
    """The configuration for `site`: TOML text."""
    return _HEAD + "".join(_input(site, name) for name in _TIMES)


def _input(site: Site, name: str) -> str:
    topic = site.topics.status if name == "status" else f"{site.topics.base}/+/{name}"
    strings = ["_".join(leaf.path) for leaf in leaves(schema_of(name)) if leaf.type in ("string", "boolean")]
    fields = [field for field in strings if field not in (*_TAGS[name], _TIMES[name])]
    scheme = "ssl" if site.has_tls else "tcp"
    return f"""
[[inputs.mqtt_consumer]]
  name_override = "kizu_{name}"
  servers = ["{scheme}://{site.host}:{site.port}"]
  topics = ["{topic}"]
  topic_tag = ""
  qos = 1
  client_id = "telegraf-kizu-{site.topics.agent}-{name}"
  persistent_session = true
  max_undelivered_messages = 1000
  data_format = "json"
  json_time_key = "{_TIMES[name]}"
  json_time_format = "{_GO_TIME}"
  tag_keys = [{_list(_TAGS[name])}]
  json_string_fields = [
{_lines(fields)}  ]
"""


def _list(names: tuple[str, ...]) -> str:
    return ", ".join(f'"{name}"' for name in names)


def _lines(names: list[str]) -> str:
    return "".join(f'    "{name}",\n' for name in names)
