"""Names that are safe as a bundle's name, an MQTT level and a file name."""

import re
from pathlib import Path


def slug(folder: Path) -> str:
    """The folder's name in the letters that manifests allow; `model` where none is left."""
    return re.sub(r"[^A-Za-z0-9]+", "-", folder.resolve().name).strip("-")[:64].strip("-") or "model"
