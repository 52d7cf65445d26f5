"""One of our configs as the reference's: `config.py` the other way round."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from uldm_cli.errors import ConfigError
from uldm_cli.formats.checkpoint import Header
from uldm_cli.formats.compvis.config import FIRST_STAGE, SCHEDULES, TARGETS_OF_TRAINING, UNCONDITIONAL
from uldm_cli.specs.models import AutoencoderModel, LatentDiffusionModel, read_model

_IDENTITY = {"target": "torch.nn.Identity"}
_ENCODERS = "ldm.modules.encoders.modules."
_STAGE_KEYS = {
    "first-stage": "masked_image",
    "class": "class_label",
    "tokens": "caption",
    "rescaler": "segmentation",
}
"""The part of a batch that each conditioner is given there (`cond_stage_key`)."""


@dataclass(frozen=True)
class Has:
    """What the checkpoint to be written has, and its config must say."""

    average: bool
    scale_factor: bool
    logvar: bool


def config_of(header: Header, path: Path, has: Has) -> dict[str, Any]:
    """The reference's YAML for a model; `path` is the checkpoint's, for messages.

    Raises:
        ConfigError: the reference has no such model; the message names the field.
    """
    if header.kind == "autoencoder":
        model = read_model(AutoencoderModel, header.config, str(path)).model_dump(mode="json")
        stage = _first_stage(_resized(model["autoencoder"], model["image_size"]), path, alone=True)
        return {"model": {"base_learning_rate": 4.5e-06, **stage}}
    model = read_model(LatentDiffusionModel, header.config, str(path)).model_dump(mode="json")
    params = _latent_diffusion(model, path, has)
    target = "ldm.models.diffusion.ddpm.LatentDiffusion"
    return {"model": {"base_learning_rate": 2.0e-06, "target": target, "params": params}}


def _unfit(path: Path, field: str, value: Any, why: str) -> ConfigError:
    return ConfigError(f"{path} cannot be written as a published checkpoint: {field} is {value}", why)


def _latent_diffusion(model: Mapping[str, Any], path: Path, has: Has) -> dict[str, Any]:
    autoencoder, network = model["autoencoder"], model["backbone"]
    first_stage = _first_stage(autoencoder, path, alone=False)
    factor = 2 ** (len(autoencoder["ch_mult"]) - 1)
    side, channels = model["image_size"] // factor, autoencoder["embed_dim"]
    if network["kind"] != "unet":
        raise _unfit(path, "backbone.kind", network["kind"], "The reference has only unet")
    if model["target"] not in TARGETS_OF_TRAINING.values():
        raise _unfit(path, "target", model["target"], "The reference knows eps and x0")
    if model["learned_variance"]:
        raise _unfit(path, "learned_variance", True, "The reference's models predict no variance")
    return {
        **_schedule(model["schedule"], path),
        "num_timesteps_cond": 1,
        "parameterization": model["target"],
        "first_stage_key": "image",
        "image_size": side,
        "channels": channels,
        "monitor": "val/loss_simple_ema",
        "use_ema": has.average,
        **({"scale_by_std": True} if has.scale_factor else {"scale_factor": model["scale_factor"]}),
        **({"learn_logvar": True} if has.logvar else {}),
        **_conditioning(model, path),
        "unet_config": {
            "target": "ldm.modules.diffusionmodules.openaimodel.UNetModel",
            "params": {
                "image_size": side,
                "in_channels": channels + model["concat_channels"],
                "out_channels": channels,
                **_backbone(network),
            },
        },
        "first_stage_config": first_stage,
    }


def _schedule(schedule: Mapping[str, Any], path: Path) -> dict[str, Any]:
    names = {ours: theirs for theirs, ours in SCHEDULES.items()}
    kind = schedule["kind"]
    if kind not in names:
        raise _unfit(path, "schedule.kind", kind, f"The reference knows {', '.join(names)}")
    if schedule["zero_terminal_snr"]:
        raise _unfit(path, "schedule.zero_terminal_snr", True, "In the reference some of the signal is always left")
    start = {"beta_schedule": names[kind], "timesteps": schedule["timesteps"]}
    if kind == "cosine":
        return start | {"cosine_s": schedule["offset"]}
    return start | {"linear_start": schedule["start"], "linear_end": schedule["end"]}


def _conditioning(model: Mapping[str, Any], path: Path) -> dict[str, Any]:
    conditioner, way = model["conditioner"], model["conditioning"]
    if conditioner is None:
        return {"concat_mode": False, "cond_stage_config": UNCONDITIONAL}
    kind = conditioner["kind"]
    common = {"conditioning_key": way, "concat_mode": way == "concat"}
    if kind == "first-stage":
        return {**common, "cond_stage_key": _STAGE_KEYS[kind], "cond_stage_config": FIRST_STAGE}
    if kind == "identity":
        key = "LR_image" if way == "concat" else "nix"
        return {**common, "cond_stage_key": key, "cond_stage_config": dict(_IDENTITY)}
    if kind not in _STAGE_KEYS:
        listing = ", ".join([*_STAGE_KEYS, "identity"])
        raise _unfit(path, "conditioner.kind", kind, f"The reference knows {listing}")
    key, stage = _STAGE_KEYS[kind], _conditioner(conditioner)
    if kind == "tokens" and not conditioner["tokenizer"]:
        key = "coordinates_bbox"
    return {**common, "cond_stage_key": key, "cond_stage_trainable": True, "cond_stage_config": stage}


def _conditioner(conditioner: Mapping[str, Any]) -> dict[str, Any]:
    params = {name: value for name, value in conditioner.items() if name != "kind"}
    if conditioner["kind"] == "class":
        return {"target": f"{_ENCODERS}ClassEmbedder", "params": params | {"key": "class_label"}}
    if conditioner["kind"] == "tokens":
        params["use_tokenizer"] = params.pop("tokenizer")
        return {"target": f"{_ENCODERS}BERTEmbedder", "params": params}
    return {"target": f"{_ENCODERS}SpatialRescaler", "params": params}


_UNET = (
    "model_channels",
    "channel_mult",
    "num_res_blocks",
    "attention_resolutions",
    "num_heads",
    "num_head_channels",
    "dropout",
    "use_scale_shift_norm",
    "resblock_updown",
    "conv_resample",
    "use_new_attention_order",
    "use_spatial_transformer",
    "transformer_depth",
    "context_dim",
    "num_classes",
)
"""Fields of a U-Net that have the same name and meaning there."""


def _backbone(network: Mapping[str, Any]) -> dict[str, Any]:
    params = {name: network[name] for name in _UNET if network[name] is not None}
    if not {"num_heads", "num_head_channels"} & set(params):
        params["num_head_channels"] = 32  # our default
    return params


def _resized(autoencoder: Mapping[str, Any], image_size: int) -> dict[str, Any]:
    """The same network, described for images of another size: there, that is what places the attention."""
    if "attn_resolutions" not in autoencoder:
        return dict(autoencoder)
    levels = range(len(autoencoder["ch_mult"]))
    attentive = [n for n in levels if autoencoder["resolution"] // 2**n in autoencoder["attn_resolutions"]]
    sizes = [image_size // 2**level for level in attentive]
    return {**autoencoder, "resolution": image_size, "attn_resolutions": sizes}


def _first_stage(autoencoder: Mapping[str, Any], path: Path, *, alone: bool) -> dict[str, Any]:
    kind = autoencoder["kind"]
    if kind not in ("vq", "kl"):
        raise _unfit(path, "autoencoder.kind", kind, "The reference has vq and kl")
    given = dict(autoencoder)
    shared: dict[str, Any] = {"embed_dim": given.pop("embed_dim"), "monitor": "val/rec_loss"}
    target = "AutoencoderKL"
    if kind == "vq":
        quantizer = given.pop("quantizer")
        if quantizer["kind"] != "nearest":
            raise _unfit(path, "autoencoder.quantizer.kind", quantizer["kind"], "The reference has only nearest")
        shared["n_embed"] = given.pop("codebook_size")
        target = "VQModel" if alone else "VQModelInterface"
    given.pop("kind")
    dd = {"double_z": kind == "kl", **given}
    params = {**shared, "ddconfig": dd, "lossconfig": dict(_IDENTITY)}
    return {"target": f"ldm.models.autoencoder.{target}", "params": params}
