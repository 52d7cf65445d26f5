"""A config of the reference (`target:`, `params:`) as one of ours.

Every parameter is translated, held to the one value that is supported, or named here as one that a trained model does
not depend on. Whatever is left is unknown, and a warning.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from uldm_cli.errors import ConfigError
from uldm_cli.formats.compvis.params import Params, Source
from uldm_cli.formats.compvis.targets import AUTOENCODERS, CONDITIONERS, check_targets
from uldm_cli.specs.models import AutoencoderModel, LatentDiffusionModel, read_model
from uldm_cli.specs.yamlfile import read_yaml

UNCONDITIONAL = "__is_unconditional__"
FIRST_STAGE = "__is_first_stage__"
SCHEDULES = {"linear": "scaled_linear", "sqrt_linear": "linear", "cosine": "cosine"}
"""The reference's names of schedules, and ours."""
TARGETS_OF_TRAINING = {"eps": "eps", "x0": "x0"}
"""What the network predicts (`parameterization`)."""
WORDS = ("concat", "crossattn", "hybrid", "adm")
"""Ways of conditioning; both sides call them the same."""
_MEND = "Correct that in the YAML"


@dataclass(frozen=True)
class Translated:
    """What a config says of its model, in our terms."""

    path: Path
    kind: str
    """"autoencoder" or "latent-diffusion"."""
    config: dict[str, Any]
    """As `specs.models` describes it."""
    scale_by_std: bool = False
    """Whether the scale factor is a tensor of the checkpoint; the config's is then where training began."""
    warnings: tuple[str, ...] = ()


def read_config(path: Path) -> Translated:
    """Reads and translates a YAML file of the reference.

    Raises:
        ConfigError: it cannot be read, is no such config, names an unknown `target`, or describes what cannot be
            built; with file and line.
    """
    data, lines = read_yaml(path, targets=True)
    source = Source(path, lines)
    if "model" not in data:
        ours = "a config of uldm itself" if "kind" in data else "no config of the published latent diffusion code"
        raise ConfigError(f"{path} is {ours}: it has no `model:`", "Name the YAML that came with the checkpoint")
    check_targets(data, lines, path)
    document = Params(source, (), data)
    document.ignore("data", "lightning")
    model = document.part("model")
    document.end()
    model.ignore("base_learning_rate")
    _, what, params = model.as_target("latent diffusion model", *AUTOENCODERS)
    if what in AUTOENCODERS:
        return _autoencoder_model(what, params)
    return _latent_diffusion_model(params)


def _autoencoder_model(what: str, params: Params) -> Translated:
    autoencoder = autoencoder_of(what, params)
    config = {"autoencoder": autoencoder, "image_size": autoencoder["resolution"]}
    read_model(AutoencoderModel, config, str(params.source.path), _MEND)
    return Translated(params.source.path, "autoencoder", config, warnings=tuple(params.source.warnings))


def _latent_diffusion_model(params: Params) -> Translated:
    _, what, first_stage = params.built("first_stage_config", *AUTOENCODERS)
    autoencoder = autoencoder_of(what, first_stage)
    channels = params.size("channels", 3)
    if channels != autoencoder["embed_dim"]:
        said = f"{channels} channels, and the first stage's latents have {autoencoder['embed_dim']} (embed_dim)"
        raise params.error("channels", said)
    conditioner, conditioning = _conditioning(params)
    _, _, network = params.built("unet_config", "U-Net")
    concat_channels = _concat_channels(network, channels, conditioning)
    by_std = params.flag("scale_by_std", False)
    config = {
        "autoencoder": autoencoder,
        "image_size": params.size("image_size", 256) * 2 ** (len(autoencoder["ch_mult"]) - 1),
        "backbone": _backbone(network),
        "schedule": _schedule(params),
        "target": params.choice("parameterization", TARGETS_OF_TRAINING, "eps"),
        "scale_factor": params.number("scale_factor", 1.0),
        "conditioner": conditioner,
        "conditioning": conditioning,
        "concat_channels": concat_channels,
    }
    _rest_of_latent_diffusion(params)
    read_model(LatentDiffusionModel, config, str(params.source.path), _MEND)
    return Translated(params.source.path, "latent-diffusion", config, by_std, tuple(params.source.warnings))


def _rest_of_latent_diffusion(params: Params) -> None:
    params.only("num_timesteps_cond", 1, None)
    params.only("given_betas", None)
    params.only("cond_stage_forward", None)
    params.only("use_positional_encodings", False)
    params.only("v_posterior", 0.0)
    params.ignore("first_stage_key", "cond_stage_key", "cond_stage_trainable")  # which part of a batch is meant
    params.ignore("use_ema")  # the checkpoint shows it
    params.ignore("clip_denoised", "log_every_t", "monitor", "ckpt_path", "ignore_keys", "load_only_unet")
    params.ignore("loss_type", "l_simple_weight", "original_elbo_weight", "learn_logvar", "logvar_init")
    params.ignore("scheduler_config")
    params.end()


def _conditioning(params: Params) -> tuple[dict[str, Any] | None, str | None]:
    """Conditioner and way of conditioning. A model that names no way concatenates, unless `concat_mode` is false."""
    concat_mode = params.flag("concat_mode", True)
    given = params.raw("conditioning_key", None)
    if given is not None and given not in WORDS:
        params.choice("conditioning_key", dict.fromkeys(WORDS, ""))
    stage = params.raw("cond_stage_config")
    if stage == UNCONDITIONAL:
        return None, None
    way = given or ("concat" if concat_mode else "crossattn")
    if stage == FIRST_STAGE:
        return {"kind": "first-stage"}, way
    _, what, inner = params.built("cond_stage_config", *CONDITIONERS)
    conditioner = _CONDITIONERS[what](inner)
    inner.end()
    return conditioner, way


def _class(params: Params) -> dict[str, Any]:
    params.ignore("key")
    return {"kind": "class", "n_classes": params.size("n_classes", 1000), "embed_dim": params.size("embed_dim")}


def _tokens(params: Params) -> dict[str, Any]:
    params.ignore("device", "embedding_dropout")
    return {
        "kind": "tokens",
        "vocab_size": params.size("vocab_size", 30522),
        "max_seq_len": params.size("max_seq_len", 77),
        "n_embed": params.size("n_embed"),
        "n_layer": params.size("n_layer"),
        "tokenizer": params.flag("use_tokenizer", True),
    }


def _rescaler(params: Params) -> dict[str, Any]:
    return {
        "kind": "rescaler",
        "n_stages": params.integer("n_stages", 1),
        "method": params.raw("method", "bilinear"),
        "multiplier": params.number("multiplier", 0.5),
        "in_channels": params.size("in_channels", 3),
        "out_channels": params.optional_size("out_channels"),
        "bias": params.flag("bias", False),
    }


def _identity(_: Params) -> dict[str, Any]:
    return {"kind": "identity"}


_CONDITIONERS = {"class embedder": _class, "token encoder": _tokens, "rescaler": _rescaler, "identity": _identity}


def _concat_channels(network: Params, channels: int, conditioning: str | None) -> int:
    """Channels of the condition beside the latent's in the U-Net's input."""
    taken, given = network.size("in_channels"), network.size("out_channels")
    if given != channels:
        raise network.error("out_channels", f"{given}, and the model's `channels` are {channels}")
    more = taken - channels
    if conditioning in ("concat", "hybrid"):
        if more < 1:
            said = f"{taken}, which leaves no channels for a condition beside the latent's {channels}"
            raise network.error("in_channels", said, f"With {conditioning} conditioning it must be larger")
    elif more:
        how = f"with {conditioning} conditioning" if conditioning else "without conditioning"
        raise network.error("in_channels", f"{taken}, and {how} it must be the latent's {channels}")
    return more


def _backbone(params: Params) -> dict[str, Any]:
    heads, head_channels = params.integer("num_heads", -1), params.integer("num_head_channels", -1)
    if heads == head_channels == -1:
        raise params.error("num_heads", "is missing, and so is num_head_channels", "A U-Net needs one of them")
    config = {
        "kind": "unet",
        "model_channels": params.size("model_channels"),
        "channel_mult": params.sizes("channel_mult", (1, 2, 4, 8)),
        "num_res_blocks": params.size("num_res_blocks"),
        "attention_resolutions": params.sizes("attention_resolutions"),
        "num_heads": heads if head_channels == -1 else None,  # the reference prefers num_head_channels
        "num_head_channels": None if head_channels == -1 else head_channels,
        "dropout": params.number("dropout", 0.0),
        "use_scale_shift_norm": params.flag("use_scale_shift_norm", False),
        "resblock_updown": params.flag("resblock_updown", False),
        "conv_resample": params.flag("conv_resample", True),
        "use_new_attention_order": params.flag("use_new_attention_order", False),
        "use_spatial_transformer": params.flag("use_spatial_transformer", False),
        "transformer_depth": params.size("transformer_depth", 1),
        "context_dim": params.optional_size("context_dim"),
        "num_classes": params.optional_size("num_classes"),
    }
    params.only("dims", 2)
    params.only("num_heads_upsample", -1, heads)
    params.only("n_embed", None)
    params.only("use_fp16", False)
    params.only("legacy", True, False)  # they count heads differently, and come to the same number
    params.ignore("image_size", "use_checkpoint")
    params.end()
    return config


def _schedule(params: Params) -> dict[str, Any]:
    kind = params.choice("beta_schedule", SCHEDULES, "linear")
    timesteps = params.size("timesteps")
    start, end = params.number("linear_start", 1e-4), params.number("linear_end", 2e-2)
    offset = params.number("cosine_s", 8e-3)
    if kind == "cosine":
        return {"kind": kind, "timesteps": timesteps, "offset": offset}
    return {"kind": kind, "timesteps": timesteps, "start": start, "end": end}


def autoencoder_of(what: str, params: Params) -> dict[str, Any]:
    """The first stage that some params describe."""
    vq = what == "VQ autoencoder"
    dd = params.part("ddconfig")
    resolution, ch_mult = dd.size("resolution"), dd.sizes("ch_mult", (1, 2, 4, 8))
    sides = [resolution // 2**level for level in range(len(ch_mult))]
    config: dict[str, Any] = {
        "kind": "vq" if vq else "kl",
        "in_channels": dd.size("in_channels"),
        "out_ch": dd.size("out_ch"),
        "resolution": resolution,
        "ch": dd.size("ch"),
        "ch_mult": ch_mult,
        "num_res_blocks": dd.size("num_res_blocks"),
        # A size that no level has is without effect there, and an error in our configs.
        "attn_resolutions": [side for side in dd.sizes("attn_resolutions") if side in sides],
        "attn_type": dd.choice("attn_type", {"vanilla": "vanilla", "none": "none"}, "vanilla"),
        "dropout": dd.number("dropout", 0.0),
        "z_channels": dd.size("z_channels"),
        "embed_dim": params.size("embed_dim"),
    }
    if dd.flag("double_z", True) == vq:
        raise dd.error("double_z", f"a {what} has it {'false' if vq else 'true'}")
    dd.only("resamp_with_conv", True)
    for name in ("use_linear_attn", "give_pre_end", "tanh_out"):
        dd.only(name, False)
    dd.end()
    if vq:
        config["codebook_size"] = params.size("n_embed")
        config["quantizer"] = {"kind": "nearest", "legacy": True}
        params.only("remap", None)
        params.ignore("sane_index_shape", "batch_resize_range", "lr_g_factor", "scheduler_config", "use_ema")
    params.ignore("lossconfig", "image_key", "monitor", "ckpt_path", "ignore_keys", "colorize_nlabels")
    params.end()
    return config
