"""`uldm viz recreate`: makes a picture again from what it says of how it was made, and compares the two."""

from __future__ import annotations

import math
from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING, Any

from uldm_cli import console, registry
from uldm_cli.errors import ConfigError, UldmError
from uldm_cli.runs.files import read_picture
from uldm_cli.runs.outdir import choose_outdir, default_outdir
from uldm_cli.runs.recipe import Recipe, identity, read_recipe
from uldm_cli.specs.load import load_config

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    import numpy as np
    from numpy.typing import NDArray

    from uldm_cli.runs.models import ModelFile
    from uldm_cli.specs.sampling import Walk

    Bytes = NDArray[np.uint8]


@dataclass(frozen=True)
class _Command:
    """A command that can be run again."""

    verb: str
    kind: str
    """Of its config."""
    planner: str
    """The module with its `plan_<verb>` and `RECORD`; the module `runs.<verb>` has its `<verb>`."""


_COMMANDS = {
    "ldm sample": _Command("sample", "ldm-sample", "uldm_cli.runs.sample"),
    "ldm grid": _Command("grid", "ldm-sample", "uldm_cli.runs.grid"),
    "ldm explain": _Command("explain", "ldm-explain", "uldm_cli.runs.explain_plan"),
}


@dataclass(frozen=True)
class Recreated:
    """A picture, and the same made again."""

    source: Path
    file: Path
    """The new one."""
    recipe: Recipe
    psnr: float
    """Between the two, in dB: infinite when all pixels are the same, not a number when the sizes differ."""
    model_changed: bool | None
    """Since the picture was made; None where the picture says nothing of its model."""

    @property
    def identical(self) -> bool:
        """Whether all pixels are the same."""
        return self.psnr == math.inf


def recreate(source: Path, outdir: Path | None = None, flags: Mapping[str, object] | None = None) -> Recreated:
    """Runs the command that made a picture again, for the samples in that picture only.

    Args:
        source: the picture.
        outdir: where to write; by default a folder of its own.
        flags: what overrides its config, such as a `model` that has moved.

    Raises:
        ConfigError: the picture does not say how it was made, or that cannot be done here.
    """
    recipe = read_recipe(source)
    before = read_picture(source)
    command = _COMMANDS.get(recipe.command)
    if command is None:
        raise ConfigError(
            f"{source} was made by `uldm {recipe.command}`, which cannot be run again from a picture",
            f"These can: {', '.join(_COMMANDS)}",
        )
    try:
        plan = _planned(command, recipe, outdir, flags or {})
    except ConfigError as error:
        raise ConfigError(f"{source} cannot be made again: {error.message}", error.hint) from error
    changed = _warn_of_change(source, recipe, plan.model)
    result = getattr(import_module(f"uldm_cli.runs.{command.verb}"), command.verb)(plan)
    for _, file in result.files:
        if file.suffix == ".png" and read_recipe(file).picture == recipe.picture:
            return Recreated(source, file, recipe, psnr(before, read_picture(file)), changed)
    raise UldmError(f"the config in {source} does not make the picture that it says it is")


def _planned(command: _Command, recipe: Recipe, outdir: Path | None, flags: Mapping[str, object]) -> Any:
    """The run that makes the picture again."""
    module = import_module(command.planner)
    spec: Walk = load_config(registry.load("commands", command.kind), None, (), flags, base=recipe.config)
    folder = choose_outdir(outdir, default_outdir("viz", "recreate"), module.RECORD, spec)
    return getattr(module, f"plan_{command.verb}")(spec, folder)


def _warn_of_change(source: Path, recipe: Recipe, model: ModelFile) -> bool:
    """Whether the model is another now."""
    now = identity(model)
    if now == recipe.model:
        return False
    then, steps = recipe.model.get("step"), ""
    if then != now["step"]:
        steps = f" (step {then} then, {now['step']} now)"
    console.warn(f"the model {model.name} is not the one that {source} was made with{steps}")
    return True


def psnr(a: Bytes, b: Bytes) -> float:
    """Peak signal-to-noise ratio of two pictures in dB; infinite where they are equal, NaN where sizes differ."""
    import numpy as np

    if a.shape != b.shape:
        return math.nan
    error = float(np.mean((a.astype(np.float64) - b) ** 2))
    return 10 * math.log10(255**2 / error) if error else math.inf
