"""The errors that a user is meant to read: one line that names the thing, what was expected and what to do.

Everything else that is raised is a bug and keeps its traceback. This module imports nothing.
"""

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path


class UldmError(Exception):
    """A failure with a message for people.

    `message` says what is wrong, `hint` (optional) what to do about it, `exit_code` what the process ends with:
    1 for a failure while working, 2 for wrong input, 3 for a broken plugin.
    """

    default_exit_code = 1

    def __init__(self, message: str, hint: str | None = None, exit_code: int | None = None) -> None:
        super().__init__(message, hint, exit_code)  # all of them, so that the error survives pickling
        self.message = message
        self.hint = hint
        self.exit_code = self.default_exit_code if exit_code is None else exit_code

    def __str__(self) -> str:
        return f"{self.message}. {self.hint}" if self.hint else self.message


class UsageError(UldmError):
    """The command was called with something it cannot take; nothing has been written."""

    default_exit_code = 2


class ConfigError(UsageError):
    """A config, an override, a flag's value or a file that one of them names is wrong."""


class PluginError(UldmError):
    """An installed plugin does not load, or is not what it claims to be."""

    default_exit_code = 3


def nearest(name: str, options: "Iterable[str]") -> str | None:
    """The option that `name` was probably meant to be, whatever its case; None when nothing is near."""
    from difflib import get_close_matches

    by_lower_case = {option.lower(): option for option in options}
    found = get_close_matches(name.lower(), list(by_lower_case), n=1, cutoff=0.6)
    return by_lower_case[found[0]] if found else None


def nearest_file(path: "Path") -> str | None:
    """The file or folder that a path which leads nowhere was probably meant to name: one beside it."""
    if not path.parent.is_dir():
        return None
    found = nearest(path.name, (entry.name for entry in path.parent.iterdir()))
    return str(path.parent / found) if found else None
