"""The `.kizu` file: one ZIP with manifest, graph, golden tiles, preview, checksums and an optional signature.

Reading is bounded before anything is unpacked: names are whitelisted, sizes limited, no pickle, no paths. Writing is
atomic and deterministic. The format is described in docs/bundle-format.md.
"""

import hashlib
import io
import os
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from numpy.typing import NDArray

from kizu_contract.errors import BundleError, ManifestError
from kizu_contract.manifest import MAX_MANIFEST_BYTES, Manifest
from kizu_contract.onnx_wire import has_external_data

MANIFEST, SCORER, GOLDEN, PREVIEW, SUMS, SIGNATURE = (
    "manifest.json",
    "scorer.onnx",
    "golden.npz",
    "preview.png",
    "SHA256SUMS",
    "SIGNATURE",
)
LIMITS = {
    MANIFEST: MAX_MANIFEST_BYTES,
    SCORER: 1 * 2**30,
    GOLDEN: 64 * 2**20,
    PREVIEW: 8 * 2**20,
    SUMS: 4096,
    SIGNATURE: 64,
}
"""Names that a bundle may hold, with the most bytes each may unpack to."""
MAX_BUNDLE_BYTES = sum(LIMITS.values())
MAX_GOLDEN_TILES = 256
_SUMMED = (MANIFEST, SCORER, GOLDEN, PREVIEW)
_EPOCH = (1980, 1, 1, 0, 0, 0)


@dataclass(frozen=True, eq=False)
class Golden:
    """Tiles uint8 [K, T, T, C] with the score [K] and map [K, T/m, T/m], float32, that the graph must give."""

    tiles: NDArray[np.uint8]
    score: NDArray[np.float32]
    map: NDArray[np.float32]


@dataclass(frozen=True, eq=False)
class Bundle:
    """A bundle in memory. `sha256` is the hash of its SHA256SUMS: it names the content, signed or not."""

    manifest: Manifest
    scorer: bytes
    golden: Golden
    preview: bytes
    signed_by: str | None = None
    """Hex of the trusted public key that signed it, None where no trusted key did."""
    sha256: str = ""


def write_bundle(bundle: Bundle, path: Path, key: Ed25519PrivateKey | None = None) -> None:
    """Write `bundle` to `path` through a temporary name, synced and renamed; signed when `key` is given.

    Raises BundleError when a part exceeds its limit, OSError when the disk refuses.
    """
    parts = {
        MANIFEST: bundle.manifest.to_json(),
        SCORER: bundle.scorer,
        GOLDEN: _pack_golden(bundle.golden),
        PREVIEW: bundle.preview,
    }
    parts[SUMS] = _sums(parts)
    if key is not None:
        parts[SIGNATURE] = key.sign(parts[SUMS])
    for name, data in parts.items():
        if len(data) > LIMITS[name]:
            raise BundleError(f"{name} would have {len(data)} bytes; at most {LIMITS[name]} are allowed")
    buffer = io.BytesIO()
    _write_zip(buffer, parts)
    write_atomically(path, buffer.getvalue())


def read_bundle(path: Path, trusted: Sequence[Ed25519PublicKey] = (), *, require_signature: bool = False) -> Bundle:
    """Read and verify the bundle at `path`: bounds, names, checksums, manifest, golden shapes, signature.

    A signature by none of the `trusted` keys is refused when `require_signature` is set or any key is trusted;
    an unsigned bundle only when `require_signature` is set. Raises BundleError or ManifestError, naming the file.
    """
    try:
        if path.stat().st_size > MAX_BUNDLE_BYTES:
            raise BundleError(f"has {path.stat().st_size} bytes; at most {MAX_BUNDLE_BYTES} are allowed")
        with path.open("rb") as file:
            parts = _read_zip(file)
        return _verify(parts, trusted, require_signature=require_signature)
    except OSError as exc:
        raise BundleError(f"{path}: cannot be read: {exc.strerror or exc}") from exc
    except (BundleError, ManifestError) as exc:
        raise type(exc)(f"{path}: {exc}") from exc


def load_public_key(path: Path) -> Ed25519PublicKey:
    """Read an Ed25519 public key, PEM. Raises BundleError, naming the file."""
    from cryptography.hazmat.primitives.serialization import load_pem_public_key  # noqa: PLC0415 - heavy, rarely used

    try:
        key = load_pem_public_key(path.read_bytes())
    except (OSError, ValueError) as exc:
        raise BundleError(f"{path}: is not a readable public key in PEM form: {exc}") from exc
    if not isinstance(key, Ed25519PublicKey):
        raise BundleError(f"{path}: is not an Ed25519 key; make one with kizu-export keygen")
    return key


def write_atomically(path: Path, data: bytes) -> None:
    """Write `data` to `path` so that a reader, or a power cut, sees the old file or the whole new one."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def _verify(parts: dict[str, bytes], trusted: Sequence[Ed25519PublicKey], *, require_signature: bool) -> Bundle:
    missing = [name for name in (*_SUMMED, SUMS) if name not in parts]
    if missing:
        raise BundleError(f"lacks {', '.join(missing)}")
    if parts[SUMS] != _sums(parts):
        raise BundleError("SHA256SUMS does not match the contents: the file is damaged or was changed")
    signed_by = _check_signature(parts, trusted, require_signature=require_signature)
    manifest = Manifest.from_json(parts[MANIFEST])
    if has_external_data(parts[SCORER]):
        raise BundleError("scorer.onnx keeps data outside the file or is not ONNX; export it in one piece")
    golden = _unpack_golden(parts[GOLDEN], manifest)
    return Bundle(manifest, parts[SCORER], golden, parts[PREVIEW], signed_by, hashlib.sha256(parts[SUMS]).hexdigest())


def _check_signature(
    parts: dict[str, bytes], trusted: Sequence[Ed25519PublicKey], *, require_signature: bool
) -> str | None:
    if SIGNATURE not in parts:
        if require_signature:
            raise BundleError("is not signed, and signatures are required; sign it with kizu-export --sign KEY")
        return None
    for key in trusted:
        try:
            key.verify(parts[SIGNATURE], parts[SUMS])
        except InvalidSignature:
            continue
        return key.public_bytes_raw().hex()
    if trusted or require_signature:
        raise BundleError(f"is signed by none of the {len(trusted)} trusted keys")
    return None


def _sums(parts: dict[str, bytes]) -> bytes:
    lines = [f"{hashlib.sha256(parts[name]).hexdigest()}  {name}\n" for name in _SUMMED]
    return "".join(lines).encode()


def _write_zip(file: BinaryIO, parts: dict[str, bytes]) -> None:
    with zipfile.ZipFile(file, "w") as archive:
        for name, data in parts.items():
            info = zipfile.ZipInfo(name, _EPOCH)
            info.compress_type = zipfile.ZIP_DEFLATED
            info.external_attr = 0o644 << 16
            archive.writestr(info, data, compresslevel=6)


def _read_zip(file: BinaryIO, limits: dict[str, int] = LIMITS) -> dict[str, bytes]:
    """Unpack a ZIP whose members are among `limits`, reading at most as many bytes of each as allowed."""
    try:
        with zipfile.ZipFile(file) as archive:
            members = archive.infolist()
            names = [member.filename for member in members]
            foreign = sorted(set(names) - limits.keys())
            if foreign or len(names) != len(set(names)):
                raise BundleError(f"holds names that do not belong there, or one twice: {(foreign or names)[:5]}")
            for member in members:
                if member.file_size > limits[member.filename]:
                    raise BundleError(
                        f"{member.filename} unpacks to {member.file_size} bytes; "
                        f"at most {limits[member.filename]} are allowed"
                    )
                if member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED) or member.flag_bits & 1:
                    raise BundleError(f"{member.filename} is encrypted or packed in a way that kizu does not read")
            return {member.filename: _read_member(archive, member) for member in members}
    except BundleError:
        raise
    except (zipfile.BadZipFile, ValueError, EOFError, NotImplementedError, RuntimeError) as exc:
        raise BundleError(f"is not a whole ZIP file: {exc}") from exc
    except OSError as exc:
        raise BundleError(f"is not a whole ZIP file: {exc}") from exc
    except Exception as exc:
        # zlib.error has no common base with the others; struct.error comes from mangled extra fields.
        raise BundleError(f"is damaged: {exc}") from exc


def _read_member(archive: zipfile.ZipFile, member: zipfile.ZipInfo) -> bytes:
    with archive.open(member) as stream:
        data = stream.read(member.file_size + 1)
    if len(data) != member.file_size:
        raise BundleError(f"{member.filename} holds {len(data)} bytes, its header says {member.file_size}")
    return data


def _pack_golden(golden: Golden) -> bytes:
    parts = {}
    for name, array in (("tiles", golden.tiles), ("score", golden.score), ("map", golden.map)):
        buffer = io.BytesIO()
        np.lib.format.write_array(buffer, np.ascontiguousarray(array), version=(1, 0), allow_pickle=False)
        parts[f"{name}.npy"] = buffer.getvalue()
    buffer = io.BytesIO()
    _write_zip(buffer, parts)
    return buffer.getvalue()


def _unpack_golden(data: bytes, manifest: Manifest) -> Golden:
    graph = manifest.graph
    names = ("tiles.npy", "score.npy", "map.npy")
    parts = _read_zip(io.BytesIO(data), dict.fromkeys(names, LIMITS[GOLDEN]))
    if set(parts) != set(names):
        raise BundleError(f"golden.npz must hold {', '.join(names)}")
    tiles = _read_npy(parts["tiles.npy"], np.dtype(np.uint8))
    score = _read_npy(parts["score.npy"], np.dtype(np.float32))
    cells = _read_npy(parts["map.npy"], np.dtype(np.float32))
    count, side = len(score), graph.tile_px // graph.map_cell_px
    wanted = ((count, graph.tile_px, graph.tile_px, graph.channels), (count,), (count, side, side))
    if not 1 <= count <= MAX_GOLDEN_TILES or (tiles.shape, score.shape, cells.shape) != wanted:
        raise BundleError(f"golden.npz holds shapes {tiles.shape}, {score.shape}, {cells.shape}; wanted {wanted}")
    if not (np.isfinite(score).all() and np.isfinite(cells).all()):
        raise BundleError("golden.npz holds scores that are not finite numbers")
    return Golden(tiles, score, cells)


def _read_npy(data: bytes, dtype: np.dtype) -> NDArray:  # type: ignore[type-arg]  # the caller's dtype decides
    """Read one .npy whose header must describe exactly the bytes that follow: nothing is allocated on its word."""
    stream = io.BytesIO(data)
    try:
        if np.lib.format.read_magic(stream) != (1, 0):
            raise BundleError("golden.npz holds an array of an unknown version")
        shape, fortran, found = np.lib.format.read_array_header_1_0(stream)
    except (ValueError, SyntaxError, TypeError, RecursionError, MemoryError) as exc:
        raise BundleError(f"golden.npz holds a damaged array: {exc}") from exc
    if found != dtype or fortran or any(length < 0 for length in shape):
        raise BundleError(f"golden.npz holds {found} where {dtype} in C order is needed")
    body = data[stream.tell() :]
    wanted = dtype.itemsize
    for length in shape:
        wanted *= int(length)
    if wanted != len(body):
        raise BundleError(f"golden.npz holds {len(body)} bytes where its header says {wanted}")
    return np.frombuffer(body, dtype).reshape(shape)
