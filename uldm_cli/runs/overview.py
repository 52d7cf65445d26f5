"""What a sampling run wrote, as few pictures for a look in the terminal."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from uldm_cli.runs.draw.grid import draw_grid
from uldm_cli.runs.files import read_picture
from uldm_cli.runs.plan import column_label, columns

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    import numpy as np
    from numpy.typing import NDArray

    from uldm_cli.runs.plan import Plan

    Bytes = NDArray[np.uint8]

MOST_ROWS = 8
MOST_IMAGES = 64


def overviews(plan: Plan) -> Iterator[Bytes]:
    """Of each kind of picture the first samples, uint8 `[H, W]` or `[H, W, 3]`, read from the run's files.

    A column a step and a row a sample, or the final images row by row.
    """
    for kind in plan.pictures:
        steps = columns(kind, plan.logged)
        if plan.spec.step_size == 0:
            count = min(plan.spec.num, MOST_IMAGES)
            yield _tiled([plan.picture_path(kind, index, steps[0]) for index in range(count)])
        elif steps:
            shown = range(min(plan.spec.num, MOST_ROWS))
            rows = [[read_picture(plan.picture_path(kind, index, pair)) for pair in steps] for index in shown]
            yield draw_grid(rows, [column_label(pair) for pair in steps])


def _tiled(paths: Sequence[Path]) -> Bytes:
    """Pictures of one size in a near-square, white where none is left."""
    import numpy as np

    pictures = [read_picture(path) for path in paths]
    across = math.isqrt(len(pictures) - 1) + 1
    pictures += [np.full_like(pictures[0], 255)] * (-len(pictures) % across)
    return draw_grid([pictures[at : at + across] for at in range(0, len(pictures), across)])
