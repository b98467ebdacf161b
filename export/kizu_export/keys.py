"""Ed25519 keys in PEM files: the private one signs bundles, agents trust the public one."""

import os
from pathlib import Path

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
    load_pem_private_key,
)

from kizu_contract.bundle import read_bundle, write_bundle
from kizu_export.errors import ExportError, UsageError

PRIVATE_NAME, PUBLIC_NAME = "kizu-private.pem", "kizu-public.pem"


def write_key_pair(folder: Path) -> tuple[Path, Path]:
    """Make a key pair in `folder` (made where it is missing); returns private (mode 0600) and public path.

    Raises UsageError when either file is there already: nothing is ever overwritten.
    """
    folder.mkdir(parents=True, exist_ok=True)
    private, public = folder / PRIVATE_NAME, folder / PUBLIC_NAME
    for path in (private, public):
        if path.exists():
            raise UsageError(f"{path}: exists already and is not overwritten; choose another folder")
    key = Ed25519PrivateKey.generate()
    _create(private, 0o600, key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
    _create(public, 0o644, key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo))
    return private, public


def load_private_key(path: Path) -> Ed25519PrivateKey:
    """Read an Ed25519 private key, PEM without a passphrase. Raises ExportError, naming the file."""
    try:
        key = load_pem_private_key(path.read_bytes(), None)
    except (OSError, ValueError, TypeError, UnsupportedAlgorithm) as exc:
        raise ExportError(f"{path}: is not a readable private key in PEM form without passphrase: {exc}") from exc
    if not isinstance(key, Ed25519PrivateKey):
        raise ExportError(f"{path}: is not an Ed25519 key; make one with kizu-export keygen")
    return key


def sign_bundle(path: Path, out: Path, key: Ed25519PrivateKey) -> str:
    """Write the bundle at `path` to `out`, signed by `key` instead of whoever signed it; its content hash.

    Raises BundleError where it cannot be read, ExportError where this version would write other contents.
    """
    bundle = read_bundle(path)
    write_bundle(bundle, out, key)
    if read_bundle(out, [key.public_key()], require_signature=True).sha256 != bundle.sha256:
        out.unlink()
        raise ExportError(f"{path}: this version of kizu writes it otherwise; sign it with the version that made it")
    return bundle.sha256


def _create(path: Path, mode: int, data: bytes) -> None:
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
    with os.fdopen(descriptor, "wb") as file:
        file.write(data)
        os.fsync(file.fileno())
