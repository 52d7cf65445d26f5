"""The tensors of a published checkpoint that follow from its config: the schedule and the average's bookkeeping."""

from typing import TYPE_CHECKING, Any

from uldm_cli.errors import ConfigError
from uldm_cli.formats.checkpoint import KEPT, Checkpoint
from uldm_cli.formats.compvis.names import BUFFERS, EMA
from uldm_cli.specs.models import LatentDiffusionModel, read_model

if TYPE_CHECKING:
    from torch import Tensor


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


def check_schedule(checkpoint: Checkpoint) -> None:
    """Holds the schedule that a published checkpoint repeats against its config's, which is the one that we use.

    This reads a tensor. Any other checkpoint passes.

    Raises:
        ConfigError: they differ by more than half precision rounds away.
    """
    stored = checkpoint.tensors.get(f"{KEPT}betas")
    if stored is None or checkpoint.header.kind != "latent-diffusion":
        return
    schedule: Any = read_model(LatentDiffusionModel, checkpoint.header.config, str(checkpoint.path)).schedule
    betas: Tensor = schedule.betas()
    found = stored.read().double()
    if found.shape != betas.shape:
        said = f"{checkpoint.path} has a schedule of {list(stored.shape)} timesteps, and its config one of {len(betas)}"
        raise ConfigError(said, "In the config, model.params.timesteps is likely wrong")
    same = (found - betas).abs() <= 0.01 * betas
    if not same.all():
        theirs, ours = (f"{b[0]:.3g} to {b[-1]:.3g}" for b in (found, betas))
        said = f"{checkpoint.path} was trained with betas of {theirs}, and its config describes betas of {ours}"
        raise ConfigError(said, "In the config, model.params.linear_start, linear_end or beta_schedule is likely wrong")
