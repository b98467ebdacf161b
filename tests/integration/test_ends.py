"""The ready-made ends hold what they promise, as far as can be seen without the products they are for."""

import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
from faults.plant import Subscriber, pictures, plant, wait_for

from kizu_agent.__main__ import main
from kizu_agent.integration.home_assistant import discovery
from kizu_agent.integration.ignition import ignition_tags
from kizu_agent.integration.leaves import leaves
from kizu_agent.integration.node_red import node_red_flow
from kizu_agent.integration.schemas import schema_of
from kizu_agent.integration.site import Site
from kizu_agent.integration.telegraf import telegraf_conf
from kizu_agent.topics import Topics

try:
    import tomllib
except ModuleNotFoundError:
    import tomli as tomllib

EXAMPLE = Path(__file__).parents[2] / "deploy" / "agent.example.toml"
SITE = Site(Topics("acme/line", "box"), "broker", 8883, has_tls=True, is_v5=True, cameras={"top": 5.0, "side": 0.5})
NODE = shutil.which("node")


def test_node_red_flow_is_wired_and_speaks_the_topics() -> None:
    """Every wire ends at a node, every node is on the tab and knows the broker, and every topic is listened to."""
    nodes: list[dict[str, Any]] = json.loads(node_red_flow(SITE))
    idents = [node["id"] for node in nodes]
    assert len(set(idents)) == len(idents)
    wired = {target for node in nodes for wires in node.get("wires", []) for target in wires}
    assert wired <= set(idents)
    assert all(node["broker"] == "kizu_broker" for node in nodes if node["type"] in ("mqtt in", "mqtt out"))
    heard = {node["topic"] for node in nodes if node["type"] == "mqtt in"}
    topics = SITE.topics
    assert heard == {
        topics.status,
        topics.model,
        topics.state("+"),
        topics.result("+"),
        topics.event("+"),
        topics.heatmap("+"),
        topics.response("+"),
    }
    sent = [(node["topic"], node["retain"]) for node in nodes if node["type"] == "mqtt out"]
    assert set(sent) == {(topics.command("ping"), "false"), (topics.command("thresholds"), "false")}
    broker = next(node for node in nodes if node["type"] == "mqtt-broker")
    assert (broker["broker"], broker["port"], broker["usetls"]) == ("broker", "8883", True)
    assert "password" not in json.dumps(nodes).replace("user and password in the broker node", "")


HARNESS = """
const steps = JSON.parse(require("fs").readFileSync(0, "utf8"));
const stored = {};
const context = { get: (key) => stored[key], set: (key, value) => { stored[key] = value; } };
let clock = 0;
Date.now = () => clock;
const run = new Function("msg", "context", steps.func);
const shown = [];
for (const [at, msg] of steps.messages) {
    clock = at;
    for (const out of run(msg, context)[0]) shown.push([at, out.topic, out.payload]);
}
console.log(JSON.stringify(shown));
"""


@pytest.mark.skipif(NODE is None, reason="Node.js is not installed; the flow's function is not run")
def test_node_red_function_never_shows_a_stale_ok() -> None:
    """It shows ok while agent and camera are heard of, and unknown as soon as either is silent or says so."""
    func = next(node["func"] for node in json.loads(node_red_flow(SITE)) if node["type"] == "function")
    tick: dict[str, Any] = {"payload": 1}
    messages: list[tuple[int, dict[str, Any]]] = [
        (1000, {"topic": "acme/line/box/top/state", "payload": {"verdict": "ok"}}),
        (1500, {"topic": "acme/line/box/status", "payload": {"state": "online"}}),
        (6000, tick),
        (7100, tick),  # six seconds without a state
        (8000, {"topic": "acme/line/box/top/state", "payload": {"verdict": "reject"}}),
        (9000, {"topic": "acme/line/box/status", "payload": {"state": "offline"}}),
        (9500, {"topic": "acme/line/box/top/state", "payload": {"verdict": "ok"}}),
        (10000, {"topic": "acme/line/box/status", "payload": {"state": "degraded"}}),
        (10100, {"topic": "acme/line/box/top/state", "payload": "not an object"}),
        *((at, {"topic": "acme/line/box/top/state", "payload": {"verdict": "ok"}}) for at in range(11000, 43000, 1000)),
    ]
    steps = json.dumps({"func": func, "messages": messages})
    done = subprocess.run(
        [str(NODE), "-e", HARNESS], input=steps, capture_output=True, text=True, check=True, timeout=60
    )
    shown = [found for found in json.loads(done.stdout) if found[1] == "top"]
    assert shown == [
        [1000, "top", "unknown"],
        [1500, "top", "ok"],
        [7100, "top", "unknown"],
        [8000, "top", "reject"],
        [9000, "top", "unknown"],
        [10000, "top", "ok"],
        [41000, "top", "unknown"],  # the states come, and nothing is heard of the agent for half a minute
    ]


def test_ignition_tags_point_at_every_leaf_of_state_and_status() -> None:
    """Reference tags for all values, with types, in names that Ignition takes; VerdictNow asks agent, age, quality."""
    root: dict[str, Any] = json.loads(ignition_tags(SITE))
    found = _sources(root)
    wanted = {f"[MQTT Engine]acme/line/box/status/{'/'.join(leaf.path)}" for leaf in leaves(schema_of("status"))}
    for camera in ("top", "side"):
        base = f"[MQTT Engine]acme/line/box/{camera}/state"
        wanted |= {f"{base}/{'/'.join(leaf.path)}" for leaf in leaves(schema_of("state"))}
    assert set(found) == wanted
    assert found["[MQTT Engine]acme/line/box/top/state/ratio"] == "Float8"
    assert found["[MQTT Engine]acme/line/box/top/state/counters/ok"] == "Int8"
    now = next(tag for tag in _tags(root) if tag["name"] == "VerdictNow")
    for part in ("../status/state", "published_at.Timestamp", "<= 6", "isGood", '"unknown"'):
        assert part in now["expression"]
    assert not any(set(tag["name"]) & set(". &%=") for tag in _tags(root))


def _tags(folder: dict[str, Any]) -> list[dict[str, Any]]:
    children: list[dict[str, Any]] = folder.get("tags", [])
    return [folder, *(tag for child in children for tag in _tags(child))]


def _sources(root: dict[str, Any]) -> dict[str, str]:
    return {tag["sourceTagPath"]: tag["dataType"] for tag in _tags(root) if tag.get("valueSource") == "reference"}


def test_telegraf_conf_parses_and_takes_every_string() -> None:
    """TOML with one input a topic; each string of the schema is tag, time or listed, and no id is a tag."""
    conf = tomllib.loads(telegraf_conf(SITE))
    inputs = {item["name_override"]: item for item in conf["inputs"]["mqtt_consumer"]}
    assert set(inputs) == {"kizu_result", "kizu_event", "kizu_state", "kizu_status"}
    for name, item in inputs.items():
        found = leaves(schema_of(name.removeprefix("kizu_")))
        strings = {"_".join(leaf.path) for leaf in found if leaf.type in ("string", "boolean")}
        listed = item["tag_keys"], [item["json_time_key"]], item["json_string_fields"]
        assert sorted(name for part in listed for name in part) == sorted(strings)
        assert not any(tag.endswith(("id", "sha256")) for tag in item["tag_keys"])
        assert item["servers"] == ["ssl://broker:8883"]
    assert inputs["kizu_result"]["topics"] == ["acme/line/box/+/result"]


def test_home_assistant_takes_agent_and_cameras() -> None:
    """One device; every entity has an id of its own, follows the agent's will, and a verdict expires."""
    found = {topic: json.loads(text) for topic, text in discovery(SITE, "1.2").items()}
    assert len(found) == 1 + 3 * 2
    assert len({config["unique_id"] for config in found.values()}) == len(found)
    assert {config["availability"][0]["topic"] for config in found.values()} == {SITE.topics.status}
    assert all(topic.split("/")[0] == "homeassistant" and topic.endswith("/config") for topic in found)
    assert found["homeassistant/sensor/kizu_acme_line_box_top_verdict/config"]["expire_after"] == 6
    assert found["homeassistant/image/kizu_acme_line_box_side_heatmap/config"]["image_topic"] == SITE.topics.heatmap(
        "side"
    )


@pytest.mark.parametrize("is_on", [True, False])
def test_the_agent_announces_itself_when_asked(tmp_path: Path, is_on: bool) -> None:
    """Retained, so that a Home Assistant that comes later knows too; not at all by default."""
    folder = pictures(tmp_path / "pictures", count=10)
    cameras = f'[[cameras]]\nname = "cam"\nsource = "folder:{folder}?loop=true&rate=20"\n'
    with plant(tmp_path, cameras) as site:
        if is_on:
            config = site.agent.config.read_text("utf-8").replace("[mqtt]\n", "[mqtt]\nhome_assistant = true\n")
            site.agent.config.write_text(config, "utf-8")
        site.begin(3)
        later = Subscriber(site.broker.port, "homeassistant/#")
        try:
            later.start()
            wait_for(lambda: len(later.messages) >= 4 or not is_on, 10, "the announcement")
            site.agent.stop()
            found = [(heard.topic, heard.retained) for heard in later.messages]
        finally:
            later.close()
    wanted = [f"sensor/{part}" for part in ("kizu_plant_line_box_cam_verdict", "kizu_plant_line_box_cam_ratio")]
    wanted += ["binary_sensor/kizu_plant_line_box_problem", "image/kizu_plant_line_box_cam_heatmap"]
    assert sorted(found) == sorted((f"homeassistant/{name}/config", True) for name in wanted if is_on)


@pytest.mark.parametrize(
    ("end", "published"),
    [
        ("node-red", "node-red/kizu-flow.json"),
        ("ignition", "ignition/kizu-tags.json"),
        ("telegraf", "telegraf/kizu.conf"),
    ],
)
def test_the_command_writes_what_lies_in_deploy(
    end: str, published: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """To a file or to standard output; run scripts/generate when what lies in deploy/ is another."""
    assert main(["integrate", end, "--config", str(EXAMPLE), "--out", str(tmp_path / "ends" / "end")]) == 0
    assert main(["integrate", end, "--config", str(EXAMPLE)]) == 0
    written = (tmp_path / "ends" / "end").read_text("utf-8")
    assert written == capsys.readouterr().out
    assert written == (EXAMPLE.parent / published).read_text("utf-8")


def test_the_command_writes_the_schemas(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Into a folder, or as one object; no configuration is needed for that."""
    assert main(["integrate", "schemas", "--config", "nowhere", "--out", str(tmp_path / "schemas")]) == 0
    assert main(["integrate", "schemas", "--config", "nowhere"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown == {path.stem: json.loads(path.read_text("utf-8")) for path in (tmp_path / "schemas").iterdir()}
