"""A sample's trajectory as numbers: gathered on disk step by step, then written as two files for whoever measures it.

`trajectory.safetensors` holds, of the K logged steps:

    x_t        float32 [K, C, h, w]   the state after the step, a scaled latent
    x0         float32 [K, C, h, w]   the clean latent that was predicted in the step
    steps      int64 [K]              how many steps were completed
    timesteps  int64 [K]              where the network was called in the step, first
    alphas     float64 [K]            factor of the signal at that timestep
    sigmas     float64 [K]            factor of the noise there; (alpha / sigma)^2 is the signal-to-noise ratio

and as text `format`, the model, the sampler, the seed and which of the two latents was drawn (`show`).
`trajectory.npz` holds the images drawn at these steps, `arr_0` uint8 [K, H, W, C]: the format that evaluators read.
"""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, Self

from uldm_cli.errors import ConfigError, UldmError
from uldm_cli.formats.tensors import open_safetensors, write_safetensors
from uldm_cli.runs.archive import read_npz, write_npz

if TYPE_CHECKING:
    from collections.abc import Mapping

    import numpy as np
    from numpy.typing import NDArray

    from uldm_cli.runs.trajectory import Frame

    Floats = NDArray[np.float32]

KIND = "trajectory"
TENSORS, IMAGES = "trajectory.safetensors", "trajectory.npz"
FORMAT = "uldm-trajectory-1"


@dataclass(frozen=True)
class Trajectory:
    """What the two files of a sample hold, named as in them."""

    x_t: Floats
    x0: Floats
    steps: tuple[int, ...]
    timesteps: tuple[int, ...]
    alphas: tuple[float, ...]
    sigmas: tuple[float, ...]
    about: Mapping[str, str]
    images: NDArray[np.uint8]


def trajectory_paths(folder: Path) -> tuple[Path, Path]:
    """The two files of the sample whose folder this is."""
    return folder / TENSORS, folder / IMAGES


class Gatherer:
    """Takes the frames of a batch and keeps them in a file without a name in `folder`: of a batch that logs a thousand
    steps, memory never holds more than one step, and what is written of one sample.

    Raises:
        UldmError: (from `add`) the disk is full.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._file: IO[bytes] = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115  # `close` does
        self._layout: np.dtype[Any] | None = None
        self._steps: list[tuple[int, int, float, float]] = []

    def add(self, frame: Frame) -> None:
        """Takes the states, predictions and images of a logged step."""
        import numpy as np

        step = frame.step
        parts = {"x_t": step.x.float().cpu().numpy(), "x0": step.x0.float().cpu().numpy(), "images": frame.image}
        if self._layout is None:
            self._layout = np.dtype([(name, part.dtype, part.shape) for name, part in parts.items()])
        self._steps.append((step.n, step.t, frame.schedule.alpha(step.t), frame.schedule.sigma(step.t)))
        try:
            for part in parts.values():
                self._file.write(np.ascontiguousarray(part).data)
        except OSError as e:
            hint = "Free some space, or log fewer steps with --step-size"
            raise UldmError(f"the trajectories cannot be kept in {self._folder} ({e.strerror})", hint) from e

    def gathered(self) -> Gathered:
        """All that was added, ready to be written."""
        import numpy as np

        assert self._layout, "the last step is always logged"
        self._file.flush()
        return Gathered(np.memmap(self._file, self._layout, "r", shape=(len(self._steps),)), tuple(self._steps))

    def close(self) -> None:
        """Lets go of the file; what `gathered` gave stays readable."""
        self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


@dataclass(frozen=True)
class Gathered:
    """The logged steps of a batch, on disk."""

    records: NDArray[np.void]
    """`[K]` of `x_t`, `x0` and `images`, each of the whole batch."""
    steps: tuple[tuple[int, int, float, float], ...]
    """Completed steps, timestep, alpha and sigma of each."""


def save_trajectory(folder: Path, gathered: Gathered, row: int, about: Mapping[str, str]) -> None:
    """Writes both files of the sample that has this row in its batch."""
    import torch

    tensors, images = trajectory_paths(folder)
    columns = zip(*gathered.steps, strict=True)
    scalars = {
        name: torch.tensor(column, dtype=torch.int64 if name in ("steps", "timesteps") else torch.float64)
        for name, column in zip(("steps", "timesteps", "alphas", "sigmas"), columns, strict=True)
    }
    latents = {name: torch.from_numpy(gathered.records[name][:, row].copy()) for name in ("x_t", "x0")}
    write_safetensors(tensors, {**latents, **scalars}, {"format": FORMAT, **about})
    write_npz(images, gathered.records["images"][:, row])


def read_trajectory(folder: Path) -> Trajectory:
    """The numbers of the sample whose folder this is.

    Raises:
        ConfigError: a file is missing, damaged, or not of a trajectory.
    """
    path, archive = trajectory_paths(folder)
    about, tensors = open_safetensors(path)
    if about.get("format") != FORMAT:
        raise ConfigError(f"{path} is no trajectory of `uldm ldm sample`", "Sample with --save trajectory")
    try:
        found: dict[str, Any] = {name: tensors[name].read().numpy() for name in ("x_t", "x0")}
        for name in ("steps", "timesteps", "alphas", "sigmas"):
            found[name] = tuple(tensors[name].read().tolist())
    except KeyError as e:
        raise ConfigError(f"{path} lacks the tensor {e.args[0]!r}", "Sample again with --save trajectory") from e
    images = read_npz(archive)
    if len(images) != len(found["steps"]):
        counts = f"{len(images)} images, and {path.name} tells of {len(found['steps'])} steps"
        raise ConfigError(f"{archive} holds {counts}", "Sample again with --save trajectory")
    return Trajectory(about=about, images=images, **found)
