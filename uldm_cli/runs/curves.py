"""`uldm viz curves`: what training runs logged, several together."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from uldm_cli import console
from uldm_cli.errors import ConfigError, nearest
from uldm_cli.runs.draw.plot import DEFAULT, Style, picture_format, save_figure
from uldm_cli.runs.files import writable_folder
from uldm_cli.runs.train import METRICS

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from uldm_cli.runs.draw.curves import Curve
    from uldm_cli.runs.metrics import Line

# Figures that say where a line stands and how fast the machine is: drawn only when they are asked for.
_BESIDE = frozenset({"step", "epoch", "counted_epoch", "lr", "images_per_second"})

PART = 50


@dataclass(frozen=True)
class Request:
    """What is asked for."""

    runs: tuple[Path, ...]
    """Folders of training runs, or their files of metrics."""
    out: Path
    terms: tuple[str, ...] | None = None
    """Which figures; None is every loss, perplexity and the like."""
    smooth: float | None = None
    """Weight of what was before, in the exponential moving average; 0 leaves the curves as they are. None takes what
    reaches back over a PART-th of a curve, so that short runs are not smoothed away."""
    log: bool = False
    """A logarithmic scale where every value is above 0."""
    titles: Mapping[str, str] = field(default_factory=dict)
    """What people call the figures."""
    style: Style = field(default=DEFAULT)


@dataclass(frozen=True)
class Run:
    """What a run has logged."""

    name: str
    lines: tuple[Line, ...]

    @property
    def terms(self) -> list[str]:
        """The figures in its lines, in their order."""
        return list(dict.fromkeys(name for line in self.lines for name in line))


def run(request: Request) -> dict[str, list[Curve]]:
    """Draws a panel a figure, a curve a run; gives the curves by figure.

    Raises:
        ConfigError: something that is no training run, or has logged nothing; a line that cannot be read; an unknown
            figure; an output that cannot be written.
    """
    from uldm_cli.runs.draw.curves import draw_curves

    picture_format(request.out)
    if request.smooth is not None and not 0 <= request.smooth < 1:
        raise ConfigError(f"--smooth {request.smooth:g}: expected a weight from 0 (off) to below 1")
    names = _names(request.runs)
    runs = [Run(name, _read_lines(_metrics_of(path))) for name, path in zip(names, request.runs, strict=True)]
    curves = {term: _curves(runs, term, request.smooth) for term in _terms(runs, request.terms)}
    writable_folder(request.out.parent)
    title = f"Training of {', '.join(names)}"
    panels = {request.titles.get(term, term.replace("_", " ")): found for term, found in curves.items()}
    save_figure(
        draw_curves(panels, names, request.style, log=request.log), request.out, {"title": title}, request.style
    )
    return curves


def _names(paths: Sequence[Path]) -> list[str]:
    """What tells the runs from each other: their folders' names, or as much of their paths as it takes."""
    folders = [path.parent if path.name == METRICS else path for path in map(Path.absolute, paths)]
    if len(set(folders)) < len(folders):
        raise ConfigError("a run is named twice", "Name each once")
    for count in range(1, max(len(folder.parts) for folder in folders) + 1):
        names = ["/".join(folder.parts[-count:]) for folder in folders]
        if len(set(names)) == len(names):
            break
    return names


def _metrics_of(path: Path) -> Path:
    file = path if path.is_file() else path / METRICS
    if not file.is_file():
        what = f"has no {METRICS}" if path.is_dir() else "does not exist"
        raise ConfigError(f"{path} {what}", "Name the folder of `uldm vqvae train` or `uldm ldm train`")
    return file


def _read_lines(path: Path) -> tuple[Line, ...]:
    """Every line; half a line at the end, of a run that was killed or is writing, is left out.

    Raises:
        ConfigError: a line is none of metrics, or there is none.
    """
    *whole, rest = path.read_text(errors="replace").split("\n")
    found = [_parsed(path, number, text) for number, text in enumerate(whole, 1) if text.strip()]
    if rest.strip():
        console.note(f"{path}:{len(whole) + 1} is half a line, and left out")
    if not found:
        raise ConfigError(f"{path} has no line yet", "The first comes with the training's first train.log_every")
    return tuple(found)


def _parsed(path: Path, number: int, text: str) -> Line:
    try:
        line: Any = json.loads(text)
    except (ValueError, RecursionError):
        line = None
    if not isinstance(line, dict) or "step" not in line:
        raise ConfigError(
            f"{path}:{number}: expected a line of metrics, a JSON mapping with `step`", "Repair or remove it"
        )
    for name, value in line.items():
        if not isinstance(value, (int, float)) or isinstance(value, bool):
            raise ConfigError(
                f"{path}:{number}: {name} is {json.dumps(value)[:40]}, not a number", "Repair or remove it"
            )
    return line


def _terms(runs: Sequence[Run], wanted: Sequence[str] | None) -> list[str]:
    there = list(dict.fromkeys(name for run in runs for name in run.terms))
    if wanted is None:
        return [name for name in there if name not in _BESIDE]
    for name in wanted:
        if name not in there:
            near = nearest(name, there)
            hint = f"Did you mean '{near}'?" if near else f"There are: {', '.join(there)}"
            raise ConfigError(f"--terms: no run has logged '{name}'", hint)
    return list(wanted)


def _curves(runs: Sequence[Run], term: str, smooth: float | None) -> list[Curve]:
    """A curve for each run that has the figure, with the run's number, which is its colour everywhere."""
    from uldm_cli.runs.draw.curves import Curve

    curves = []
    for number, run in enumerate(runs):
        points = [(line["step"], line[term]) for line in run.lines if term in line]
        if points:
            steps, values = zip(*points, strict=True)
            weight = math.exp(-PART / len(values)) if smooth is None else smooth
            curves.append(Curve(number, steps, values, tuple(moving_average(values, weight))))
    return curves


def moving_average(values: Sequence[float], weight: float) -> list[float]:
    """The exponential moving average, `weight` being that of what was before. Its first value is the first itself:
    the missing past is divided out (as in Adam), so that the curve does not begin at 0. What is not finite is skipped.
    """
    mean, part, averages = 0.0, 0.0, []
    for value in values:
        if math.isfinite(value):
            mean = weight * mean + (1 - weight) * value
            part = weight * part + (1 - weight)
        averages.append(mean / part if part else math.nan)
    return averages
