"""All that a plugin imports from `uldm`, and all that is kept stable for it.

    from typing import Literal
    from pydantic import Field
    from uldm_cli.api import Sampler, Spec

    class Euler(Spec):
        '''Euler's method on the probability-flow equation.'''
        kind: Literal["euler"] = "euler"
        steps: int = Field(50, ge=1, description="Number of steps.")

        def build(self) -> Sampler:
            from my_package.euler import euler     # torch loads here, when the sampler is used
            return partial(euler, steps=self.steps)

Announce it in the plugin's pyproject: `[project.entry-points."uldm.samplers.v1"]`, `euler = "my_package.specs:Euler"`.
What comes from the core (`Step`, `Prediction`, ...) brings torch and is imported when it is first asked for.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from uldm_cli.errors import ConfigError, PluginError, UldmError, UsageError, nearest
from uldm_cli.specs.autoencoders import Autoencoder
from uldm_cli.specs.backbones import Backbone
from uldm_cli.specs.base import Slot, Spec, problem
from uldm_cli.specs.datasets import Dataset
from uldm_cli.specs.samplers import Sampler

if TYPE_CHECKING:
    from uldm_cli.core.data import ImageSet
    from uldm_cli.core.samplers import Constrain, Denoise, Noise, Prediction, Step
    from uldm_cli.core.schedules import Schedule
    from uldm_cli.core.spacing import uniform_timesteps

__all__ = [
    "Autoencoder",
    "Backbone",
    "ConfigError",
    "Constrain",
    "Dataset",
    "Denoise",
    "ImageSet",
    "Noise",
    "PluginError",
    "Prediction",
    "Sampler",
    "Schedule",
    "Slot",
    "Spec",
    "Step",
    "UldmError",
    "UsageError",
    "nearest",
    "problem",
    "uniform_timesteps",
]

_CORE = {
    **dict.fromkeys(("Constrain", "Denoise", "Noise", "Prediction", "Step"), "uldm_cli.core.samplers"),
    "Schedule": "uldm_cli.core.schedules",
    "uniform_timesteps": "uldm_cli.core.spacing",
    "ImageSet": "uldm_cli.core.data",
}


def __getattr__(name: str) -> Any:
    if name not in _CORE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_CORE[name]), name)


def __dir__() -> list[str]:
    return __all__
