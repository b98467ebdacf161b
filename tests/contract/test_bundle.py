"""The `.kizu` file: what is written is read back, and nothing else is."""

import hashlib
import io
import os
import struct
import time
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kizu_contract.archive import pack_archive
from kizu_contract.bundle import (
    LIMITS,
    MAX_BUNDLE_BYTES,
    Bundle,
    Golden,
    read_bundle,
    write_atomically,
    write_bundle,
)
from kizu_contract.errors import BundleError, ManifestError
from kizu_contract.signing import fingerprint_of, load_public_key
from kizu_contract.tiles import FrameSize

SUMMED = ("manifest.json", "scorer.onnx", "golden.npz", "preview.png")
sharing_fixtures = settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)


def parts_of(path: Path) -> dict[str, bytes]:
    with zipfile.ZipFile(path) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def resummed(parts: dict[str, bytes]) -> dict[str, bytes]:
    """The parts with checksums that fit: what a careful attacker would write."""
    sums = "".join(f"{hashlib.sha256(parts[name]).hexdigest()}  {name}\n" for name in SUMMED)
    return {**parts, "SHA256SUMS": sums.encode()}


def refusal(path: Path) -> str:
    """Why `path` is refused; the reason names the file."""
    with pytest.raises((BundleError, ManifestError)) as caught:
        read_bundle(path)
    assert str(path) in str(caught.value)
    return str(caught.value)


def equal(one: Bundle, other: Bundle) -> bool:
    arrays = zip(vars(one.golden).values(), vars(other.golden).values(), strict=True)
    return (one.manifest, one.scorer, one.preview) == (other.manifest, other.scorer, other.preview) and all(
        a is b is None or (a.dtype == b.dtype and np.array_equal(a, b)) for a, b in arrays
    )


class TestRoundTrip:
    """Writing and reading."""

    def test_a_bundle_comes_back_as_it_was_written(self, bundle: Bundle, bundle_file: Path) -> None:
        """Manifest, graph, golden tiles and preview are the same to the bit, and the content has a name."""
        read = read_bundle(bundle_file)
        assert equal(read, bundle)
        assert read.signed_by is None
        assert read.sha256 == hashlib.sha256(parts_of(bundle_file)["SHA256SUMS"]).hexdigest()

    def test_the_same_bundle_gives_the_same_bytes(self, bundle: Bundle, bundle_file: Path, tmp_path: Path) -> None:
        """Neither time nor place nor process shows in the file."""
        time.sleep(0.01)
        write_bundle(read_bundle(bundle_file), tmp_path / "again.kizu")
        assert (tmp_path / "again.kizu").read_bytes() == bundle_file.read_bytes()
        write_bundle(replace(bundle, preview=b"other"), tmp_path / "other.kizu")
        assert read_bundle(tmp_path / "other.kizu").sha256 != read_bundle(bundle_file).sha256

    def test_other_tools_can_open_it(self, bundle: Bundle, bundle_file: Path) -> None:
        """It is a plain ZIP, its golden.npz opens in numpy, and sha256sum's format holds the checksums."""
        parts = parts_of(bundle_file)
        assert list(parts) == [*SUMMED, "SHA256SUMS"]
        with np.load(io.BytesIO(parts["golden.npz"]), allow_pickle=False) as golden:
            np.testing.assert_array_equal(golden["tiles"], bundle.golden.tiles)
        for line in parts["SHA256SUMS"].decode().splitlines():
            digest, name = line.split("  ")
            assert hashlib.sha256(parts[name]).hexdigest() == digest

    def test_what_could_not_be_read_is_not_written(self, bundle: Bundle, tmp_path: Path) -> None:
        """A broken graph, golden tiles that do not fit or a part too large are refused before a file appears."""
        wrong_map = Golden(bundle.golden.tiles, bundle.golden.score, bundle.golden.map[:, :1])
        not_finite = Golden(bundle.golden.tiles, bundle.golden.score * np.float32(np.nan), bundle.golden.map)
        too_many = Golden(
            *(np.repeat(array, 100, axis=0) for array in vars(bundle.golden).values() if array is not None)
        )
        for broken in (
            replace(bundle, scorer=b"no graph"),
            replace(bundle, golden=wrong_map),
            replace(bundle, golden=not_finite),
            replace(bundle, golden=too_many),
            replace(bundle, preview=bytes(LIMITS["preview.png"] + 1)),
        ):
            with pytest.raises(BundleError):
                write_bundle(broken, tmp_path / "broken.kizu")
        assert not list(tmp_path.iterdir())


class TestPlaces:
    """Bundles whose graph is told where each tile lies."""

    @pytest.fixture
    def placed(self, bundle: Bundle) -> Bundle:
        """A bundle for frames of 6 × 8 pixels, which the grid covers with 3 × 4 tiles."""
        manifest = bundle.manifest
        graph = replace(manifest.graph, inputs=("tiles", "position"))
        position = np.arange(len(bundle.golden.tiles), dtype=np.int64) * 3 % 12
        return replace(
            bundle,
            manifest=replace(manifest, graph=graph, frame=FrameSize(6, 8)),
            golden=replace(bundle.golden, position=position),
        )

    def test_positions_and_frame_size_come_back(self, placed: Bundle, tmp_path: Path) -> None:
        """The golden tiles' positions and the one size of frames are read as they were written."""
        write_bundle(placed, tmp_path / "placed.kizu")
        read = read_bundle(tmp_path / "placed.kizu")
        assert equal(read, placed)
        assert read.golden.position is not None
        assert read.golden.position.dtype == np.int64
        assert (read.manifest.takes_position, read.manifest.frame, read.manifest.places) == (True, FrameSize(6, 8), 12)

    def test_without_positions_they_are_zero(self, placed: Bundle, tmp_path: Path) -> None:
        """A bundle that was written before golden tiles had positions stays readable."""
        old = replace(
            placed, manifest=replace(placed.manifest, frame=None), golden=replace(placed.golden, position=None)
        )
        write_bundle(old, tmp_path / "old.kizu")
        read = read_bundle(tmp_path / "old.kizu")
        assert read.manifest.frame is None
        assert read.manifest.misfit(1000, 3) is None
        assert (read.golden.positions() == 0).all()

    def test_positions_that_do_not_fit_are_refused(self, placed: Bundle, bundle: Bundle, tmp_path: Path) -> None:
        """Positions outside the grid, of another number, or for a graph that takes none, do not get into a file."""
        golden = placed.golden
        assert golden.position is not None
        for broken in (
            replace(placed, golden=replace(golden, position=golden.position + 12)),
            replace(placed, golden=replace(golden, position=golden.position - 12)),
            replace(placed, golden=replace(golden, position=golden.position[:-1])),
            replace(bundle, golden=golden),
        ):
            with pytest.raises(BundleError, match="position"):
                write_bundle(broken, tmp_path / "broken.kizu")

    def test_positions_of_another_type_are_refused(self, placed: Bundle, tmp_path: Path) -> None:
        """Positions must be int64."""
        path = tmp_path / "placed.kizu"
        write_bundle(placed, path)
        parts = parts_of(path)
        with zipfile.ZipFile(io.BytesIO(parts["golden.npz"])) as inner:
            arrays = {name: inner.read(name) for name in inner.namelist()}
        arrays["position.npy"] = arrays["score.npy"]
        path.write_bytes(pack_archive(resummed({**parts, "golden.npz": pack_archive(arrays)})))
        assert "int64" in refusal(path)


class TestAtomicity:
    """Readers see the old file or the new one."""

    def test_a_failing_write_leaves_the_old_file_alone(self, tmp_path: Path) -> None:
        """When the rename fails, nothing is left but what was there before."""
        target = tmp_path / "taken.kizu"
        target.mkdir()
        (target / "inside").write_bytes(b"old")
        with pytest.raises(OSError, match="taken"):
            write_atomically(target, b"new")
        assert [path.name for path in tmp_path.iterdir()] == ["taken.kizu"]
        assert (target / "inside").read_bytes() == b"old"

    def test_a_full_disk_leaves_no_temporary_file(self, tmp_path: Path) -> None:
        """When writing fails half-way, the temporary file goes and the old file stays."""
        import resource
        import signal

        target = tmp_path / "model.kizu"
        target.write_bytes(b"old")
        old_limit = resource.getrlimit(resource.RLIMIT_FSIZE)
        old_handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, old_limit[1]))
        try:
            with pytest.raises(OSError, match="File too large"):
                write_atomically(target, bytes(100_000))
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, old_limit)
            signal.signal(signal.SIGXFSZ, old_handler)
        assert [path.name for path in tmp_path.iterdir()] == ["model.kizu"]
        assert target.read_bytes() == b"old"

    def test_a_reader_never_sees_half_a_file(self, bundle: Bundle, tmp_path: Path) -> None:
        """An open old file stays whole while a new one takes its name."""
        path = tmp_path / "m.kizu"
        write_bundle(bundle, path)
        with path.open("rb") as old:
            write_bundle(replace(bundle, preview=b"new"), path)
            assert old.read() != path.read_bytes()
        assert read_bundle(path).preview == b"new"


class TestDamage:
    """Files that were cut, flipped or are something else."""

    def test_every_truncation_is_refused(self, bundle_file: Path, tmp_path: Path) -> None:
        """No prefix of a bundle is a bundle."""
        data = bundle_file.read_bytes()
        short = tmp_path / "short.kizu"
        for length in [*range(0, len(data), 37), len(data) - 1]:
            short.write_bytes(data[:length])
            refusal(short)

    def test_a_flipped_bit_is_refused_or_harmless(self, bundle: Bundle, bundle_file: Path, tmp_path: Path) -> None:
        """Each sampled bit flip is refused, or lay in a date or attribute that nobody reads."""
        data = bundle_file.read_bytes()
        flipped = tmp_path / "flipped.kizu"
        parts = [(data.index(part), len(part)) for part in parts_of(bundle_file).values()]
        for at in range(0, len(data) * 8, 13):
            damaged = bytearray(data)
            damaged[at // 8] ^= 1 << at % 8
            flipped.write_bytes(damaged)
            try:
                read = read_bundle(flipped)
            except (BundleError, ManifestError):
                continue
            assert equal(read, bundle)
            assert not any(start <= at // 8 < start + length for start, length in parts)

    @sharing_fixtures
    @given(data=st.data())
    def test_wild_damage_raises_our_errors_only(self, bundle_file: Path, data: st.DataObject) -> None:
        """Bytes overwritten, cut out or put in anywhere raise BundleError or ManifestError, if anything."""
        whole = bundle_file.read_bytes()
        at = data.draw(st.integers(0, len(whole)) | st.integers(len(whole) - 450, len(whole)))
        damaged = whole[:at] + data.draw(st.binary(max_size=30)) + whole[at + data.draw(st.integers(0, 40)) :]
        wild = bundle_file.with_name("wild.kizu")
        wild.write_bytes(damaged)
        try:
            read = read_bundle(wild)
        except (BundleError, ManifestError):
            return
        assert equal(read, read_bundle(bundle_file))

    @sharing_fixtures
    @given(data=st.binary(max_size=200))
    def test_garbage_is_refused(self, tmp_path: Path, data: bytes) -> None:
        """Any bytes that are no ZIP raise BundleError."""
        path = tmp_path / "garbage.kizu"
        path.write_bytes(data)
        refusal(path)

    def test_missing_files_folders_and_pipes_are_refused(self, tmp_path: Path) -> None:
        """Nothing but a regular file is opened; a pipe would block for ever."""
        refusal(tmp_path / "missing.kizu")
        refusal(tmp_path)
        os.mkfifo(tmp_path / "pipe.kizu")
        assert "not a file" in refusal(tmp_path / "pipe.kizu")

    def test_a_huge_file_is_refused_by_its_size(self, tmp_path: Path) -> None:
        """A file beyond every limit is not opened."""
        path = tmp_path / "huge.kizu"
        with path.open("wb") as file:
            file.truncate(MAX_BUNDLE_BYTES + 1)
        assert "at most" in refusal(path)


class TestHostileArchives:
    """ZIP tricks."""

    @pytest.mark.parametrize("name", ["../evil", "/etc/passwd", "evil.pkl", "preview.png/", "sub/scorer.onnx"])
    def test_foreign_names_are_refused(self, bundle_file: Path, name: str) -> None:
        """One extra member of any other name is enough."""
        with zipfile.ZipFile(bundle_file, "a") as archive:
            archive.writestr(name, b"x")
        assert "do not belong" in refusal(bundle_file)

    def test_a_name_cut_short_by_a_nul_is_refused(self, bundle_file: Path) -> None:
        """The name on disk counts, not what zipfile makes of it."""
        parts = {name.replace("preview.png", "preview.pngX"): data for name, data in parts_of(bundle_file).items()}
        bundle_file.write_bytes(pack_archive(parts).replace(b"preview.pngX", b"preview.png\0"))
        assert "do not belong" in refusal(bundle_file)

    @pytest.mark.filterwarnings("ignore:Duplicate name")
    def test_a_name_that_stands_twice_is_refused(self, bundle_file: Path) -> None:
        """Two readers could take two different members."""
        with zipfile.ZipFile(bundle_file, "a") as archive:
            archive.writestr("preview.png", b"other")
        assert "twice" in refusal(bundle_file)

    @pytest.mark.parametrize("missing", [*SUMMED, "SHA256SUMS"])
    def test_no_part_may_be_missing(self, bundle_file: Path, missing: str) -> None:
        """Each part is needed, and its absence is named."""
        parts = parts_of(bundle_file)
        del parts[missing]
        bundle_file.write_bytes(pack_archive(parts))
        assert missing in refusal(bundle_file)

    def test_a_compressed_bomb_is_refused_before_unpacking(self, bundle_file: Path) -> None:
        """A gigabyte of zeros in a megabyte is refused by its header, in no time and no memory."""
        import tracemalloc

        with (
            zipfile.ZipFile(bundle_file, "w", zipfile.ZIP_DEFLATED) as archive,
            archive.open("scorer.onnx", "w") as part,
        ):
            for _ in range(64):
                part.write(bytes(2**20))
        assert bundle_file.stat().st_size < 2**17
        tracemalloc.start()
        try:
            assert "compressed" in refusal(bundle_file)
            assert tracemalloc.get_traced_memory()[1] < 2**20
        finally:
            tracemalloc.stop()

    def test_a_bomb_inside_the_golden_tiles_is_refused(self, bundle_file: Path) -> None:
        """The inner ZIP follows the same rules as the outer one."""
        inner = io.BytesIO()
        np.savez_compressed(inner, tiles=np.zeros(10**7, np.uint8), score=np.zeros(1), map=np.zeros(1))
        bundle_file.write_bytes(pack_archive(resummed({**parts_of(bundle_file), "golden.npz": inner.getvalue()})))
        assert "compressed" in refusal(bundle_file)

    @pytest.mark.parametrize(("offset", "label"), [(20, "compress_size"), (24, "file_size")])
    @pytest.mark.parametrize("change", [-1, 1, 1000, 2**31])
    def test_a_lying_size_is_refused(self, bundle_file: Path, offset: int, label: str, change: int) -> None:
        """A directory that tells other sizes than the data has is refused, both ways."""
        data = bytearray(bundle_file.read_bytes())
        at = data.index(b"PK\x01\x02") + offset
        (size,) = struct.unpack_from("<I", data, at)
        struct.pack_into("<I", data, at, size + change)
        bundle_file.write_bytes(data)
        assert refusal(bundle_file), label

    def test_members_that_share_their_bytes_are_refused(self, bundle_file: Path) -> None:
        """Two names for one stretch of the file do not pass: the local header tells another name."""
        data = bytearray(bundle_file.read_bytes())
        first = data.index(b"PK\x01\x02")
        second = data.index(b"PK\x01\x02", first + 1)
        data[second + 42 : second + 46] = data[first + 42 : first + 46]
        bundle_file.write_bytes(data)
        refusal(bundle_file)

    def test_a_million_entries_are_refused_before_parsing(self, bundle_file: Path) -> None:
        """The directory is bounded by what a bundle can hold, so that no list of millions is built."""
        data = bundle_file.read_bytes()
        start, end = data.index(b"PK\x01\x02"), data.index(b"PK\x05\x06")
        one = data[start : data.index(b"PK\x01\x02", start + 1)]
        directory = one * 200_000
        tail = struct.pack("<4s4H2LH", b"PK\x05\x06", 0, 0, 5, 5, len(directory), start, 0)
        bundle_file.write_bytes(data[:start] + directory + tail)
        assert "belong there" in refusal(bundle_file)
        bundle_file.write_bytes(
            data[:end] + struct.pack("<4s4H2LH", b"PK\x05\x06", 0, 0, 60000, 60000, end - start, start, 0)
        )
        assert "belong there" in refusal(bundle_file)

    @pytest.mark.parametrize("where", ["comment", "before", "after"])
    def test_bytes_around_the_archive_are_refused(self, bundle_file: Path, where: str) -> None:
        """Comments, prefixes and suffixes could hide a second archive."""
        data = bundle_file.read_bytes()
        changed = {
            "comment": data[:-2] + struct.pack("<H", 1000) + bytes(1000),
            "before": b"#!/bin/sh\n" + data,
            "after": data + b"\n",
        }
        bundle_file.write_bytes(changed[where])
        refusal(bundle_file)

    def test_zip64_is_refused(self, bundle_file: Path) -> None:
        """A ZIP64 locator would make the reader follow other numbers than those checked."""
        data = bundle_file.read_bytes()
        start, end = data.index(b"PK\x01\x02"), data.index(b"PK\x05\x06")
        locator = struct.pack("<4sLQL", b"PK\x06\x07", 0, start, 1)
        tail = struct.pack("<4s4H2LH", b"PK\x05\x06", 0, 0, 5, 5, end - start + 20, start, 0)
        bundle_file.write_bytes(data[:end] + locator + tail)
        assert "ZIP64" in refusal(bundle_file)

    def test_an_encrypted_part_is_refused(self, bundle_file: Path) -> None:
        """The encryption flag is seen before anybody asks for a password."""
        data = bytearray(bundle_file.read_bytes())
        data[data.index(b"PK\x01\x02") + 8] |= 1
        bundle_file.write_bytes(data)
        assert "encrypted" in refusal(bundle_file)


class TestHostileParts:
    """Parts that are wrong although their checksums fit."""

    def test_a_changed_part_is_refused_by_its_checksum(self, bundle_file: Path) -> None:
        """A ZIP that is whole, with a part that is not the one summed."""
        bundle_file.write_bytes(pack_archive({**parts_of(bundle_file), "preview.png": b"changed"}))
        assert "SHA256SUMS" in refusal(bundle_file)

    def test_a_bad_manifest_is_refused(self, bundle_file: Path) -> None:
        """A manifest of another schema raises ManifestError."""
        parts = parts_of(bundle_file)
        parts["manifest.json"] = parts["manifest.json"].replace(b'"schema": 1', b'"schema": 2')
        bundle_file.write_bytes(pack_archive(resummed(parts)))
        with pytest.raises(ManifestError, match="schema 2"):
            read_bundle(bundle_file)

    def test_external_data_is_refused(self, bundle_file: Path) -> None:
        """A graph that points at another file is not loaded."""
        import onnx

        parts = parts_of(bundle_file)
        model = onnx.ModelProto.FromString(parts["scorer.onnx"])
        model.graph.initializer[0].data_location = onnx.TensorProto.EXTERNAL
        model.graph.initializer[0].external_data.add(key="location", value="../../etc/shadow")
        bundle_file.write_bytes(pack_archive(resummed({**parts, "scorer.onnx": model.SerializeToString()})))
        assert "outside the file" in refusal(bundle_file)

    def test_a_pickled_array_is_refused_and_not_run(self, bundle_file: Path, tmp_path: Path) -> None:
        """No pickle is opened, whichever array it hides in."""
        witness = tmp_path / "ran"

        class Evil:
            def __reduce__(self) -> tuple[Callable[[str], None], tuple[str]]:
                return os.mkdir, (str(witness),)

        for victim in ("tiles", "score", "map"):
            with zipfile.ZipFile(io.BytesIO(parts_of(bundle_file)["golden.npz"])) as archive:
                arrays = {name: archive.read(name) for name in archive.namelist()}
            pickled = io.BytesIO()
            np.save(pickled, np.array([Evil()], dtype=object))
            inner = pack_archive({**arrays, f"{victim}.npy": pickled.getvalue()})
            changed = bundle_file.with_name("pickled.kizu")
            changed.write_bytes(pack_archive(resummed({**parts_of(bundle_file), "golden.npz": inner})))
            assert "no plain array" in refusal(changed)
        assert not witness.exists()

    @pytest.mark.parametrize(
        "header",
        [
            "{'descr': '|u1', 'fortran_order': False, 'shape': (999999999, 999999999, 999999999, 1), }",
            "{'descr': '|u1', 'fortran_order': False, 'shape': (3, 4, 4, 2), }",
            "{'descr': '|u1', 'fortran_order': False, 'shape': (-3, -4, 4, 1), }",
            "{'descr': '|u1', 'fortran_order': True, 'shape': (3, 4, 4, 1), }",
            "{'descr': '|O', 'fortran_order': False, 'shape': (3, 4, 4, 1), }",
            "{'descr': '<f4', 'fortran_order': False, 'shape': (12, 1), }",
            "{'descr': '|u1', 'fortran_order': False, 'shape': (48,), }",
            "{'descr': '|u1', 'fortran_order': False, 'shape': (48), }",
            "__import__('os').abort()",
            "[" * 9000,
        ],
    )
    def test_a_lying_array_header_is_refused(self, bundle_file: Path, header: str) -> None:
        """An array that is not what its header says raises BundleError, and nothing is allocated on its word."""
        parts = parts_of(bundle_file)
        with zipfile.ZipFile(io.BytesIO(parts["golden.npz"])) as inner:
            arrays = {name: inner.read(name) for name in inner.namelist()}
        text = header.encode() + b"\n"
        arrays["tiles.npy"] = b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text + arrays["tiles.npy"][128:]
        bundle_file.write_bytes(pack_archive(resummed({**parts, "golden.npz": pack_archive(arrays)})))
        assert "golden.npz" in refusal(bundle_file)

    @sharing_fixtures
    @given(data=st.data())
    def test_damaged_golden_tiles_raise_our_errors_only(self, bundle_file: Path, data: st.DataObject) -> None:
        """Fuzzing golden.npz, with checksums that fit, raises BundleError if anything."""
        parts = parts_of(bundle_file)
        golden = bytearray(parts["golden.npz"])
        for _ in range(data.draw(st.integers(1, 4))):
            golden[data.draw(st.integers(0, len(golden) - 1))] = data.draw(st.integers(0, 255))
        fuzzed = bundle_file.with_name("fuzzed.kizu")
        fuzzed.write_bytes(pack_archive(resummed({**parts, "golden.npz": bytes(golden)})))
        try:
            read_bundle(fuzzed)
        except BundleError:
            return


class TestSignatures:
    """Who may put a model on the line."""

    def test_a_signature_by_a_trusted_key_is_named(self, bundle: Bundle, tmp_path: Path) -> None:
        """The bundle tells which of several trusted keys signed it."""
        path, key, other = tmp_path / "s.kizu", Ed25519PrivateKey.generate(), Ed25519PrivateKey.generate()
        write_bundle(bundle, path, key)
        read = read_bundle(path, [other.public_key(), key.public_key()], require_signature=True)
        assert read.signed_by == fingerprint_of(key.public_key())

    def test_signing_does_not_change_the_name_of_the_content(
        self, bundle: Bundle, bundle_file: Path, tmp_path: Path
    ) -> None:
        """`sha256` is the same with and without a signature."""
        write_bundle(bundle, tmp_path / "s.kizu", Ed25519PrivateKey.generate())
        assert read_bundle(tmp_path / "s.kizu").sha256 == read_bundle(bundle_file).sha256

    def test_a_foreign_signature_is_refused(self, bundle: Bundle, tmp_path: Path) -> None:
        """As soon as one key is trusted, a signature by another is refused."""
        path, key, other = tmp_path / "s.kizu", Ed25519PrivateKey.generate(), Ed25519PrivateKey.generate()
        write_bundle(bundle, path, other)
        with pytest.raises(BundleError, match="none of the 1 trusted keys"):
            read_bundle(path, [key.public_key()])
        with pytest.raises(BundleError, match="none of the 0 trusted keys"):
            read_bundle(path, require_signature=True)

    def test_a_removed_signature_is_refused_where_one_is_required(self, bundle_file: Path) -> None:
        """An unsigned bundle passes only where signatures are not required."""
        key = Ed25519PrivateKey.generate().public_key()
        assert read_bundle(bundle_file, [key]).signed_by is None
        with pytest.raises(BundleError, match="is not signed"):
            read_bundle(bundle_file, [key], require_signature=True)

    def test_a_signature_does_not_cover_other_contents(self, bundle: Bundle, tmp_path: Path) -> None:
        """A signature moved to a bundle with other contents is refused."""
        path, key = tmp_path / "s.kizu", Ed25519PrivateKey.generate()
        write_bundle(bundle, path, key)
        parts = {**parts_of(path), "preview.png": b"other"}
        path.write_bytes(pack_archive(resummed(parts)))
        with pytest.raises(BundleError, match="trusted keys"):
            read_bundle(path, [key.public_key()])

    @pytest.mark.parametrize("length", [0, 63])
    def test_a_signature_of_another_length_is_refused(self, bundle: Bundle, tmp_path: Path, length: int) -> None:
        """A cut signature raises BundleError."""
        path, key = tmp_path / "s.kizu", Ed25519PrivateKey.generate()
        write_bundle(bundle, path, key)
        parts = parts_of(path)
        path.write_bytes(pack_archive({**parts, "SIGNATURE": parts["SIGNATURE"][:length]}))
        with pytest.raises(BundleError, match="trusted keys"):
            read_bundle(path, [key.public_key()])

    def test_only_an_ed25519_public_key_is_loaded(self, tmp_path: Path) -> None:
        """A key file of another kind, or none, raises BundleError that names it."""
        from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
        from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

        path, key = tmp_path / "key.pem", Ed25519PrivateKey.generate().public_key()
        path.write_bytes(key.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo))
        assert load_public_key(path).public_bytes_raw() == key.public_bytes_raw()
        other = X25519PrivateKey.generate().public_key()
        for content in (other.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo), b"", b"\xff" * 99):
            path.write_bytes(content)
            with pytest.raises(BundleError, match=r"key\.pem"):
                load_public_key(path)
        with pytest.raises(BundleError, match=r"missing\.pem"):
            load_public_key(tmp_path / "missing.pem")


def test_no_byte_of_a_bundle_can_be_changed(bundle_file: Path) -> None:
    """Whichever bit is flipped, in parts, headers or directory, the file is refused; so is one that grew."""
    whole = bundle_file.read_bytes()
    refusals = 0
    for at in range(len(whole)):
        if 2000 < at < len(whole) - 2000 and at % 17:  # the parts' own bytes: some of them will do
            continue
        bundle_file.write_bytes(whole[:at] + bytes([whole[at] ^ (1 << at % 8)]) + whole[at + 1 :])
        refusal(bundle_file)
        refusals += 1
    assert refusals > 2000
    bundle_file.write_bytes(b"\0" + whole)
    refusal(bundle_file)
    bundle_file.write_bytes(whole)
    assert read_bundle(bundle_file).manifest.name == "plates"
