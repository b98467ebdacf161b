"""Export's errors.

ExportError        a run that cannot ship: graph refused, parity missed, key unusable
└── UsageError     wrong usage (exit 2)
"""

from kizu_contract.errors import KizuError


class ExportError(KizuError):
    """A run cannot become a bundle, or a bundle cannot be used; the message says why and what to do."""


class UsageError(ExportError):
    """The command was given something that does not fit."""
