"""A checkpoint and a config that do not fit: which tensors differ, and which field of the config is likely wrong."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from uldm_cli.errors import ConfigError
from uldm_cli.formats.compvis.config import Translated
from uldm_cli.formats.compvis.names import EMA

SHOWN = 10
Shape = tuple[int, ...]


@dataclass(frozen=True)
class Difference:
    """A tensor by the checkpoint's name; a shape is None where there is no such tensor."""

    name: str
    found: Shape | None
    expected: Shape | None

    def __str__(self) -> str:
        return f"{self.name} is {_shape(self.found)} in the checkpoint and {_shape(self.expected)} by the config"

    def axis(self, number: int) -> bool:
        """Whether the shapes differ in this axis."""
        if not self.found or not self.expected or min(len(self.found), len(self.expected)) <= number:
            return False
        return self.found[number] != self.expected[number]

    @property
    def presence(self) -> bool:
        """Whether one side lacks the tensor."""
        return self.found is None or self.expected is None


def _shape(shape: Shape | None) -> str:
    return "missing" if shape is None else str(list(shape))


@dataclass(frozen=True)
class _Rule:
    """A field is likely wrong if a tensor of this name differs in this axis, or (None) is missing on one side."""

    name: str
    axis: int | None
    field: str

    def fits(self, difference: Difference) -> bool:
        if not re.search(self.name, difference.name):
            return False
        return difference.presence if self.axis is None else difference.axis(self.axis)


_UNET, _STAGE, _COND = "unet_config.params", "first_stage_config.params", "cond_stage_config.params"
# The first rule that fits decides: causes come before what follows from them.
_BACKBONE = (
    _Rule(r"\.time_embed\.0\.weight$", 1, f"{_UNET}.model_channels"),
    _Rule(r"\.input_blocks\.0\.0\.weight$", 0, f"{_UNET}.model_channels"),
    _Rule(r"\.input_blocks\.0\.0\.weight$", 1, f"{_UNET}.in_channels"),
    _Rule(r"\.out\.2\.weight$", 0, f"{_UNET}.out_channels"),
    _Rule(r"\.label_emb\.", None, f"{_UNET}.num_classes"),
    _Rule(r"\.label_emb\.weight$", 0, f"{_UNET}.num_classes"),
    _Rule(r"\.in_layers\.", None, f"{_UNET}.num_res_blocks, channel_mult or resblock_updown"),
    _Rule(r"\.(in_layers|out_layers)\.\d\.weight$", 0, f"{_UNET}.channel_mult"),
    _Rule(r"\.emb_layers\.1\.weight$", 0, f"{_UNET}.use_scale_shift_norm"),
    _Rule(r"\.attn2\.to_[kv]\.weight$", 1, f"{_UNET}.context_dim"),
    _Rule(r"\.transformer_blocks\.0\.", None, f"{_UNET}.use_spatial_transformer or attention_resolutions"),
    _Rule(r"\.transformer_blocks\.", None, f"{_UNET}.transformer_depth"),
    _Rule(r"\.(qkv|norm|proj_in|proj_out)\.", None, f"{_UNET}.attention_resolutions"),
    _Rule(r"diffusion_model\.", None, f"{_UNET}.num_res_blocks, channel_mult or conv_resample"),
)
_FIRST_STAGE = (
    _Rule(r"quantize\.embedding\.weight$", 0, f"{_STAGE}.n_embed"),
    _Rule(r"quantize\.embedding\.weight$", 1, f"{_STAGE}.embed_dim"),
    _Rule(r"quantize\.", None, f"{_STAGE[:-7]}.target"),  # a codebook where none should be
    _Rule(r"encoder\.conv_in\.weight$", 0, f"{_STAGE}.ddconfig.ch"),
    _Rule(r"encoder\.conv_in\.weight$", 1, f"{_STAGE}.ddconfig.in_channels"),
    _Rule(r"decoder\.conv_out\.weight$", 0, f"{_STAGE}.ddconfig.out_ch"),
    _Rule(r"encoder\.(down|mid)\..*conv\d\.weight$", 0, f"{_STAGE}.ddconfig.ch_mult"),
    _Rule(r"encoder\.conv_out\.weight$", 0, f"{_STAGE}.ddconfig.z_channels"),
    _Rule(r"(encoder|decoder)\.mid\.attn_1\.", None, f"{_STAGE}.ddconfig.attn_type"),
    _Rule(r"(encoder|decoder)\..*\.attn\.", None, f"{_STAGE}.ddconfig.attn_resolutions"),
    _Rule(r"(encoder|decoder)\..*\.block\.0\.", None, f"{_STAGE}.ddconfig.ch_mult"),
    _Rule(r"(encoder|decoder)\..*\.block\.", None, f"{_STAGE}.ddconfig.num_res_blocks"),
    _Rule(r"quant_conv\.weight$", 0, f"{_STAGE}.embed_dim"),
    _Rule(r"post_quant_conv\.weight$", 1, f"{_STAGE}.embed_dim"),
)
_CONDITIONER = (
    _Rule(r"cond_stage_model\.embedding\.weight$", 0, f"{_COND}.n_classes"),
    _Rule(r"cond_stage_model\.embedding\.weight$", 1, f"{_COND}.embed_dim"),
    _Rule(r"\.token_emb\.weight$", 1, f"{_COND}.n_embed"),
    _Rule(r"\.token_emb\.weight$", 0, f"{_COND}.vocab_size"),
    _Rule(r"\.pos_emb\.emb\.weight$", 0, f"{_COND}.max_seq_len"),
    _Rule(r"\.attn_layers\.layers\.", None, f"{_COND}.n_layer"),
    _Rule(r"\.channel_mapper\.weight$", 0, f"{_COND}.out_channels"),
    _Rule(r"\.channel_mapper\.weight$", 1, f"{_COND}.in_channels"),
    _Rule(r"cond_stage_model\.", None, "cond_stage_config.target"),
)


def explain(differences: Sequence[Difference], path: Path, model: Translated) -> ConfigError:
    """The error that names the first tensors that differ, and the field of the config that explains them best."""
    listing = "; ".join(map(str, differences[:SHOWN]))
    more = f", the first {SHOWN} are" if len(differences) > SHOWN else ""
    count = "1 tensor differs" if len(differences) == 1 else f"{len(differences)} tensors differ"
    hint = f"In the config, {_field(differences, model.kind)} is likely wrong"
    if all(difference.found is None for difference in differences):
        hint = f"The checkpoint is incomplete, or, in the config, {_field(differences, model.kind)} is wrong"
    if all(difference.name.startswith(EMA) for difference in differences):
        hint = "The averaged weights are incomplete; save the checkpoint again"
    return ConfigError(f"{path} does not fit {model.path}: {count}{more}: {listing}", hint)


def _field(differences: Sequence[Difference], kind: str) -> str:
    stages = {"autoencoder": (("", _FIRST_STAGE),)}.get(
        kind,
        (
            ("model.diffusion_model.", _BACKBONE),
            ("first_stage_model.", _FIRST_STAGE),
            ("cond_stage_model.", _CONDITIONER),
        ),
    )
    for start, rules in stages:
        ours = [difference for difference in differences if difference.name.startswith(start)]
        for rule in rules:
            if any(rule.fits(difference) for difference in ours):
                field = rule.field if kind != "autoencoder" else rule.field.removeprefix(f"{_STAGE}.")
                return f"model.params.{field}"
    return "model.params"
