"""`kizu-agent check`: what it says of each thing."""

import re
from collections.abc import Callable

import pytest

from kizu_agent.check import check
from kizu_agent.providers import available_providers

RIGHT = 'username = "line"\npassword = "right"'


@pytest.fixture
def said(capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, list[str]]]:
    def said(config: object) -> tuple[int, list[str]]:
        code = check(config)
        return code, capsys.readouterr().out.splitlines()

    return said


def test_everything_in_place_is_well(box, broker: int, said) -> None:
    """Two slots with a waiting model each, a broker with its password, cameras that give pictures: 0."""
    cameras = [
        {"name": "one", "source": box.pictures("one", 1), "model": "plates"},
        {"name": "two", "source": "sim:gears?width=64&height=48", "model": "bolts"},
    ]
    box.give("plates")
    box.give("bolts")
    code, lines = said(box.config(cameras, mqtt=f"port = {broker}\n{RIGHT}"))
    assert code == 0, lines
    assert "ok   camera one" in "\n".join(lines)
    assert any("12 × 8 pixels, grey" in line for line in lines)
    assert any("64 × 48 pixels" in line for line in lines)
    assert lines[-1] == "all is well"


def test_what_is_wrong_is_named_each_by_itself(box, broker: int, said) -> None:
    """A slot without a model beside one with, a model nobody asks for, a wrong password, a camera that is away."""
    cameras = [
        {"name": "one", "source": box.pictures("one", 1), "model": "plates"},
        {"name": "two", "source": "rtsp://user:secret@127.0.0.1:1/stream", "model": "bolts"},
    ]
    box.give("plates")
    box.give("nuts")
    (box.drop / "broken.kizu").write_bytes(b"PK")
    code, lines = said(box.config(cameras, mqtt=f'port = {broker}\nusername = "line"\npassword = "wrong"'))
    assert code == 1
    wrong = [line.removeprefix("FAIL ") for line in lines if line.startswith("FAIL")]
    assert len(wrong) == 5, lines
    assert wrong[0].startswith("model bolts: none yet")
    assert wrong[1].startswith("waiting model broken.kizu: ")
    assert wrong[2].startswith("waiting model nuts.kizu: no camera asks for a model named 'nuts'")
    assert "user name, password" in wrong[3]
    assert wrong[4].startswith("camera two")
    assert "lost: " in wrong[4]
    assert "secret" not in "\n".join(lines)
    tried = [line for line in lines if line.startswith(("ok ", "FAIL"))]
    assert lines[-1] == f"5 of {len(tried)} things are wrong"


def test_a_camera_that_waits_for_its_trigger_is_well(box, said) -> None:
    """The check does not wait for a part to come by."""
    fault = box.folder / "fault"
    fault.write_text("silent")
    _, lines = said(box.config([{"name": "cam", "source": f"sim:gears?trigger=true&fault={fault}"}]))
    assert any(line.startswith("ok   camera cam") and "waits for its trigger" in line for line in lines), lines


def test_a_damaged_record_of_models_is_said(box, said) -> None:
    """A record that cannot be read is not told as an empty one only."""
    (box.state / "models").mkdir(parents=True)
    (box.state / "models" / "current.json").write_text("{")
    _, lines = said(box.config([{"name": "cam", "source": "sim:gears"}]))
    assert any(line.startswith("FAIL models: ") and "damaged" in line for line in lines)


def test_the_engine_is_told_in_full(box, said) -> None:
    """What is asked for, there, started and on what, how the cores are divided; for a model its batch and why."""
    box.give()
    _, lines = said(box.config([{"name": "cam", "source": box.pictures("one", 1)}]))
    (engine,) = [line for line in lines if line.startswith("ok   engine: ")]
    assert engine.startswith("ok   engine: cpu is asked for, onnxruntime ")
    assert "; cpu runs on " in engine
    assert "OpenCV 1, BLAS 1" in engine
    (model,) = [line for line in lines if line.startswith("ok   waiting model plates.kizu: ")]
    streams = int(re.search(r"in (\d+) stream", engine)[1])
    shared = f", shared by {streams} streams" if streams > 1 else ""
    assert f"plates 1.0.0 runs on cpu; batches of {max(1, 8 // streams)} tiles (the bundle's own{shared})" in model


@pytest.mark.skipif("openvino" in available_providers(), reason="this machine has OpenVINO")
def test_a_missing_provider_is_wrong_or_a_warning(box, said) -> None:
    """As the configuration says: it cannot start, or runs on less, which is told with its reason and no failure."""
    box.give()
    cameras = [{"name": "cam", "source": box.pictures("one", 1)}]
    _, lines = said(box.config(cameras, agent='[engine]\nprovider = "openvino"'))
    (engine,) = [line for line in lines if " engine: " in line]
    assert engine.startswith("FAIL engine: this onnxruntime was built without openvino; install the openvino extra")
    degrade = '[engine]\nprovider = "openvino"\non_missing_provider = "degrade"'
    _, lines = said(box.config(cameras, agent=degrade))
    warned = [line for line in lines if line.startswith("WARN ") and "DEGRADED: openvino was asked for" in line]
    assert [line.split(":")[0] for line in warned] == ["WARN engine", "WARN waiting model plates.kizu"]
    assert not any(line.startswith("FAIL engine") for line in lines)
