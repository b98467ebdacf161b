"""The keys that may sign models, as the files say now: several, in folders too, and those that were revoked."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import structlog
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

from kizu_agent.errors import ConfigError
from kizu_agent.settings import ModelsConfig
from kizu_contract.bundle import Bundle, read_bundle
from kizu_contract.errors import BundleError
from kizu_contract.signing import fingerprint_of, load_fingerprints, load_public_key

log = structlog.get_logger(__name__)

_Stamp = tuple[str, int, int, int]


@dataclass(frozen=True)
class Trust:
    """Whose signature is good: keys by their fingerprints, `revoked` ones among them or not.

    `is_required`: an unsigned model is refused.
    """

    keys: dict[str, Ed25519PublicKey] = field(default_factory=dict)
    revoked: frozenset[str] = frozenset()
    is_required: bool = False

    def read(self, path: Path) -> Bundle:
        """Read and verify the bundle at `path`. Raises BundleError or ManifestError."""
        keys = list(self.keys.values())
        return read_bundle(path, keys, require_signature=self.is_required, revoked=self.revoked)

    def objection(self, signed_by: str | None) -> str | None:
        """What speaks by now against a model that this key signed (None: no trusted one), None where nothing does."""
        if not self.keys and not self.is_required:
            return None
        if signed_by is None:
            return "is not signed by a trusted key" if self.is_required else None
        if signed_by in self.revoked:
            return f"is signed by the revoked key {signed_by}"
        return None if signed_by in self.keys else f"is signed by the key {signed_by}, which is not trusted any more"


class KeyRing:
    """Reads the configured keys, and again when their files change; used by one thread.

    A key that cannot be read any more is not trusted any more; a list of revoked keys that cannot be read leaves those
    of before revoked. Either is told in `problems`.
    """

    def __init__(self, config: ModelsConfig) -> None:
        """Read all files. Raises ConfigError when one cannot be, or where there is no key at all."""
        self.problems: list[str] = []
        self._config = config
        self._stamps = self._stamp()
        try:
            keys = dict(_load(path) for path in self._key_files())
            revoked = self._load_revoked()
        except BundleError as exc:
            raise ConfigError(f"models.trusted_keys: {exc}") from exc
        if config.trusted_keys and not keys:
            raise ConfigError("models.trusted_keys: there is no key, a file *.pem, in these folders")
        self.trust = Trust(keys, revoked, config.require_signature)

    def refresh(self) -> bool:
        """Read again what has changed; tell whether anything had."""
        stamps = self._stamp()
        if stamps == self._stamps:
            return False
        self._stamps, problems = stamps, []
        keys: dict[str, Ed25519PublicKey] = {}
        for path in self._key_files():
            try:
                keys.update([_load(path)])
            except BundleError as exc:  # noqa: PERF203 - one bad file must not take the others with it
                problems.append(f"a key for models is not trusted: {exc}")
        revoked = self.trust.revoked
        try:
            revoked = self._load_revoked()
        except BundleError as exc:
            problems.append(f"the keys revoked before stay revoked, new ones are not known: {exc}")
        self._tell(problems, keys, revoked)
        # Without a key every signature would pass unchecked.
        self.trust = Trust(keys, revoked, self._config.require_signature or not keys)
        return True

    def _tell(self, problems: list[str], keys: dict[str, Ed25519PublicKey], revoked: frozenset[str]) -> None:
        if not keys:
            problems.append("no key for models is left: every new model is refused")
        for problem in problems:
            if problem not in self.problems:
                log.warning("keys for models", problem=problem)
        self.problems = problems
        log.info("keys for models were read again", trusted=sorted(keys.keys() - revoked), revoked=len(revoked))

    def _load_revoked(self) -> frozenset[str]:
        path = self._config.revoked_keys_file
        return frozenset() if path is None else load_fingerprints(path)

    def _key_files(self) -> Iterator[Path]:
        for path in self._config.trusted_keys:
            if path.is_dir():
                yield from sorted(path.glob("*.pem"))
            else:
                yield path

    def _stamp(self) -> list[_Stamp]:
        revoked = self._config.revoked_keys_file
        return [_stamp(path) for path in (*self._key_files(), *([revoked] if revoked else []))]


def _load(path: Path) -> tuple[str, Ed25519PublicKey]:
    key = load_public_key(path)
    return fingerprint_of(key), key


def _stamp(path: Path) -> _Stamp:
    try:
        found = path.stat()
    except OSError:
        return str(path), 0, 0, 0
    return str(path), found.st_mtime_ns, found.st_size, found.st_ino
