"""The command line that runs now: what a picture says of how it was made where it has no recipe of its own."""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from uldm_cli import __version__

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from pathlib import Path

KEYWORD = "uldm"  # of the text in a PNG that says how it was made
PLACES = ("--out", "--outdir", "--figure")  # options that say where pictures are written


@dataclass
class Call:
    """One call of a command."""

    command: str
    """As it is typed, without `uldm`: "viz schedule"."""
    arguments: list[str]
    """The others, but for those that decide where the results go and what is told of them."""
    places: dict[str, str]
    """Options that say where to write, with the name of that file or folder, without the folders above it."""
    pictures: list[Path] = field(default_factory=list)
    """The PNG files that it has written."""

    def as_text(self, path: Path) -> dict[str, str]:
        """As the picture `path` keeps it."""
        import json

        said = {"version": __version__, "command": self.command, "arguments": self.arguments, "places": self.places}
        return {KEYWORD: json.dumps({**said, "name": path.name}, separators=(",", ":"))}


_running: list[Call] = []  # the innermost last; of the process, since pictures are also written by threads of a call


@contextmanager
def running(call: Call) -> Iterator[None]:
    """While it runs, `call` is what made the pictures. A call that it runs within has made them, too."""
    _running.append(call)
    try:
        yield
    finally:
        _running.pop()
        if _running:
            _running[-1].pictures += call.pictures


def current() -> Call | None:
    """The innermost call, None where the package is used from Python."""
    return _running[-1] if _running else None


def signed(path: Path, about: Mapping[str, str] | None) -> dict[str, str]:
    """The text of a picture that is about to be written, with the call unless there is a recipe.

    A picture of which nothing is told, such as those of a training, is not drawn again alone: it gets no call.
    """
    call, text = current(), dict(about or {})
    if call:
        call.pictures.append(path)
    if call and text and KEYWORD not in text:
        text |= call.as_text(path)
    return text
