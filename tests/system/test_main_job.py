"""From pictures to messages that an independent client receives."""

import json
import signal
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest

from kizu_contract.pictures import list_pictures

pytestmark = pytest.mark.timeout(300)


def test_every_picture_of_a_folder_becomes_one_result(product, make_agent, listen, wait) -> None:
    """A folder is inspected without loss, in order, and its results reach a client that shares no code with kizu."""
    listener = listen()
    agent = make_agent(f"folder:{product.pictures}/test", '[cameras.heatmap]\nwhen = "always"\n')
    agent.give(product.first)
    agent.start("--until-ended")
    assert agent.process.wait(60) == 0, agent.log.read_text()
    pictures = list_pictures(product.pictures / "test")
    wait(lambda: len(listener.messages("/cam/result")) == len(pictures), 10, "the results")
    results = listener.messages("/cam/result")
    assert [result["seq"] for result in results] == list(range(1, len(pictures) + 1))
    assert [result["source"].rsplit("/", 2)[-2:] for result in results] == [list(path.parts[-2:]) for path in pictures]
    assert {result["verdict"] for result in results} <= {"ok", "warn", "reject"}
    last = listener.messages("/box/status")[-1]
    assert (last["state"], last["reason"]) == ("offline", "stopped")
    assert listener.messages("/cam/state")[-1]["verdict"] == "unknown"


def test_agent_score_and_evaluation_give_the_same_numbers(
    product, make_agent, listen, wait, run_command, tmp_path: Path
) -> None:
    """One picture has one score, whether the service, `kizu-agent score` or `kizu-export evaluate` computed it."""
    listener = listen()
    agent = make_agent(f"folder:{product.pictures}/test")
    agent.give(product.first)
    agent.start("--until-ended")
    assert agent.process.wait(60) == 0, agent.log.read_text()
    served = {_key(r["source"]): r["score"] for r in listener.messages("/cam/result")}

    lines = run_command("kizu_agent", "score", str(product.first), f"{product.pictures}/test", "--json", "-")
    scored = {_key(line["path"]): line["score"] for line in map(json.loads, lines.splitlines())}

    figures = tmp_path / "q.json"
    run_command("kizu_export", "evaluate", str(product.first), "--data", str(product.pictures), "--json", str(figures))
    evaluated = {_key(entry["path"]): entry["score"] for entry in json.loads(figures.read_text())["pictures"]}

    assert served.keys() == scored.keys() == evaluated.keys()
    for name, score in served.items():
        assert scored[name] == pytest.approx(score, rel=1e-5)
        assert evaluated[name] == pytest.approx(score, rel=1e-5)


def test_models_change_while_the_line_runs(product, make_agent, listen, wait, tmp_path: Path) -> None:
    """A new model takes over between two frames, none is lost, and bad files change nothing but the quarantine."""
    listener = listen()
    agent = make_agent(f"folder:{product.pictures}/test?loop=true&rate=20")
    agent.give(product.first)
    agent.start()
    wait(lambda: len(listener.messages("/cam/result")) > 5, 30, "first results")
    whole = product.second.read_bytes()
    bad = {"cut.kizu": whole[: len(whole) // 2], "flipped.kizu": _flip(whole), "bomb.kizu": _bomb(tmp_path)}
    for name, data in bad.items():
        (tmp_path / name).write_bytes(data)
        agent.give(tmp_path / name)
    wait(lambda: _refused(listener) == set(bad), 60, "refusals of the bad files")
    assert {r["model"]["version"] for r in listener.messages("/cam/result")} == {"1"}
    agent.give(product.second)
    wait(lambda: listener.messages("/cam/result")[-1]["model"]["version"] == "2", 30, "the second model")
    assert agent.stop() == 0, agent.log.read_text()
    results = listener.messages("/cam/result")
    assert [result["seq"] for result in results] == list(range(1, len(results) + 1))
    assert [result["frame"] for result in results] == list(range(len(results)))
    versions = [result["model"]["version"] for result in results]
    assert versions == sorted(versions)
    reasons = {path.name for path in (agent.state / "quarantine").glob("*.json")}
    assert len(reasons) == len(bad)
    assert list(agent.drop.glob("*.kizu")) == []


def test_results_wait_for_the_broker(product, make_agent, broker, listen, wait) -> None:
    """An agent that starts without a broker keeps its results and delivers them when the broker comes, marked."""
    broker.stop()
    agent = make_agent(f"folder:{product.pictures}/test?rate=20")
    agent.give(product.first)
    agent.start("--until-ended")
    wait((agent.state / "models" / "current.json").exists, 30, "the model")
    wait(lambda: agent.log.read_text().count("ended") > 0, 30, "the end of the folder")
    agent.process.send_signal(signal.SIGSTOP)  # so that the listener has subscribed before the agent comes back
    broker.start()
    listener = listen()
    agent.process.send_signal(signal.SIGCONT)
    count = len(list_pictures(product.pictures / "test"))
    wait(lambda: len(listener.messages("/cam/result")) == count, 60, "the kept results")
    assert all(result["replayed"] for result in listener.messages("/cam/result"))
    assert agent.process.wait(20) == 0


def test_a_restart_goes_on_with_the_last_model_and_numbers(product, make_agent, listen, wait) -> None:
    """After SIGKILL the agent comes back with the model it had, and no result number is given twice."""
    listener = listen()
    agent = make_agent("sim:plates?rate=10&width=128&height=96")
    agent.give(product.first)
    agent.start()
    wait(lambda: len(listener.messages("/cam/result")) > 3, 30, "first results")
    agent.process.kill()
    agent.process.wait()
    before = len(listener.messages("/cam/result"))
    wait(lambda: listener.messages("/box/status")[-1]["state"] == "offline", 30, "the last will")
    agent.start()
    wait(lambda: len(listener.messages("/cam/result")) > before + 5, 30, "results after the restart")
    assert agent.stop() == 0
    results = listener.messages("/cam/result")
    seqs = {result["id"]: result["seq"] for result in results}
    assert sorted(seqs.values()) == list(range(1, len(seqs) + 1))
    assert {result["model"]["version"] for result in results} == {"1"}


@pytest.mark.parametrize(
    ("text", "part"),
    [("[agent]\nname = 'a'\n", "agent.prefix"), ("[agent", "declaration"), (None, "no such file")],
)
def test_a_configuration_that_cannot_be_used_ends_with_3(run_command, tmp_path: Path, text, part) -> None:
    """Systemd must not restart an agent whose configuration is wrong: exit code 3 and what is wrong."""
    path = tmp_path / "agent.toml"
    if text is not None:
        path.write_text(text)
    done = subprocess.run(
        [sys.executable, "-m", "kizu_agent", "run", "--config", str(path)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 3
    assert part in done.stderr


def test_check_says_what_is_wrong_and_what_is_well(product, make_agent, broker) -> None:
    """`kizu-agent check` fails while something is missing, names it, and is content once it is there."""

    def check() -> "subprocess.CompletedProcess[str]":
        line = [sys.executable, "-m", "kizu_agent", "check", "--config", str(agent.config)]
        return subprocess.run(line, capture_output=True, text=True, timeout=60, check=False)

    agent = make_agent(f"folder:{product.pictures}/test")
    missing = check()
    assert missing.returncode == 1
    assert "none yet" in missing.stdout
    agent.give(product.first)
    assert check().returncode == 0, check().stdout
    broker.stop()
    away = check()
    assert away.returncode == 1
    assert "FAIL broker" in away.stdout


def _key(path: str) -> str:
    return "/".join(Path(path).parts[-2:])


def _flip(data: bytes) -> bytes:
    middle = len(data) // 2
    return data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :]


def _bomb(folder: Path) -> bytes:
    path = folder / "bomb.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("manifest.json", b" " * (300 * 2**20))
    return path.read_bytes()


def _refused(listener: Any) -> set[str]:
    return {report["file"] for report in listener.messages("/box/model") if report["kind"] == "rejected"}
