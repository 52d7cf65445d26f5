"""The memory that a training needs, by its config alone, and whether there is as much."""

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

from uldm_cli import console
from uldm_cli.errors import ConfigError
from uldm_cli.runs.models import known_autoencoder
from uldm_cli.runs.processes import neighbours, processes, sharded
from uldm_cli.runs.train_plan import Plan
from uldm_cli.runs.trained_on import autoencoder_of
from uldm_cli.specs.autoencoder_training import AutoencoderTraining
from uldm_cli.specs.diffusion_training import DiffusionTraining

if TYPE_CHECKING:
    import torch
    from torch import nn

    from uldm_cli.core.memory import Memory

_MOST = 5000
"""Activations are at most so many times the images: those of the largest published autoencoder are 3,300 times."""


def autoencoder_memory(plan: Plan[AutoencoderTraining], *, activations: bool = True) -> "Memory":
    """Of a process that trains an autoencoder; without `activations` they count as none, and it takes no time."""
    import torch

    from uldm_cli.core.lpips import BACKBONES
    from uldm_cli.core.memory import estimate, shapes_only

    spec = plan.config
    shape = (spec.data.channels, spec.data.size, spec.data.size)
    with shapes_only(_precision(plan)) if activations else torch.device("meta"):
        module = spec.autoencoder.build().eval()  # only in training do quantizers look at values
        net = BACKBONES[spec.loss.lpips_net]
        used = [net.build(weights=None).features[: net.cuts[-1]]] if spec.loss.lpips else []
        rivals = [spec.adversarial.build(spec.data.channels).discriminator] if spec.adversarial else []

        def compute(images: int) -> None:
            latent = module.to_latent(torch.empty(images, *shape))
            recon = module.decode(latent) if hasattr(module, "quantize") else module.from_latent(latent)
            for features in used:
                features(recon.expand(-1, 3, -1, -1))
            for rival in rivals:
                rival.eval()(recon)

        kept = _kept(compute, module, plan) if activations else 0
        return estimate([module, *rivals], used, _averages(plan), kept, _weights(plan))


def diffusion_memory(plan: Plan[DiffusionTraining], *, activations: bool = True) -> "Memory":
    """Of a process that trains a latent diffusion model; `activations` as above."""
    import torch

    from uldm_cli.core.memory import estimate, most_alive, shapes_only

    spec = plan.config
    assert spec.data is not None
    held = known_autoencoder(autoencoder_of(plan))
    shape = held.model_copy(update={"image_size": spec.data.size}).latent_shape
    with shapes_only(_precision(plan)) if activations else torch.device("meta"):
        backbone = spec.backbone.build(shape[0], shape[0] * (2 if spec.learned_variance else 1))

        def compute(images: int) -> None:
            backbone(torch.empty(images, *shape), torch.zeros(images, dtype=torch.int64))

        autoencoder: Any = held.build().eval().requires_grad_(False)
        image = (spec.data.channels, spec.data.size, spec.data.size)

        def encode() -> None:
            autoencoder.to_latent(torch.empty(1, *image))

        kept = _kept(compute, backbone, plan) if activations else 0
        if activations and spec.latents is None:
            kept = max(kept, plan.micro_batch * most_alive(encode))
        shares = processes() if sharded() else 1
        return estimate([backbone], [autoencoder], _averages(plan), kept, _weights(plan), shares)


def mind_memory(plan: Plan[Any], measure: "Callable[..., Memory]") -> None:
    """Tells before a training starts that it needs more memory than there is. `measure` is one of the above.

    Raises:
        ConfigError: not even the weights and what training keeps of each fit.
    """
    from uldm_cli.core.device import pick_device
    from uldm_cli.core.memory import available

    data, there = plan.config.data, available(pick_device(plan.train.device), *neighbours())
    fits = _MOST * 4 * plan.micro_batch * data.channels * data.size**2 < there / 2
    need = measure(plan, activations=not fits)
    if need.fixed > there:
        what = (
            f"weights, averages, gradients and moments need {in_gb(need.fixed)} of memory, and {in_gb(there)} are free"
        )
        raise ConfigError(what, "Take a smaller network")
    if need.total > there:
        console.warn(
            f"this training needs about {in_gb(need.total)} of memory, and {in_gb(there)} are free: a smaller "
            "--batch-size, or a greater train.accumulate, needs less"
        )


def in_gb(size: int) -> str:
    """Bytes for people."""
    return f"{size / 1e9:,.0f} GB" if size >= 10e9 else f"{size / 1e9:.2g} GB"


def _kept(compute: "Callable[[int], None]", trained: "nn.Module", plan: Plan[Any]) -> int:
    """What a backward pass of a micro-batch needs, from one and two images: each further one adds as much.

    All at once would take minutes for a large one, for attention goes through its images by themselves on a CPU.
    """
    import torch

    from uldm_cli.core.device import pick_device
    from uldm_cli.core.memory import kept_for_backward, kept_transformed

    one, two = (kept_for_backward(partial(compute, images)) for images in (1, 2))
    kept = one + (plan.micro_batch - 1) * (two - one)
    train = plan.config.train
    if pick_device(train.device).type == "cpu" and _precision(plan) == torch.float32 and not train.compile:
        kept += kept_transformed(trained, partial(compute, 1), plan.micro_batch)
    return kept


def _precision(plan: Plan[Any]) -> "torch.dtype":
    from uldm_cli.core.device import pick_device, pick_dtype

    return pick_dtype(plan.train.precision, pick_device(plan.train.device))


def _weights(plan: Plan[Any]) -> "torch.dtype":
    import torch

    return torch.float64 if plan.train.precision == "fp64" else torch.float32


def _averages(plan: Plan[Any]) -> int:
    return 1 + len(plan.train.ema_profiles)
