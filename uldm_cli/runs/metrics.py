"""The figures of a training run: means over its steps, and the lines of `metrics.jsonl`."""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from uldm_cli.errors import UldmError
from uldm_cli.runs.files import atomic_write

if TYPE_CHECKING:
    from torch import Tensor

Line = dict[str, float]
"""A line of metrics: `step`, `epoch` (how often the images have been through), then figures by name.

Most are means over the steps since the line before. `perplexity` and `usage` are counted over a whole epoch: the one
that `counted_epoch` numbers, from 1. That is the last whole epoch; in the first, `epoch` is below it: so far.
"""


class Means:
    """Means of what the steps since the last line logged; not every step logs every figure."""

    def __init__(self) -> None:
        self.clear()

    def clear(self) -> None:
        """Begins anew."""
        self.counts: dict[str, int] = {}
        self._sums: dict[str, Tensor] = {}

    def add(self, logs: "Mapping[str, Tensor]") -> None:
        """Takes a step's scalars. They are summed on the device: to read them here would wait for every step."""
        for name, value in logs.items():
            self._sums[name] = self._sums[name] + value if name in self._sums else value
            self.counts[name] = self.counts.get(name, 0) + 1

    def read(self) -> Line:
        """The means, over all processes too, each of which must call this; waits for the device."""
        if not self._sums:
            return {}
        import torch

        from uldm_cli.core import collectives

        wide = torch.float64 if any(value.dtype == torch.float64 for value in self._sums.values()) else torch.float32
        sums = collectives.mean(torch.stack([value.to(wide) for value in self._sums.values()])).tolist()
        return {name: total / self.counts[name] for name, total in zip(self._sums, sums, strict=True)}

    def state(self) -> "dict[str, Tensor]":
        """The sums, of several processes their mean, which each of them can go on from; `counts` belongs to them.

        Copies: after one step, figures may still be one and the same tensor.
        """
        from uldm_cli.core import collectives

        return {name: collectives.mean(total).clone() for name, total in self._sums.items()}

    def load_state(self, sums: "Mapping[str, Tensor]", counts: Mapping[str, int]) -> None:
        """The inverse of `state`."""
        self.counts = dict(counts)
        self._sums = {name: sums[name] for name in counts}


HIGHER_IS_BETTER = frozenset({"psnr", "perplexity", "entropy", "usage"})
"""Figures of which more is better; of all others less."""


def is_better(name: str, value: float, than: float | None) -> bool:
    """Whether a figure of this name improved."""
    if than is None:
        return math.isfinite(value)
    return value > than if name in HIGHER_IS_BETTER else value < than


def not_finite(line: Line) -> list[str]:
    """The names of the figures that are NaN or infinite."""
    return [name for name, value in line.items() if not math.isfinite(value)]


def append_line(path: Path, line: Line) -> None:
    """Adds a line to `metrics.jsonl`.

    Raises:
        UldmError: the disk is full, or the file cannot be written to.
    """
    try:
        with path.open("a") as file:
            file.write(json.dumps(line) + "\n")
    except OSError as e:
        hint = "What was saved before is whole: the same command goes on from there"
        raise UldmError(f"{path} could not be written ({e.strerror})", hint) from e


def read_lines(path: Path) -> list[Line]:
    """The lines of `metrics.jsonl`; half a line, of a run that was killed, is left out."""
    if not path.exists():
        return []
    read = [_parsed(text) for text in path.read_text(errors="replace").splitlines()]
    return [line for line in read if line is not None]


def forget_after(path: Path, step: int) -> None:
    """Drops the lines of steps that are going to be made again."""
    if path.exists():
        kept = "".join(json.dumps(line) + "\n" for line in read_lines(path) if line["step"] <= step)
        atomic_write(path, lambda file: file.write(kept.encode()))


def _parsed(text: str) -> Line | None:
    try:
        line: Any = json.loads(text)
    except ValueError:
        return None
    return line if isinstance(line, dict) and "step" in line else None
