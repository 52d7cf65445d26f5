"""What a network is made of, as a picture of it needs: its stages in the order that data take, without any layout.

Everything comes out of the config. Parameters are counted by formula; the tests hold the sums against the modules.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any, Literal

from uldm_cli.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from uldm_cli.specs.autoencoders import KL, VQ, VQVAE
    from uldm_cli.specs.backbones import UNet
    from uldm_cli.specs.models import LatentDiffusionModel, Model

Kind = Literal["convolution", "residual", "attention", "transformer", "resampling"]


@dataclass(frozen=True)
class Layer:
    """One part of a stage."""

    kind: Kind
    parameters: int


@dataclass(frozen=True)
class Stage:
    """What happens at one size."""

    kind: Literal["maps", "layers", "codebook", "posterior"]
    """Data that go in or come out, a group of layers, or what makes latents of what the encoder made."""
    part: str
    """What people call it: "encoder", "latent", "codebook"; several stages that follow each other can share one."""
    channels: int
    side: int
    """Height and width of its maps."""
    layers: tuple[Layer, ...] = ()
    heads: int | None = None
    """Of its attention; None without."""
    codes: int | None = None
    """Entries of a codebook."""
    code_length: int = 0
    """Of each of them; its layers are what projects the latents to that length and back."""
    learned: bool = True
    """Whether the codes are found by training, not a fixed grid."""
    beside: int = 0
    """Channels of a condition that stand beside its own."""

    @property
    def blocks(self) -> int:
        """Residual blocks, without those that only change the size."""
        return sum(layer.kind == "residual" for layer in self.layers)

    @property
    def parameters(self) -> int:
        """Weights of its layers, or numbers in its codebook."""
        return sum(layer.parameters for layer in self.layers) + self.learned * (self.codes or 0) * self.code_length


@dataclass(frozen=True)
class Skip:
    """Feature maps that go from one stage straight to another, by their positions among the stages."""

    start: int
    end: int
    count: int


@dataclass(frozen=True)
class Signal:
    """What many stages are given."""

    kind: Literal["time", "context"]
    name: str
    width: int
    """Length of its vectors."""
    stages: tuple[int, ...]
    """Positions of the stages that take it."""
    parameters: int = 0


@dataclass(frozen=True)
class Architecture:
    """A network."""

    name: str
    """What people call the model, or the config, that it is a part of."""
    kind: str
    """Of its spec."""
    facts: tuple[str, ...]
    """What there is to say of the whole."""
    stages: tuple[Stage, ...]
    skips: tuple[Skip, ...] = ()
    signals: tuple[Signal, ...] = ()
    resampling: str = "convolution"
    """What halves and doubles the size."""

    @property
    def parameters(self) -> int:
        """In all."""
        return sum(stage.parameters for stage in self.stages) + sum(signal.parameters for signal in self.signals)


class UnknownKind(ConfigError):
    """There is a network of a kind, such as a plugin's, of which nothing is known that could be drawn."""


def autoencoder_of(model: Model, name: str) -> Architecture:
    """The autoencoder of a model that people call `name`.

    Raises:
        UnknownKind: it is of a kind that is not known.
        ConfigError: it does not take the model's images.
    """
    spec: Any = model.autoencoder
    if spec.kind not in _AUTOENCODERS:
        raise _unknown("autoencoder", spec.kind, _AUTOENCODERS)
    title, describe = _AUTOENCODERS[spec.kind]
    _check_side(model.image_size, spec.factor, "images", "autoencoder")
    facts = [title, f"images {_shape(model.image_shape)}", f"latents {_shape(model.latent_shape)}"]
    if spec.kind != "kl":
        facts.append(f"{spec.codebook_size:,} codes")
    return Architecture(name, spec.kind, tuple(facts), tuple(describe(spec, model.image_size)))


def backbone_of(model: LatentDiffusionModel, name: str) -> Architecture:
    """The backbone of a latent diffusion model that people call `name`.

    Raises:
        UnknownKind: it is of a kind that is not known.
        ConfigError: it does not take the model's latents.
    """
    spec: Any = model.backbone
    if spec.kind != "unet":
        raise _unknown("backbone", spec.kind, ("unet",))
    _check_side(model.latent_shape[1], spec.factor, "latents", "backbone")
    stages = tuple(_unet(spec, model))
    depth, inner = len(spec.channel_mult), range(1, len(stages) - 1)
    skips = tuple(Skip(1 + i, len(stages) - 2 - i, spec.num_res_blocks + 1) for i in range(depth))
    resampling = "residual block" if spec.resblock_updown else "convolution" if spec.conv_resample else "no weights"
    signals = [Signal("time", "time", 4 * spec.model_channels, tuple(inner), _time_parameters(spec))]
    if spec.num_classes is not None:
        signals[0] = Signal("time", "time + class", signals[0].width, signals[0].stages, signals[0].parameters)
    if spec.context_dim is not None:
        takers = tuple(i for i in inner if stages[i].heads)
        signals.append(Signal("context", "context", spec.context_dim, takers))
    return Architecture(name, spec.kind, tuple(_unet_facts(model)), stages, skips, tuple(signals), resampling)


def _unknown(word: str, kind: str, known: Iterable[str]) -> UnknownKind:
    return UnknownKind(f"what {word}s of the kind '{kind}' are made of is not known here", f"Known: {', '.join(known)}")


def _check_side(side: int, factor: int, what: str, part: str) -> None:
    if side % factor:
        said = f"the {part} needs {what} whose side is a multiple of {factor}, and these are {side}x{side}"
        raise ConfigError(said, "Change the size, or the number of levels")


def _shape(shape: tuple[int, int, int]) -> str:
    return "×".join(map(str, shape))  # noqa: RUF001


# Parameters, as core/blocks.py and core/unet.py have them.


def _conv(inputs: int, outputs: int, kernel: int = 3) -> int:
    return (inputs * kernel * kernel + 1) * outputs


def _linear(inputs: int, outputs: int) -> int:
    return (inputs + 1) * outputs


def _norm(channels: int) -> int:
    return 2 * channels


def _residual(width: int, out: int) -> Layer:
    """An autoencoder's residual block."""
    shortcut = _conv(width, out, 1) if width != out else 0
    return Layer("residual", _norm(width) + _conv(width, out) + _norm(out) + _conv(out, out) + shortcut)


def _attention(width: int) -> Layer:
    return Layer("attention", _norm(width) + 4 * _conv(width, width, 1))


def _convolution(inputs: int, outputs: int, kernel: int = 3, *, normed: bool = False) -> Layer:
    """A convolution that is a layer of its own, with a normalisation before it where it ends a network."""
    return Layer("convolution", _conv(inputs, outputs, kernel) + (_norm(inputs) if normed else 0))


def _resampling(width: int) -> Layer:
    return Layer("resampling", _conv(width, width))


def _blocks(width: int, out: int, count: int, attends: bool) -> list[Layer]:
    """Residual blocks of a level, each followed by attention or none of them."""
    layers = []
    for i in range(count):
        layers += [_residual(out if i else width, out), *([_attention(out)] if attends else [])]
    return layers


def _middle(width: int, out: int, pairs: int) -> list[Layer]:
    return [_residual(width, out)] + [_attention(out), _residual(out, out)] * pairs


def _level(part: str, side: int, layers: list[Layer], out: int, heads: int | None) -> Stage:
    return Stage("layers", part, out, side, tuple(layers), heads)


def _vqvae(spec: VQVAE, side: int) -> Iterator[Stage]:
    z, last = spec.z_channels, spec.down_channels[-1]
    small = side // spec.factor
    yield Stage("maps", "image", spec.in_channels, side)
    yield from _vqvae_encoder(spec, side)
    middle = list(pairwise(spec.mid_channels))
    for i, (width, out) in enumerate(middle):
        layers = _middle(width, out, spec.num_mid_layers)
        if i == len(middle) - 1:
            layers += [_convolution(last, z, normed=True), _convolution(z, z, 1)]
        yield _level("encoder", small, layers, out, spec.num_heads)
    yield Stage("maps", "latent", z, small)
    yield _codebook(spec, z, small)
    for i, (out, width) in enumerate(reversed(middle)):
        layers = [] if i else [_convolution(z, z, 1), _convolution(z, last)]
        yield _level("decoder", small, layers + _middle(width, out, spec.num_mid_layers), out, spec.num_heads)
    yield from _vqvae_decoder(spec, small)
    yield Stage("maps", "image", spec.in_channels, side)


def _vqvae_encoder(spec: VQVAE, side: int) -> Iterator[Stage]:
    before = [_convolution(spec.in_channels, spec.down_channels[0])]
    steps = zip(pairwise(spec.down_channels), spec.down_sample, spec.attn_down, strict=True)
    for (width, out), halves, attends in steps:
        layers = before + _blocks(width, out, spec.num_down_layers, attends) + [_resampling(out)] * halves
        yield _level("encoder", side, layers, out, spec.num_heads if attends else None)
        side, before = side // (1 + halves), []


def _vqvae_decoder(spec: VQVAE, side: int) -> Iterator[Stage]:
    """The steps of the encoder, backwards: the size doubles before a level's blocks."""
    steps = list(zip(pairwise(spec.down_channels), spec.down_sample, spec.attn_down, strict=True))
    for i, ((out, width), doubles, attends) in reversed(list(enumerate(steps))):
        side *= 1 + doubles
        layers = [_resampling(width)] * doubles + _blocks(width, out, spec.num_up_layers, attends)
        if i == 0:
            layers.append(_convolution(out, spec.in_channels, normed=True))
        yield _level("decoder", side, layers, out, spec.num_heads if attends else None)


def _codebook(spec: Any, channels: int, side: int) -> Stage:
    quantizer = spec.quantizer
    projected = quantizer.code_dim if quantizer.kind == "cosine" else None
    length = projected or channels
    layers = (_convolution(channels, length, 1), _convolution(length, channels, 1)) if projected else ()
    learned = quantizer.kind != "fsq"
    return Stage(
        "codebook", "codebook", channels, side, layers, codes=spec.codebook_size, code_length=length, learned=learned
    )


def _published(spec: VQ | KL, side: int) -> Iterator[Stage]:
    """VQ and KL, which differ in what is between encoder and decoder."""
    widths = [spec.ch * mult for mult in spec.ch_mult]
    sides = [side >> level for level in range(len(widths))]
    heads = [1 if spec.resolution >> level in spec.attn_resolutions else None for level in range(len(widths))]
    if spec.attn_type == "none":
        heads = [None] * len(widths)
    yield Stage("maps", "image", spec.in_channels, side)
    for i, (width, out) in enumerate(zip([spec.ch, *widths[:-1]], widths, strict=True)):
        layers = [] if i else [_convolution(spec.in_channels, spec.ch)]
        layers += _blocks(width, out, spec.num_res_blocks, heads[i] is not None)
        layers += [_resampling(out)] * (i < len(widths) - 1)
        yield _level("encoder", sides[i], layers, out, heads[i])
    yield from _published_latents(spec, sides[-1], widths[-1])
    for i, (width, out) in reversed(list(enumerate(zip([*widths[1:], widths[-1]], widths, strict=True)))):
        layers = _blocks(width, out, spec.num_res_blocks + 1, heads[i] is not None)
        layers += [_resampling(out)] if i else [_convolution(out, spec.out_ch, normed=True)]
        yield _level("decoder", sides[i], layers, out, heads[i])
    yield Stage("maps", "image", spec.out_ch, side)


def _published_latents(spec: VQ | KL, side: int, width: int) -> Iterator[Stage]:
    """All of the smallest size: the encoder's end, the latents, the decoder's beginning."""
    z, channels = spec.z_channels, spec.embed_dim
    attends = spec.attn_type == "vanilla"
    middle = [_residual(width, width), *([_attention(width)] if attends else []), _residual(width, width)]
    wide = 2 if spec.kind == "kl" else 1  # mean and variance
    ending = [_convolution(width, wide * z, normed=True), _convolution(wide * z, wide * channels, 1)]
    yield _level("encoder", side, middle + ending, width, 1 if attends else None)
    latent = Stage("maps", "latent", channels, side)
    if spec.kind == "kl":
        yield from (Stage("posterior", "posterior", 2 * channels, side), latent)
    else:
        yield from (latent, _codebook(spec, channels, side))
    beginning = [_convolution(channels, z, 1), _convolution(z, width)]
    yield _level("decoder", side, beginning + middle, width, 1 if attends else None)


def _unet(spec: UNet, model: LatentDiffusionModel) -> Iterator[Stage]:
    channels, side, _ = model.latent_shape
    first, depth = spec.model_channels, len(spec.channel_mult)
    widths = [first * mult for mult in spec.channel_mult]
    yield Stage("maps", "noised latent", channels, side, beside=model.concat_channels)
    width, skips = first, [first]
    for i, out in enumerate(widths):
        layers = [] if i else [_convolution(channels + model.concat_channels, first)]
        for _ in range(spec.num_res_blocks):
            layers += _unet_block(spec, width, out, i)
            skips.append(width := out)
        if i < depth - 1:
            layers += _unet_resampling(spec, width)
            skips.append(width)
        yield _level("encoder", side >> i, layers, out, _heads(spec, out, i))
    layers = [_unet_residual(spec, width, width), _unet_attention(spec, width), _unet_residual(spec, width, width)]
    yield _level("middle", side >> (depth - 1), layers, width, _heads(spec, width))
    for i, out in reversed(list(enumerate(widths))):
        layers = []
        for _ in range(spec.num_res_blocks + 1):
            layers += _unet_block(spec, width + skips.pop(), out, i)
            width = out
        layers += _unet_resampling(spec, width) if i else [_convolution(width, model.predicted_channels, normed=True)]
        yield _level("decoder", side >> i, layers, out, _heads(spec, out, i))
    variance = " and variance" if model.learned_variance else ""
    yield Stage("maps", _PREDICTIONS[model.target] + variance, model.predicted_channels, side)


def _heads(spec: UNet, width: int, level: int | None = None) -> int | None:
    """Of the attention at a level, which may have none, or in the middle, which always has."""
    if level is not None and 2**level not in spec.attention_resolutions:
        return None
    return spec.num_heads or width // (spec.num_head_channels or 32)


def _unet_block(spec: UNet, width: int, out: int, level: int) -> list[Layer]:
    block = [_unet_residual(spec, width, out)]
    return [*block, _unet_attention(spec, out)] if _heads(spec, out, level) else block


def _unet_residual(spec: UNet, width: int, out: int) -> Layer:
    emb = _linear(4 * spec.model_channels, 2 * out if spec.use_scale_shift_norm else out)
    return Layer("residual", _residual(width, out).parameters + emb)


def _unet_resampling(spec: UNet, width: int) -> list[Layer]:
    if spec.resblock_updown:
        return [Layer("resampling", _unet_residual(spec, width, width).parameters)]
    return [_resampling(width) if spec.conv_resample else Layer("resampling", 0)]


def _unet_attention(spec: UNet, width: int) -> Layer:
    if spec.context_dim is None:
        return Layer("attention", _norm(width) + _linear(width, 3 * width) + _linear(width, width))
    own, context = 3 * width * width, (width + 2 * spec.context_dim) * width  # q, k and v have no bias
    feed_forward = _linear(width, 8 * width) + _linear(4 * width, width)
    block = own + context + 2 * _linear(width, width) + feed_forward + 3 * _norm(width)
    return Layer("transformer", _norm(width) + 2 * _conv(width, width, 1) + spec.transformer_depth * block)


def _time_parameters(spec: UNet) -> int:
    """Of the embedding of the time, and of the classes that are added to it."""
    width, emb = spec.model_channels, 4 * spec.model_channels
    return _linear(width, emb) + _linear(emb, emb) + (spec.num_classes or 0) * emb


def _unet_facts(model: LatentDiffusionModel) -> Iterator[str]:
    channels, *size = model.latent_shape
    yield "U-Net"
    yield f"input {_shape((channels + model.concat_channels, size[0], size[1]))}"
    variance = " and the variance of a step" if model.learned_variance else ""
    yield f"predicts {'the ' if model.target != 'eps' else ''}{_PREDICTIONS[model.target]}{variance}"
    if model.conditioner is not None:
        condition = _CONDITIONS.get(model.conditioner.kind, model.conditioner.kind)  # type: ignore[attr-defined]
        yield f"{_WAYS[str(model.conditioning)]} {condition}"


_PREDICTIONS = {"eps": "noise", "x0": "clean latent", "v": "velocity"}
_CONDITIONS = {
    "class": "a class",
    "tokens": "encoded tokens",
    "rescaler": "a resized map",
    "first-stage": "an image's latents",
    "identity": "given as it is",
}
_WAYS = {
    "concat": "beside the latent:",
    "crossattn": "context:",
    "hybrid": "context and beside the latent:",
    "adm": "label:",
}
_AUTOENCODERS: dict[str, tuple[str, Callable[[Any, int], Iterator[Stage]]]] = {
    "vqvae": ("VQ-VAE", _vqvae),
    "vq": ("VQ autoencoder", _published),
    "kl": ("KL autoencoder", _published),
}
