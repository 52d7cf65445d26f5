"""`uldm viz noising`: what schedules make of an image, timestep by timestep."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from uldm_cli.errors import ConfigError
from uldm_cli.runs.draw.plot import DEFAULT, Style, picture_format, save_figure
from uldm_cli.runs.files import writable_folder
from uldm_cli.runs.viz_schedule import Named, built, read_schedules

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from uldm_cli.core.schedules import Schedule
    from uldm_cli.runs.draw.noising import Noised

PARTS = (0.0, 0.1, 0.25, 0.5, 1.0)  # of the timesteps, where none are named
LARGEST = 256  # pixels, where no size is asked for
MOST_COLUMNS = 20


@dataclass(frozen=True)
class Request:
    """What is asked for."""

    image: Path
    out: Path
    schedules: tuple[str, ...] = ("scaled_linear",)
    """Each a kind with its settings, as `linear end=0.03`."""
    steps: str | None = None
    """Timesteps with commas between; None spreads five over the schedule."""
    size: int | None = None
    """Of the centre square that is drawn; None is the image's short side, and LARGEST at most."""
    seed: int = 0
    style: Style = field(default=DEFAULT)


def run(request: Request) -> list[list[Noised]]:
    """Draws the image as it is at some timesteps of the forward process: a column each, a row a schedule.

    All are made with the same noise: only how much there is of it differs.

    Raises:
        ConfigError: an unknown schedule, a timestep that it does not have, or an output that cannot be written.
        ImageError: the image cannot be read.
    """
    from uldm_cli.core.noise import PerSampleNoise
    from uldm_cli.runs.draw.noising import draw_noised

    picture_format(request.out)
    wanted = _numbers(request.steps)
    schedules = [_only(text) for text in request.schedules]
    image = _centre(request.image, request.size)
    writable_folder(request.out.parent)
    noise = PerSampleNoise([request.seed], image.shape).initial()[0]
    rows = [_row(built(schedule), schedule.name, wanted, image, noise) for schedule in schedules]
    names = [schedule.name for schedule in schedules]
    title = f"{request.image.name}, noised by {', '.join(names)} with seed {request.seed}"
    save_figure(draw_noised(rows, names, request.style), request.out, {"title": title}, request.style)
    return rows


def _only(text: str) -> Named:
    found = read_schedules(text.split())
    if len(found) != 1:
        raise ConfigError(f"--schedule '{text}': expected one schedule", "Give --schedule once for each")
    return found[0]


def _numbers(text: str | None) -> list[int] | None:
    if text is None:
        return None
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isascii() and part.isdecimal() for part in parts):
        raise ConfigError(f"--steps {text}: expected timesteps with commas between", "As in 0,100,250,500,999")
    if len(parts) > MOST_COLUMNS:
        raise ConfigError(f"--steps: {len(parts)} are more than the {MOST_COLUMNS} that fit beside each other")
    return [int(part) for part in parts]


def _centre(path: Path, size: int | None) -> Tensor:
    """The image's centre square in [-1, 1], `[3, size, size]`."""
    from uldm_cli.core.images import decode_image

    side = size or min(LARGEST, *decode_image(path).shape[1:])
    return decode_image(path, size=side).float() / 127.5 - 1


def _row(schedule: Schedule, name: str, wanted: Sequence[int] | None, image: Tensor, noise: Tensor) -> list[Noised]:
    import math

    from uldm_cli.core.images import to_uint8
    from uldm_cli.runs.draw.noising import Noised

    last = schedule.T - 1
    made = []
    for t in wanted if wanted is not None else [round(part * last) for part in PARTS]:
        if t > last:
            raise ConfigError(f"--steps {t}: {name} has the timesteps 0 to {last}")
        alpha, sigma = schedule.alpha(t), schedule.sigma(t)
        picture = to_uint8((alpha * image + sigma * noise)[None])[0]
        log_snr = 2 * math.log(alpha / sigma) if alpha and sigma else math.copysign(math.inf, alpha - sigma)
        made.append(Noised(t, log_snr, picture))
    return made
