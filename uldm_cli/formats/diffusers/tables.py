"""Which of diffusers' tensors is which of ours: one table for each network, used in both directions."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from torch import Tensor

    from uldm_cli.formats.tensors import TensorRef, Tensors


class Change(Protocol):
    """How the values under the two names differ."""

    def join(self, theirs: Sequence["TensorRef"]) -> "TensorRef | None":
        """Our tensor out of theirs; None if they do not have the shapes that they should."""

    def split(self, ours: "TensorRef") -> "Sequence[TensorRef] | None":
        """Their tensors out of ours; None likewise."""


class Same:
    """Nothing differs."""

    def join(self, theirs: Sequence["TensorRef"]) -> "TensorRef | None":
        return theirs[0]

    def split(self, ours: "TensorRef") -> "Sequence[TensorRef] | None":
        return [ours]


@dataclass(frozen=True)
class Matrix:
    """A linear map: theirs `[O, I]`, ours a convolution `[O, I, 1, ...]` with that many taps' axes."""

    axes: int

    def join(self, theirs: Sequence["TensorRef"]) -> "TensorRef | None":
        shape = (*theirs[0].shape, *(1,) * self.axes)
        return theirs[0].map(shape, lambda value: value.reshape(shape)) if len(theirs[0].shape) == 2 else None

    def split(self, ours: "TensorRef") -> "Sequence[TensorRef] | None":
        shape = ours.shape[:2]
        if ours.shape != (*shape, *(1,) * self.axes):
            return None
        return [ours.map(shape, lambda value: value.reshape(shape))]


@dataclass(frozen=True)
class Fused:
    """Queries, keys and values: three tensors of theirs, `[C, C]` or `[C]`; one of ours, `[3C, C, 1]` or `[3C]`.

    Ours has them head by head, or with `grouped` all queries first (`use_new_attention_order`).
    """

    heads: int
    grouped: bool = False

    def join(self, theirs: Sequence["TensorRef"]) -> "TensorRef | None":
        from uldm_cli.formats.tensors import TensorRef

        first = theirs[0]
        width, *rest = first.shape or (0,)
        if width % self.heads or first.shape not in ((width,), (width, width)):
            return None
        if any((one.shape, one.dtype) != (first.shape, first.dtype) for one in theirs):
            return None
        shape = (3 * width, *rest, *(1,) * len(rest))

        def read() -> "Tensor":
            import torch

            parts = torch.stack([one.read() for one in theirs])
            if not self.grouped:
                parts = parts.reshape(3, self.heads, width // self.heads, *rest).transpose(0, 1)
            return parts.reshape(shape)

        return TensorRef(shape, first.dtype, read)

    def split(self, ours: "TensorRef") -> "Sequence[TensorRef] | None":
        total, *rest = ours.shape or (0,)
        width, shape = total // 3, (total // 3, *rest[:1])
        if total % (3 * self.heads) or ours.shape not in ((total,), (total, width, 1)):
            return None

        def part(value: "Tensor", i: int) -> "Tensor":
            if self.grouped:
                return value[i * width : (i + 1) * width].reshape(shape)
            return value.reshape(self.heads, 3, width // self.heads, *rest)[:, i].reshape(shape)

        return [ours.map(shape, lambda value, i=i: part(value, i)) for i in range(3)]  # type: ignore[misc]


SAME = Same()


@dataclass(frozen=True)
class Row:
    """One tensor of ours, and the one or three of theirs that hold the same."""

    ours: str
    theirs: tuple[str, ...]
    change: Change = SAME


def to_ours(rows: Sequence[Row], theirs: "Tensors") -> "dict[str, TensorRef]":
    """Our tensors out of diffusers'. Rows whose tensors are missing or misshapen give nothing."""
    found = {}
    for row in rows:
        if all(name in theirs for name in row.theirs):
            joined = row.change.join([theirs[name] for name in row.theirs])
            if joined is not None:
                found[row.ours] = joined
    return found


def to_theirs(rows: Sequence[Row], ours: "Tensors") -> "dict[str, TensorRef]":
    """Diffusers' tensors out of ours; the same."""
    found: dict[str, TensorRef] = {}
    for row in rows:
        if row.ours in ours and (parts := row.change.split(ours[row.ours])) is not None:
            found |= zip(row.theirs, parts, strict=True)
    return found


@dataclass(frozen=True)
class UNetShape:
    """What of a U-Net decides the names of its tensors; the first three have one entry a level."""

    widths: tuple[int, ...]
    attention: tuple[bool, ...]
    heads: tuple[int, ...]
    blocks: int
    updown: bool
    grouped: bool = False


def unet_rows(shape: UNetShape) -> list[Row]:
    """Every tensor of a U-Net."""
    rows: list[Row] = []
    for ours, theirs in _UNET_ENDS.items():
        rows += _layer(ours, theirs)
    skips = [shape.widths[0]]
    rows += _unet_down(shape, skips)
    rows += _resnet("middle_block.0", "mid_block.resnets.0", _UNET_RESNET)
    rows += _unet_attention("middle_block.1", "mid_block.attentions.0", shape, -1)
    rows += _resnet("middle_block.2", "mid_block.resnets.1", _UNET_RESNET)
    rows += _unet_up(shape, skips)
    return rows


def _unet_down(shape: UNetShape, skips: list[int]) -> Iterator[Row]:
    """The downward half; `skips` gets the width of everything that the upward half will see again."""
    for level, width in enumerate(shape.widths):
        for j in range(shape.blocks):
            ours, theirs = f"input_blocks.{len(skips)}", f"down_blocks.{level}"
            yield from _resnet(f"{ours}.0", f"{theirs}.resnets.{j}", _UNET_RESNET, skips[-1] != width)
            if shape.attention[level]:
                yield from _unet_attention(f"{ours}.1", f"{theirs}.attentions.{j}", shape, level)
            skips.append(width)
        if level < len(shape.widths) - 1:
            yield from _resample(shape, f"input_blocks.{len(skips)}.0", f"down_blocks.{level}.downsamplers.0", "op")
            skips.append(width)


def _unet_up(shape: UNetShape, skips: list[int]) -> Iterator[Row]:
    channels, n, last = skips[-1], 0, len(shape.widths) - 1
    for level in range(last, -1, -1):
        theirs, width = f"up_blocks.{last - level}", shape.widths[level]
        for j in range(shape.blocks + 1):
            ours = f"output_blocks.{n}"
            yield from _resnet(f"{ours}.0", f"{theirs}.resnets.{j}", _UNET_RESNET, channels + skips.pop() != width)
            if shape.attention[level]:
                yield from _unet_attention(f"{ours}.1", f"{theirs}.attentions.{j}", shape, level)
            channels, n = width, n + 1
        if level:
            place = 2 if shape.attention[level] else 1
            yield from _resample(shape, f"{ours}.{place}", f"{theirs}.upsamplers.0", "conv")


_SHORTCUT = "conv_shortcut"
_UNET_ENDS = {
    "time_embed.0": "time_embedding.linear_1",
    "time_embed.2": "time_embedding.linear_2",
    "input_blocks.0.0": "conv_in",
    "out.0": "conv_norm_out",
    "out.2": "conv_out",
}
_UNET_RESNET = {
    "in_layers.0": "norm1",
    "in_layers.2": "conv1",
    "emb_layers.1": "time_emb_proj",
    "out_layers.0": "norm2",
    "out_layers.3": "conv2",
    "skip_connection": _SHORTCUT,
}
_RESNET = {name: name for name in ("norm1", "conv1", "norm2", "conv2")} | {"nin_shortcut": _SHORTCUT}
_QKV = ("to_q", "to_k", "to_v")
_ATTENTION = dict(zip(("q", "k", "v", "proj_out"), (*_QKV, "to_out.0"), strict=True))


def _unet_attention(ours: str, theirs: str, shape: UNetShape, level: int) -> Iterator[Row]:
    yield from _layer(f"{ours}.norm", f"{theirs}.group_norm")
    fused = Fused(shape.heads[level], shape.grouped)
    for kind in ("weight", "bias"):
        yield Row(f"{ours}.qkv.{kind}", tuple(f"{theirs}.{one}.{kind}" for one in _QKV), fused)
    yield from _layer(f"{ours}.proj_out", f"{theirs}.to_out.0", Matrix(1))


def _resample(shape: UNetShape, ours: str, theirs: str, name: str) -> Iterator[Row]:
    if shape.updown:
        yield from _resnet(ours, theirs, _UNET_RESNET)
    else:
        yield from _layer(f"{ours}.{name}", f"{theirs}.conv")


@dataclass(frozen=True)
class AutoencoderShape:
    """What of a VQ or KL autoencoder decides the names of its tensors; the first two have one entry a level."""

    widths: tuple[int, ...]
    attention: tuple[bool, ...]
    middle: bool
    """Whether there is attention in the middle."""
    blocks: int
    codes: bool
    """Whether there is a codebook."""


def autoencoder_rows(shape: AutoencoderShape) -> list[Row]:
    """Every tensor of an autoencoder."""
    rows: list[Row] = []
    for half in ("encoder", "decoder"):
        for ours, theirs in (("conv_in", "conv_in"), ("norm_out", "conv_norm_out"), ("conv_out", "conv_out")):
            rows += _layer(f"{half}.{ours}", f"{half}.{theirs}")
        for i in (1, 2):
            rows += _resnet(f"{half}.mid.block_{i}", f"{half}.mid_block.resnets.{i - 1}", _RESNET)
        if shape.middle:
            rows += _attention(f"{half}.mid.attn_1", f"{half}.mid_block.attentions.0")
    rows += _down_and_up(shape)
    for name in ("quant_conv", "post_quant_conv"):
        rows += _layer(name, name)
    if shape.codes:
        rows.append(Row("quantize.embedding", ("quantize.embedding.weight",)))
    return rows


def _down_and_up(shape: AutoencoderShape) -> Iterator[Row]:
    """The levels of both halves; diffusers counts those of the decoder from the smallest size."""
    last = len(shape.widths) - 1
    for level in range(last + 1):
        ours, theirs = f"encoder.down.{level}", f"encoder.down_blocks.{level}"
        yield from _level(shape, level, ours, theirs, shape.blocks, shape.widths[max(level - 1, 0)])
        if level < last:
            yield from _layer(f"{ours}.downsample.conv", f"{theirs}.downsamplers.0.conv")
        ours, theirs = f"decoder.up.{level}", f"decoder.up_blocks.{last - level}"
        yield from _level(shape, level, ours, theirs, shape.blocks + 1, shape.widths[min(level + 1, last)])
        if level:
            yield from _layer(f"{ours}.upsample.conv", f"{theirs}.upsamplers.0.conv")


def _level(shape: AutoencoderShape, level: int, ours: str, theirs: str, blocks: int, before: int) -> Iterator[Row]:
    """Residual blocks of one size; `before` is the width of what the first one takes."""
    for j in range(blocks):
        shortcut = j == 0 and before != shape.widths[level]
        yield from _resnet(f"{ours}.block.{j}", f"{theirs}.resnets.{j}", _RESNET, shortcut)
        if shape.attention[level]:
            yield from _attention(f"{ours}.attn.{j}", f"{theirs}.attentions.{j}")


def _attention(ours: str, theirs: str) -> Iterator[Row]:
    yield from _layer(f"{ours}.norm", f"{theirs}.group_norm")
    for one, other in _ATTENTION.items():
        yield from _layer(f"{ours}.{one}", f"{theirs}.{other}", Matrix(2))


def _resnet(ours: str, theirs: str, names: Mapping[str, str], shortcut: bool = False) -> Iterator[Row]:
    """A residual block; with `shortcut` its skip connection changes the width."""
    for one, other in names.items():
        if other != _SHORTCUT or shortcut:
            yield from _layer(f"{ours}.{one}", f"{theirs}.{other}")


def _layer(ours: str, theirs: str, weight: Change = SAME) -> Iterator[Row]:
    yield Row(f"{ours}.weight", (f"{theirs}.weight",), weight)
    yield Row(f"{ours}.bias", (f"{theirs}.bias",))
