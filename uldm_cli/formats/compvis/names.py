"""The reference's names of tensors and ours: one table, used in both directions."""

import re
from collections.abc import Callable, Iterable, Mapping

from uldm_cli.formats.checkpoint import KEPT

PARTS: dict[str, dict[str, str]] = {
    "latent-diffusion": {
        "backbone": "model.diffusion_model.",
        "autoencoder": "first_stage_model.",
        "conditioner": "cond_stage_model.",
    },
    "autoencoder": {"model": ""},
}
"""By kind of model: what each of our parts begins with there."""
RENAMED = {"quantize.embedding": "quantize.embedding.weight"}
"""Keys, in an autoencoder, that differ. All others are the same on both sides."""
EMA = "model_ema."
AVERAGED = {"latent-diffusion": ("backbone", "diffusion_model."), "autoencoder": ("model", "")}
"""By kind: the part that has an average there, and how the names begin that the average goes by."""
TWIN, ORIGINAL = "cond_stage_model.", "first_stage_model."
"""A first stage that is the conditioner, too, is stored under both."""
BUFFERS = (
    "betas",
    "alphas_cumprod",
    "alphas_cumprod_prev",
    "sqrt_alphas_cumprod",
    "sqrt_one_minus_alphas_cumprod",
    "log_one_minus_alphas_cumprod",
    "sqrt_recip_alphas_cumprod",
    "sqrt_recipm1_alphas_cumprod",
    "posterior_variance",
    "posterior_log_variance_clipped",
    "posterior_mean_coef1",
    "posterior_mean_coef2",
)
"""The schedule, which a checkpoint repeats in full."""

_UNUSED = re.compile(
    rf"({'|'.join(BUFFERS)}|scale_factor|scaling_factor|logvar|lvlb_weights|ddim_\w+"
    r"|model_ema\.(decay|num_updates|loss\w+)"
    r"|((first|cond)_stage_model\.)?(loss\..+|colorize)"
    r"|cond_stage_model\.transformer\.to_logits\.(weight|bias))"
)
"""What a checkpoint may hold that no module needs: it is kept, and known. `scaling_factor` comes with autoencoders that
were read out of folders of diffusers."""


def source_name(kind: str, name: str) -> str:
    """What the reference calls a tensor of a model of that kind.

    The average of a parameter goes by its path in the model, from which the dots are taken out.
    """
    part, _, key = name.partition(".")
    if name.startswith(KEPT):
        return key
    if part == "ema":
        averaged, start = AVERAGED[kind]
        return EMA + (start + _key(averaged, key)).replace(".", "")
    return PARTS[kind][part] + _key(part, key)


def _key(part: str, key: str) -> str:
    return RENAMED.get(key, key) if part in ("autoencoder", "model") else key


def is_unused(name: str) -> bool:
    """Whether a tensor of a checkpoint is one that is known not to be needed."""
    return _UNUSED.fullmatch(name) is not None


def belongs(kind: str, name: str) -> bool:
    """Whether a tensor of a checkpoint is of a part that our modules have, so that they must know it."""
    if is_unused(name):
        return False
    if kind == "autoencoder":
        return name.startswith(("encoder.", "decoder.", "quantize.", "quant_conv.", "post_quant_conv."))
    return name.startswith(tuple(PARTS[kind].values()))


def order(name: str) -> int:
    """Place of a tensor among a checkpoint's: schedule, network, average, first stage, conditioner."""
    starts = ("model.", EMA, ORIGINAL, TWIN)
    return next((place for place, start in enumerate(starts, 1) if name.startswith(start)), 0)


def told(names: Iterable[str]) -> str:
    """What a state dict with those names is of, in words."""
    known = tuple(names)
    return next((what for what, fits in _KINDS.items() if fits(known)), "nothing of a latent diffusion model")


def _any(names: tuple[str, ...], *starts: str) -> bool:
    return any(name.startswith(starts) for name in names)


_KINDS: Mapping[str, Callable[[tuple[str, ...]], bool]] = {
    "a latent diffusion model": lambda n: _any(n, "model.diffusion_model.") and _any(n, ORIGINAL),
    "a U-Net without a first stage": lambda n: _any(n, "model.diffusion_model."),
    "the first stage of a latent diffusion model, without the U-Net": lambda n: _any(n, ORIGINAL),
    "a U-Net alone": lambda n: _any(n, "input_blocks.", "diffusion_model."),
    "an autoencoder": lambda n: _any(n, "encoder.") and _any(n, "decoder."),
}
