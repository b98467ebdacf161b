"""Node-RED: a flow that takes everything an agent says, shows no stale ok, and sends commands.

Nodes of Node-RED's core alone. Source for their members: Node-RED's documentation and the JSON that its editor exports.
"""

import json
from importlib.resources import files
from typing import Any

from kizu_agent.integration.site import Site

_TAB, _BROKER = "kizu_tab", "kizu_broker"
_COLUMNS = (160, 400, 640, 880)
_ROW = 60


class _Flow:
    """Nodes laid out in rows, one after the other."""

    def __init__(self) -> None:
        self.nodes: list[dict[str, Any]] = []
        self._row = 0

    def add(self, ident: str, kind: str, column: int, wires: list[str], **members: Any) -> None:
        place = {"x": _COLUMNS[column], "y": _ROW * (self._row + 1)}
        self.nodes.append({"id": ident, "type": kind, "z": _TAB, **place, "wires": [wires] if wires else [], **members})

    def next_row(self) -> None:
        self._row += 1


def node_red_flow(site: Site) -> str:
    """The flow for `site`: JSON text for Node-RED's import."""
    flow = _Flow()
    _verdicts(flow, site)
    for name in ("result", "event"):
        _messages(flow, f"{site.topics.base}/+/{name}", name)
    _messages(flow, site.topics.model, "model")
    _heatmaps(flow, site)
    _command(flow, site, "ping", {})
    for camera in site.cameras:
        _command(flow, site, "thresholds", {"action": "get", "camera": camera})
    flow.next_row()
    _messages(flow, site.topics.response("+"), "answer")
    tab = {"id": _TAB, "type": "tab", "label": f"kizu {site.topics.agent}", "disabled": False, "info": _INFO}
    return json.dumps([tab, _broker(site), *flow.nodes], indent=2) + "\n"


_INFO = (
    "What a kizu agent says, and commands to it. Set user and password in the broker node. The function `verdict now` "
    "gives a message for each camera whenever the verdict that may be shown changes; wire it to your dashboard."
)


def _broker(site: Site) -> dict[str, Any]:
    return {
        "id": _BROKER,
        "type": "mqtt-broker",
        "name": "plant broker",
        "broker": site.host,
        "port": str(site.port),
        "clientid": "",
        "autoConnect": True,
        "usetls": site.has_tls,
        "protocolVersion": "5" if site.is_v5 else "4",
        "keepalive": "15",
        "cleansession": True,
    }


def _verdicts(flow: _Flow, site: Site) -> None:
    stale_s = json.dumps(site.cameras)
    script = files(__package__).joinpath("verdict_now.js").read_text("utf-8")
    _subscribe(flow, "status", site.topics.status, "verdict_now")
    flow.next_row()
    _subscribe(flow, "state", f"{site.topics.base}/+/state", "verdict_now")
    function = {"name": "verdict now", "func": f"const stale_s = {stale_s};\n{script}", "outputs": 1, "libs": []}
    flow.add("verdict_now", "function", 1, ["verdict_shown"], **function)
    _show(flow, "verdict_shown", 2, "verdict now", "payload")
    flow.next_row()
    tick = {"name": "every second", "props": [{"p": "payload"}], "repeat": "1", "once": True, "payloadType": "date"}
    flow.add("tick", "inject", 0, ["verdict_now"], **tick)


def _messages(flow: _Flow, topic: str, name: str) -> None:
    flow.next_row()
    _subscribe(flow, name, topic, f"{name}_shown")
    _show(flow, f"{name}_shown", 1, name, "true")


def _heatmaps(flow: _Flow, site: Site) -> None:
    flow.next_row()
    _subscribe(flow, "heatmap", f"image/{site.topics.base}/+/heatmap", "heatmap_shown", "buffer")
    _show(flow, "heatmap_shown", 1, "heatmap (JPEG)", "true")


def _command(flow: _Flow, site: Site, name: str, request: dict[str, Any]) -> None:
    flow.next_row()
    ident = "_".join([name, *(str(value) for value in request.values())])
    # Node-RED numbers nothing by itself: the answer carries this id, so that it can be told from others'.
    payload = json.dumps({"request_id": f"node-red-{ident}", **request})
    inject = {"name": ident.replace("_", " "), "props": [{"p": "payload"}], "payload": payload, "payloadType": "json"}
    flow.add(f"ask_{ident}", "inject", 0, [f"send_{ident}"], repeat="", once=False, **inject)
    out = {"name": name, "topic": site.topics.command(name), "qos": "1", "retain": "false", "broker": _BROKER}
    flow.add(f"send_{ident}", "mqtt out", 1, [], **out)


def _subscribe(flow: _Flow, name: str, topic: str, target: str, datatype: str = "json") -> None:
    members = {"name": name, "topic": topic, "qos": "1", "datatype": datatype, "broker": _BROKER, "inputs": 0}
    # 0: retained messages come at each new subscription, so that a restart of Node-RED shows what holds.
    flow.add(f"in_{name}", "mqtt in", 0, [target], nl=False, rap=True, rh=0, **members)


def _show(flow: _Flow, ident: str, column: int, name: str, complete: str) -> None:
    target = {"targetType": "msg" if complete == "payload" else "full"}
    flow.add(ident, "debug", column, [], name=name, active=True, tosidebar=True, complete=complete, **target)
