"""The `.kizu` file: one ZIP with manifest, graph, golden tiles, preview, checksums and an optional signature.

Reading is bounded before anything is parsed: names are whitelisted, sizes limited, no compression, no pickle, no paths.
Writing is atomic and deterministic. The format is described in docs/bundle-format.md.
"""

import hashlib
import os
import stat
import threading
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from kizu_contract.archive import most_bytes, pack_archive, unpack_archive
from kizu_contract.errors import BundleError, ManifestError
from kizu_contract.golden import MAX_GOLDEN_BYTES, Golden, pack_golden, unpack_golden
from kizu_contract.manifest import MAX_MANIFEST_BYTES, Manifest
from kizu_contract.onnx_wire import has_external_data
from kizu_contract.signing import find_signer

__all__ = [
    "LIMITS",
    "MAX_BUNDLE_BYTES",
    "Bundle",
    "Golden",
    "read_bundle",
    "write_atomically",
    "write_bundle",
]

MANIFEST, SCORER, FRAME, GOLDEN, PREVIEW, SUMS, SIGNATURE = (
    "manifest.json",
    "scorer.onnx",
    "frame.onnx",
    "golden.npz",
    "preview.png",
    "SHA256SUMS",
    "SIGNATURE",
)
LIMITS = {
    MANIFEST: MAX_MANIFEST_BYTES,
    SCORER: 1 * 2**30,
    FRAME: 1 * 2**30,
    GOLDEN: MAX_GOLDEN_BYTES,
    PREVIEW: 8 * 2**20,
    SUMS: 4096,
    SIGNATURE: 64,
}
"""Names that a bundle may hold, with the most bytes of each."""
MAX_BUNDLE_BYTES = most_bytes(LIMITS)
_SUMMED = (MANIFEST, SCORER, FRAME, GOLDEN, PREVIEW)


@dataclass(frozen=True, eq=False)
class Bundle:
    """A bundle in memory. `sha256` is the hash of its SHA256SUMS: it names the content, signed or not."""

    manifest: Manifest
    scorer: bytes
    golden: Golden
    preview: bytes
    signed_by: str | None = None
    """Fingerprint of the trusted key that signed it, None where no trusted key did."""
    sha256: str = ""
    is_signed: bool = False
    """Whether it carries a signature, by whomever."""
    frame_graph: bytes | None = None
    """The graph that takes frames of one size whole, where there is one: what `manifest.frame_graph` says of it."""


def write_bundle(bundle: Bundle, path: Path, key: Ed25519PrivateKey | None = None) -> None:
    """Write `bundle` to `path` through a temporary name, synced and renamed; signed when `key` is given.

    What could not be read back is refused: raises BundleError or ManifestError, and OSError when the disk refuses.
    """
    parts = {
        MANIFEST: bundle.manifest.to_json(),
        SCORER: bundle.scorer,
        **({FRAME: bundle.frame_graph} if bundle.frame_graph is not None else {}),
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


def read_bundle(
    path: Path,
    trusted: Sequence[Ed25519PublicKey] = (),
    *,
    require_signature: bool = False,
    revoked: Collection[str] = (),
) -> Bundle:
    """Read and verify the bundle at `path`: bounds, names, checksums, manifest, golden shapes, signature.

    A signature by none of the `trusted` keys is refused when `require_signature` is set or any key is trusted, and one
    by a key whose fingerprint is among the `revoked` always; an unsigned bundle only when `require_signature` is set.
    Raises BundleError or ManifestError, naming the file.
    """
    try:
        found = path.stat()
        if not stat.S_ISREG(found.st_mode):
            raise BundleError("is not a file")
        if found.st_size > MAX_BUNDLE_BYTES:
            raise BundleError(f"has {found.st_size} bytes; at most {MAX_BUNDLE_BYTES} are allowed")
        with path.open("rb") as file:
            parts = unpack_archive(file, LIMITS)
        return _verify(parts, trusted, require_signature=require_signature, revoked=revoked)
    except OSError as exc:
        raise BundleError(f"{path}: cannot be read: {exc.strerror or exc}") from exc
    except (BundleError, ManifestError) as exc:
        raise type(exc)(f"{path}: {exc}") from exc


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


def _verify(
    parts: Mapping[str, bytes],
    trusted: Sequence[Ed25519PublicKey],
    *,
    require_signature: bool,
    revoked: Collection[str] = (),
) -> Bundle:
    missing = [name for name in (*_SUMMED, SUMS) if name not in parts and name != FRAME]
    if missing:
        raise BundleError(f"lacks {', '.join(missing)}")
    if parts[SUMS] != _sums(parts):
        raise BundleError("SHA256SUMS does not match the contents: the file is damaged or was changed")
    signed_by = _check_signature(parts, trusted, revoked, require_signature=require_signature)
    manifest = Manifest.from_json(parts[MANIFEST])
    _check_graphs(parts, manifest)
    golden = unpack_golden(parts[GOLDEN])
    golden.check(manifest.graph.tile_px, manifest.graph.channels, manifest.graph.map_cell_px)
    golden.check_position(manifest.takes_position, manifest.places)
    content = hashlib.sha256(parts[SUMS]).hexdigest()
    own = (manifest, parts[SCORER], golden, parts[PREVIEW])
    return Bundle(*own, signed_by, content, SIGNATURE in parts, parts.get(FRAME))


def _check_graphs(parts: Mapping[str, bytes], manifest: Manifest) -> None:
    if (FRAME in parts) != (manifest.frame_graph is not None):
        raise BundleError("frame.onnx and the manifest's frame_graph go together; one of them is missing")
    for name in (SCORER, FRAME):
        if name in parts and has_external_data(parts[name]):
            raise BundleError(f"{name} keeps data outside the file or is not ONNX; export it in one piece")


def _check_signature(
    parts: Mapping[str, bytes],
    trusted: Sequence[Ed25519PublicKey],
    revoked: Collection[str],
    *,
    require_signature: bool,
) -> str | None:
    if SIGNATURE not in parts:
        if require_signature:
            raise BundleError("is not signed, and signatures are required; sign it with kizu-export --sign KEY")
        return None
    signer = find_signer(parts[SIGNATURE], parts[SUMS], trusted, revoked)
    if signer is None and (trusted or require_signature):
        raise BundleError(f"is signed by none of the {len(trusted)} trusted keys")
    return signer


def _sums(parts: Mapping[str, bytes]) -> bytes:
    lines = [f"{hashlib.sha256(parts[name]).hexdigest()}  {name}\n" for name in _SUMMED if name in parts]
    return "".join(lines).encode()
