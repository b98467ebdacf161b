"""The one error root of kizu; every package derives its own base from it.

KizuError
├── PictureError       a picture cannot be read
├── ManifestError      a manifest is not what schema 1 allows
└── BundleError        a bundle is damaged, hostile or not trusted
"""


class KizuError(Exception):
    """Something a user can mend; the message says what, where and what to do."""


class PictureError(KizuError):
    """A picture cannot be read or has a form that kizu does not take."""


class ManifestError(KizuError):
    """A manifest breaks schema 1; the message names the key."""


class BundleError(KizuError):
    """A bundle is damaged, hostile, too large or not signed by a trusted key."""
