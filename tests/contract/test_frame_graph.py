"""The optional second graph: written, read back, named in the manifest, and refused where the two do not agree."""

import hashlib
import json
import zipfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from kizu_contract.archive import pack_archive
from kizu_contract.bundle import Bundle, read_bundle, write_bundle
from kizu_contract.errors import BundleError, ManifestError
from kizu_contract.golden import golden_frame
from kizu_contract.manifest import FrameGraph, Manifest
from kizu_contract.tiles import FrameSize, TileGrid

RECORD = FrameGraph(48, 64, "shared", 1.75)
MEMBERS = ["manifest.json", "scorer.onnx", "frame.onnx", "golden.npz", "preview.png", "SHA256SUMS"]


@pytest.fixture
def whole(bundle: Bundle) -> Bundle:
    return replace(bundle, manifest=replace(bundle.manifest, frame_graph=RECORD), frame_graph=bundle.scorer)


def packed(path: Path, parts: Mapping[str, bytes]) -> Path:
    """A bundle of `parts` whose checksums fit."""
    own = {name: data for name, data in parts.items() if name != "SHA256SUMS"}
    sums = "".join(f"{hashlib.sha256(data).hexdigest()}  {name}\n" for name, data in own.items())
    path.write_bytes(pack_archive({**own, "SHA256SUMS": sums.encode()}))
    return path


def parts_of(path: Path) -> dict[str, bytes]:
    with zipfile.ZipFile(path) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def test_both_graphs_come_back(whole: Bundle, bundle: Bundle, tmp_path: Path) -> None:
    """The graph and its record are read as written and are part of what the content's name covers."""
    write_bundle(whole, tmp_path / "w.kizu")
    write_bundle(bundle, tmp_path / "p.kizu")
    read, plain = read_bundle(tmp_path / "w.kizu"), read_bundle(tmp_path / "p.kizu")
    assert (read.frame_graph, read.manifest.frame_graph) == (whole.frame_graph, RECORD)
    assert (plain.frame_graph, plain.manifest.frame_graph) == (None, None)
    assert list(parts_of(tmp_path / "w.kizu")) == MEMBERS
    assert (
        packed(tmp_path / "again.kizu", parts_of(tmp_path / "w.kizu")).read_bytes()
        == (tmp_path / "w.kizu").read_bytes()
    )
    assert read.sha256 != plain.sha256


def test_graph_and_record_go_together(whole: Bundle, bundle: Bundle, tmp_path: Path) -> None:
    """One without the other is refused, whether written or read."""
    for broken in (replace(whole, frame_graph=None), replace(whole, manifest=bundle.manifest)):
        with pytest.raises(BundleError, match="go together"):
            write_bundle(broken, tmp_path / "x.kizu")
    write_bundle(whole, tmp_path / "w.kizu")
    parts = parts_of(tmp_path / "w.kizu")
    del parts["frame.onnx"]
    with pytest.raises(BundleError, match="go together"):
        read_bundle(packed(tmp_path / "x.kizu", parts))


def test_a_changed_frame_graph_is_seen(whole: Bundle, tmp_path: Path) -> None:
    """Its checksum is among those that the content's name and the signature cover, and it may not be left out."""
    write_bundle(whole, tmp_path / "w.kizu")
    parts = parts_of(tmp_path / "w.kizu")
    (tmp_path / "x.kizu").write_bytes(pack_archive({**parts, "frame.onnx": parts["frame.onnx"][:-1]}))
    with pytest.raises(BundleError, match="SHA256SUMS"):
        read_bundle(tmp_path / "x.kizu")
    lines = [line for line in parts["SHA256SUMS"].splitlines(keepends=True) if b"frame.onnx" not in line]
    (tmp_path / "x.kizu").write_bytes(pack_archive({**parts, "SHA256SUMS": b"".join(lines)}))
    with pytest.raises(BundleError, match="SHA256SUMS"):
        read_bundle(tmp_path / "x.kizu")


def test_a_frame_graph_may_not_point_outside(whole: Bundle, tmp_path: Path) -> None:
    """What holds for the tiled graph holds for this one."""
    model = onnx.ModelProto.FromString(whole.scorer)
    model.graph.initializer[0].data_location = onnx.TensorProto.EXTERNAL
    model.graph.initializer[0].external_data.add(key="location", value="../../etc/shadow")
    with pytest.raises(BundleError, match=r"frame\.onnx keeps data outside"):
        write_bundle(replace(whole, frame_graph=model.SerializeToString()), tmp_path / "x.kizu")


@pytest.mark.parametrize(
    ("key", "value"),
    [("height", 0), ("width", 70_000), ("form", "other"), ("speedup", 0), ("speedup", None), ("more", 1)],
)
def test_the_record_is_read_strictly(manifest: Manifest, key: str, value: Any) -> None:
    """Each of its keys is needed, bounded and of its type; none is added; the whole is absent or there, never null."""
    raw = json.loads(replace(manifest, frame_graph=RECORD).to_json())
    assert Manifest.from_json(json.dumps(raw).encode()).frame_graph == RECORD
    raw["frame_graph"][key] = value
    with pytest.raises(ManifestError, match="frame_graph"):
        Manifest.from_json(json.dumps(raw).encode())
    raw["frame_graph"] = None
    with pytest.raises(ManifestError, match="frame_graph"):
        Manifest.from_json(json.dumps(raw).encode())


def test_the_only_size_is_that_of_the_graph(manifest: Manifest) -> None:
    """A model that knows one size of frames cannot have a graph for another."""
    assert replace(manifest, frame=FrameSize(48, 64), frame_graph=RECORD).frame_graph is RECORD
    with pytest.raises(ValueError, match="the frame graph takes 48 × 64"):
        replace(manifest, frame=FrameSize(64, 48), frame_graph=RECORD)


@pytest.mark.parametrize("size", [(4, 4), (3, 9), (30, 21)])
def test_a_golden_frame_is_made_of_golden_tiles(size: tuple[int, int]) -> None:
    """Side by side, row by row, from the first again when they are used up, cut off at the lower and right edge."""
    tiles = np.random.default_rng(0).integers(0, 256, (3, 4, 4, 1), np.uint8)
    frame = golden_frame(tiles, *size)
    assert frame.shape == (*size, 1)
    columns = -(-size[1] // 4)
    for y, x in np.ndindex(*size):
        assert frame[y, x] == tiles[(y // 4 * columns + x // 4) % 3, y % 4, x % 4]


@pytest.mark.parametrize("shape", [(3, 3), (5, 6), (16, 10), (4, 4)])
def test_a_joined_map_of_another_form_is_not_spread(shape: tuple[int, int]) -> None:
    """The map of another layout is refused rather than stretched."""
    layout = TileGrid(8, 8).layout(16, 12)
    assert layout.spread(np.zeros((4, 3), np.float32)).shape == (16, 12)
    with pytest.raises(ValueError, match="joined map"):
        layout.spread(np.zeros(shape, np.float32))
