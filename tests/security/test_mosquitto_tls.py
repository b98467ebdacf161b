"""The plant's TLS configuration of Mosquitto, with its access list: who is let in, and who may say and hear what."""

import subprocess
from pathlib import Path
from typing import Any

LINE = "acme/osaka/press/line2"


def test_agents_say_what_is_theirs(broker: Any, authority: Any) -> None:
    """With its certificate an agent says what lies below its own name, and nothing else."""
    box = authority.issue("box1")
    assert broker.may_say(box, f"{LINE}/box1/status")
    assert broker.may_say(box, f"image/{LINE}/box1/cam/heatmap")
    for topic in ("box2/status", "box2/cam/result", "box1/cmd/ping", "box2/response/ping"):
        assert not broker.may_say(box, f"{LINE}/{topic}"), topic


def test_strangers_are_not_let_in(broker: Any, authority: Any, make_authority: Any, tmp_path: Path) -> None:
    """No certificate, one of another authority, an expired one, and one that is not yet valid are refused."""
    topic = f"{LINE}/box1/status"
    assert broker.may_say(authority.issue("box1"), topic)
    assert not broker.may_say(None, topic)
    other = make_authority(tmp_path / "other", "other")
    assert not broker.may_say(other.issue("box1"), topic)
    assert not broker.may_say(authority.issue("box1", days=-1, begins=-30, file="expired"), topic)
    assert not broker.may_say(authority.issue("box1", begins=2, file="early"), topic)


def test_clients_refuse_a_foreign_broker(broker: Any, authority: Any, make_authority: Any, tmp_path: Path) -> None:
    """A client that trusts another authority does not speak to this broker."""
    other = make_authority(tmp_path / "other", "other")
    assert not broker.may_say(authority.issue("box1"), f"{LINE}/box1/status", ca=other.ca)


def test_only_scada_commands(broker: Any, authority: Any) -> None:
    """Commands come from the SCADA account alone; the agent meant hears them, another does not."""
    box, other, scada, display = (authority.issue(name) for name in ("box1", "box2", "scada", "display"))
    command = f"{LINE}/box1/cmd/ping"
    for who in (box, other, display):
        assert not broker.may_say(who, command)
    assert broker.client("mosquitto_pub", scada, "-q", "1", "-r", "-t", command, "-m", "x").returncode == 0
    assert broker.may_hear(box, command)
    assert not broker.may_hear(other, command)


def test_a_display_only_listens(broker: Any, authority: Any) -> None:
    """A display hears the line and may say nothing: nothing below its own name, and no answers."""
    box, display = authority.issue("box1"), authority.issue("display")
    topics = (f"{LINE}/box1/cam/state", f"image/{LINE}/box1/cam/heatmap")
    for topic in topics:
        assert broker.client("mosquitto_pub", box, "-q", "1", "-r", "-t", topic, "-m", "x").returncode == 0
        assert broker.may_hear(display, topic)
    mine = (f"{LINE}/display/status", f"{LINE}/display/cam/state", f"image/{LINE}/display/cam/heatmap")
    for topic in (*topics, *mine, "reply/scada", f"{LINE}/box1/response/ping", "elsewhere"):
        assert not broker.may_say(display, topic), topic


def test_a_revoked_certificate_is_refused(broker: Any, authority: Any, wait_until: Any) -> None:
    """Once the list of revoked certificates names one, and the broker has read it again, its owner is not let in."""
    lost, kept = authority.issue("box1"), authority.issue("box2")
    assert broker.may_say(lost, f"{LINE}/box1/status")
    authority.revoke(lost[0])
    broker.reload()
    wait_until(lambda: not broker.may_say(lost, f"{LINE}/box1/status"), "the revocation")
    assert broker.may_say(kept, f"{LINE}/box2/status")


def test_only_tls_1_2_and_later(broker: Any, authority: Any) -> None:
    """The broker itself turns away a client that offers TLS 1.1 at most."""
    cert, key = authority.issue("box1")

    def offer(version: str) -> str:
        who = ["-cert", str(cert), "-key", str(key), "-CAfile", str(authority.ca)]
        command = ["openssl", "s_client", "-connect", f"127.0.0.1:{broker.port}", version, *who]
        command += ["-cipher", "ALL:@SECLEVEL=0"]  # else the client would not even offer it
        done = subprocess.run(command, capture_output=True, stdin=subprocess.DEVNULL, timeout=20, check=False)
        return (done.stdout + done.stderr).decode(errors="replace")

    assert "Verify return code: 0 (ok)" in offer("-tls1_2")
    assert "alert protocol version" in offer("-tls1_1")
