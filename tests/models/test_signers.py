"""Keys for models over time: several, new ones, revoked ones, without a restart; and what becomes of their models."""

from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from kizu_agent.errors import ConfigError
from kizu_agent.model_keys import KeyRing
from kizu_agent.settings import ModelsConfig
from kizu_contract.signing import fingerprint_of


class Keys:
    """A folder of trusted keys and a list of revoked ones, as an administrator keeps them."""

    def __init__(self, root: Path) -> None:
        self.folder, self.revoked = root / "keys", root / "revoked.txt"
        self.folder.mkdir()
        self.revoked.write_text("# none yet\n")
        self.settings = {"trusted_keys": (self.folder,), "revoked_keys_file": self.revoked, "require_signature": True}

    def trust(self, name: str) -> Ed25519PrivateKey:
        """Make a key and put its public half into the folder."""
        key = Ed25519PrivateKey.generate()
        pem = key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
        (self.folder / f"{name}.pem").write_bytes(pem)
        return key

    def revoke(self, key: Ed25519PrivateKey) -> None:
        """Put a key on the list, as a person may write it."""
        text = fingerprint_of(key.public_key()).upper()
        with self.revoked.open("a") as file:
            file.write(f"  {':'.join(text[at : at + 2] for at in range(0, 64, 2))}   # stolen\n")


@pytest.fixture
def keys(tmp_path: Path, box: Any) -> Keys:
    """One folder of keys, which the box trusts and requires."""
    found = Keys(tmp_path)
    box.settings = found.settings
    return found


def test_keys_are_rotated_without_a_restart(box: Any, keys: Keys) -> None:
    """A key that is put into the folder signs at once, reports name it, and one that is taken out signs no more."""
    first = keys.trust("first")
    box.start()
    box.put("a.kizu", version="1", key=first)
    assert box.wait_for("active", "a.kizu").signed_by == fingerprint_of(first.public_key())
    second = keys.trust("second")
    box.put("b.kizu", version="2", factor=2.0, key=second)
    assert box.wait_for("active", "b.kizu").signed_by == fingerprint_of(second.public_key())
    (keys.folder / "first.pem").unlink()
    box.put("c.kizu", version="3", key=first)
    assert "none of the 1 trusted keys" in (box.wait_for("rejected", "c.kizu").reason or "")
    listed = {model.model.version: model.signed_by for model in box.keeper.listing().models}
    assert listed == {"1": fingerprint_of(first.public_key()), "2": fingerprint_of(second.public_key())}


def test_a_model_whose_key_is_revoked_serves_on_and_is_not_loaded_again(box: Any, keys: Keys) -> None:
    """It is told at once, by report and problem; a restart goes back to what a good key signed, and so by command."""
    good, stolen = keys.trust("good"), keys.trust("stolen")
    box.start()
    box.put("a.kizu", version="1", factor=1.0, key=good)
    box.wait_for("active", "a.kizu")
    box.put("b.kizu", version="2", factor=2.0, key=stolen)
    serving = box.wait_for("active", "b.kizu").model
    keys.revoke(stolen)
    told = box.wait_for("failed")
    assert (told.model, told.cause) == (serving, "revoked")
    assert box.score() == pytest.approx(200.0), "the line goes on"
    assert "is signed by the revoked key" in box.keeper.problems[0]
    box.put("c.kizu", version="3", key=stolen)
    assert "is signed by the revoked key" in (box.wait_for("rejected", "c.kizu").reason or "")

    box.stop()
    box.start()
    assert box.score() == pytest.approx(100.0), "the model before it serves"
    assert "is signed by the revoked key" in (box.wait_for("failed").reason or "")
    assert box.keeper.problems == []
    listing = {model.model.version: model for model in box.keeper.listing().models}
    from kizu_agent.records import ModelOrder

    box.reports.clear()
    assert box.keeper.order(ModelOrder(None, listing["2"].file))
    assert "is signed by the revoked key" in (box.wait_for("failed").reason or ""), "no command overrules it"
    assert box.score() == pytest.approx(100.0)


def test_the_same_model_signed_anew_is_well_again(box: Any, keys: Keys) -> None:
    """The same content with a good signature ends the trouble without a swap, and is loaded at a restart."""
    good, stolen = keys.trust("good"), keys.trust("stolen")
    box.start()
    box.put("a.kizu", key=stolen)
    box.wait_for("active", "a.kizu")
    keys.revoke(stolen)
    box.wait_for("failed")
    box.put("again.kizu", key=good)
    box.wait_for("unchanged", "again.kizu")
    box.put("again2.kizu", key=good)  # a round later
    box.wait_for("unchanged", "again2.kizu")
    assert box.keeper.problems == []
    box.stop()
    box.start()
    assert box.wait_for("active").signed_by == fingerprint_of(good.public_key())
    assert box.keeper.listing().models[0].signed_by == fingerprint_of(good.public_key())


def test_without_a_model_of_a_good_key_nothing_serves(box: Any, keys: Keys) -> None:
    """After a restart a revoked key's only model does not serve, until the key is taken off the list."""
    stolen = keys.trust("stolen")
    box.start()
    box.put("a.kizu", key=stolen)
    box.wait_for("active", "a.kizu")
    box.stop()
    keys.revoke(stolen)
    box.start()
    assert box.keeper.current(None) is None
    box.stop()
    keys.revoked.write_text("")
    box.start()
    assert box.keeper.current(None) is not None


def test_broken_key_files_close_and_do_not_open(keys: Keys) -> None:
    """At run time a key or list that cannot be read trusts nobody more than before, and without keys all is refused."""
    good, stolen = keys.trust("good"), keys.trust("stolen")
    ring = KeyRing(ModelsConfig(trusted_keys=(keys.folder,), revoked_keys_file=keys.revoked))
    assert ring.trust.objection(fingerprint_of(good.public_key())) is None
    assert ring.refresh() is False
    keys.revoke(stolen)
    assert ring.refresh() is True
    assert "revoked" in (ring.trust.objection(fingerprint_of(stolen.public_key())) or "")
    keys.revoked.write_text("not a fingerprint\n")
    ring.refresh()
    assert "line 1 is no fingerprint" in ring.problems[0]
    assert "revoked" in (ring.trust.objection(fingerprint_of(stolen.public_key())) or "")
    for file in keys.folder.iterdir():
        file.write_text("half")
    ring.refresh()
    assert ring.trust.is_required
    assert "no key for models is left" in ring.problems[-1]
    assert "not trusted any more" in (ring.trust.objection(fingerprint_of(good.public_key())) or "")


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"trusted_keys": ("keys",)}, "there is no key"),
        ({"trusted_keys": ("keys",), "revoked_keys_file": "none.txt"}, r"none\.txt"),
    ],
)
def test_unusable_keys_keep_the_agent_from_starting(
    keys: Keys, settings: Any, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An empty folder, or a list of revoked keys that is not there, is found at the start."""
    monkeypatch.chdir(keys.folder.parent)
    if "revoked_keys_file" in settings:
        keys.trust("one")
    with pytest.raises(ConfigError, match=words):
        KeyRing(ModelsConfig(**settings))


def test_a_list_of_revoked_keys_needs_trusted_ones() -> None:
    """A list that nothing would ever look at is refused."""
    with pytest.raises(ValueError, match="goes with trusted_keys"):
        ModelsConfig(revoked_keys_file="x")  # type: ignore[arg-type]
