"""Certificates as people ask of them: whose, until when, how soon that is, and who else may read their keys.

Their validity is wall-clock time by its nature; a box whose clock is wrong judges it wrongly, as TLS itself does.
"""

import stat
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Literal

from cryptography import x509
from cryptography.exceptions import InvalidSignature

from kizu_agent.errors import AgentError

Role = Literal["client", "ca", "broker"]

WARN_AHEAD = timedelta(days=30)
"""So long before its end a certificate is a problem; one that lives shorter than three times this: a third of that."""
_NAMES: dict[Role, str] = {
    "client": "client certificate",
    "ca": "certificate of the authority",
    "broker": "broker's certificate",
}
_MAX_SUBJECT = 80


@dataclass(frozen=True)
class Validity:
    """From when until when a certificate holds, UTC; `subject` as RFC 4514 writes it, cut where it is long."""

    role: Role
    subject: str
    begins: datetime
    ends: datetime

    @classmethod
    def of(cls, role: Role, certificate: x509.Certificate) -> "Validity":
        """Take what is asked of `certificate`."""
        subject = certificate.subject.rfc4514_string()[:_MAX_SUBJECT]
        return cls(role, subject, certificate.not_valid_before_utc, certificate.not_valid_after_utc)

    def days_left(self, now: datetime | None = None) -> int:
        """Whole days until its end; negative when it is over."""
        return (self.ends - (now or _now())) // timedelta(days=1)

    def unusable(self, now: datetime | None = None) -> str | None:
        """Why nobody takes it now, None where it holds."""
        now = now or _now()
        if now >= self.ends:
            return f"{self} expired on {self.ends:%Y-%m-%d}, {-self.days_left(now)} days ago"
        if now < self.begins:
            return f"{self} is not valid before {self.begins:%Y-%m-%d %H:%M} UTC; is this box's clock right?"
        return None

    def problem(self, now: datetime | None = None) -> str | None:
        """What is wrong with it or will soon be, in words; None while nothing is."""
        now = now or _now()
        ahead = min(WARN_AHEAD, (self.ends - self.begins) / 3)
        if (unusable := self.unusable(now)) or self.ends - now > ahead:
            return unusable
        return f"{self} expires in {self.days_left(now)} days, on {self.ends:%Y-%m-%d}"

    def __str__(self) -> str:
        return f"{_NAMES[self.role]} {self.subject}"


def parse_certificates(path: Path, data: bytes) -> list[x509.Certificate]:
    """Read all certificates of a PEM file, its own first. Raises AgentError, naming the file."""
    try:
        return x509.load_pem_x509_certificates(data)
    except ValueError as exc:
        raise AgentError(f"{path}: holds no certificate in PEM form, or one that cannot be read") from exc


def issuer_of(certificate: x509.Certificate, authorities: Iterable[x509.Certificate]) -> x509.Certificate | None:
    """The one of `authorities` that signed `certificate`; the one that holds longest where several did."""
    return latest([authority for authority in authorities if _has_signed(authority, certificate)])


def latest(certificates: Sequence[x509.Certificate]) -> x509.Certificate | None:
    """The certificate that holds longest."""
    return max(certificates, key=lambda certificate: certificate.not_valid_after_utc, default=None)


def exposed(path: Path) -> str | None:
    """Who beside its owner and group may read or change the private file at `path`, in words; None where nobody may."""
    try:
        mode = stat.S_IMODE(path.stat().st_mode)
    except OSError:
        return None  # whoever uses it says so
    if mode & (stat.S_IROTH | stat.S_IWOTH | stat.S_IWGRP) == 0:
        return None
    who = "everybody on this box" if mode & (stat.S_IROTH | stat.S_IWOTH) else "its group"
    what = "read" if mode & stat.S_IROTH else "changed"
    return f"{path} can be {what} by {who}: chmod 0640 or less"


def _has_signed(authority: x509.Certificate, certificate: x509.Certificate) -> bool:
    try:
        certificate.verify_directly_issued_by(authority)
    except (ValueError, TypeError, InvalidSignature):
        return False
    return True


def _now() -> datetime:
    return datetime.now(timezone.utc)
