"""3x3 convolutions with a quarter of the multiplications, F(4x4, 3x3) of Lavin & Gray 2016 (arXiv:1509.09308).

oneDNN's convolutions run at the peak of a CPU, but multiply directly. Training in float32 is faster this way. Its
largest errors are about ten times those of a direct convolution: 5e-5 of the output's standard deviation.
"""

from typing import Any

import torch
from torch import Tensor, nn

_TILE, _PATCH, _TAPS = 4, 6, 3
"""Sides of what is computed at once: a tile of the output, the patch of the input that it sees, and the kernel."""


def _both_ways(*rows: tuple[int, ...], divisor: int = 1) -> Tensor:
    """A transform of lines, `[n, m]`, as one of squares whose lines follow each other, `[n * n, m * m]`."""
    lines = torch.tensor(rows, dtype=torch.float64) / divisor
    return torch.kron(lines, lines).float()


_OF_PATCH = _both_ways(
    *((4, 0, -5, 0, 1, 0), (0, -4, -4, 1, 1, 0), (0, 4, -4, -1, 1, 0)),
    *((0, -2, -1, 2, 1, 0), (0, 2, -1, -2, 1, 0), (0, 4, 0, -5, 0, 1)),
)
_OF_KERNEL = _both_ways((6, 0, 0), (-4, -4, -4), (-4, 4, -4), (1, 2, 4), (1, -2, 4), (0, 0, 24), divisor=24)
_TO_TILE = _both_ways((1, 1, 1, 1, 1, 0), (0, 1, -1, 2, -2, 0), (0, 1, 1, 4, 4, 0), (0, 1, -1, 8, -8, 1))
_CONSTANT = _PATCH + 1
"""What is added there, `_TO_TILE` adds to every position of the tile."""
_AT_ONCE, _KEPT = 2**24, 2**21
"""So many bytes of transformed inputs and outputs are held at once, if a sample needs no more. Where a sample needs at
most so many, its input is kept transformed for the backward pass, in 2.25 times the memory; else as it is."""


def fits(x: Tensor, conv: nn.Conv2d) -> bool:
    """Whether an input is convolved faster this way."""
    inputs, outputs = conv.in_channels, conv.out_channels
    height, width = x.shape[2:]
    return (
        conv.training
        and torch.is_grad_enabled()
        and type(x) is Tensor
        and x.dtype == torch.float32
        and x.device.type == "cpu"
        and conv.kernel_size == (_TAPS, _TAPS)
        and conv.stride == conv.padding == conv.dilation == (1, 1)
        and conv.groups == 1
        and not height % _TILE
        and not width % _TILE
        # What is saved grows with the product of the channels and with the tiles. It has to be more than the transforms
        # of inputs and outputs cost, which goes by the sum of the channels, and that of the kernel, by their product.
        and inputs * outputs >= 32 * (inputs + outputs)
        and len(x) * height * width >= 32 * _TILE**2
        and torch.backends.mkl.is_available()
        and not torch.is_autocast_enabled("cpu")
        and not torch.compiler.is_compiling()
    )


def conv2d(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """`torch.nn.functional.conv2d` with padding 1: `[N, C, H, W]` and `[K, C, 3, 3]` to `[N, K, H, W]`, float32.

    H and W must be multiples of 4. It has a gradient, but no gradient of that.
    """
    out: Tensor = _Winograd.apply(x, weight, bias)
    return out


class _Winograd(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        x = x.contiguous(memory_format=torch.channels_last)
        out = x.new_empty(len(x), *x.shape[2:], len(weight)).permute(0, 3, 1, 2)
        kernel, some, keep = _transformed(weight), *_sizes(x, out)
        kept = []
        for part, into in zip(x.split(some), out.split(some), strict=True):
            patches = _patches(part)
            kept.append(patches if keep else part)
            product = torch.bmm(patches, kernel.mT)
            if bias is not None:
                product[_CONSTANT].add_(bias)
            tiles = _tiles(into)
            tiles.copy_((_TO_TILE @ product.view(_PATCH**2, -1)).view(tiles.shape))
        ctx.save_for_backward(weight, *kept)
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """The steps of `forward`, transposed."""
        weight, *kept = ctx.saved_tensors
        gradient = gradient.contiguous(memory_format=torch.channels_last)
        of_x = gradient.new_empty(len(gradient), *gradient.shape[2:], weight.shape[1]).permute(0, 3, 1, 2)
        kernel, some, keep = _transformed(weight), *_sizes(of_x, gradient)
        of_kernel = None
        for part, of_out, into in zip(kept, gradient.split(some), of_x.split(some), strict=True):
            product = (_TO_TILE.mT @ _tiles(of_out).reshape(_TILE**2, -1)).view(_PATCH**2, -1, len(weight))
            _add_patches(torch.bmm(product, kernel), into)
            if ctx.needs_input_grad[1]:
                of_part = torch.bmm(product.mT, part if keep else _patches(part))
                of_kernel = of_part if of_kernel is None else of_kernel.add_(of_part)
        return (
            of_x,
            None if of_kernel is None else _transposed(of_kernel),
            gradient.sum((0, 2, 3)) if ctx.needs_input_grad[2] else None,
        )


def _sizes(x: Tensor, out: Tensor) -> tuple[int, bool]:
    """How many samples are transformed at once, and whether they stay so for the backward pass."""
    tiles = x.shape[2:].numel() // _TILE**2
    sample = x.element_size() * _PATCH**2 * tiles * (x.shape[1] + out.shape[1])
    return max(1, _AT_ONCE // sample), sample <= _KEPT


def _tiles(x: Tensor) -> Tensor:
    """`[N, C, H, W]`, channels last in memory, as `[4, 4, N, H / 4, W / 4, C]`: the same memory."""
    N, C, H, W = x.shape
    tiles = x.permute(0, 2, 3, 1).view(N, H // _TILE, _TILE, W // _TILE, _TILE, C)
    return tiles.permute(2, 4, 0, 1, 3, 5)


def _patches(x: Tensor) -> Tensor:
    """The transformed patches of an input with zeros round it: `[N, C, H, W]` to `[36, tiles, C]`.

    A patch is a tile with the nearest line of each neighbour: those beside it, then those above and below it.
    """
    tiles = _tiles(x)
    patches = x.new_empty(_PATCH, _PATCH, *tiles.shape[2:])
    inner = patches[1:-1]
    inner[:, 1:-1] = tiles
    inner[:, 0, :, :, 1:], inner[:, -1, :, :, :-1] = inner[:, -2, :, :, :-1], inner[:, 1, :, :, 1:]
    inner[:, 0, :, :, 0] = inner[:, -1, :, :, -1] = 0
    patches[0, :, :, 1:], patches[-1, :, :, :-1] = patches[-2, :, :, :-1], patches[1, :, :, 1:]
    patches[0, :, :, 0] = patches[-1, :, :, -1] = 0
    return (_OF_PATCH @ patches.view(_PATCH**2, -1)).view(_PATCH**2, -1, x.shape[1])


def _add_patches(transformed: Tensor, into: Tensor) -> None:
    """`_patches`, transposed: every position of the input's gradient is the sum over the patches that saw it."""
    tiles = _tiles(into)
    patches = (_OF_PATCH.mT @ transformed.view(_PATCH**2, -1)).view(_PATCH, _PATCH, *tiles.shape[2:])
    inner = patches[1:-1]
    patches[-2, :, :, :-1].add_(patches[0, :, :, 1:])
    patches[1, :, :, 1:].add_(patches[-1, :, :, :-1])
    inner[:, -2, :, :, :-1].add_(inner[:, 0, :, :, 1:])
    inner[:, 1, :, :, 1:].add_(inner[:, -1, :, :, :-1])
    tiles.copy_(inner[:, 1:-1])


def _transformed(weight: Tensor) -> Tensor:
    """A kernel `[K, C, 3, 3]` to `[36, K, C]`."""
    outputs, inputs = weight.shape[:2]
    taps = weight.permute(0, 2, 3, 1).reshape(outputs, _TAPS**2, inputs)
    return torch.matmul(_OF_KERNEL, taps).transpose(0, 1)


def _transposed(of_kernel: Tensor) -> Tensor:
    """`_transformed`, transposed: the gradient of a transformed kernel to that of the kernel, channels last."""
    of_taps = torch.matmul(_OF_KERNEL.mT, of_kernel.transpose(0, 1))
    return of_taps.unflatten(1, (_TAPS, _TAPS)).permute(0, 3, 1, 2)
