"""Telling which images a command skips."""

from collections.abc import Iterable

from uldm_cli import console

NAMED = 10
"""So many skipped images are named; the others are counted."""


class Skipped:
    """Warns of images that are skipped, and counts them.

    Args:
        rest: what is said of those that are not named any more.
    """

    def __init__(self, rest: str) -> None:
        self._rest = rest
        self._names: set[str] = set()

    def __len__(self) -> int:
        return len(self._names)

    def add(self, skipped: Iterable[tuple[str, str]]) -> None:
        """Takes name and reason of each. One that is met again, in another epoch, is the same image."""
        for name, reason in skipped:
            if name in self._names:
                continue
            self._names.add(name)
            if len(self) <= NAMED:
                console.warn(f"skipped {name}: {reason} ({len(self)} so far)")
            elif len(self) == NAMED + 1:
                console.warn(f"more images are skipped; {self._rest}")
