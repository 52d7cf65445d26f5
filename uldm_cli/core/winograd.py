"""3x3 convolutions with a quarter of the multiplications, F(4x4, 3x3) of Lavin & Gray 2016 (arXiv:1509.09308).

oneDNN's convolutions run at the peak of a CPU, but multiply directly. Training in float32 is faster this way. In the
mean its errors are about ten times those of a direct convolution; the largest are below 1e-4 of the output's deviation.
"""

from functools import cache, lru_cache
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_TILE, _PATCH, _TAPS = 4, 6, 3
"""Sides of what is computed at once: a tile of the output, the patch of the input that it sees, and the kernel."""
_OF_PATCH = [
    *([4, 0, -5, 0, 1, 0], [0, -4, -4, 1, 1, 0], [0, 4, -4, -1, 1, 0]),
    *([0, -2, -1, 2, 1, 0], [0, 2, -1, -2, 1, 0], [0, 4, 0, -5, 0, 1]),
]
_OF_KERNEL = [[6, 0, 0], [-4, -4, -4], [-4, 4, -4], [1, 2, 4], [1, -2, 4], [0, 0, 24]]
"""To be divided by 24."""
_TO_TILE = [[1, 1, 1, 1, 1, 0], [0, 1, -1, 2, -2, 0], [0, 1, 1, 4, 4, 0], [0, 1, -1, 8, -8, 1]]
_CONSTANT = _PATCH + 1
"""What is added there before the transform to a tile is added to every position of the tile."""
_AT_ONCE, _KEPT, _MOST = 2**24, 2**21, 2**26
"""Bytes of transformed inputs and outputs. So many are held at once, if a sample needs no more. Where a sample needs at
most so many, its input is kept transformed for the backward pass, in 2.25 times the memory. A sample that needs more
than so many is convolved directly."""


def fits(x: Tensor, conv: nn.Conv2d) -> bool:
    """Whether an input `[N, C, H, W]` is convolved faster this way."""
    return (
        conv.training
        and torch.is_grad_enabled()
        and type(x) is Tensor
        and x.dtype == torch.float32
        and x.device.type == "cpu"
        and not torch.is_autocast_enabled("cpu")
        and not torch.compiler.is_compiling()
        and suits(conv, *x.shape)
    )


def suits(conv: nn.Conv2d, samples: int, inputs: int, height: int, width: int) -> bool:
    """Whether a convolution of such inputs is faster this way in training."""
    outputs = conv.out_channels
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
        and _sample(height, width, inputs + outputs) <= _MOST
    )


def kept_more(conv: nn.Conv2d, x: Tensor) -> int:
    """Bytes by which a sample of an input `[N, C, H, W]` grows when it is kept for the backward pass."""
    _, inputs, height, width = x.shape
    return _sizes(x, inputs + conv.out_channels)[1] * (_sample(height, width, inputs) - x.element_size() * x[0].numel())


def conv2d(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """`torch.nn.functional.conv2d` with padding 1: `[N, C, H, W]` and `[K, C, 3, 3]` to `[N, K, H, W]`, float32.

    H and W must be multiples of 4. It has a gradient, but no gradient of that.
    """
    out: Tensor = _Winograd.apply(x, weight, bias)
    return out


@cache
def _transforms() -> tuple[Tensor, Tensor, Tensor]:
    """Of patches `[36, 36]`, of kernels `[36, 9]`, and to tiles `[16, 36]`: of squares, whose lines follow each other.

    Made when they are first needed, for modules may be imported where tensors that are made have no memory.
    """
    lines = (torch.tensor(x, dtype=torch.float64, device="cpu") for x in (_OF_PATCH, _OF_KERNEL, _TO_TILE))
    of_patch, of_kernel, to_tile = (torch.kron(x, x) for x in lines)
    return of_patch.float(), (of_kernel / 24**2).float(), to_tile.float()


class _Winograd(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        kernel, (some, keep) = _transformed(weight), _sizes(x, sum(weight.shape[:2]))
        # Written into, for a view of rows could not be changed in place.
        out = torch.empty(len(x), len(weight), *x.shape[2:], dtype=x.dtype, memory_format=torch.channels_last)
        kept = []
        for part, into in zip(x.split(some), out.split(some), strict=True):
            patches = _patches(part)
            kept.append(patches if keep else part)
            product = torch.bmm(patches.transpose(0, 1), kernel.mT)
            if bias is not None:
                product[_CONSTANT].add_(bias)
            tiles = _transforms()[2] @ product.flatten(1)
            torch.index_select(tiles.view(-1, len(weight)), 0, _places(part).in_tiles, out=_rows(into))
        ctx.save_for_backward(weight, *kept)
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """The steps of `forward`, transposed."""
        weight, *kept = ctx.saved_tensors
        kernel, (some, keep) = _transformed(weight), _sizes(gradient, sum(weight.shape[:2]))
        of_parts, of_kernel, of_bias = [], None, None
        for part, of_out in zip(kept, gradient.split(some), strict=True):
            places = _places(of_out)
            tiles = _rows(of_out).index_select(0, places.of_tiles).view(_TILE**2, -1)
            product = (_transforms()[2].mT @ tiles).view(_PATCH**2, -1, len(weight))
            if ctx.needs_input_grad[0]:
                of_parts.append(_add_patches(torch.bmm(product, kernel), len(of_out), places))
            if ctx.needs_input_grad[1]:
                patches = part if keep else _patches(part)
                of_part = torch.bmm(product.mT, patches.transpose(0, 1))
                of_kernel = of_part if of_kernel is None else of_kernel.add_(of_part)
            if ctx.needs_input_grad[2]:
                of_tiles = product[_CONSTANT].sum(0)
                of_bias = of_tiles if of_bias is None else of_bias.add_(of_tiles)
        return (
            _images(of_parts, gradient) if of_parts else None,
            None if of_kernel is None else _transposed(of_kernel),
            of_bias,
        )


def _sizes(x: Tensor, channels: int) -> tuple[int, bool]:
    """How many samples are transformed at once, and whether they stay so for the backward pass.

    Args:
        x: the input or the output, `[N, C, H, W]`.
        channels: of both.
    """
    height, width = x.shape[2:]
    sample = _sample(height, width, channels)
    return max(1, _AT_ONCE // sample), sample <= _KEPT


def _sample(height: int, width: int, channels: int) -> int:
    """Bytes of so many channels of a sample, transformed."""
    return torch.float32.itemsize * _PATCH**2 * (height // _TILE) * (width // _TILE) * channels


_Sums = tuple[Tensor, Tensor]
"""Which rows are added up, one sum after the other, and where among them each begins: as `embedding_bag` takes them."""


class _Places(NamedTuple):
    """Which rows, each with the channels of a place, others are made of.

    There are rows of pixels, `[N * H * W, C]`, of patches and of tiles. What is multiplied with a matrix has the order
    in which that is fastest: patches that are made go one after the other, and so do their positions. Patches that are
    added up go sample after sample, and in a sample position after position. Tiles have the first position of all of
    them, then the second.
    """

    of_patches: _Sums
    """The pixel, or none outside of the image."""
    in_patches: _Sums
    """`of_patches`, transposed: all places at which patches have the pixel."""
    of_tiles: Tensor
    """The pixel."""
    in_tiles: Tensor
    """The place at which a tile has the pixel."""


def _places(x: Tensor) -> _Places:
    """Of inputs or outputs like `[N, C, H, W]`."""
    return _places_of(len(x), *x.shape[2:])


@lru_cache(maxsize=64)
def _places_of(samples: int, height: int, width: int) -> _Places:
    """Made once for a size: less than 80 bytes for a pixel, where transformed it has more than 500."""
    lengths = (samples, height // _TILE, width // _TILE, _PATCH, _PATCH)
    n, i, j, row, column = torch.meshgrid(*(torch.arange(length, device="cpu") for length in lengths), indexing="ij")
    y, x = i * _TILE + row - 1, j * _TILE + column - 1  # a patch begins a line before its tile
    inside = (y >= 0) & (y < height) & (x >= 0) & (x < width)
    pixels = torch.where(inside, (n * height + y) * width + x, -1)
    tiles = pixels[..., 1:-1, 1:-1].permute(3, 4, 0, 1, 2).flatten()
    return _Places(_chosen(pixels.flatten()), _given(pixels.permute(0, 3, 4, 1, 2).flatten()), tiles, tiles.argsort())


def _chosen(rows: Tensor) -> _Sums:
    """Sums of one of these rows each, or of nothing where it is -1."""
    there = (rows >= 0).long()
    return rows[rows >= 0], there.cumsum(0) - there


def _given(rows: Tensor) -> _Sums:
    """`_chosen`, transposed: where a row has been chosen, all places to which it was given."""
    [places] = (rows >= 0).nonzero(as_tuple=True)
    times = rows[places].bincount()
    return places[rows[places].argsort(stable=True)], times.cumsum(0) - times


def _summed(rows: Tensor, sums: _Sums) -> Tensor:
    """Sums of rows `[rows, C]`: `[sums, C]`."""
    return F.embedding_bag(sums[0], rows, sums[1], mode="sum")


def _rows(x: Tensor) -> Tensor:
    """`[N, C, H, W]` as `[N * H * W, C]`: the same memory, if the channels are last there."""
    return x.permute(0, 2, 3, 1).reshape(-1, x.shape[1])


def _images(of_parts: list[Tensor], like: Tensor) -> Tensor:
    """Rows of pixels of some samples after those of others, as `[N, C, H, W]`, channels last in memory."""
    rows = of_parts[0] if len(of_parts) == 1 else torch.cat(of_parts)
    return rows.view(len(like), *like.shape[2:], -1).permute(0, 3, 1, 2)


def _patches(x: Tensor) -> Tensor:
    """The transformed patches of an input with zeros round it: `[N, C, H, W]` to `[tiles, 36, C]`.

    A patch is a tile with the nearest line of each neighbour.
    """
    patches = _summed(_rows(x), _places(x).of_patches)
    return _transforms()[0] @ patches.view(-1, _PATCH**2, x.shape[1])


def _add_patches(transformed: Tensor, samples: int, places: _Places) -> Tensor:
    """`_patches`, transposed: `[36, tiles, C]` to `[N * H * W, C]`, where a pixel is the sum over its patches."""
    patches = _transforms()[0].mT @ transformed.view(_PATCH**2, samples, -1).transpose(0, 1)
    return _summed(patches.view(-1, transformed.shape[2]), places.in_patches)


def _transformed(weight: Tensor) -> Tensor:
    """A kernel `[K, C, 3, 3]` to `[36, K, C]`."""
    outputs, inputs = weight.shape[:2]
    taps = weight.permute(0, 2, 3, 1).reshape(outputs, _TAPS**2, inputs)
    return torch.matmul(_transforms()[1], taps).transpose(0, 1)


def _transposed(of_kernel: Tensor) -> Tensor:
    """`_transformed`, transposed: the gradient of a transformed kernel to that of the kernel, channels last."""
    of_taps = torch.matmul(_transforms()[1].mT, of_kernel.transpose(0, 1))
    return of_taps.unflatten(1, (_TAPS, _TAPS)).permute(0, 3, 1, 2)
