"""A plant that triggers, end to end: real agent, real broker, a commander and an independent subscriber."""

import json
from pathlib import Path

from faults.commander import commander
from faults.plant import pictures, plant, wait_for

_CAMERA = (
    '[[cameras]]\nname = "{name}"\nsource = "{source}"\ntrigger = "mqtt"\n{more}[cameras.heatmap]\nwhen = "always"\n'
)


def test_parts_are_triggered_answered_and_followed(tmp_path: Path) -> None:
    """Each trigger of two cameras is answered with its own part; answer, result, event and heatmap tell of the same."""
    shots, fault = pictures(tmp_path / "pictures", 40), tmp_path / "fault"
    fault.write_text("")
    one = _CAMERA.format(name="one", source=f"folder:{shots}?loop=true", more="")
    two = _CAMERA.format(
        name="two", source=f"sim:plates?rate=0&width=64&height=64&fault={fault}", more="trigger_deadline_s = 0.5\n"
    )
    with plant(tmp_path / "plant", one + two) as site:
        site.begin(0)
        with commander(site.broker.port) as client:
            for camera in ("one", "two"):
                client.until_ok("inspect", {"camera": camera})
            sent = {}
            for number in range(10):
                for camera in ("one", "two"):
                    request = {"camera": camera, "part_id": f"{camera}-{number}", "batch": "L1"}
                    sent[client.send("inspect", request)] = request
            wait_for(lambda: sent.keys() <= client.answers.keys(), 15, "the answers")
            answers = {correlation: client.answers[correlation][0].answer for correlation in sent}
            assert [answers[key]["part_id"] for key in sent] == [request["part_id"] for request in sent.values()]
            assert all(answer["ok"] and answer["verdict"] != "unknown" for answer in answers.values())
            for camera in ("one", "two"):
                frames = [a["frame"] for a in answers.values() if a["camera"] == camera]
                assert frames == list(range(frames[0], frames[0] + 10))

            fault.write_text("silent")
            late = client.ask("inspect", {"camera": "two", "part_id": "late", "request_id": "late"})
            assert (late["ok"], late["verdict"], late["reason"]) == (False, "unknown", "deadline")
            assert late["elapsed_ms"] >= 500
            fault.write_text("")

            def results() -> dict[str, dict[str, object]]:
                return {h.json["part_id"]: h.json for h in site.subscriber.results() if h.json["part_id"]}

            wait_for(lambda: len(results()) == 21, 10, "the results, the late one included")
            assert (results()["late"]["late"], results()["late"]["request_id"]) == (True, "late")
            assert len([1 for found in client.answers.values() for a in found if a.answer["part_id"] == "late"]) == 1
            for answer in answers.values():
                result = results()[answer["part_id"]]
                assert (result["id"], result["verdict"], result["batch"], result["trigger"], result["late"]) == (
                    answer["result_id"],
                    answer["verdict"],
                    "L1",
                    "mqtt",
                    False,
                )
            events = {heard.json["part_id"] for heard in site.subscriber.of("one/event")}
            assert {answer["part_id"] for answer in answers.values() if answer["verdict"] == "reject"} & events
            comment = json.dumps({"part_id": "one-3", "batch": "L1", "product": None}).encode()
            wait_for(lambda: any(comment in picture for picture in client.pictures), 10, "the heatmap")
        assert site.agent.stop() == 0
