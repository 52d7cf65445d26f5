"""The configs of a VQModel and an AutoencoderKL, and those of our autoencoders "vq" and "kl"."""

from collections.abc import Mapping, Sequence
from typing import Any

from uldm_cli.errors import ConfigError
from uldm_cli.formats.diffusers.fields import Fields, unheld
from uldm_cli.formats.diffusers.tables import AutoencoderShape

CLASSES = {"VQModel": "vq", "AutoencoderKL": "kl"}
"""Diffusers' classes, and our kinds."""
_BOTH = {"act_fn": ("silu", "swish"), "norm_num_groups": (32,)}
FIXED: dict[str, dict[str, Sequence[Any]]] = {
    "vq": {**_BOTH, "lookup_from_codebook": (False,), "norm_type": ("group",)},
    "kl": {
        **_BOTH,
        "latents_mean": (None,),
        "latents_std": (None,),
        "shift_factor": (None,),
        "use_post_quant_conv": (True,),
        "use_quant_conv": (True,),
    },
}
"""Fields that our autoencoders have one value for."""
BLOCKS = {
    "down": ("DownEncoderBlock2D", "AttnDownEncoderBlock2D"),
    "up": ("UpDecoderBlock2D", "AttnUpDecoderBlock2D"),
}
"""Types of a level, without and with attention."""
SCALING = {"vq": 1.0, "kl": 0.18215}
"""What a config means that has no scaling_factor. Diffusers reads 0.18215 for both, but published VQ models that lack
it were trained with 1."""
QUANTIZERS = ("nearest", "ema")
"""Kinds of quantizer that choose codes as diffusers does; they differ in training."""


def read_autoencoder(fields: Fields) -> tuple[dict[str, Any], float]:
    """Our autoencoder's config, and the scale factor of its latents.

    Raises:
        ConfigError: our autoencoders cannot be that; the field is named.
    """
    kind = CLASSES[fields.get("_class_name")]
    fields.fixed(FIXED[kind])
    fields.get("force_upcast")  # about a pipeline's precision
    widths = fields.integers("block_out_channels", (64,))
    if any(width % widths[0] for width in widths):
        raise fields.wrong("block_out_channels", "multiples of the first")
    resolution = fields.side("sample_size", 32)
    attention = _attention(fields, len(widths))
    channels = fields.integer("in_channels", 3)
    if fields.integer("out_channels", 3) != channels:
        raise fields.wrong("out_channels", f"as many as in_channels, {channels}")
    latents = fields.integer("latent_channels", 3 if kind == "vq" else 4)
    config = {
        "kind": kind,
        "in_channels": channels,
        "out_ch": channels,
        "resolution": resolution,
        "ch": widths[0],
        "ch_mult": [width // widths[0] for width in widths],
        "num_res_blocks": fields.integer("layers_per_block", 1, most=1000),
        "attn_resolutions": _resolutions(fields, attention, resolution),
        "attn_type": "vanilla" if fields.get("mid_block_add_attention", True) else "none",
        "z_channels": latents,
        "embed_dim": latents,
    }
    if kind == "vq":
        if fields.get("vq_embed_dim") is not None:
            config["embed_dim"] = fields.integer("vq_embed_dim", None)
        config["codebook_size"] = fields.integer("num_vq_embeddings", 256)
        config["quantizer"] = {"kind": "nearest", "legacy": True}
    scale = fields.number("scaling_factor", SCALING[kind])
    if scale <= 0:
        raise fields.wrong("scaling_factor", "a number above 0")
    return config, scale


def _attention(fields: Fields, levels: int) -> list[bool]:
    """Which levels have attention."""
    attention = {}
    for way, kinds in BLOCKS.items():
        name = f"{way}_block_types"
        types = fields.get(name, [kinds[0]])
        if not isinstance(types, list) or len(types) != levels:
            raise fields.wrong(name, f"{levels} entries, as in block_out_channels")
        if not all(one in kinds for one in types):
            raise fields.wrong(name, ", ".join(kinds))
        attention[way] = [one == kinds[1] for one in types]
    if attention["up"][::-1] != attention["down"]:
        raise fields.wrong("up_block_types", "attention at the same levels as in down_block_types, in reverse")
    if any(attention["down"]) and not fields.get("mid_block_add_attention", True):
        raise fields.wrong("mid_block_add_attention", "true where levels have attention")
    return attention["down"]


def _resolutions(fields: Fields, attention: list[bool], resolution: int) -> list[int]:
    """The sizes of the image at the levels that have attention."""
    sizes = [resolution // 2**level for level in range(len(attention))]
    chosen = [size for size, attends in zip(sizes, attention, strict=True) if attends]
    if 0 in chosen or [size in chosen for size in sizes] != attention:
        raise fields.wrong("sample_size", f"sizes that halve {len(sizes) - 1} times, to tell the levels apart")
    return chosen


def write_autoencoder(config: Mapping[str, Any], scale: float | None) -> dict[str, Any]:
    """The config of a VQModel or an AutoencoderKL; no scale is what diffusers takes for a KL autoencoder.

    Raises:
        ConfigError: diffusers' models cannot be that; the field is named.
    """
    kinds = {ours: theirs for theirs, ours in CLASSES.items()}
    if config["kind"] not in kinds:
        raise ConfigError(
            f"diffusers has no model like autoencoder.kind {config['kind']!r}", f"It has: {', '.join(kinds)}"
        )
    if config["ch_mult"][0] != 1:
        first = config["ch_mult"][0]
        raise unheld(f"autoencoder.ch_mult begins with {first}, and in diffusers it is always 1")
    shape = autoencoder_shape(config)
    types = {way: [names[attends] for attends in shape.attention] for way, names in BLOCKS.items()}
    written = {
        "_class_name": kinds[config["kind"]],
        **{name: allowed[0] for name, allowed in FIXED[config["kind"]].items()},
        "block_out_channels": [config["ch"] * one for one in config["ch_mult"]],
        "down_block_types": types["down"],
        "in_channels": config["in_channels"],
        "latent_channels": config["z_channels"],
        "layers_per_block": config["num_res_blocks"],
        "mid_block_add_attention": config["attn_type"] != "none",
        "out_channels": config["out_ch"],
        "sample_size": config["resolution"],
        "up_block_types": types["up"][::-1],
    }
    if scale is not None:
        written["scaling_factor"] = scale
    return written | (_codes(config) if config["kind"] == "vq" else _moments(config))


def _codes(config: Mapping[str, Any]) -> dict[str, Any]:
    quantizer = config["quantizer"]["kind"]
    if quantizer not in QUANTIZERS:
        raise ConfigError(
            f"diffusers has no quantizer like autoencoder.quantizer.kind {quantizer!r}",
            f"It can hold: {', '.join(QUANTIZERS)}",
        )
    return {"num_vq_embeddings": config["codebook_size"], "vq_embed_dim": config["embed_dim"]}


def _moments(config: Mapping[str, Any]) -> dict[str, Any]:
    embedded, latents = config["embed_dim"], config["z_channels"]
    if embedded != latents:
        raise ConfigError(
            f"autoencoder.embed_dim is {embedded} and autoencoder.z_channels {latents}",
            "In diffusers' AutoencoderKL they are equal",
        )
    return {}


def autoencoder_shape(config: Mapping[str, Any]) -> AutoencoderShape:
    """What of our config decides the names of the tensors."""
    sizes = [config["resolution"] // 2**level for level in range(len(config["ch_mult"]))]
    attends = config["attn_type"] != "none"
    return AutoencoderShape(
        widths=tuple(config["ch"] * one for one in config["ch_mult"]),
        attention=tuple(attends and size in config["attn_resolutions"] for size in sizes),
        middle=attends,
        blocks=config["num_res_blocks"],
        codes=config["kind"] == "vq",
    )
