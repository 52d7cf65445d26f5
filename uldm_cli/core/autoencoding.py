"""The training of an autoencoder."""

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from uldm_cli.core import rng
from uldm_cli.core.autoencoders import drawn, has_posterior, kl_divergence
from uldm_cli.core.device import at_least_float32
from uldm_cli.core.losses import (
    Adversarial,
    adaptive_weight,
    discriminator_loss,
    generator_loss,
    with_gradient,
)
from uldm_cli.core.lpips import LPIPS
from uldm_cli.core.quantizers import entropy, perplexity, usage
from uldm_cli.core.training import Task, below
from uldm_cli.errors import ConfigError, UldmError, UsageError

ENCODING = ("encoder", "quant_conv", "quantize")
"""Modules of an autoencoder that make latents and their codes."""


@dataclass(frozen=True)
class ReconstructionWeights:
    """Factors of an autoencoder's loss terms; each term is a mean over everything, except the divergence."""

    l1: float
    l2: float
    lpips: float
    codebook: float = 0.0
    commitment: float = 0.0
    kl: float = 0.0
    """Of the divergence summed over a latent, against a reconstruction that is summed over the image, as published.
    Here both are divided by the number of an image's values."""


class AutoencoderTask(Task):
    """Reconstruction, perceptual, latent and adversarial losses of an autoencoder.

    With a codebook (van den Oord et al. 2017; Esser et al. 2021), rec = l1 + l2 + lpips, each times its factor:

        loss = rec + codebook + commitment + d_weight * generator

    Of a KL autoencoder (Kingma and Welling 2014; Rombach et al. 2022, appendix G), with D values in an image:

        loss = rec / exp(logvar) + logvar + kl / D + d_weight * generator

    where `logvar`, if there is one, is learned. Published code defines it likewise, but hands it to no optimizer, so
    that there it keeps its initial value. The generator's term begins with `adversarial.start`; there is no work of
    the discriminator before. d_weight is `adversarial.weight`, in warm-up a share of it, times the adaptive weight.

    Args:
        model: `core.autoencoders.KL`, or one like it, with `moments(images)`; or one with a codebook, that called with
            images gives reconstructions, codes and the quantizer's losses.
        weights: factors of the terms.
        lpips: the perceptual distance; None without.
        seed: of the draws of a KL autoencoder's latents, by sample number.
        logvar: initial value of the learned log-variance; None without.
        adversarial: None without a discriminator.
        frozen: leave encoder, quantizer and so the latents as they are, and train only the decoder.

    Raises:
        UsageError: the model lacks what is asked for: a `decoder.conv_out` for the adaptive weight, an `encoder` and
            a `quant_conv` to be frozen.
    """

    def __init__(
        self,
        model: nn.Module,
        weights: ReconstructionWeights,
        lpips: LPIPS | None,
        *,
        seed: int = 0,
        logvar: float | None = None,
        adversarial: Adversarial | None = None,
        frozen: bool = False,
    ) -> None:
        super().__init__()
        self.model: Any = model
        self.weights, self.lpips, self.seed = weights, lpips, seed
        self.variational = has_posterior(model)
        self.logvar = None if logvar is None else nn.Parameter(torch.tensor(float(logvar)))
        self.adversarial = adversarial
        self.discriminator = adversarial.discriminator if adversarial else None
        self.phases = ("autoencoder", "discriminator") if adversarial else ("autoencoder",)
        if adversarial and adversarial.adaptive and self._last() is None:
            raise UsageError(
                f"{type(model).__name__} has no decoder.conv_out, where the adaptive weight is measured",
                "Set adversarial.adaptive=false",
            )
        self.frozen = self._freeze() if frozen else ()
        self._ramp = 0.0
        self._kept: list[Tensor] = []
        self._before: list[tuple[Tensor, Tensor]] = []

    def _freeze(self) -> tuple[nn.Module, ...]:
        for name in ENCODING[:2]:
            if not hasattr(self.model, name):
                what = f"{type(self.model).__name__} has no {name}, so its encoder cannot be frozen"
                raise UsageError(what, "Set freeze=null")
        return tuple(getattr(self.model, name).requires_grad_(False) for name in ENCODING if hasattr(self.model, name))

    def _last(self) -> Tensor | None:
        """The weights of the decoder's last layer."""
        layer = getattr(getattr(self.model, "decoder", None), "conv_out", None)
        return getattr(layer, "weight", None)

    def train(self, mode: bool = True) -> "AutoencoderTask":
        super().train(mode)
        for module in self.frozen:
            module.eval()
        return self

    def trained(self, phase: str) -> list[nn.Parameter]:
        if phase == "discriminator":
            assert self.discriminator is not None
            return list(self.discriminator.parameters())
        learned = [p for p in self.model.parameters() if p.requires_grad]
        return learned if self.logvar is None else [*learned, self.logvar]

    def begin(self, step: int) -> tuple[str, ...]:
        self._forget()
        if self.adversarial is None:
            return self.phases
        self._ramp = self.adversarial.ramp(step)
        if not self._ramp:
            return self.phases[:1]
        self._before = [(buffer, buffer.clone()) for buffer in self.adversarial.discriminator.buffers()]
        return self.phases

    def after_step(self, step: int) -> None:
        self._before = []
        if self._counts_codes:
            self.model.quantize.after_step(step)

    def _forget(self) -> None:
        """What is left of a step that was skipped; a NaN in it would stay in the running statistics for ever."""
        self._kept.clear()
        for buffer, value in self._before:
            buffer.copy_(value)
        self._before = []
        if self._counts_codes:
            self.model.quantize.forget_step()

    def forward(self, phase: str, image: Tensor, number: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        if phase == "discriminator":
            return self._discriminate(image)
        recon, terms = self._reconstruct(image, number)
        recon = at_least_float32(recon)
        logs: dict[str, Tensor] = {}
        distance = partial(self._distance, image=image, logs=logs)
        rec = with_gradient(distance, recon) if self._ramp else distance(recon)
        nll = rec
        if self.logvar is not None:
            nll = rec / self.logvar.exp() + self.logvar
            logs |= {"nll": nll, "logvar": self.logvar.clone()}
        loss = nll
        for name, term in terms.items():
            loss = loss + getattr(self.weights, name) * (term / image[0].numel() if name == "kl" else term)
        logs |= terms
        if self._ramp:
            generator, weight = self._fool(recon, nll)
            loss = loss + weight * generator
            logs |= {"generator": generator, "d_weight": weight}
        logs["psnr"] = mean_psnr(recon.detach(), image)
        return loss, {"loss": loss.detach(), **{name: value.detach() for name, value in logs.items()}}

    def _reconstruct(self, image: Tensor, number: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Reconstructions, and the terms of latents and codes, of which there are none where those are frozen."""
        model = self.model
        if self.variational:
            with self._encoding():
                mean, logvar = (at_least_float32(x) for x in model.moments(image))
            noise = rng.normal(self.seed, rng.STREAM_POSTERIOR, number, mean.shape[1:]).to(mean.dtype)
            recon = model.from_latent(drawn(mean, logvar, noise))
            return recon, {} if self.frozen else {"kl": kl_divergence(mean, logvar).mean()}
        if self.frozen:
            with self._encoding():
                codes, _ = model.encode(image)
            return model.decode(codes), {}
        recon, _, losses = model(image)
        return recon, {"codebook": losses["codebook_loss"], "commitment": losses["commitment_loss"]}

    def _encoding(self) -> AbstractContextManager[object]:
        return torch.no_grad() if self.frozen else nullcontext()

    def _distance(self, recon: Tensor, image: Tensor, logs: dict[str, Tensor]) -> Tensor:
        """The weighted distance of reconstructions from their images; its parts are noted in `logs`."""
        terms = {"l1": F.l1_loss(recon, image), "l2": F.mse_loss(recon, image)}
        if self.lpips is not None:
            terms["lpips"] = self.lpips(recon, image).mean()
        logs |= terms
        return torch.stack([getattr(self.weights, name) * term for name, term in terms.items()]).sum()

    def _fool(self, recon: Tensor, nll: Tensor) -> tuple[Tensor, Tensor]:
        """The generator's term and its factor; keeps the reconstructions for the discriminator's phase."""
        settings = self.adversarial
        assert settings is not None
        generator = with_gradient(lambda x: generator_loss(at_least_float32(settings.discriminator(x))), recon)
        weight = recon.new_full((), settings.weight * self._ramp)
        if not recon.requires_grad:  # only looked at: there are no gradients to balance
            return generator, weight
        self._kept.append(recon.detach())
        if settings.adaptive:
            last = self._last()
            assert last is not None
            weight = weight * adaptive_weight(nll, generator, last, recon[0].numel() if self.variational else 1)
        return generator, weight

    def _discriminate(self, image: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """The discriminator's loss on images and on what the autoencoder's phase made of them."""
        assert self.adversarial is not None
        if not self._kept:
            raise UldmError("the discriminator's phase has no reconstructions", "Run the autoencoder's before it")
        discriminator = self.adversarial.discriminator
        real, fake = at_least_float32(discriminator(image)), at_least_float32(discriminator(self._kept.pop(0)))
        loss = discriminator_loss(self.adversarial.loss, real, fake)
        logs = {"discriminator": loss, "logits_real": real.mean(), "logits_fake": fake.mean()}
        return loss, {name: value.detach() for name, value in logs.items()}

    @property
    def _counts_codes(self) -> bool:
        return not (self.variational or self.frozen)

    def codebook_logs(self) -> dict[str, float]:
        """Entropy, perplexity and share of used codes since the epoch began; nothing where no codebook is trained."""
        if not self._counts_codes:
            return {}
        counts = self.model.quantize.epoch_counts
        return {figure.__name__: float(figure(counts)) for figure in (entropy, perplexity, usage)}

    def start_epoch(self) -> None:
        if self._counts_codes:
            self.model.quantize.epoch_counts.zero_()

    def state(self) -> dict[str, Tensor]:
        self._forget()
        state: dict[str, Tensor] = {}
        if self._counts_codes:
            state |= {f"quantizer.{name}": value for name, value in self.model.quantize.state().items()}
        if self.logvar is not None:
            state["logvar"] = self.logvar.detach()
        if self.lpips is not None and self.lpips.sha256 is not None:
            state["lpips_sha256"] = _bytes(self.lpips.sha256)
        if self.discriminator is not None:
            state |= {f"discriminator.{name}": value for name, value in self.discriminator.state_dict().items()}
        return state

    @torch.no_grad()
    def load_state(self, state: dict[str, Tensor]) -> None:
        if "lpips_sha256" in state and not torch.equal(state["lpips_sha256"].cpu(), self.state()["lpips_sha256"]):
            what = "the perceptual loss has other weights than those that this run began with"
            raise ConfigError(what, "Name those by loss.lpips_weights, or start another run")
        if self._counts_codes:
            self.model.quantize.load_state(below("quantizer.", state))
        if self.logvar is not None:
            self.logvar.copy_(state["logvar"])
        if self.discriminator is not None:
            self.discriminator.load_state_dict(below("discriminator.", state))


def mean_psnr(recon: Tensor, image: Tensor) -> Tensor:
    """Peak signal-to-noise ratio in dB, the mean over images `[N, C, H, W]` in [-1, 1]: a scalar.

    A mean over images can be shared out among processes; the ratio of a batch's mean error could not. At most 106:
    of an image without any error it would be infinite.
    """
    return (-10 * torch.log10((recon - image).square().flatten(1).mean(1).clamp(min=1e-10) / 4)).mean()


def _bytes(hexadecimal: str) -> Tensor:
    return torch.tensor([*bytes.fromhex(hexadecimal)], dtype=torch.uint8)
