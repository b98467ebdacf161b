"""Must-show: a real agent with mutual TLS and the plant's access list; its certificate is renewed under its feet."""

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from faults.plant import Agent, Subscriber, account, brightness_bundle, committed_numbers, give, pictures

LINE = "acme/osaka/press/line2"


class Site:
    """An agent `box1` with its certificate, and what the SCADA server hears of it."""

    def __init__(self, folder: Path, broker: Any, authority: Any) -> None:
        self.authority, self.broker = authority, broker
        self.cert, self.key = authority.issue("box1", days=20, begins=-345, file="box1-now")
        tls = f'[mqtt.tls]\nca_file = "{authority.ca}"\ncert_file = "{self.cert}"\nkey_file = "{self.key}"\n'
        source = f"folder:{pictures(folder / 'pictures')}?rate=25&loop=true"
        camera = f'[[cameras]]\nname = "cam"\nsource = "{source}"\n[cameras.heatmap]\nwhen = "never"\n'
        self.agent = Agent(folder, broker.port, camera, tls)
        text = self.agent.config.read_text().replace('"plant/line"', f'"{LINE}"').replace('"box"', '"box1"')
        self.agent.config.write_text(text)
        self.scada = Subscriber(broker.port, f"{LINE}/box1/#")
        cert, key = authority.issue("scada")
        login = ["-h", "127.0.0.1", "--cafile", str(authority.ca), "--cert", str(cert), "--key", str(key)]
        self.scada._command += login
        give(self.agent, brightness_bundle())

    def statuses(self) -> list[dict[str, Any]]:
        """Every status so far."""
        return [heard.json for heard in self.scada.of("/status")]

    def status(self) -> dict[str, Any]:
        """The latest status."""
        return (self.statuses() or [{"reason": None, "certificates": {"client_expires_at": None}, "problems": {}}])[-1]

    def install(self, cert: Path, key: Path | None) -> None:
        """Put files in place as a renewal does: written beside, then renamed, one after the other."""
        for source, target in ((cert, self.cert), (key, self.key)):
            if source is not None:
                shutil.copy(source, target.with_suffix(".new"))
                target.with_suffix(".new").replace(target)


@pytest.fixture
def site(tmp_path: Path, broker: Any, authority: Any, wait_until: Callable[..., None]) -> Iterator[Site]:
    """The agent at work, heard by the SCADA server."""
    found = Site(tmp_path / "agent", broker, authority)
    try:
        found.scada.start()
        wait_until(lambda: "u'scada'" in broker.log.read_text(), "the SCADA server")
        found.agent.start()
        wait_until(lambda: len(found.scada.results()) > 5, "results", 40)
        yield found
    finally:
        found.agent.close()
        found.scada.close()


def test_a_certificate_is_renewed_live(site: Site, wait_until: Callable[..., None]) -> None:
    """With mutual TLS and the access list: warned ahead, a misfit refused, the renewal taken up, nothing lost."""
    broker, authority, agent = site.broker, site.authority, site.agent
    assert not broker.may_say((site.cert, site.key), f"{LINE}/box2/status")
    assert not broker.may_say(None, f"{LINE}/box1/status")
    wait_until(
        lambda: "client certificate CN=box1 expires in 19 days" in (site.status()["reason"] or ""), "the warning"
    )
    assert site.status()["problems"]["certificates_expiring"] == 1

    old = authority.folder / "old.crt", authority.folder / "old.key"
    shutil.copy(site.cert, old[0])
    shutil.copy(site.key, old[1])
    new = authority.issue("box1", days=300, file="box1-new")
    site.install(new[0], None)
    wait_until(lambda: "is not the key of the certificate" in (site.status()["reason"] or ""), "the misfit")
    before = len(site.scada.results())
    wait_until(lambda: len(site.scada.results()) > before + 10, "results on the old connection")
    assert agent.metric("credential_renewals_total") == 1  # refused

    ends = site.status()["certificates"]["client_expires_at"]
    site.install(*new)
    wait_until(lambda: site.status()["certificates"]["client_expires_at"] > ends, "the renewed certificate")
    wait_until(lambda: site.status()["state"] == "online", "no problem any more")
    authority.revoke(old[0])
    broker.reload()
    wait_until(lambda: not broker.may_say(old, f"{LINE}/box1/status"), "the revocation")
    before = len(site.scada.results())
    wait_until(lambda: len(site.scada.results()) > before + 10, "results with the renewed certificate")

    assert all(status["state"] != "offline" for status in site.statuses())
    assert agent.stop() == 0
    wait_until(lambda: site.status()["state"] == "offline", "the last word")
    committed, lost, _, disorder = account(site.scada.results(), committed_numbers(agent.state))
    assert (committed > 20, lost, disorder) == (True, 0, "")
    told = [event["event"] for event in agent.log_events() if "credentials" in event["event"]]
    assert told == ["renewed credentials are not taken up", "renewed credentials are taken up"]
    assert not [event for event in agent.log_events() if "broker" in event["event"]]


def test_a_certificate_that_the_broker_refuses_is_not_taken_up(site: Site, wait_until: Callable[..., None]) -> None:
    """A whole new pair that the broker does not take leaves the connection as it is, and is told."""
    revoked = site.authority.issue("box1", days=300, file="box1-revoked")
    site.authority.revoke(revoked[0])
    site.broker.reload()
    wait_until(lambda: not site.broker.may_say(revoked, f"{LINE}/box1/status"), "the revocation")
    site.install(*revoked)
    wait_until(lambda: "not taken up" in (site.status()["reason"] or ""), "the refusal")
    assert "does the broker take this certificate" in site.status()["reason"]
    before = len(site.scada.results())
    wait_until(lambda: len(site.scada.results()) > before + 10, "results on the old connection")
    assert all(status["state"] == "degraded" for status in site.statuses()[-1:])
    assert site.agent.metric("broker_connected") == 1
