"""3x3 convolutions with a quarter of the multiplications, F(4x4, 3x3) of Lavin & Gray 2016 (arXiv:1509.09308).

oneDNN's convolutions run at the peak of a CPU, but multiply directly. Training in float32 is faster this way. In the
mean its errors are about ten times those of a direct convolution; the largest are below 1e-4 of the output's deviation.

An image that is doubled before, by its nearest pixels, is never made: a tile sees 4x4 of its pixels in place of 6x6,
and 11 of the 36 products vanish.
"""

from functools import cache, lru_cache
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_TILE, _TAPS = 4, 3
"""Sides of what is computed at once: a tile of the output, and the kernel."""
_PATCH, _POINTS = {1: 6, 2: 4}, {1: 6, 2: 5}
"""Sides of the patch of the input that a tile sees, and of that patch transformed, by the scale of the input."""
_OF_PATCH = [
    *([4, 0, -5, 0, 1, 0], [0, -4, -4, 1, 1, 0], [0, 4, -4, -1, 1, 0]),
    *([0, -2, -1, 2, 1, 0], [0, 2, -1, -2, 1, 0], [0, 4, 0, -5, 0, 1]),
]
_OF_KERNEL = [[6, 0, 0], [-4, -4, -4], [-4, 4, -4], [1, 2, 4], [1, -2, 4], [0, 0, 24]]
"""To be divided by 24."""
_TO_TILE = [[1, 1, 1, 1, 1, 0], [0, 1, -1, 2, -2, 0], [0, 1, 1, 4, 4, 0], [0, 1, -1, 8, -8, 1]]
"""What is added to the second value, before this transform, is added to the whole tile."""
_DOUBLED = [0, 1, 1, 2, 2, 3]
"""Which of the four lines of an image that a tile of its double sees each of the six doubled lines is."""
_AT_ONCE, _KEPT, _MOST = 2**24, 2**21, 2**26
"""Bytes of transformed inputs and outputs. So many are held at once, if a sample needs no more. Where a sample needs at
most so many, its input is kept transformed for the backward pass, in 2.25 times the memory, or, of one that is doubled,
in 1.6 times the memory of its double. A sample that needs more than so many is convolved directly."""


def fits(x: Tensor, conv: nn.Conv2d, scale: int = 1) -> bool:
    """Whether an input `[N, C, H, W]` is convolved faster this way."""
    return (
        conv.training
        and torch.is_grad_enabled()
        and type(x) is Tensor
        and x.dtype == torch.float32
        and x.device.type == "cpu"
        and not torch.is_autocast_enabled("cpu")
        and not torch.compiler.is_compiling()
        and suits(conv, *x.shape, scale=scale)
    )


def suits(conv: nn.Conv2d, samples: int, inputs: int, height: int, width: int, *, scale: int = 1) -> bool:
    """Whether a convolution of such inputs is faster this way in training."""
    outputs, height, width = conv.out_channels, height * scale, width * scale
    return (
        torch.backends.mkl.is_available()
        and conv.kernel_size == (_TAPS, _TAPS)
        and conv.stride == conv.padding == conv.dilation == (1, 1)
        and conv.groups == 1
        and not height % _TILE
        and not width % _TILE
        # What is saved grows with the product of the channels and with the tiles. It has to be more than the transforms
        # of inputs and outputs cost, which goes by the sum of the channels, and that of the kernel, by their product.
        and inputs * outputs >= 32 * (inputs + outputs)
        and samples * height * width >= 32 * _TILE**2
        and _sample(height, width, inputs + outputs, scale) <= _MOST
    )


def kept_more(conv: nn.Conv2d, x: Tensor, scale: int = 1) -> int:
    """Bytes by which a sample of an input `[N, C, H, W]` grows when it is kept for the backward pass, over what a
    direct convolution keeps of it."""
    _, inputs, height, width = x.shape
    height, width = height * scale, width * scale
    _, transformed = _sizes(height, width, inputs + conv.out_channels, scale)
    own = x.element_size() * x[0].numel()
    return (_sample(height, width, inputs, scale) if transformed else own) - own * scale**2


def conv2d(x: Tensor, weight: Tensor, bias: Tensor | None, scale: int = 1) -> Tensor:
    """`torch.nn.functional.conv2d` with padding 1: `[N, C, H, W]` and `[K, C, 3, 3]` to `[N, K, H, W]`, float32.

    With a scale of 2, the input is doubled before: `[N, K, 2H, 2W]` come out. Height and width of what comes out must
    be multiples of 4. It has a gradient, but no gradient of that.
    """
    out: Tensor = _Winograd.apply(x, weight, bias, scale)
    return out


class _Transforms(NamedTuple):
    """Matrices for squares whose lines follow each other: with a scale of 2 of the second shape."""

    of_patch: Tensor
    """`[36, 36]` or `[25, 16]`."""
    of_kernel: Tensor
    """`[36, 9]` or `[25, 9]`."""
    to_tile: Tensor
    """`[16, 36]` or `[16, 25]`."""


@cache
def _transforms(scale: int) -> _Transforms:
    """Made when they are first needed, for modules may be imported where tensors that are made have no memory."""
    of_patch, of_kernel, to_tile = (
        torch.tensor(x, dtype=torch.float64, device="cpu") for x in (_OF_PATCH, _OF_KERNEL, _TO_TILE)
    )
    if scale == 2:  # the third value of every transformed line is zero
        of_patch = of_patch @ F.one_hot(torch.tensor(_DOUBLED, device="cpu")).double()
        some = of_patch.any(1)
        of_patch, of_kernel, to_tile = of_patch[some], of_kernel[some], to_tile[:, some]
    of_patch, of_kernel, to_tile = (torch.kron(x, x) for x in (of_patch, of_kernel, to_tile))
    return _Transforms(of_patch.float(), (of_kernel / 24**2).float(), to_tile.float())


class _Winograd(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, scale: int) -> Tensor:
        samples, inputs, height, width = x.shape
        height, width, outputs = height * scale, width * scale, weight.shape[0]
        kernel, (some, keep) = _transformed(weight, scale), _sizes(height, width, inputs + outputs, scale)
        # Written into, for a view of rows could not be changed in place.
        out = torch.empty(samples, outputs, height, width, dtype=x.dtype, memory_format=torch.channels_last)
        kept = []
        for part, into in zip(_parts(x, some), _parts(out, some), strict=True):
            places = _places(into, scale)
            patches = _patches(part, places, scale)
            kept.append(patches if keep else part)
            product = torch.bmm(patches.transpose(0, 1), kernel.mT)
            if bias is not None:
                _constant(product, scale).add_(bias)
            tiles = torch.mm(_transforms(scale).to_tile, product.view(product.shape[0], -1))
            torch.index_select(tiles.view(-1, outputs), 0, places.in_tiles, out=_rows(into))
        ctx.scale = scale
        ctx.save_for_backward(weight, *kept)
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None, None]:
        """The steps of `forward`, transposed."""
        weight, *kept = ctx.saved_tensors
        (outputs, inputs), (samples, _, height, width), scale = weight.shape[:2], gradient.shape, ctx.scale
        kernel, (some, keep) = _transformed(weight, scale), _sizes(height, width, inputs + outputs, scale)
        of_parts, of_kernel, of_bias = [], None, None
        for part, of_out in zip(kept, _parts(gradient, some), strict=True):
            places = _places(of_out, scale)
            tiles = _rows(of_out).index_select(0, places.of_tiles).view(_TILE**2, -1)
            product = torch.mm(_transforms(scale).to_tile.mT, tiles).view(_POINTS[scale] ** 2, -1, outputs)
            if ctx.needs_input_grad[0]:
                of_parts.append(_add_patches(torch.bmm(product, kernel), of_out.shape[0], places, scale))
            if ctx.needs_input_grad[1]:
                patches = part if keep else _patches(part, places, scale)
                of_part = torch.bmm(product.mT, patches.transpose(0, 1))
                of_kernel = of_part if of_kernel is None else of_kernel.add_(of_part)
            if ctx.needs_input_grad[2]:
                of_tiles = _constant(product, scale).sum(0)
                of_bias = of_tiles if of_bias is None else of_bias.add_(of_tiles)
        return (
            _images(of_parts, samples, height // scale, width // scale) if of_parts else None,
            None if of_kernel is None else _transposed(of_kernel, scale),
            of_bias,
            None,
        )


def _sizes(height: int, width: int, channels: int, scale: int) -> tuple[int, bool]:
    """How many samples are transformed at once, and whether they stay so for the backward pass.

    Args:
        height: of the output.
        width: of the output.
        channels: of the input and of the output.
        scale: of the input.
    """
    sample = _sample(height, width, channels, scale)
    return max(1, _AT_ONCE // sample), sample <= _KEPT


def _sample(height: int, width: int, channels: int, scale: int) -> int:
    """Bytes of so many channels of a sample, transformed."""
    return torch.float32.itemsize * _POINTS[scale] ** 2 * (height // _TILE) * (width // _TILE) * channels


def _parts(x: Tensor, some: int) -> tuple[Tensor, ...]:
    """So many samples of it, the next ones, and so on."""
    return x.split(some) if x.shape[0] > some else (x,)


def _constant(product: Tensor, scale: int) -> Tensor:
    """Of `[36 or 25, tiles, K]`, those values `[tiles, K]` that are added to whole tiles."""
    return product[_POINTS[scale] + 1]


_Sums = tuple[Tensor, Tensor]
"""Which rows are added up, one sum after the other, and where among them each begins, and at last where all end."""


class _Places(NamedTuple):
    """Which rows, each with the channels of a place, others are made of.

    There are rows of pixels, `[N * H * W, C]`, of patches and of tiles. What is multiplied with a matrix has the order
    in which that is fastest: patches that are made go one after the other, and so do their positions. Patches that are
    added up go sample after sample, and in a sample position after position. Tiles have the first position of all of
    them, then the second.
    """

    of_patches: _Sums
    """The pixel of the input, or none outside of the image."""
    in_patches: _Sums
    """`of_patches`, transposed: all places at which patches have the pixel."""
    of_tiles: Tensor
    """The pixel of the output."""
    in_tiles: Tensor
    """The place at which a tile has the pixel."""


def _places(out: Tensor, scale: int) -> _Places:
    """For an output like `[N, K, H, W]`."""
    samples, _, height, width = out.shape
    return _places_of(samples, height, width, scale)


@lru_cache(maxsize=64)
def _places_of(samples: int, height: int, width: int, scale: int) -> _Places:
    """Made once for a size: less than 80 bytes for a pixel, where transformed it has more than 500."""
    # A patch begins a line before its tile.
    pixels = _windows(samples, height // scale, width // scale, _PATCH[scale], _TILE // scale, before=1)
    tiles = _windows(samples, height, width, _TILE, _TILE, before=0).permute(3, 4, 0, 1, 2).flatten()
    return _Places(_chosen(pixels.flatten()), _given(pixels.permute(0, 3, 4, 1, 2).flatten()), tiles, tiles.argsort())


def _windows(samples: int, height: int, width: int, side: int, step: int, before: int) -> Tensor:
    """Numbers of the pixels in windows that cover images: `[N, rows, columns, side, side]`, -1 outside of the image."""
    lengths = (samples, height // step, width // step, side, side)
    n, i, j, row, column = torch.meshgrid(*(torch.arange(length, device="cpu") for length in lengths), indexing="ij")
    y, x = i * step + row - before, j * step + column - before
    inside = (y >= 0) & (y < height) & (x >= 0) & (x < width)
    return torch.where(inside, (n * height + y) * width + x, -1)


def _chosen(rows: Tensor) -> _Sums:
    """Sums of one of these rows each, or of nothing where it is -1."""
    there = rows >= 0
    return rows[there], _bounds(there.long())


def _given(rows: Tensor) -> _Sums:
    """`_chosen`, transposed: where a row has been chosen, all places to which it was given."""
    [places] = (rows >= 0).nonzero(as_tuple=True)
    return places[rows[places].argsort(stable=True)], _bounds(rows[places].bincount())


def _bounds(lengths: Tensor) -> Tensor:
    """Where each of so long sums begins, and where the last one ends."""
    return F.pad(lengths.cumsum(0), (1, 0))


def _summed(rows: Tensor, sums: _Sums) -> Tensor:
    """Sums of rows `[rows, C]`: `[sums, C]`. Detached, for what may have a gradient is summed up more slowly."""
    return F.embedding_bag(sums[0], rows.detach(), sums[1], mode="sum", include_last_offset=True)


def _rows(x: Tensor) -> Tensor:
    """`[N, C, H, W]` as `[N * H * W, C]`: the same memory, if the channels are last there."""
    return x.permute(0, 2, 3, 1).reshape(-1, x.shape[1])


def _images(of_parts: list[Tensor], samples: int, height: int, width: int) -> Tensor:
    """Rows of pixels of some samples after those of others, as `[N, C, H, W]`, channels last in memory."""
    rows = of_parts[0] if len(of_parts) == 1 else torch.cat(of_parts)
    return rows.view(samples, height, width, -1).permute(0, 3, 1, 2)


def _times(matrix: Tensor, batch: Tensor) -> Tensor:
    """`matrix @ batch`, of `[A, B]` and `[N, B, C]`, by fewer calls."""
    return torch.bmm(matrix.expand(batch.shape[0], -1, -1), batch)


def _patches(x: Tensor, places: _Places, scale: int) -> Tensor:
    """The transformed patches of an input with zeros round it: `[N, C, H, W]` to `[tiles, 36 or 25, C]`.

    A patch is a tile with the nearest line of each neighbour.
    """
    patches = _summed(_rows(x), places.of_patches)
    return _times(_transforms(scale).of_patch, patches.view(-1, _PATCH[scale] ** 2, x.shape[1]))


def _add_patches(transformed: Tensor, samples: int, places: _Places, scale: int) -> Tensor:
    """`_patches`, transposed: `[36 or 25, tiles, C]` to `[N * H * W, C]`, where a pixel is the sum over its patches."""
    positions, _, channels = transformed.shape
    patches = _times(_transforms(scale).of_patch.mT, transformed.view(positions, samples, -1).transpose(0, 1))
    return _summed(patches.view(-1, channels), places.in_patches)


def _transformed(weight: Tensor, scale: int) -> Tensor:
    """A kernel `[K, C, 3, 3]` to `[36 or 25, K, C]`."""
    outputs, inputs = weight.shape[:2]
    taps = weight.permute(0, 2, 3, 1).reshape(outputs, _TAPS**2, inputs)
    return _times(_transforms(scale).of_kernel, taps).transpose(0, 1)


def _transposed(of_kernel: Tensor, scale: int) -> Tensor:
    """`_transformed`, transposed: the gradient of a transformed kernel to that of the kernel, channels last."""
    of_taps = _times(_transforms(scale).of_kernel.mT, of_kernel.transpose(0, 1))
    return of_taps.unflatten(1, (_TAPS, _TAPS)).permute(0, 3, 1, 2)
