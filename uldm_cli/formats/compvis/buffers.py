"""The tensors of a published checkpoint that follow from its config: the schedule and the average's bookkeeping."""

from typing import TYPE_CHECKING, Any

from uldm_cli.formats.compvis.names import BUFFERS, EMA

if TYPE_CHECKING:
    from torch import Tensor


def betas_of(schedule: Any) -> "Tensor":
    """The betas, float64 `[T]`, of the spec of a schedule that the reference knows, too."""
    from uldm_cli.core import schedules

    if schedule.kind == "cosine":
        return schedules.cosine_betas(schedule.timesteps, schedule.offset)
    make = {"scaled_linear": schedules.scaled_linear_betas, "linear": schedules.linear_betas}[schedule.kind]
    return make(schedule.timesteps, schedule.start, schedule.end)


def schedule_buffers(betas: "Tensor") -> "dict[str, Tensor]":
    """All that the reference precomputes of a schedule (Ho et al. 2020, eq. 4, 6 and 7).

    Args:
        betas: float64 `[T]`.

    Returns:
        float32 `[T]` each, by the reference's names.
    """
    import torch

    alphas = 1 - betas
    bars = torch.cumprod(alphas, 0)
    before = torch.cat([torch.ones(1, dtype=torch.float64), bars[:-1]])
    variance = betas * (1 - before) / (1 - bars)
    values = (
        betas,
        bars,
        before,
        bars.sqrt(),
        (1 - bars).sqrt(),
        (1 - bars).log(),
        (1 / bars).sqrt(),
        (1 / bars - 1).sqrt(),
        variance,
        variance.clamp(min=1e-20).log(),
        betas * before.sqrt() / (1 - bars),
        (1 - before) * alphas.sqrt() / (1 - bars),
    )
    return {name: value.float() for name, value in zip(BUFFERS, values, strict=True)}


def average_counters(step: int) -> "dict[str, Tensor]":
    """Decay and number of updates, which the reference stores with an average."""
    import torch

    return {
        f"{EMA}decay": torch.tensor(0.9999, dtype=torch.float32),
        f"{EMA}num_updates": torch.tensor(step, dtype=torch.int32),
    }
