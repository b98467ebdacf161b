"""Bad files dropped: each is quarantined with its reason, and the old model goes on."""

import io
import json
import os
import signal
import struct
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from onnx import TensorProto, helper

from kizu_agent.errors import ConfigError
from kizu_agent.models import ModelKeeper
from kizu_agent.settings import EngineConfig, ModelsConfig


def refused(box: Any, file: str = "m.kizu") -> str:
    """Wait for the refusal of `file`, check the quarantine and that the old model goes on; returns the reason."""
    report = box.wait_for("rejected", file)
    [kept] = [path for path in box.quarantined() if path.name.endswith(file)]
    record = json.loads(kept.with_name(f"{kept.name}.reason.json").read_bytes())
    assert record["file"] == file
    assert record["reason"] == report.reason
    assert record["size"] == kept.stat().st_size
    assert not (box.drop / file).exists()
    assert box.score() == pytest.approx(100)
    return str(report.reason)


@pytest.fixture
def served(box: Any) -> Any:
    """A box with a good model in service, whose score is the picture's mean."""
    box.start()
    box.put("old.kizu", version="old")
    box.wait_for("active", "old.kizu")
    return box


def test_truncated(served: Any) -> None:
    """A truncated file that stays as it is is refused."""
    data = served.make(served.root / "good", factor=2.0).read_bytes()
    served.put_bytes(data[: len(data) * 2 // 3])
    assert "not a whole ZIP" in refused(served)


def test_bit_flips(box: Any) -> None:
    """A bundle with any one bit flipped is refused, or is one that still says and computes the same."""
    data = box.make(box.root / "good").read_bytes()
    box.start()
    box.put_bytes(data, "good.kizu")
    good = box.wait_for("active", "good.kizu").model
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        members = [(info.header_offset, info.compress_size) for info in archive.infolist()]
    directory = data.rindex(b"PK\x05\x06")
    headers = [at + offset for (at, _), offset in zip(members, (2, 14, 22, 27, 32), strict=True)]
    contents = [at + 60 + size // 2 for at, size in members]
    places = [*headers, *contents, directory - 30, directory + 12]
    for number, place in enumerate(places):
        flipped = bytearray(data)
        flipped[min(place, len(data) - 1)] ^= 1 << (number % 8)
        box.put_bytes(bytes(flipped), f"flip{number}.kizu")
    deadline = time.monotonic() + 90
    while len(box.reports) < len(places) + 2 and time.monotonic() < deadline:
        time.sleep(0.1)
    outcomes = [report for report in box.reports if report.file.startswith("flip")]
    assert len(outcomes) == len(places)
    assert {report.kind for report in outcomes} <= {"rejected", "unchanged"}
    assert sum(report.kind == "rejected" for report in outcomes) >= len(places) // 2
    assert box.keeper.current(None).id == good


def _rezip(path: Path, **members: bytes) -> bytes:
    """The bundle at `path`, some members replaced, packed anew."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(path) as source, zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as out:
        for name in source.namelist():
            out.writestr(name, members.get(name.replace(".", "_"), source.read(name)))
    return buffer.getvalue()


def _lie_about_size(data: bytes, name: bytes, size: int) -> bytes:
    """Change the unpacked size that the central directory claims for `name`."""
    at = data.rindex(name) - 46
    assert data[at : at + 4] == b"PK\x01\x02"
    return data[: at + 24] + struct.pack("<I", size) + data[at + 28 :]


def _zeros(size: int) -> bytes:
    """A ZIP of `size` zeros named like a golden array."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as out, out.open("tiles.npy", "w") as member:
        for _ in range(size // 2**20):
            member.write(bytes(2**20))
    return buffer.getvalue()


@pytest.mark.parametrize("kind", ["too large", "within the limit", "nested", "claims less", "claims more"])
def test_zip_bombs(served: Any, kind: str) -> None:
    """A ZIP bomb of any make is refused, and the agent's own memory hardly moves."""
    good = served.make(served.root / "good")
    inner = _zeros(100 * 2**20)
    bombs = {
        "too large": lambda: _rezip(good, manifest_json=bytes(100 * 2**20)),
        "within the limit": lambda: _rezip(good, scorer_onnx=bytes(100 * 2**20)),
        "nested": lambda: _rezip(good, golden_npz=inner),
        "claims less": lambda: _lie_about_size(_rezip(good, preview_png=bytes(100 * 2**20)), b"preview.png", 1000),
        "claims more": lambda: _lie_about_size(_rezip(good), b"scorer.onnx", 2**30 - 1),
    }
    data = bombs[kind]()
    assert len(data) < 2**20
    me = psutil.Process()
    before = peak = me.memory_info().rss
    path = served.put_bytes(data)
    while path.exists():
        peak = max(peak, me.memory_info().rss)
        time.sleep(0.01)
    refused(served)
    assert peak - before < 32 * 2**20


def test_wrong_golden(served: Any, golden_of: Callable[[float], Any]) -> None:
    """A graph that does not give its golden scores is refused."""
    served.put(factor=2.0, golden=golden_of(2.01))
    assert "deviate" in refused(served)


def test_nan(served: Any) -> None:
    """A graph that gives numbers that are none is refused."""
    zero = helper.make_node("Sub", ["factor", "factor"], ["zero"])
    served.put(extra=[zero, helper.make_node("Div", ["zero", "zero"], ["nan"])], scale="nan")
    assert "deviate by inf" in refused(served)


def _of_size(side: int) -> list[Any]:
    shape = helper.make_tensor("shape", TensorProto.INT64, [2], [side, side])
    return [
        helper.make_node("Constant", [], ["shape"], value=shape),
        helper.make_node("ReduceMax", ["float"], ["largest"], keepdims=0),  # depends on the input: no constant folding
        helper.make_node("Expand", ["largest", "shape"], ["wide0"]),
    ]


def test_huge_allocation(served: Any) -> None:
    """A graph that asks for more memory than a self-test may use is refused."""
    sum_all = helper.make_node("ReduceSum", ["wide0"], ["sum"], keepdims=0)
    served.put(extra=[*_of_size(28_000), sum_all], scale="sum")  # 3.1 GB, which the machine might well have
    reason = refused(served)
    assert "llocat" in reason or "memory" in reason


def test_endless_graph(box: Any) -> None:
    """A graph that does not come to an end is stopped after the time allowed."""
    box.settings = {"self_test_timeout_s": 4}
    box.start()
    box.put("old.kizu", version="old")
    box.wait_for("active")
    products = [helper.make_node("MatMul", [f"wide{i}", f"wide{i}"], [f"wide{i + 1}"]) for i in range(40)]
    sum_all = helper.make_node("ReduceSum", ["wide40"], ["sum"], keepdims=0)
    box.put(extra=[*_of_size(4000), *products, sum_all], scale="sum")
    assert "more than 4 s" in refused(box)
    assert not psutil.Process().children()


def test_self_test_process_dies(served: Any) -> None:
    """A bundle during whose self-test the process is killed is refused with the signal's name."""
    products = [helper.make_node("MatMul", [f"wide{i}", f"wide{i}"], [f"wide{i + 1}"]) for i in range(40)]
    sum_all = helper.make_node("ReduceSum", ["wide40"], ["sum"], keepdims=0)
    served.put(extra=[*_of_size(4000), *products, sum_all], scale="sum")
    deadline = time.monotonic() + 20
    while not (children := psutil.Process().children()) and time.monotonic() < deadline:
        time.sleep(0.05)
    time.sleep(1)
    os.kill(children[0].pid, signal.SIGKILL)
    assert "killed by SIGKILL" in refused(served)


def test_graph_that_does_not_load(served: Any) -> None:
    """A graph with an operator that onnxruntime does not know is refused by its name."""
    served.put(extra=[helper.make_node("Nonsense", ["factor"], ["none"])], scale="none")
    assert "Nonsense" in refused(served)


@pytest.fixture
def key(box: Any) -> Ed25519PrivateKey:
    """A private key whose public half the box trusts, and which it requires."""
    private = Ed25519PrivateKey.generate()
    pem = private.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
    (box.root / "key.pem").write_bytes(pem)
    box.settings = {"trusted_keys": (box.root / "key.pem",), "require_signature": True}
    return private


def test_signatures(box: Any, key: Ed25519PrivateKey) -> None:
    """Where signatures are required, a trusted one passes, a foreign one and none are refused."""
    box.start()
    box.put("old.kizu", version="old", key=key)
    box.wait_for("active", "old.kizu")
    box.put("foreign.kizu", key=Ed25519PrivateKey.generate())
    assert "none of the 1 trusted keys" in refused(box, "foreign.kizu")
    box.put("unsigned.kizu")
    assert "is not signed" in refused(box, "unsigned.kizu")


def test_stored_model_must_be_trusted_too(box: Any, key: Ed25519PrivateKey) -> None:
    """When signatures come to be required, a stored model without one does not go into service again."""
    required, box.settings = box.settings, {}
    box.start()
    box.put()
    box.wait_for("active")
    box.stop()
    box.settings = required
    assert box.start().current(None) is None
    box.put(key=key)
    box.wait_for("active", "m.kizu")


def test_unreadable_key(tmp_path: Path) -> None:
    """A trusted key that cannot be read keeps the agent from starting."""
    config = ModelsConfig(drop_dir=tmp_path, trusted_keys=(tmp_path / "none.pem",))
    with pytest.raises(ConfigError, match=r"none\.pem"):
        ModelKeeper(config, EngineConfig(), tmp_path, [None], lambda _report: None)


def test_quarantine_is_bounded(served: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The quarantine keeps the newest files within its count and bytes; too large a file leaves its reason only."""
    monkeypatch.setattr("kizu_agent.model_store.MAX_QUARANTINED", 3)
    monkeypatch.setattr("kizu_agent.model_store.MAX_QUARANTINE_BYTES", 1000)
    empty_zip = b"PK\x05\x06" + b"\0" * 18
    for number in range(4):
        served.put_bytes(empty_zip, f"{number}.kizu")
        served.wait_for("rejected", f"{number}.kizu")
    served.put_bytes(np.random.default_rng(1).bytes(2000) + empty_zip, "large.kizu")
    served.wait_for("rejected", "large.kizu")
    assert [path.name[-6:] for path in served.quarantined()] == ["2.kizu", "3.kizu"]
    reasons = sorted((served.state / "quarantine").glob("*.reason.json"))
    assert len(reasons) == 3
    assert json.loads(reasons[-1].read_bytes())["sha256"] is None


def test_read_only_drop_directory(served: Any) -> None:
    """A bad file that cannot be moved away is reported once and not tried again and again."""
    if os.geteuid() == 0:
        pytest.skip("root may write anywhere")
    served.put_bytes(b"PK\x05\x06" + b"\0" * 18)
    served.drop.chmod(0o555)
    try:
        assert "cannot be moved" in (served.wait_for("rejected").reason or "")
        time.sleep(1)
    finally:
        served.drop.chmod(0o755)
    assert sum(report.kind == "rejected" for report in served.reports) == 1
