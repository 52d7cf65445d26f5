"""Name and shape of every tensor that our modules have for a published model's config, without PyTorch.

The modules themselves would tell, too, but importing PyTorch takes longer, and more memory, than all else that is
needed to look at a checkpoint. The tests hold this against the modules.
"""

from collections.abc import Iterator
from typing import Any

from uldm_cli.specs.models import LatentDiffusionModel, Model

Shape = tuple[int, ...]
Named = Iterator[tuple[str, Shape]]


def shapes_of(model: Model) -> dict[str, Shape]:
    """By our names, averages left out."""
    if not isinstance(model, LatentDiffusionModel):
        return {f"model.{name}": shape for name, shape in _autoencoder(model.autoencoder)}
    channels = model.latent_shape[0]
    parts = {
        "autoencoder": _autoencoder(model.autoencoder),
        "backbone": _unet(model.backbone, channels + model.concat_channels, channels),
        "conditioner": _conditioner(model.conditioner),
    }
    return {f"{part}.{name}": shape for part, named in parts.items() for name, shape in named}


def _norm(name: str, channels: int) -> Named:
    yield f"{name}.weight", (channels,)
    yield f"{name}.bias", (channels,)


def _linear(name: str, inputs: int, outputs: int, *, bias: bool = True) -> Named:
    yield f"{name}.weight", (outputs, inputs)
    if bias:
        yield f"{name}.bias", (outputs,)


def _conv(name: str, inputs: int, outputs: int, *kernel: int, bias: bool = True) -> Named:
    yield f"{name}.weight", (outputs, inputs, *kernel)
    if bias:
        yield f"{name}.bias", (outputs,)


def _autoencoder(spec: Any) -> Named:
    wide = 1 if spec.kind == "vq" else 2  # mean and variance
    widths = [spec.ch * mult for mult in spec.ch_mult]
    attends = [
        spec.attn_type != "none" and spec.resolution // 2**level in spec.attn_resolutions
        for level in range(len(widths))
    ]
    yield from _conv("encoder.conv_in", spec.in_channels, spec.ch, 3, 3)
    for level, (width, out) in enumerate(zip([spec.ch, *widths], widths, strict=False)):
        yield from _level(f"encoder.down.{level}", width, out, spec.num_res_blocks, attends[level])
        if level < len(widths) - 1:
            yield from _conv(f"encoder.down.{level}.downsample.conv", out, out, 3, 3)
    yield from _coder("encoder", spec, widths[-1])
    yield from _norm("encoder.norm_out", widths[-1])
    yield from _conv("encoder.conv_out", widths[-1], wide * spec.z_channels, 3, 3)
    yield from _conv("decoder.conv_in", spec.z_channels, widths[-1], 3, 3)
    yield from _coder("decoder", spec, widths[-1])
    for level, (width, out) in enumerate(zip([*widths[1:], widths[-1]], widths, strict=True)):
        yield from _level(f"decoder.up.{level}", width, out, spec.num_res_blocks + 1, attends[level])
        if level:
            yield from _conv(f"decoder.up.{level}.upsample.conv", out, out, 3, 3)
    yield from _norm("decoder.norm_out", widths[0])
    yield from _conv("decoder.conv_out", widths[0], spec.out_ch, 3, 3)
    if spec.kind == "vq":
        yield "quantize.embedding", (spec.codebook_size, spec.embed_dim)
    yield from _conv("quant_conv", wide * spec.z_channels, wide * spec.embed_dim, 1, 1)
    yield from _conv("post_quant_conv", spec.embed_dim, spec.z_channels, 1, 1)


def _coder(name: str, spec: Any, width: int) -> Named:
    """The middle of encoder or decoder."""
    for block in ("block_1", "block_2"):
        yield from _resnet(f"{name}.mid.{block}", width, width)
    if spec.attn_type != "none":
        yield from _self_attention(f"{name}.mid.attn_1", width)


def _level(name: str, width: int, out: int, blocks: int, attends: bool) -> Named:
    for block in range(blocks):
        yield from _resnet(f"{name}.block.{block}", out if block else width, out)
        if attends:
            yield from _self_attention(f"{name}.attn.{block}", out)


def _resnet(name: str, width: int, out: int) -> Named:
    yield from _norm(f"{name}.norm1", width)
    yield from _conv(f"{name}.conv1", width, out, 3, 3)
    yield from _norm(f"{name}.norm2", out)
    yield from _conv(f"{name}.conv2", out, out, 3, 3)
    if width != out:
        yield from _conv(f"{name}.nin_shortcut", width, out, 1, 1)


def _self_attention(name: str, width: int) -> Named:
    yield from _norm(f"{name}.norm", width)
    for part in ("q", "k", "v", "proj_out"):
        yield from _conv(f"{name}.{part}", width, width, 1, 1)


def _unet(spec: Any, inputs: int, outputs: int) -> Named:
    first = spec.model_channels
    yield from _linear("time_embed.0", first, 4 * first)
    yield from _linear("time_embed.2", 4 * first, 4 * first)
    if spec.num_classes is not None:
        yield "label_emb.weight", (spec.num_classes, 4 * first)
    yield from _conv("input_blocks.0.0", inputs, first, 3, 3)
    width, skips = first, [first]
    for level, mult in enumerate(spec.channel_mult):
        for _ in range(spec.num_res_blocks):
            yield from _stage(f"input_blocks.{len(skips)}", spec, width, mult * first, level)
            width = mult * first
            skips.append(width)
        if level < len(spec.channel_mult) - 1:
            yield from _resampling(f"input_blocks.{len(skips)}.0", spec, width, "op")
            skips.append(width)
    for place in (0, 2):
        yield from _res_block(f"middle_block.{place}", spec, width, width)
    yield from _attention("middle_block.1", spec, width)
    number = 0
    for level, mult in reversed(list(enumerate(spec.channel_mult))):
        for block in range(spec.num_res_blocks + 1):
            name = f"output_blocks.{number}"
            yield from _stage(name, spec, width + skips.pop(), mult * first, level)
            width = mult * first
            if level and block == spec.num_res_blocks:
                yield from _resampling(f"{name}.{2 if _attends(spec, level) else 1}", spec, width, "conv")
            number += 1
    yield from _norm("out.0", width)
    yield from _conv("out.2", width, outputs, 3, 3)


def _attends(spec: Any, level: int) -> bool:
    return 2**level in spec.attention_resolutions


def _stage(name: str, spec: Any, width: int, out: int, level: int) -> Named:
    yield from _res_block(f"{name}.0", spec, width, out)
    if _attends(spec, level):
        yield from _attention(f"{name}.1", spec, out)


def _res_block(name: str, spec: Any, width: int, out: int) -> Named:
    yield from _norm(f"{name}.in_layers.0", width)
    yield from _conv(f"{name}.in_layers.2", width, out, 3, 3)
    yield from _linear(f"{name}.emb_layers.1", 4 * spec.model_channels, 2 * out if spec.use_scale_shift_norm else out)
    yield from _norm(f"{name}.out_layers.0", out)
    yield from _conv(f"{name}.out_layers.3", out, out, 3, 3)
    if width != out:
        yield from _conv(f"{name}.skip_connection", width, out, 1, 1)


def _resampling(name: str, spec: Any, width: int, conv: str) -> Named:
    if spec.resblock_updown:
        yield from _res_block(name, spec, width, width)
    elif spec.conv_resample:
        yield from _conv(f"{name}.{conv}", width, width, 3, 3)


def _attention(name: str, spec: Any, width: int) -> Named:
    yield from _norm(f"{name}.norm", width)
    if not spec.use_spatial_transformer:
        yield from _conv(f"{name}.qkv", width, 3 * width, 1)
        yield from _conv(f"{name}.proj_out", width, width, 1)
        return
    yield from _conv(f"{name}.proj_in", width, width, 1, 1)
    for depth in range(spec.transformer_depth):
        block = f"{name}.transformer_blocks.{depth}"
        for attention, context in (("attn1", width), ("attn2", spec.context_dim)):
            yield from _linear(f"{block}.{attention}.to_q", width, width, bias=False)
            for part in ("to_k", "to_v"):
                yield from _linear(f"{block}.{attention}.{part}", context, width, bias=False)
            yield from _linear(f"{block}.{attention}.to_out.0", width, width)
        yield from _linear(f"{block}.ff.net.0.proj", width, 8 * width)
        yield from _linear(f"{block}.ff.net.2", 4 * width, width)
        for number in (1, 2, 3):
            yield from _norm(f"{block}.norm{number}", width)
    yield from _conv(f"{name}.proj_out", width, width, 1, 1)


def _conditioner(spec: Any) -> Named:
    kind = None if spec is None else spec.kind
    if kind == "class":
        yield "embedding.weight", (spec.n_classes, spec.embed_dim)
    elif kind == "tokens":
        yield from _token_encoder(spec)
    elif kind == "rescaler" and spec.out_channels is not None:
        yield from _conv("channel_mapper", spec.in_channels, spec.out_channels, 1, 1, bias=spec.bias)


def _token_encoder(spec: Any) -> Named:
    width, inner = spec.n_embed, 8 * 64
    yield "transformer.token_emb.weight", (spec.vocab_size, width)
    yield "transformer.pos_emb.emb.weight", (spec.max_seq_len, width)
    for layer in range(2 * spec.n_layer):
        name = f"transformer.attn_layers.layers.{layer}"
        yield from _norm(f"{name}.0", width)
        if layer % 2:
            yield from _linear(f"{name}.1.net.0.0", width, 4 * width)
            yield from _linear(f"{name}.1.net.2", 4 * width, width)
            continue
        for part in ("to_q", "to_k", "to_v"):
            yield from _linear(f"{name}.1.{part}", width, inner, bias=False)
        yield from _linear(f"{name}.1.to_out", inner, width)
    yield from _norm("transformer.norm", width)
