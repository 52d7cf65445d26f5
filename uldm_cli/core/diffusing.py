"""The training of a diffusion model in the latents of an autoencoder."""

import torch.nn.functional as F
from torch import Tensor, nn

from uldm_cli.core import rng
from uldm_cli.core.denoiser import training_target
from uldm_cli.core.latent import LatentDiffusion
from uldm_cli.core.training import Task


class DiffusionTask(Task):
    """Denoising score matching in latents: mean squared error of what the network predicts (Ho et al. 2020, eq. 14).

    Args:
        model: whose autoencoder stays as it is.
        seed: of timesteps and noise; a sample's draws depend on its number and this seed only.
    """

    phases = ("denoiser",)

    def __init__(self, model: LatentDiffusion, seed: int) -> None:
        super().__init__()
        self.model, self.seed = model, seed
        model.autoencoder.requires_grad_(False)

    def train(self, mode: bool = True) -> "DiffusionTask":
        super().train(mode)
        self.model.autoencoder.eval()
        return self

    def trained(self, phase: str) -> list[nn.Parameter]:
        return list(self.model.denoiser.parameters())

    def forward(self, phase: str, image: Tensor, number: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        latents = self.model.encode(image)
        denoiser = self.model.denoiser
        t = rng.integers(self.seed, rng.STREAM_TIMESTEP, number, denoiser.schedule.T)
        eps = rng.normal(self.seed, rng.STREAM_NOISE, number, latents.shape[1:])
        alpha, sigma = denoiser.schedule.factors(t)
        out = denoiser.backbone(alpha * latents + sigma * eps, t).float()
        loss = F.mse_loss(out, training_target(denoiser.target, latents, eps, alpha, sigma))
        return loss, {"loss": loss.detach()}
