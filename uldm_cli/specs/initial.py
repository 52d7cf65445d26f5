"""Which model a training begins with, read before the rest of its config: that model gives the defaults."""

from collections.abc import Sequence
from pathlib import Path

from pydantic import BaseModel

from uldm_cli.specs.load import load_config, parse_override


class Initial(BaseModel):
    """The one field that has to be known first."""

    init_from: str | None = None


def init_reference(path: Path | None, overrides: Sequence[str], flag: str | None) -> str | None:
    """The model that a command line's training begins with: the flag's, else the overrides', else the YAML's."""
    about_it = [text for text in overrides if parse_override(text).path == ("init_from",)]
    return load_config(Initial, path, about_it, {"init_from": flag}).init_from
