"""The only printer: results go to stdout, everything else to stderr, and of several processes only rank 0 speaks.

Three modes, set once by `configure`: for people (tables, bars), `json` (one document on stdout), `quiet` (only what was
asked for, warnings and errors). Where stderr is no terminal, bars become log lines. Rich loads when it is first needed,
and text of users is never read as its markup. NO_COLOR is honoured.
"""

import os
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from os import PathLike
from typing import TYPE_CHECKING, Any, Protocol, TextIO

if TYPE_CHECKING:
    from pathlib import Path

    import numpy as np
    from numpy.typing import NDArray
    from rich.console import Console, RenderableType
    from rich.live import Live
    from rich.progress import Progress as RichProgress
    from rich.progress import TaskID

    from uldm_cli.errors import UldmError

PIPED_WIDTH = 120  # columns of a table that does not go to a terminal, so that its layout depends on nothing
LOG_SECONDS = 5.0  # between two log lines of a progress that is piped
QUIET_SECONDS = 30.0  # after which a training says in between how far it is


class Progress(Protocol):
    """What `progress` hands out; safe to call from several threads."""

    def advance(self, n: int = 1) -> None:
        """Count `n` more units as done."""


class Training(Protocol):
    """What `training` hands out."""

    def reached(self, step: int) -> None:
        """Show that so many steps are completed, of which there are no values."""

    def update(self, step: int, values: Mapping[str, float], images_per_second: float) -> None:
        """Show the values after `step` completed steps."""


@dataclass
class _State:
    json: bool = False
    quiet: bool = False
    live: bool = False  # a display is redrawing the terminal; another one below it would garble it


_state = _State()


def configure(*, json: bool = False, quiet: bool = False) -> None:
    """Set the mode for all that follows."""
    _state.json, _state.quiet = json, quiet


def note(text: str) -> None:
    """An information line on stderr; nothing when quiet."""
    if _talkative():
        print(_one_line(text), file=sys.stderr)


def warn(text: str) -> None:
    """A warning line on stderr, also when quiet."""
    if _rank() == 0:
        print(_styled("warning:", "33", sys.stderr), _one_line(text), file=sys.stderr)


def error(err: "UldmError") -> None:
    """One line on stderr, and a JSON document on stdout where JSON was asked for.

    Wrong input is the same on every rank, so rank 0 reports it; any other failure is reported by whom it strikes.
    """
    rank = _rank()
    if rank and err.exit_code in (2, 130):
        return
    who = f"rank {rank}: " if rank else ""
    print(who + _styled("error:", "1;31", sys.stderr), _one_line(str(err)), file=sys.stderr)
    if _state.json and rank == 0:
        _print_json({"error": err.message, "hint": err.hint, "exit_code": err.exit_code})


def traceback(err: BaseException) -> None:
    """The whole traceback on stderr, for whoever debugs."""
    from traceback import print_exception

    print_exception(err)


def result(
    data: Mapping[str, Any],
    *,
    title: str | None = None,
    columns: Sequence[str] = (),
    rows: Sequence[Sequence[object]] = (),
    summary: str | None = None,
) -> None:
    """What a command found or did: `data` as one JSON document, or for people a table of `rows` and a summary line."""
    if _rank() != 0:
        return
    if _state.json:
        _print_json(data)
    elif not _state.quiet:
        if title:
            print(_one_line(title))
        if rows:
            _print_table(columns, rows)
        if summary:
            print(_one_line(summary))


def text(s: str) -> None:
    """A document that was asked for (YAML, a schema) on stdout as it is, also when quiet."""
    if _rank() == 0:
        print(s, end="" if s.endswith("\n") else "\n")


def shows_pictures() -> bool:
    """Whether `picture` shows anything: stdout is a terminal, and it is not the place of JSON or of silence."""
    return not _state.json and _talkative() and _interactive(sys.stdout)


def picture(source: "Path | NDArray[np.uint8]") -> None:
    """A picture on stdout, as far as `shows_pictures`.

    `source` is a file that Pillow reads, of a film the last frame, or an array `[H, W]` or `[H, W, 3]`.
    """
    if not shows_pictures():
        return
    from shutil import get_terminal_size

    from PIL import Image, UnidentifiedImageError

    from uldm_cli import terminal

    how = terminal.protocol(os.environ)
    if how == "blocks" and (sys.stdout.encoding or "").lower().replace("-", "") != "utf8":
        note("this terminal shows no pictures")
        return
    try:
        opened = Image.open(source) if isinstance(source, PathLike) else Image.fromarray(source)
    except UnidentifiedImageError:  # such as an SVG
        note(f"{source} is of a kind that no terminal shows")
        return
    with opened as image:
        image.seek(getattr(image, "n_frames", 1) - 1)
        print(terminal.draw(image, how, get_terminal_size().columns), end="", flush=True)


@contextmanager
def progress(total: int, description: str, unit: str) -> Iterator[Progress]:
    """Count up to `total` units: a bar with rate and time left, or a log line every few seconds and at the end."""
    if not _talkative() or _state.live:
        yield _Silent()
    elif _interactive():
        with _redrawing():
            bar = _rich_progress()
            with bar:
                yield _BarProgress(bar, _Meter(total), _one_line(description), unit)
    else:
        log = _LogProgress(_Meter(total), description, unit)
        yield log
        log.write()


@contextmanager
def training(total: int, start: int, title: str) -> Iterator[Training]:
    """Show a training of `total` steps that begins after `start`: a live table and a bar, or a log line a call."""
    if not _talkative() or _state.live:
        yield _Silent()
    elif _interactive():
        from rich.live import Live

        with _redrawing(), Live(console=_console(sys.stderr), refresh_per_second=4) as live:
            yield _LiveTraining(live, _Meter(total, start), _one_line(title))
    else:
        note(title)
        yield _LogTraining(_Meter(total, start))


def _rank() -> int:
    """This process's number among those that torchrun or accelerate started; 0 where it is the only one."""
    rank = os.environ.get("RANK", "0")
    return int(rank) if rank.isdecimal() else 0


def _talkative() -> bool:
    return not _state.quiet and _rank() == 0


def _interactive(stream: TextIO | None = None) -> bool:
    """Whether a stream, by default stderr, is a terminal that can do more than print."""
    return (stream or sys.stderr).isatty() and os.environ.get("TERM") != "dumb"


@contextmanager
def _redrawing() -> Iterator[None]:
    _state.live = True
    try:
        yield
    finally:
        _state.live = False


def _one_line(line: str) -> str:
    """`line` with line breaks as spaces and other control characters spelt out: they may come from a file's name."""
    if line.isprintable():
        return line
    return "".join(c if c.isprintable() else " " if c.isspace() else ascii(c)[1:-1] for c in line).strip()


def _styled(word: str, code: str, stream: TextIO) -> str:
    plain = os.environ.get("NO_COLOR") or os.environ.get("TERM") == "dumb" or not stream.isatty()
    return word if plain else f"\x1b[{code}m{word}\x1b[0m"


def _console(stream: TextIO) -> "Console":
    from rich.console import Console

    width = None if stream.isatty() else PIPED_WIDTH
    return Console(file=stream, width=width, highlight=False, markup=False, emoji=False)


def _print_json(data: Mapping[str, Any]) -> None:
    import json

    print(json.dumps(_jsonable(data), indent=2, allow_nan=False))


def _jsonable(value: Any) -> Any:
    """`value` in the types of JSON: what is not a finite number becomes null, an array or scalar its Python value."""
    if value is None or isinstance(value, (str, bool, int)):
        return value
    if isinstance(value, float):
        return value if value - value == 0 else None  # inf - inf and nan - nan are nan
    if isinstance(value, Mapping):
        return {str(key): _jsonable(item) for key, item in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        return [_jsonable(item) for item in value]
    if hasattr(value, "tolist"):  # an array or tensor; no need to import either library
        return _jsonable(value.tolist())
    return str(value)


def _print_table(columns: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    from rich.box import SIMPLE_HEAD
    from rich.table import Table
    from rich.text import Text

    table = Table(box=SIMPLE_HEAD, show_header=bool(columns))
    for index in range(len(rows[0])):
        numeric = all(isinstance(row[index], (int, float)) for row in rows)
        header = _one_line(columns[index]) if columns else ""
        table.add_column(header, justify="right" if numeric else "left", overflow="fold")
    for row in rows:
        table.add_row(*(Text(_cell(value)) for value in row))
    _console(sys.stdout).print(table)


def _cell(value: object) -> str:
    if value is None:
        return ""
    if isinstance(value, bool):
        return "yes" if value else "no"
    return _figure(value) if isinstance(value, float) else _one_line(str(value))


def _figure(value: float) -> str:
    """A number to four digits, never fewer than its whole part."""
    return f"{value:.0f}" if 1000 <= abs(value) < 1e9 else f"{value:.4g}"


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{rest:02d}"


class _Meter:
    """Counts, and knows how fast it has been since it began."""

    def __init__(self, total: int, start: int = 0) -> None:
        self.total = total
        self.done = self._start = start
        self._began = time.monotonic()

    @property
    def elapsed(self) -> float:
        return time.monotonic() - self._began

    @property
    def rate(self) -> float:
        """Units a second."""
        return (self.done - self._start) / max(self.elapsed, 1e-9)

    @property
    def left(self) -> str:
        return _clock((self.total - self.done) / self.rate) if self.done > self._start else "-:--:--"


class _Silent:
    def advance(self, n: int = 1) -> None:
        pass

    def reached(self, step: int) -> None:
        pass

    def update(self, step: int, values: Mapping[str, float], images_per_second: float) -> None:
        pass


class _LogProgress:
    def __init__(self, meter: _Meter, description: str, unit: str) -> None:
        self._meter, self._description, self._unit = meter, description, unit
        self._lock = threading.Lock()
        self._written, self._written_done = time.monotonic(), -1

    def advance(self, n: int = 1) -> None:
        with self._lock:
            self._meter.done += n
            due = time.monotonic() - self._written >= LOG_SECONDS
        if due:
            self.write()

    def write(self) -> None:
        with self._lock:
            meter = self._meter
            if self._written_done == meter.done:
                return
            self._written, self._written_done = time.monotonic(), meter.done
            time_left = f"left {meter.left}" if meter.done < meter.total else f"took {_clock(meter.elapsed)}"
            line = f"{self._description} {meter.done}/{meter.total}  {_figure(meter.rate)} {self._unit}/s  {time_left}"
        note(line)


def _rich_progress(*, console: "Console | None" = None) -> "RichProgress":
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

    return Progress(
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[rate]}", markup=False),
        TextColumn("left {task.fields[left]}", markup=False),
        console=console or _console(sys.stderr),
    )


class _BarProgress:
    def __init__(self, bar: "RichProgress", meter: _Meter, description: str, unit: str) -> None:
        self._bar, self._meter, self._unit = bar, meter, unit
        self._lock = threading.Lock()
        self._task: TaskID = bar.add_task(description, total=meter.total, rate="", left=meter.left)

    def advance(self, n: int = 1) -> None:
        with self._lock:
            meter = self._meter
            meter.done += n
            rate = f"{_figure(meter.rate)} {self._unit}/s"
            self._bar.update(self._task, completed=meter.done, rate=rate, left=meter.left)


class _LogTraining:
    def __init__(self, meter: _Meter) -> None:
        self._meter = meter
        self._written, self._pause = time.monotonic(), LOG_SECONDS

    def reached(self, step: int) -> None:
        meter = self._meter
        meter.done = step
        if time.monotonic() - self._written >= self._pause:
            self._written, self._pause = time.monotonic(), QUIET_SECONDS
            note(f"step {step}/{meter.total}  {_figure(meter.rate)} steps/s  left {meter.left}")

    def update(self, step: int, values: Mapping[str, float], images_per_second: float) -> None:
        meter = self._meter
        meter.done = step
        self._written, self._pause = time.monotonic(), QUIET_SECONDS
        figures = "".join(f"  {name} {_figure(value)}" for name, value in values.items())
        note(f"step {step}/{meter.total}{figures}  {_figure(images_per_second)} images/s  left {meter.left}")


class _LiveTraining:
    def __init__(self, live: "Live", meter: _Meter, title: str) -> None:
        self._live, self._meter, self._title = live, meter, title
        self._bar = _rich_progress(console=live.console)
        self._task: TaskID = self._bar.add_task("step", total=meter.total, completed=meter.done, rate="", left="")
        live.update(self._bar)

    def reached(self, step: int) -> None:
        self._meter.done = step
        self._bar.update(self._task, completed=step, left=self._meter.left)

    def update(self, step: int, values: Mapping[str, float], images_per_second: float) -> None:
        self._meter.done = step
        rate = f"{_figure(images_per_second)} images/s"
        self._bar.update(self._task, completed=step, rate=rate, left=self._meter.left)
        self._live.update(self._picture(values))

    def _picture(self, values: Mapping[str, float]) -> "RenderableType":
        from rich.box import SIMPLE_HEAD
        from rich.console import Group
        from rich.table import Table
        from rich.text import Text

        table = Table("value", "now", box=SIMPLE_HEAD)
        table.columns[1].justify = "right"
        for name, value in values.items():
            table.add_row(_one_line(name), _figure(value))
        return Group(Text(self._title, style="bold"), table, self._bar)
