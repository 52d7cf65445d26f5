"""Files that come with the package."""

from importlib.resources import files
from pathlib import Path


def path(name: str) -> Path:
    """Where an embedded file lies; pip installs packages unpacked, so it is a file on disk."""
    return Path(str(files(__name__) / name))
