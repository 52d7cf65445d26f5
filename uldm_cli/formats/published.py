"""The configs of published models, for checkpoints that come without one: their own layout, from a few facts.

The facts are those of `assets/zoo.yaml`. What only matters to training is left out.
"""

from collections.abc import Mapping
from typing import Any

Shape = Mapping[str, Any]

_MODEL = "ldm.models.diffusion.ddpm.LatentDiffusion"
_UNET = "ldm.modules.diffusionmodules.openaimodel.UNetModel"
_IDENTITY = "torch.nn.Identity"
_TRANSFORMER = "ldm.modules.encoders.modules.BERTEmbedder"

# A condition's kind: the part of a batch that it is, its encoder (None: the first stage), how it reaches the network,
# and what else its config holds.
_CONDITIONS: dict[str, tuple[str, str | None, str, dict[str, Any]]] = {
    "class": ("class_label", "ldm.modules.encoders.modules.ClassEmbedder", "crossattn", {"key": "class_label"}),
    "text": ("caption", _TRANSFORMER, "crossattn", {}),
    "boxes": ("coordinates_bbox", _TRANSFORMER, "crossattn", {}),
    "embedding": ("nix", _IDENTITY, "crossattn", {}),
    "low-resolution": ("LR_image", _IDENTITY, "concat", {}),
    "segmentation": ("segmentation", "ldm.modules.encoders.modules.SpatialRescaler", "concat", {}),
    "masked-image": ("masked_image", None, "concat", {}),
}


def published_config(shape: Shape, autoencoders: Mapping[str, Shape]) -> dict[str, Any]:
    """A whole config in `target:`, `params:` form.

    Args:
        shape: of an autoencoder (it has a `kind`) or of a latent diffusion model.
        autoencoders: the shapes that a model's `first_stage` can name.
    """
    if "kind" in shape:
        return {"model": _autoencoder(shape, "ldm.models.autoencoder.VQModel")}
    first_stage = autoencoders[shape["first_stage"]]
    start, end = shape["betas"]
    channels = first_stage["channels"]
    optional = ("loss_type", "scale_by_std", "scale_factor", "use_ema")
    params = {
        "linear_start": start,
        "linear_end": end,
        "timesteps": 1000,
        "image_size": shape["latent"],
        "channels": channels,
        "first_stage_key": "image",
        **{name: shape[name] for name in optional if name in shape},
        **_condition(shape.get("condition")),
        "unet_config": _target(
            _UNET,
            image_size=shape["latent"],
            **{"in_channels": channels, "out_channels": channels, "num_res_blocks": 2, **shape["unet"]},
        ),
        "first_stage_config": _autoencoder(first_stage, "ldm.models.autoencoder.VQModelInterface"),
    }
    return {"model": _target(_MODEL, **params)}


def _target(name: str, **params: Any) -> dict[str, Any]:
    return {"target": name, "params": params} if params else {"target": name}


def _autoencoder(shape: Shape, vq: str) -> dict[str, Any]:
    is_vq = shape["kind"] == "vq"
    channels = shape["channels"]
    given = ("ch_mult", "attn_resolutions", "attn_type")
    ddconfig = {
        "double_z": not is_vq,
        "z_channels": channels,
        "resolution": 256,
        "in_channels": 3,
        "out_ch": 3,
        "ch": 128,
        "num_res_blocks": 2,
        "dropout": 0.0,
        **{name: shape[name] for name in given if name in shape},
    }
    codes = {"n_embed": shape["codes"]} if is_vq else {}
    name = vq if is_vq else "ldm.models.autoencoder.AutoencoderKL"
    return _target(name, embed_dim=channels, **codes, ddconfig=ddconfig, lossconfig=_target(_IDENTITY))


def _condition(condition: Shape | None) -> dict[str, Any]:
    if condition is None:
        return {"concat_mode": False, "cond_stage_config": "__is_unconditional__"}
    key, encoder, way, params = _CONDITIONS[condition["kind"]]
    given = {name: value for name, value in condition.items() if name != "kind"}
    return {
        "cond_stage_key": key,
        "cond_stage_trainable": encoder not in (None, _IDENTITY),
        "conditioning_key": way,
        "cond_stage_config": _target(encoder, **given, **params) if encoder else "__is_first_stage__",
    }
