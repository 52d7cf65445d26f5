"""Vector quantizers: latents to the nearest of a set of codes, and what is known of the codes' use.

Each kind says where a latent lies among its codes (`enter`), which code is nearest there, what the decoder is given
in the latent's place (`leave`), and what it learns from a training step.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from uldm_cli.core import collectives, rng
from uldm_cli.core.device import at_least_float32
from uldm_cli.errors import ConfigError

Losses = dict[str, Tensor]

USE_DECAY = 0.99
"""Of the moving average of use by which codes that are trained by gradient count as dead: about a hundred steps."""


class Quantized(NamedTuple):
    z: Tensor
    """Codes in place of latents, `[N, D, h, w]`; gradients pass straight through to the latents."""
    losses: Losses
    """`codebook_loss` and `commitment_loss`: mean squared distances, unweighted scalars."""
    indices: Tensor
    """int64 `[N, h, w]`."""


class Quantizer(nn.Module):
    """What all kinds have in common.

    In training it keeps what it sees of a step, which may come in several micro-batches and be spread over processes,
    until `after_step` or `forget_step`. A pass without gradients (of a discriminator's phase, say) is not training.

    Args:
        codebook_size: number of codes K.
        dim: channels D of a latent.
    """

    epoch_counts: Tensor
    """How often each code was used in the training steps since the epoch began, by all processes: int64 `[K]`."""

    def __init__(self, codebook_size: int, dim: int) -> None:
        super().__init__()
        self.codebook_size, self.dim = codebook_size, dim
        # Not part of the model: the training state keeps it.
        self.register_buffer("epoch_counts", torch.zeros(codebook_size, dtype=torch.int64), persistent=False)
        self._seen: list[tuple[Tensor, Tensor]] = []

    def forward(self, z: Tensor) -> Quantized:
        N, D, h, w = z.shape
        # Distances in bfloat16 would send many latents to the wrong code.
        with torch.autocast(z.device.type, enabled=False):
            points = self.enter(at_least_float32(z).permute(0, 2, 3, 1).reshape(-1, D))
            training = self.training and torch.is_grad_enabled()
            if training:
                self.start(points.detach())
            indices = self.nearest(points.detach())
            if training:
                self._seen.append((points.detach(), indices))
            codes = F.embedding(indices, self.table(points.dtype))
            losses = self.losses(points, codes)
            straight = points + (codes - points).detach() if points.requires_grad else codes
            quantized = self.leave(straight).view(N, h, w, D).permute(0, 3, 1, 2)
        return Quantized(quantized.to(z.dtype), losses, indices.view(N, h, w))

    @property
    def codes(self) -> Tensor:
        """What the decoder is given for each code: `[K, D]`, float32, or float64 where the weights are."""
        return self.leave(self.table(None))

    def enter(self, flat: Tensor) -> Tensor:
        """Where latents `[M, D]` lie among the codes: `[M, d]`."""
        return flat

    def leave(self, codes: Tensor) -> Tensor:
        """What the decoder is given in place of codes `[M, d]`: `[M, D]`."""
        return codes

    def table(self, dtype: torch.dtype | None) -> Tensor:
        """The codes, `[K, d]`; by default float32, or float64 where the weights are."""
        raise NotImplementedError

    def nearest(self, points: Tensor) -> Tensor:
        """Index of the code nearest to each of `[M, d]`: int64 `[M]`."""
        raise NotImplementedError

    def losses(self, points: Tensor, codes: Tensor) -> Losses:
        """The two losses of points and their codes, both `[M, d]`."""
        raise NotImplementedError

    def start(self, points: Tensor) -> None:
        """Called with the points `[M, d]` of each batch of training before their codes are looked up."""

    def learn(self, step: int, parts: list[Tensor], indices: Tensor, counts: Tensor) -> None:
        """What the codebook does once a training step is complete.

        Args:
            step: counted from 1.
            parts: this process's points, `[m, d]` a micro-batch.
            indices: of their codes, int64, the micro-batches one after another.
            counts: how often each code was used by all processes, int64 `[K]`.
        """

    @torch.no_grad()
    def after_step(self, step: int) -> None:
        """Counts and learns what all processes saw since the last step. To be called on each of them."""
        if not self._seen:
            return
        parts, indices = [points for points, _ in self._seen], torch.cat([chosen for _, chosen in self._seen])
        self._seen = []
        counts = collectives.total(torch.bincount(indices, minlength=self.codebook_size))
        self.epoch_counts += counts
        self.learn(step, parts, indices, counts)

    def forget_step(self) -> None:
        """Forgets what was seen since the last step: it is skipped, and `after_step` is not called."""
        self._seen = []

    def state(self) -> dict[str, Tensor]:
        """What resuming needs beside the module's state dict; between two steps the same on every process."""
        return {"epoch_counts": self.epoch_counts}

    def load_state(self, state: dict[str, Tensor]) -> None:
        """The inverse of `state`.

        Raises:
            ConfigError: it is the state of another quantizer.
        """
        for name, value in self.state().items():
            if name not in state or state[name].shape != value.shape:
                raise ConfigError(f"expected {name} of {value.numel()} codes in the state of the training, not found")
            value.copy_(state[name])


class Codebook(Quantizer):
    """Codes that are learned: the nearest is chosen, and dead ones can be put on random latents.

    Args:
        codebook_size: number of codes K.
        dim: channels D of a latent, and length of a code.
        revive_below: share of the average use, in [0, 1), below which a code counts as dead; 0 never revives.
        seed: of the draws of latents.
    """

    def __init__(self, codebook_size: int, dim: int, revive_below: float, seed: int) -> None:
        super().__init__(codebook_size, dim)
        self.revive_below, self.seed = revive_below, seed
        self.embedding = nn.Parameter(torch.empty(codebook_size, dim).uniform_(-1 / codebook_size, 1 / codebook_size))

    def table(self, dtype: torch.dtype | None) -> Tensor:
        return at_least_float32(self.embedding) if dtype is None else self.embedding.to(dtype)

    def nearest(self, points: Tensor) -> Tensor:
        codes = self.table(points.dtype).detach()
        distances = torch.addmm(codes.square().sum(1), points, codes.t(), alpha=-2)
        return distances.min(1).indices  # on a CPU `argmin` takes twice as long

    def draw(self, step: int, parts: list[Tensor]) -> Tensor:
        """A random one of the points of all processes for each code, `[K, d]`."""
        codes = torch.arange(self.codebook_size, device=parts[0].device)
        return _rows(parts, rng.integers(self.seed, step, codes, _size(parts)))


class NearestQuantizer(Codebook):
    """Nearest-neighbour quantizer whose codes are trained by gradient (van den Oord et al. 2017, eq. 3).

    Only codes that are chosen get a gradient, so without revival those far from all latents stay dead.

    Args:
        codebook_size: number of codes K.
        dim: length D of a code.
        legacy: give the two losses under each other's name, and so with each other's factor. The published code does
            this: its beta of 0.25, meant for the commitment, weighs the loss that moves the codes.
        revive_below: as of Codebook.
        seed: as of Codebook.
    """

    use: Tensor
    """Moving average of each code's use, as a share of the average use: `[K]`. 1 until training says otherwise."""

    def __init__(
        self, codebook_size: int, dim: int, *, legacy: bool = False, revive_below: float = 0.0, seed: int = 0
    ) -> None:
        super().__init__(codebook_size, dim, revive_below, seed)
        self.legacy = legacy
        # Published checkpoints hold the codes alone, so this is left to the training state.
        self.register_buffer("use", torch.ones(codebook_size), persistent=False)

    def losses(self, points: Tensor, codes: Tensor) -> Losses:
        codebook, commitment = F.mse_loss(codes, points.detach()), F.mse_loss(points, codes.detach())
        if self.legacy:
            codebook, commitment = commitment, codebook
        return {"codebook_loss": codebook, "commitment_loss": commitment}

    def learn(self, step: int, parts: list[Tensor], indices: Tensor, counts: Tensor) -> None:
        if not self.revive_below:
            return
        self.use.lerp_(counts.to(self.use) * (self.codebook_size / _size(parts)), 1 - USE_DECAY)
        dead = self.use < self.revive_below
        self.embedding.copy_(torch.where(dead[:, None], self.draw(step, parts), self.embedding))
        self.use.masked_fill_(dead, 1)

    def state(self) -> dict[str, Tensor]:
        return {**super().state(), "use": self.use}


class CosineQuantizer(NearestQuantizer):
    """Codes and latents of length 1, compared by their cosine, in fewer dimensions if so wished (Yu et al. 2022, 3.2).

    The losses are those of the normalised vectors; on the sphere no code is far from all latents for its length alone.

    Args:
        codebook_size: number of codes K.
        dim: channels D of a latent.
        code_dim: length d of a code, between two learned projections; None compares the latents as they are.
        revive_below: as of Codebook.
        seed: as of Codebook.
    """

    def __init__(
        self, codebook_size: int, dim: int, *, code_dim: int | None = None, revive_below: float = 0.0, seed: int = 0
    ) -> None:
        super().__init__(codebook_size, code_dim or dim, revive_below=revive_below, seed=seed)
        self.dim = dim
        # A gradient step turns a short code further: of length 1 all turn alike, and spread over the sphere.
        nn.init.normal_(self.embedding)
        self.embedding.data.copy_(F.normalize(self.embedding.data, dim=1))
        self.project_in = nn.Linear(dim, code_dim) if code_dim else None
        self.project_out = nn.Linear(code_dim, dim) if code_dim else None

    def enter(self, flat: Tensor) -> Tensor:
        return F.normalize(_projected(flat, self.project_in), dim=1)

    def leave(self, codes: Tensor) -> Tensor:
        return _projected(codes, self.project_out)

    def table(self, dtype: torch.dtype | None) -> Tensor:
        return F.normalize(super().table(dtype), dim=1)

    def nearest(self, points: Tensor) -> Tensor:
        return (points @ self.table(points.dtype).detach().t()).argmax(1)


class EMAQuantizer(Codebook):
    """Codes that follow the mean of the latents assigned to them (van den Oord et al. 2017, appendix A.1).

    The codes start as latents of the first training batch. A code whose use falls below the share `revive_below` of
    the average use is put on a random latent of the current step, so the codebook cannot collapse.

    Args:
        codebook_size: number of codes K.
        dim: length D of a code.
        decay: of the moving averages, in [0, 1).
        revive_below: as of Codebook.
        seed: as of Codebook.
    """

    cluster_size: Tensor
    cluster_sum: Tensor
    initialized: Tensor

    def __init__(self, codebook_size: int, dim: int, decay: float, revive_below: float, seed: int) -> None:
        super().__init__(codebook_size, dim, revive_below, seed)
        self.decay = decay
        self.embedding.requires_grad_(False)
        self.register_buffer("cluster_size", torch.ones(codebook_size))
        self.register_buffer("cluster_sum", self.embedding.detach().clone())
        self.register_buffer("initialized", torch.tensor(False))
        self._just_placed = False

    def losses(self, points: Tensor, codes: Tensor) -> Losses:
        commitment = F.mse_loss(points, codes)
        return {"codebook_loss": commitment.detach(), "commitment_loss": commitment}

    @torch.no_grad()
    def start(self, points: Tensor) -> None:
        if not self.initialized:
            self._place(torch.ones_like(self.cluster_size, dtype=torch.bool), [points], step=0)
            self.initialized.fill_(True)
            self._just_placed = True

    def learn(self, step: int, parts: list[Tensor], indices: Tensor, counts: Tensor) -> None:
        self._just_placed = False
        sums = collectives.total(torch.zeros_like(self.cluster_sum).index_add_(0, indices, torch.cat(parts)))
        self.cluster_size.lerp_(counts.to(self.cluster_size), 1 - self.decay)
        self.cluster_sum.lerp_(sums, 1 - self.decay)
        # A code that has long been out of use stays where it is: of its sum and size only rounding errors are left.
        mean = self.cluster_sum / self.cluster_size.clamp(min=1e-5)[:, None]
        self.embedding.copy_(torch.where(self.cluster_size[:, None] > 1e-5, mean, self.embedding))
        # Revival in every step costs nothing to speak of, and needs no number to be chosen.
        self._place(self.cluster_size < self.revive_below * _size(parts) / self.codebook_size, parts, step)

    def _place(self, where: Tensor, parts: list[Tensor], step: int) -> None:
        """Puts the codes marked in `where` `[K]` on random points of all processes."""
        chosen = self.draw(step, parts)
        # A placed code gets the average weight: with less it would be dead again before it could win latents.
        size = torch.full_like(self.cluster_size, _size(parts) / self.codebook_size)
        mark = where[:, None]
        self.cluster_size.copy_(torch.where(where, size, self.cluster_size))
        self.cluster_sum.copy_(torch.where(mark, chosen * size[:, None], self.cluster_sum))
        self.embedding.data.copy_(torch.where(mark, chosen, self.embedding))

    def forget_step(self) -> None:
        """Also takes back the codes' first placement, which was made for this step: its latents may be NaN."""
        super().forget_step()
        if self._just_placed:
            self.initialized.fill_(False)
            self._just_placed = False


class FSQ(Quantizer):
    """Finite scalar quantization (Mentzer et al. 2023, appendix A.1): each channel is rounded to a few values.

    The codes are all combinations of those values, a fixed grid in [-1, 1]. Nothing is learned and both losses are 0.

    Args:
        levels: number of values of each channel of a latent, from 3: with two the paper's bound is lopsided.
    """

    basis: Tensor
    half_width: Tensor
    grid: Tensor
    """int64 `[K, D]`: the code of each index as whole numbers around 0. The first channel counts fastest."""

    def __init__(self, levels: Sequence[int]) -> None:
        super().__init__(math.prod(levels), len(levels))
        self.levels = tuple(levels)
        widths = torch.tensor(self.levels)
        basis = torch.tensor([math.prod(levels[:channel]) for channel in range(len(levels))])
        digits = torch.arange(self.codebook_size)[:, None] // basis % widths
        # All of them follow from the levels. Whole numbers, so that they are exact whatever type a model has.
        self.register_buffer("basis", basis, persistent=False)
        self.register_buffer("half_width", widths // 2, persistent=False)
        self.register_buffer("grid", digits - widths // 2, persistent=False)

    def enter(self, flat: Tensor) -> Tensor:
        """Latents bounded by tanh, in units of which the codes' are: 1 / (L // 2)."""
        levels = torch.tensor(self.levels, dtype=flat.dtype, device=flat.device)
        reach = (levels - 1) * (1 - 1e-3) / 2
        offset = 0.5 * (levels % 2 == 0)  # of an even number of values one more lies below 0 than above
        return (torch.tanh(flat + torch.tan(offset / reach)) * reach - offset) / self.half_width

    def table(self, dtype: torch.dtype | None) -> Tensor:
        return self.grid.to(dtype or torch.get_default_dtype()) / self.half_width

    def nearest(self, points: Tensor) -> Tensor:
        digits = (points * self.half_width).round().long() + self.half_width
        digits = digits.clamp(min=0)  # of NaN, in a step that the trainer will skip, any code will do
        return (digits * self.basis).sum(1)

    def losses(self, points: Tensor, codes: Tensor) -> Losses:
        return {"codebook_loss": points.new_zeros(()), "commitment_loss": points.new_zeros(())}


def _projected(points: Tensor, linear: nn.Linear | None) -> Tensor:
    """Computes in the points' type, also in a model of less precision."""
    if linear is None:
        return points
    return F.linear(points, linear.weight.to(points.dtype), linear.bias.to(points.dtype))


def _size(parts: list[Tensor]) -> int:
    """How many points all processes saw; each has as many as this one."""
    return collectives.world() * sum(map(len, parts))


def _rows(parts: list[Tensor], index: Tensor) -> Tensor:
    """Points out of those of all processes, `[len(index), d]`, the same on each process.

    Args:
        parts: this process's, `[m, d]` a micro-batch.
        index: int64, in the samples' order: micro-batch by micro-batch, in each of them process by process.
    """
    found = parts[0].new_zeros(len(index), parts[0].shape[1])
    begin = 0
    for part in parts:
        here = index - begin - collectives.rank() * len(part)
        mine = (here >= 0) & (here < len(part))
        found = torch.where(mine[:, None], part[here.clamp(0, len(part) - 1)], found)
        begin += collectives.world() * len(part)
    return collectives.total(found)


def entropy(counts: Tensor) -> Tensor:
    """Entropy of code usage in bits, from counts `[K]`: 0 (one code only) to log2 K (all equally). Scalar float64."""
    return _nats(counts) / math.log(2)


def perplexity(counts: Tensor) -> Tensor:
    """exp of the entropy of code usage, from counts `[K]`: 1 (one code only) to K (all equally). Scalar float64."""
    return _nats(counts).exp()


def _nats(counts: Tensor) -> Tensor:
    p = counts.cpu().double() / counts.cpu().sum().clamp(min=1)
    return torch.special.entr(p).sum()


def usage(counts: Tensor) -> Tensor:
    """Share of the codes used at least once, in [0, 1], from counts `[K]`. Scalar float64."""
    return (counts > 0).cpu().double().mean()
