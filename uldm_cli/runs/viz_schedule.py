"""`uldm viz schedule`: how much signal and noise the timesteps of noise schedules hold."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from uldm_cli import registry
from uldm_cli.errors import ConfigError, PluginError, UldmError
from uldm_cli.runs.draw.plot import DEFAULT, Style, picture_format, save_figure
from uldm_cli.runs.files import writable_folder
from uldm_cli.runs.models import model_config, resolve
from uldm_cli.specs.base import spec_class
from uldm_cli.specs.load import load_config
from uldm_cli.specs.models import LatentDiffusionModel

if TYPE_CHECKING:
    from collections.abc import Sequence

    from uldm_cli.core.schedules import Schedule
    from uldm_cli.runs.draw.schedules import Table
    from uldm_cli.specs.base import Spec


@dataclass(frozen=True)
class Named:
    """A schedule that is looked at."""

    name: str
    """What people call it: the kind and the settings that were given, or the model that it is of."""
    spec: Spec


def run(words: Sequence[str], models: Sequence[str], out: Path, style: Style = DEFAULT) -> list[Table]:
    """Draws schedules together.

    Args:
        words: kinds, each followed by its settings: `linear end=0.03 cosine`. Without any, and without models, all
            that are installed.
        models: references to models, whose schedules are drawn too.
        out: the picture.
        style: how it is printed.

    Raises:
        ConfigError: a kind, a setting or a model that does not exist.
        PluginError: a plugin's schedule that does not work.
    """
    from uldm_cli.runs.draw.schedules import draw_tables

    picture_format(out)
    if not words and not models:
        words = registry.kinds("schedules")
    schedules = [*read_schedules(words), *(schedule_of(model) for model in models)]
    writable_folder(out.parent)
    tables = [tabulated(schedule) for schedule in schedules]
    title = "Noise schedules: " + ", ".join(table.name for table in tables)
    save_figure(draw_tables(tables, style), out, {"title": title}, style)
    return tables


def read_schedules(words: Sequence[str]) -> list[Named]:
    """Schedules as they are typed: a kind, then settings of it as `key=value`, then the next kind.

    Raises:
        ConfigError: an unknown kind or setting, or one that comes before any kind.
    """
    groups: list[tuple[str, list[str]]] = []
    for word in words:
        if "=" not in word:
            groups.append((word, []))
        elif groups:
            groups[-1][1].append(word)
        else:
            raise ConfigError(f"{word} comes before the schedule that it is of", f"Write: linear {word}")
    return [_read(kind, settings) for kind, settings in groups]


def _read(kind: str, settings: list[str]) -> Named:
    return Named(" ".join([kind, *settings]), load_config(spec_class("schedules", kind), None, settings))


def schedule_of(model: str) -> Named:
    """The schedule that a model was trained with.

    Raises:
        ConfigError: there is no such model.
    """
    return Named(model, model_config(resolve(model), LatentDiffusionModel).schedule)


def built(schedule: Named) -> Schedule:
    """What its spec builds. A plugin imports its heavy part only there, so there it can still break."""
    kind: Any = getattr(schedule.spec, "kind", "")
    try:
        made: Schedule = schedule.spec.build()
    except UldmError as e:
        raise ConfigError(f"{schedule.name}: {e.message}", e.hint) from e
    except Exception as e:
        owner = registry.owner("schedules", kind)
        raise PluginError(f"schedule '{kind}' of {owner} failed to build: {type(e).__name__}: {e}") from e
    return made


def tabulated(schedule: Named) -> Table:
    """Its values at every timestep, from the factors of signal and noise that samplers ask it for."""
    import numpy as np

    from uldm_cli.runs.draw.schedules import Table

    made = built(schedule)
    alphas = np.array([made.alpha(t) for t in range(made.T)])
    sigmas = np.array([made.sigma(t) for t in range(made.T)])
    signal = alphas**2
    with np.errstate(divide="ignore"):
        log_snr = 2 * (np.log(alphas) - np.log(sigmas))
    # For one that preserves the variance these are its betas; of another, what a step takes of the signal's variance.
    betas = 1 - signal / np.concatenate([[1.0], signal[:-1]])
    return Table(schedule.name, signal, log_snr, betas)
