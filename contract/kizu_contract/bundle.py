"""The `.kizu` file: one ZIP with manifest, graph, golden tiles, preview, checksums and an optional signature.

Reading is bounded before anything is parsed: names are whitelisted, sizes limited, no compression, no pickle, no paths.
Writing is atomic and deterministic. The format is described in docs/bundle-format.md.
"""

import hashlib
import os
import stat
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from kizu_contract.archive import most_bytes, pack_archive, unpack_archive
from kizu_contract.errors import BundleError, ManifestError
from kizu_contract.golden import MAX_GOLDEN_BYTES, Golden, pack_golden, unpack_golden
from kizu_contract.manifest import MAX_MANIFEST_BYTES, Manifest
from kizu_contract.onnx_wire import has_external_data

__all__ = [
    "LIMITS",
    "MAX_BUNDLE_BYTES",
    "Bundle",
    "Golden",
    "load_public_key",
    "read_bundle",
    "write_atomically",
    "write_bundle",
]

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
    GOLDEN: MAX_GOLDEN_BYTES,
    PREVIEW: 8 * 2**20,
    SUMS: 4096,
    SIGNATURE: 64,
}
"""Names that a bundle may hold, with the most bytes of each."""
MAX_BUNDLE_BYTES = most_bytes(LIMITS)
_SUMMED = (MANIFEST, SCORER, GOLDEN, PREVIEW)


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

    What could not be read back is refused: raises BundleError or ManifestError, and OSError when the disk refuses.
    """
    parts = {
        MANIFEST: bundle.manifest.to_json(),
        SCORER: bundle.scorer,
        GOLDEN: pack_golden(bundle.golden),
        PREVIEW: bundle.preview,
    }
    parts[SUMS] = _sums(parts)
    if key is not None:
        parts[SIGNATURE] = key.sign(parts[SUMS])
    for name, data in parts.items():
        if len(data) > LIMITS[name]:
            raise BundleError(f"{name} would have {len(data)} bytes; at most {LIMITS[name]} are allowed")
    _verify(parts, (), require_signature=False)
    write_atomically(path, pack_archive(parts))


def read_bundle(path: Path, trusted: Sequence[Ed25519PublicKey] = (), *, require_signature: bool = False) -> Bundle:
    """Read and verify the bundle at `path`: bounds, names, checksums, manifest, golden shapes, signature.

    A signature by none of the `trusted` keys is refused when `require_signature` is set or any key is trusted;
    an unsigned bundle only when `require_signature` is set. Raises BundleError or ManifestError, naming the file.
    """
    try:
        found = path.stat()
        if not stat.S_ISREG(found.st_mode):
            raise BundleError("is not a file")
        if found.st_size > MAX_BUNDLE_BYTES:
            raise BundleError(f"has {found.st_size} bytes; at most {MAX_BUNDLE_BYTES} are allowed")
        with path.open("rb") as file:
            parts = unpack_archive(file, LIMITS)
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
    temporary = path.with_name(f".{path.name}.{os.getpid()}.{threading.get_ident()}.tmp")
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


def _verify(parts: Mapping[str, bytes], trusted: Sequence[Ed25519PublicKey], *, require_signature: bool) -> Bundle:
    missing = [name for name in (*_SUMMED, SUMS) if name not in parts]
    if missing:
        raise BundleError(f"lacks {', '.join(missing)}")
    if parts[SUMS] != _sums(parts):
        raise BundleError("SHA256SUMS does not match the contents: the file is damaged or was changed")
    signed_by = _check_signature(parts, trusted, require_signature=require_signature)
    manifest = Manifest.from_json(parts[MANIFEST])
    if has_external_data(parts[SCORER]):
        raise BundleError("scorer.onnx keeps data outside the file or is not ONNX; export it in one piece")
    golden = unpack_golden(parts[GOLDEN])
    golden.check(manifest.graph.tile_px, manifest.graph.channels, manifest.graph.map_cell_px)
    golden.check_position(manifest.takes_position, manifest.places)
    return Bundle(manifest, parts[SCORER], golden, parts[PREVIEW], signed_by, hashlib.sha256(parts[SUMS]).hexdigest())


def _check_signature(
    parts: Mapping[str, bytes], trusted: Sequence[Ed25519PublicKey], *, require_signature: bool
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


def _sums(parts: Mapping[str, bytes]) -> bytes:
    lines = [f"{hashlib.sha256(parts[name]).hexdigest()}  {name}\n" for name in _SUMMED]
    return "".join(lines).encode()
