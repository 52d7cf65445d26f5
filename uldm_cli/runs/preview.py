"""What a training run would do, for `--dry-run`: parameters, memory, steps, and where everything goes."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from uldm_cli.runs.latent_cache import training_set
from uldm_cli.runs.train import count_parameters
from uldm_cli.runs.train_plan import Plan

if TYPE_CHECKING:
    from torch import nn

    from uldm_cli.core.memory import Memory


@dataclass(frozen=True)
class Preview:
    """What a run would do."""

    plan: Plan[Any]
    title: str
    device: str
    parameters: int
    images: int
    skipped: int
    memory: "Memory"
    """Of a process, estimated."""
    details: dict[str, str]
    """What else there is to know, by name."""


def make_preview(plan: Plan[Any], what: str, module: "nn.Module", memory: "Memory", details: dict[str, str]) -> Preview:
    """What a run would do, for `--dry-run`. `module` is what it would train, and may be without memory ("meta")."""
    from uldm_cli.core.device import pick_device, pick_dtype

    images = training_set(plan)
    device = pick_device(plan.train.device)
    precision = str(pick_dtype(plan.train.precision, device)).removeprefix("torch.")
    return Preview(
        plan,
        what,
        f"{device}, {precision}",
        count_parameters(module),
        len(images),
        len(images.skipped),
        memory,
        details,
    )
