"""The edge node with mutual TLS and the plant's access list: who may say what, and a renewal under its feet."""

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from faults.plant import Agent, Subscriber, brightness_bundle, give, pictures

from kizu_agent.sparkplug.payload import Metric, Payload, decode

LINE, GROUP = "acme/osaka/press/line2", "acme:osaka:press:line2"
BASE = f"spBv1.0/{GROUP}"


class Site:
    """An agent `box1` that speaks Sparkplug alone, and what the SCADA server hears of it."""

    def __init__(self, folder: Path, broker: Any, authority: Any) -> None:
        self.broker, self.authority = broker, authority
        self.cert, self.key = authority.issue("box1", days=20, begins=-345, file="box1-now")
        more = (
            f'[mqtt.tls]\nca_file = "{authority.ca}"\ncert_file = "{self.cert}"\n'
            f'key_file = "{self.key}"\n[sparkplug]\nenabled = true\n'
        )
        source = f"folder:{pictures(folder / 'pictures')}?rate=25&loop=true"
        self.agent = Agent(folder, broker.port, f'[[cameras]]\nname = "cam"\nsource = "{source}"\n', more)
        text = self.agent.config.read_text().replace('"plant/line"', f'"{LINE}"').replace('"box"', '"box1"')
        self.agent.config.write_text(text.replace("[mqtt]\n", "[mqtt]\njson_topics = false\n"))
        self.scada_login = authority.issue("scada")
        self.scada = Subscriber(broker.port, "spBv1.0/#")
        self.scada._command[-1] = "%r\t%t\t%x"
        login = ["--cert", str(self.scada_login[0]), "--key", str(self.scada_login[1])]
        self.scada._command += ["-h", "127.0.0.1", "--cafile", str(authority.ca), *login]
        give(self.agent, brightness_bundle())

    def heard(self, kind: str) -> list[Payload]:
        """Sparkplug messages of a type so far, decoded."""
        found = [heard for heard in list(self.scada.messages) if heard.topic.startswith(f"{BASE}/{kind}/box1")]
        return [decode(bytes.fromhex(heard.payload.decode())) for heard in found]

    def numbers(self) -> list[int]:
        """The camera's inspections that were told of, each once."""
        metrics = [m for kind in ("DBIRTH", "DDATA") for payload in self.heard(kind) for m in payload.metrics]
        return sorted({m.value for m in metrics if m.name == "Inspection/Sequence" and isinstance(m.value, int)})

    def bd_seqs(self, kind: str) -> list[int]:
        """The bdSeq of each birth or death of the node so far."""
        metrics: list[Metric] = [m for payload in self.heard(kind) for m in payload.metrics if m.name == "bdSeq"]
        return [int(m.value) for m in metrics if isinstance(m.value, int)]


@pytest.fixture
def site(tmp_path: Path, broker: Any, authority: Any, wait_until: Callable[..., None]) -> Iterator[Site]:
    """The node at work, heard by the SCADA server."""
    found = Site(tmp_path / "agent", broker, authority)
    try:
        found.scada.start()
        wait_until(lambda: "u'scada'" in broker.log.read_text(), "the SCADA server")
        found.agent.start()
        wait_until(lambda: len(found.heard("DDATA")) > 5, "data", 40)
        yield found
    finally:
        found.agent.close()
        found.scada.close()


def test_an_edge_node_renews_its_certificate_live(site: Site, wait_until: Callable[..., None]) -> None:
    """It dies in good order and is born again on the new certificate with the next bdSeq; nothing is lost."""
    assert len(site.heard("NBIRTH")) == len(site.heard("DBIRTH")) == 1
    old = site.authority.folder / "old.crt", site.authority.folder / "old.key"
    new = site.authority.issue("box1", days=300, file="box1-new")
    for now, kept, renewed in zip((site.cert, site.key), old, new, strict=True):
        shutil.copy(now, kept)
        shutil.copy(renewed, now.with_suffix(".new"))
        now.with_suffix(".new").replace(now)
    wait_until(lambda: len(site.heard("NBIRTH")) == 2, "the birth after the renewal")
    site.authority.revoke(old[0])
    site.broker.reload()
    wait_until(lambda: not site.broker.may_say(old, f"{BASE}/NDATA/box1"), "the revocation")
    before = len(site.heard("DDATA"))
    wait_until(lambda: len(site.heard("DDATA")) > before + 10, "data on the renewed certificate")
    assert site.agent.stop() == 0
    wait_until(lambda: len(site.heard("NDEATH")) >= 2, "the last death")
    births = site.bd_seqs("NBIRTH")
    assert births[1] == (births[0] + 1) % 256
    assert list(dict.fromkeys(site.bd_seqs("NDEATH"))) == births
    seen = site.numbers()
    assert seen == list(range(seen[0], seen[-1] + 1))


@pytest.mark.parametrize(
    ("who", "kind", "may"),
    [
        ("box2", "NBIRTH/box1", False),
        ("box2", "DDATA/box1/cam", False),
        ("box2", "NDEATH/box2", True),
        ("box1", "DDATA/box1/cam", True),
        ("box1", "NCMD/box2", False),
        ("box1", "DCMD/box1/cam", False),
        ("scada", "NCMD/box1", True),
        ("scada", "DCMD/box1/cam", True),
        ("scada", "NBIRTH/box1", False),
        ("scada", "NDEATH/box1", False),
    ],
)
def test_each_account_says_what_is_its_own(broker: Any, authority: Any, who: str, kind: str, may: bool) -> None:
    """A node its own births, data and deaths, the SCADA server commands, and neither what is the other's."""
    assert broker.may_say(authority.issue(who), f"{BASE}/{kind}") is may


def test_only_the_scada_server_is_the_host(broker: Any, authority: Any) -> None:
    """A false STATE would end every session in the plant."""
    assert broker.may_say(authority.issue("scada"), "spBv1.0/STATE/scada")
    assert not broker.may_say(authority.issue("box1"), "spBv1.0/STATE/scada")
    assert not broker.may_say(authority.issue("scada"), "spBv1.0/STATE/other")
