"""The config of a UNet2DModel, and that of our U-Net."""

import json
from collections.abc import Mapping
from typing import Any

from uldm_cli.errors import ConfigError
from uldm_cli.formats.diffusers.fields import Fields, unheld
from uldm_cli.formats.diffusers.tables import UNetShape

CLASS = "UNet2DModel"
FIXED = {
    "act_fn": ("silu", "swish"),
    "add_attention": (True,),
    "center_input_sample": (False,),
    "class_embed_type": (None,),
    "downsample_padding": (1,),
    "flip_sin_to_cos": (True,),
    "freq_shift": (0,),
    "mid_block_scale_factor": (1,),
    "mid_block_type": ("UNetMidBlock2D",),
    "norm_eps": (1e-5,),
    "norm_num_groups": (32,),
    "num_class_embeds": (None,),
    "time_embedding_type": ("positional",),
}
"""Fields that our U-Net has one value for."""
BLOCKS = {"down": ("DownBlock2D", "ResnetDownsampleBlock2D", "AttnDownBlock2D")}
BLOCKS["up"] = ("UpBlock2D", "ResnetUpsampleBlock2D", "AttnUpBlock2D")
"""Types of a level: without attention, resized by a convolution or by a residual block; with attention."""
PLAIN = {"use_spatial_transformer": False, "num_classes": None, "conv_resample": True}
"""Fields of ours that diffusers' model has one value for."""


def read_unet(fields: Fields) -> tuple[dict[str, Any], int, int]:
    """Our backbone's config, the channels of the latents, and the side of the latents.

    Raises:
        ConfigError: our U-Net cannot be that; the field is named.
    """
    fields.fixed(FIXED)
    widths = fields.integers("block_out_channels", (224, 448, 672, 896))
    if any(width % widths[0] for width in widths):
        raise fields.wrong("block_out_channels", "multiples of the first")
    if fields.get("time_embedding_dim") not in (None, 4 * widths[0]):
        raise fields.wrong("time_embedding_dim", f"null or {4 * widths[0]}")
    if (channels := fields.integer("in_channels", 3)) != fields.integer("out_channels", 3):
        raise fields.wrong("out_channels", f"as many as in_channels, {channels}")
    attention, updown = _levels(fields, len(widths))
    scale_shift = fields.choice("resnet_time_scale_shift", ("default", "scale_shift")) == "scale_shift"
    # Diffusers leaves this normalisation out of the middle attention when nothing asks for it.
    groups = (32,) if scale_shift else (None, 32)
    if fields.get("attn_norm_num_groups") not in groups:
        raise fields.wrong("attn_norm_num_groups", " or ".join("null" if one is None else str(one) for one in groups))
    config = {
        "kind": "unet",
        "model_channels": widths[0],
        "channel_mult": [width // widths[0] for width in widths],
        "num_res_blocks": fields.integer("layers_per_block", 2, most=1000),
        "attention_resolutions": [2**level for level, attends in enumerate(attention) if attends],
        **_heads(fields, [w for w, attends in zip(widths, attention, strict=True) if attends] + [widths[-1]]),
        "dropout": fields.number("dropout", 0.0),
        "use_scale_shift_norm": scale_shift,
        "resblock_updown": updown,
    }
    fields.get("num_train_timesteps")  # used by learned time embeddings only
    return config, channels, fields.side("sample_size", None)


def _heads(fields: Fields, widths: list[int]) -> dict[str, int | None]:
    if fields.get("attention_head_dim", 8) is None:
        return {"num_heads": 1, "num_head_channels": None}
    size = fields.integer("attention_head_dim", 8)
    if any(width % size for width in widths):
        raise fields.wrong("attention_head_dim", f"a divisor of every width that has attention, {sorted(set(widths))}")
    return {"num_heads": None, "num_head_channels": size}


def _levels(fields: Fields, levels: int) -> tuple[list[bool], bool]:
    """Which levels have attention, and whether residual blocks change the size."""
    attention: dict[str, list[bool]] = {}
    updown: set[bool] = set()
    for way, kinds in BLOCKS.items():
        name, resampler = f"{way}_block_types", f"{way}sample_type"
        default = [kinds[0], *[kinds[2]] * 3]
        types = fields.get(name, default if way == "down" else default[::-1])
        if not isinstance(types, list) or len(types) != levels:
            raise fields.wrong(name, f"{levels} entries, as in block_out_channels")
        types = [str(one).removeprefix("UNetRes") for one in types]  # as the first versions called them
        if not set(types) <= set(kinds):
            raise fields.wrong(name, ", ".join(kinds))
        resnet = fields.choice(resampler, ("conv", "resnet", None)) == "resnet"
        updown |= {resnet if one == kinds[2] else one == kinds[1] for one in types[:-1]}
        attention[way] = [one == kinds[2] for one in types]
    if attention["up"][::-1] != attention["down"]:
        raise fields.wrong("up_block_types", "attention at the same levels as in down_block_types, in reverse")
    if len(updown) > 1:
        raise fields.wrong(
            "down_block_types", "one way to change the size: convolutions or residual blocks at all levels"
        )
    return attention["down"], True in updown


def write_unet(config: Mapping[str, Any], channels: int, side: int) -> dict[str, Any]:
    """The config of a UNet2DModel.

    Raises:
        ConfigError: diffusers' model cannot be that; the field is named.
    """
    if config["kind"] != "unet":
        raise ConfigError(f"diffusers has no model like backbone.kind {config['kind']!r}", "It has: unet")
    for name, only in PLAIN.items():
        if (value := config[name]) != only:
            raise unheld(f"backbone.{name} is {json.dumps(value)}, which diffusers' {CLASS} cannot hold")
    width, mult = config["model_channels"], config["channel_mult"]
    if mult[0] != 1:
        raise unheld(f"backbone.channel_mult begins with {mult[0]}, and in diffusers' {CLASS} it is always 1")
    shape = unet_shape(config)
    updown = config["resblock_updown"]
    resample = "resnet" if updown else "conv"
    types = {way: [kinds[2] if a else kinds[updown] for a in shape.attention] for way, kinds in BLOCKS.items()}
    scale_shift = config["use_scale_shift_norm"]
    return {
        "_class_name": CLASS,
        **{name: allowed[0] for name, allowed in FIXED.items()},
        "attention_head_dim": _head_size(config),
        "attn_norm_num_groups": 32 if scale_shift else None,
        "block_out_channels": [width * one for one in mult],
        "down_block_types": types["down"],
        "downsample_type": resample,
        "dropout": config["dropout"],
        "in_channels": channels,
        "layers_per_block": config["num_res_blocks"],
        "out_channels": channels,
        "resnet_time_scale_shift": "scale_shift" if scale_shift else "default",
        "sample_size": side,
        "up_block_types": types["up"][::-1],
        "upsample_type": resample,
    }


def _head_size(config: Mapping[str, Any]) -> int | None:
    """Channels of a head, the same in the whole model; None: as many as each level has, so one head."""
    heads = config["num_heads"]
    if heads is None:
        return int(config["num_head_channels"] or 32)
    attentive = _attentive_widths(config)
    if heads > 1 and len(attentive) > 1:
        sizes = ", ".join(str(width // heads) for width in attentive)
        raise ConfigError(
            f"backbone.num_heads is {heads} at several widths, so heads have {sizes} channels",
            "Diffusers holds one size of all heads (attention_head_dim) only",
        )
    return None if heads == 1 else attentive[0] // heads


def _attentive_widths(config: Mapping[str, Any]) -> list[int]:
    """Every width that has attention; the lowest level always has it, in the middle."""
    mult, levels = config["channel_mult"], config["attention_resolutions"]
    last = len(mult) - 1
    return sorted({config["model_channels"] * m for i, m in enumerate(mult) if 2**i in levels or i == last})


def unet_shape(config: Mapping[str, Any]) -> UNetShape:
    """What of our config decides the names of the tensors."""
    mult, heads = config["channel_mult"], config["num_heads"]
    size = config["num_head_channels"] or 32
    return UNetShape(
        widths=tuple(config["model_channels"] * one for one in mult),
        attention=tuple(2**level in config["attention_resolutions"] for level in range(len(mult))),
        heads=tuple(heads or max(1, config["model_channels"] * one // size) for one in mult),
        blocks=config["num_res_blocks"],
        updown=config["resblock_updown"],
        grouped=config.get("use_new_attention_order", False),
    )
