"""Who signed a bundle: keys by their fingerprints, and the list of those that were revoked."""

import hashlib
import re
from collections.abc import Collection, Sequence
from pathlib import Path

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

from kizu_contract.errors import BundleError

_SPKI_HEAD = bytes.fromhex("302a300506032b6570032100")
"""What stands before the 32 bytes of an Ed25519 key in a SubjectPublicKeyInfo, DER (RFC 8410)."""
_FINGERPRINT = re.compile(r"[0-9a-f]{64}")
MAX_LIST_BYTES = 2**20


def fingerprint_of(key: Ed25519PublicKey) -> str:
    """SHA-256 of the key as DER, 64 hex digits: `openssl pkey -pubin -in KEY.pem -outform DER | sha256sum`."""
    return hashlib.sha256(_SPKI_HEAD + key.public_bytes_raw()).hexdigest()


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


def load_fingerprints(path: Path) -> frozenset[str]:
    """Read a list of fingerprints, one a line; what follows a `#` is a comment, colons and capitals do no harm.

    Raises BundleError, naming the file and the line: half a list of revoked keys would be worse than none.
    """
    try:
        with path.open("rb") as file:
            lines = file.read(MAX_LIST_BYTES).decode().splitlines()
    except (OSError, ValueError) as exc:
        raise BundleError(f"{path}: is not a readable list of fingerprints: {exc}") from exc
    found = [line.partition("#")[0].strip().replace(":", "").lower() for line in lines]
    wrong = [number for number, text in enumerate(found, 1) if text and not _FINGERPRINT.fullmatch(text)]
    if wrong:
        raise BundleError(f"{path}: line {wrong[0]} is no fingerprint; one has 64 hex digits (kizu-export keygen)")
    return frozenset(filter(None, found))


def find_signer(
    signature: bytes, signed: bytes, trusted: Sequence[Ed25519PublicKey], revoked: Collection[str]
) -> str | None:
    """Give the fingerprint of the one of `trusted` that signed; None where none did.

    Raises BundleError when that key is among the `revoked` ones.
    """
    for key in trusted:
        try:
            key.verify(signature, signed)
        except InvalidSignature:
            continue
        fingerprint = fingerprint_of(key)
        if fingerprint in revoked:
            raise BundleError(f"is signed by the revoked key {fingerprint}; have it signed by one that is trusted")
        return fingerprint
    return None
