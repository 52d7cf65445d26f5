"""Vector quantizers: latents to the nearest of a learned set of codes, and what is known of the codes' use."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from uldm_cli.core import rng

Losses = dict[str, Tensor]


class Quantized(NamedTuple):
    z: Tensor
    """Codes in place of latents, `[N, D, h, w]`; gradients pass straight through to the latents."""
    losses: Losses
    """`codebook_loss` and `commitment_loss`: mean squared distances, unweighted scalars."""
    indices: Tensor
    """int64 `[N, h, w]`."""


class Quantizer(nn.Module):
    """Nearest-neighbour quantizer whose codes are trained by gradient (van den Oord et al. 2017, eq. 3).

    Args:
        codebook_size: number of codes K.
        dim: length D of a code.
        legacy: give the two losses under each other's name, and so with each other's factor. The published code does
            this: its beta of 0.25, meant for the commitment, weighs the loss that moves the codes.
    """

    epoch_counts: Tensor
    """How often each code was used in training since the epoch began, int64 `[K]`."""

    def __init__(self, codebook_size: int, dim: int, legacy: bool = False) -> None:
        super().__init__()
        self.codebook_size, self.dim, self.legacy = codebook_size, dim, legacy
        self.embedding = nn.Parameter(torch.empty(codebook_size, dim).uniform_(-1 / codebook_size, 1 / codebook_size))
        # Not part of the model: the training state keeps it.
        self.register_buffer("epoch_counts", torch.zeros(codebook_size, dtype=torch.int64), persistent=False)

    def forward(self, z: Tensor) -> Quantized:
        N, D, h, w = z.shape
        # Distances in bfloat16 would send many latents to the wrong code.
        with torch.autocast(z.device.type, enabled=False):
            flat = z.float().permute(0, 2, 3, 1).reshape(-1, D)
            indices = self.nearest(flat)
            if self.training:
                self.observe(flat.detach(), indices)
            codes = F.embedding(indices, self.codes)
            losses = self.losses(flat, codes)
            straight = flat + (codes - flat).detach() if z.requires_grad else codes
            quantized = straight.view(N, h, w, D).permute(0, 3, 1, 2)
        return Quantized(quantized.to(z.dtype), losses, indices.view(N, h, w))

    @property
    def codes(self) -> Tensor:
        """float32 `[K, D]`."""
        return self.embedding.float()

    def nearest(self, flat: Tensor) -> Tensor:
        """Index of the nearest code of each row of `[M, D]`: int64 `[M]`."""
        codes = self.codes.detach()
        return torch.addmm(codes.square().sum(1), flat.detach(), codes.t(), alpha=-2).argmin(1)

    def losses(self, flat: Tensor, codes: Tensor) -> Losses:
        codebook, commitment = F.mse_loss(codes, flat.detach()), F.mse_loss(flat, codes.detach())
        if self.legacy:
            codebook, commitment = commitment, codebook
        return {"codebook_loss": codebook, "commitment_loss": commitment}

    def observe(self, flat: Tensor, indices: Tensor) -> None:
        """Takes note of a training batch: latents `[M, D]` and their codes `[M]`."""
        self.epoch_counts += torch.bincount(indices, minlength=self.codebook_size)

    def after_step(self, step: int) -> None:
        """What the codebook does once a training step is complete."""

    def forget_step(self) -> None:
        """Forgets what was seen since the last step: it is skipped, and `after_step` is not called."""

    def state(self) -> dict[str, Tensor]:
        """What resuming needs beside the module's state dict."""
        return {"epoch_counts": self.epoch_counts}

    def load_state(self, state: dict[str, Tensor]) -> None:
        """The inverse of `state`."""
        self.epoch_counts.copy_(state["epoch_counts"])


class EMAQuantizer(Quantizer):
    """Codes that follow the mean of the latents assigned to them (van den Oord et al. 2017, appendix A.1).

    The codes start as latents of the first training batch. A code whose use falls below the share `revive_below` of
    the average use is put on a random latent of the current batch, so the codebook cannot collapse.

    Args:
        codebook_size: number of codes K.
        dim: length D of a code.
        decay: of the moving averages, in [0, 1).
        revive_below: share of the average use, in [0, 1), below which a code counts as dead; 0 never revives.
        seed: of the draws for start and revival.
    """

    cluster_size: Tensor
    cluster_sum: Tensor
    initialized: Tensor

    def __init__(self, codebook_size: int, dim: int, decay: float, revive_below: float, seed: int) -> None:
        super().__init__(codebook_size, dim)
        self.decay, self.revive_below, self.seed = decay, revive_below, seed
        self.embedding.requires_grad_(False)
        self.register_buffer("cluster_size", torch.ones(codebook_size))
        self.register_buffer("cluster_sum", self.embedding.detach().clone())
        self.register_buffer("initialized", torch.tensor(False))
        self._batch: tuple[Tensor, Tensor] | None = None

    def losses(self, flat: Tensor, codes: Tensor) -> Losses:
        commitment = F.mse_loss(flat, codes)
        return {"codebook_loss": commitment.detach(), "commitment_loss": commitment}

    def nearest(self, flat: Tensor) -> Tensor:
        if self.training and not self.initialized:
            self._place(torch.ones_like(self.cluster_size, dtype=torch.bool), flat.detach(), step=0)
            self.initialized.fill_(True)
        return super().nearest(flat)

    def observe(self, flat: Tensor, indices: Tensor) -> None:
        super().observe(flat, indices)
        if self._batch is not None:  # several micro-batches make one step
            flat, indices = torch.cat([self._batch[0], flat]), torch.cat([self._batch[1], indices])
        self._batch = flat, indices

    @torch.no_grad()
    def after_step(self, step: int) -> None:
        if self._batch is None:
            return
        flat, indices = self._batch
        self._batch = None
        counts = torch.bincount(indices, minlength=self.codebook_size).float()
        sums = torch.zeros_like(self.cluster_sum).index_add_(0, indices, flat)
        self.cluster_size.lerp_(counts, 1 - self.decay)
        self.cluster_sum.lerp_(sums, 1 - self.decay)
        # A code that has long been out of use stays where it is: of its sum and size only rounding errors are left.
        mean = self.cluster_sum / self.cluster_size.clamp(min=1e-5)[:, None]
        self.embedding.copy_(torch.where(self.cluster_size[:, None] > 1e-5, mean, self.embedding))
        # Revival in every step costs nothing to speak of, and needs no number to be chosen.
        self._place(self.cluster_size < self.revive_below * len(flat) / self.codebook_size, flat, step)

    def _place(self, where: Tensor, flat: Tensor, step: int) -> None:
        """Puts the codes marked in `where` `[K]` on random latents out of `flat` `[M, D]`."""
        codes = torch.arange(self.codebook_size, device=flat.device)
        chosen = flat[rng.integers(self.seed, step, codes, len(flat))]
        # A placed code gets the average weight: with less it would be dead again before it could win latents.
        size = torch.full_like(self.cluster_size, len(flat) / self.codebook_size)
        mark = where[:, None]
        self.cluster_size.copy_(torch.where(where, size, self.cluster_size))
        self.cluster_sum.copy_(torch.where(mark, chosen * size[:, None], self.cluster_sum))
        self.embedding.data.copy_(torch.where(mark, chosen, self.embedding))


def perplexity(counts: Tensor) -> Tensor:
    """exp of the entropy of code usage, from counts `[K]`: 1 (one code only) to K (all equally). Scalar float64."""
    p = counts.cpu().double() / counts.cpu().sum().clamp(min=1)
    return torch.special.entr(p).sum().exp()


def usage(counts: Tensor) -> Tensor:
    """Share of the codes used at least once, in [0, 1], from counts `[K]`. Scalar float64."""
    return (counts > 0).cpu().double().mean()
