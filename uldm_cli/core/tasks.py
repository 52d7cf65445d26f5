"""What can be trained: an autoencoder, and a diffusion model in the latents of one."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from uldm_cli.core import rng
from uldm_cli.core.denoiser import training_target
from uldm_cli.core.latent import LatentDiffusion
from uldm_cli.core.lpips import LPIPS
from uldm_cli.core.quantizers import perplexity, usage
from uldm_cli.core.training import STREAM_NOISE, STREAM_TIMESTEP, Task
from uldm_cli.core.vqvae import VQVAE


@dataclass(frozen=True)
class ReconstructionWeights:
    """Factors of an autoencoder's loss terms; each term is a mean over everything."""

    l1: float
    l2: float
    lpips: float
    codebook: float
    commitment: float


class AutoencoderTask(Task):
    """Reconstruction, perceptual and quantizer losses of a VQ-VAE (van den Oord et al. 2017; Esser et al. 2021)."""

    phases = ("autoencoder",)

    def __init__(self, model: VQVAE, weights: ReconstructionWeights, lpips: LPIPS | None) -> None:
        super().__init__()
        self.model, self.weights, self.lpips = model, weights, lpips

    def trained(self, phase: str) -> list[nn.Parameter]:
        return [p for p in self.model.parameters() if p.requires_grad]

    def forward(self, phase: str, image: Tensor, number: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        recon, _, losses = self.model(image)
        recon = recon.float()
        terms = {
            "l1": F.l1_loss(recon, image),
            "l2": F.mse_loss(recon, image),
            "codebook": losses["codebook_loss"],
            "commitment": losses["commitment_loss"],
        }
        if self.lpips is not None:
            terms["lpips"] = self.lpips(recon, image).mean()
        loss = torch.stack([getattr(self.weights, name) * term for name, term in terms.items()]).sum()
        psnr = -10 * torch.log10(terms["l2"].detach() / 4)
        return loss, {"loss": loss.detach(), **{k: v.detach() for k, v in terms.items()}, "psnr": psnr}

    def after_step(self, step: int) -> None:
        self.model.quantize.after_step(step)

    def codebook_logs(self) -> dict[str, float]:
        """Perplexity and share of used codes since the epoch began."""
        counts = self.model.quantize.epoch_counts
        return {"perplexity": float(perplexity(counts)), "usage": float(usage(counts))}

    def start_epoch(self) -> None:
        self.model.quantize.epoch_counts.zero_()


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
        t = rng.integers(self.seed, STREAM_TIMESTEP, number, denoiser.schedule.T)
        eps = rng.normal(self.seed, STREAM_NOISE, number, latents.shape[1:])
        alpha, sigma = denoiser.schedule.factors(t)
        out = denoiser.backbone(alpha * latents + sigma * eps, t).float()
        loss = F.mse_loss(out, training_target(denoiser.target, latents, eps, alpha, sigma))
        return loss, {"loss": loss.detach()}
