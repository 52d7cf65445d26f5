"""The training of an autoencoder."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from uldm_cli.core.lpips import LPIPS
from uldm_cli.core.quantizers import perplexity, usage
from uldm_cli.core.training import Task
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

    def state(self) -> dict[str, Tensor]:
        return {"epoch_counts": self.model.quantize.epoch_counts}

    def load_state(self, state: dict[str, Tensor]) -> None:
        self.model.quantize.epoch_counts.copy_(state["epoch_counts"])

    def codebook_logs(self) -> dict[str, float]:
        """Perplexity and share of used codes since the epoch began."""
        counts = self.model.quantize.epoch_counts
        return {"perplexity": float(perplexity(counts)), "usage": float(usage(counts))}

    def start_epoch(self) -> None:
        self.model.quantize.epoch_counts.zero_()
