"""Layers of the autoencoders, named as in the published code, and what the U-Net shares with them."""

from collections.abc import Callable
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from uldm_cli.core import winograd
from uldm_cli.errors import UsageError


class ResnetBlock(nn.Module):
    """Two normalised 3x3 convolutions and a skip connection."""

    def __init__(self, channels: int, out_channels: int, groups: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.norm1 = norm(channels, groups)
        self.conv1 = Conv2d(channels, out_channels, 3, padding=1)
        self.norm2 = norm(out_channels, groups)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = Conv2d(out_channels, out_channels, 3, padding=1)
        self.nin_shortcut = nn.Identity() if channels == out_channels else Conv2d(channels, out_channels, 1)

    def forward(self, x: Tensor) -> Tensor:  # (N, C, H, W) -> (N, C', H, W)
        h = self.conv1(F.silu(self.norm1(x)))
        h = self.conv2(self.dropout(F.silu(self.norm2(h))))
        return self.nin_shortcut(x) + h


class Attends(nn.Module):
    """A layer that mixes by attention, of which something outside may take note without changing it."""

    heads: int
    kind: Literal["self", "cross"] = "self"
    """Whether positions look at each other, or at a context's tokens."""
    watch: Callable[[Tensor, Tensor], None] | None = None
    """Called with the queries `[N, heads, Q, d]` and the keys `[N, heads, K, d]` of every call, if set."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """`attention`, seen by whoever watches."""
        if self.watch is not None:
            self.watch(q, k)
        return attention(q, k, v)


class SelfAttention(Attends):
    """Multi-head self-attention over all positions, residual."""

    def __init__(self, channels: int, heads: int, groups: int) -> None:
        super().__init__()
        if channels % heads:
            raise UsageError(f"num_heads is {heads}", f"It must divide the {channels} channels that have attention")
        self.heads = heads
        self.norm = norm(channels, groups)
        self.q = Conv2d(channels, channels, 1)
        self.k = Conv2d(channels, channels, 1)
        self.v = Conv2d(channels, channels, 1)
        self.proj_out = Conv2d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:  # (N, C, H, W) -> the same
        N, C, H, W = x.shape
        h = self.norm(x)

        def heads(y: Tensor) -> Tensor:  # (N, heads, HW, d)
            return y.permute(0, 2, 3, 1).reshape(N, H * W, self.heads, C // self.heads).transpose(1, 2)

        mixed = self.attend(heads(self.q(h)), heads(self.k(h)), heads(self.v(h)))
        return x + self.proj_out(mixed.transpose(1, 2).reshape(N, H, W, C).permute(0, 3, 1, 2))


class Downsample(nn.Module):
    """Halves height and width by a strided convolution, padded at the bottom and the right only."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = Conv2d(channels, channels, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:  # (N, C, H, W) -> (N, C, H/2, W/2)
        return self.conv(F.pad(x, (0, 1, 0, 1)))


class Upsample(nn.Module):
    """Doubles height and width: nearest neighbour, then a convolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:  # (N, C, H, W) -> (N, C, 2H, 2W)
        return self.conv(x, scale=2)


class Packed:
    """Weights of a convolution laid out for oneDNN once, where a call of `conv2d` does it every time.

    The two functions are those by which PyTorch's own compiler does this; they are not public.
    """

    def __init__(self) -> None:
        self._made_for: tuple[object, ...] = ()
        self._weight: Tensor | None = None

    @staticmethod
    def fits(x: Tensor) -> bool:
        """Whether an input can be convolved this way. There are no gradients."""
        if torch.is_grad_enabled() or x.device.type != "cpu" or torch.compiler.is_compiling():
            return False
        if x.dtype == torch.bfloat16:
            return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
        return x.dtype == torch.float32 and torch.backends.mkldnn.is_available()

    def conv2d(self, x: Tensor, weight: Tensor, bias: Tensor | None, *geometry: Any) -> Tensor:
        """`torch.nn.functional.conv2d` with padding, stride, dilation and groups; the weight may lack its last axis."""
        version = None if weight.is_inference() else weight._version
        made_for = (x.shape, x.dtype, weight.data_ptr(), version)
        if self._weight is None or self._made_for != made_for:
            plain = weight.detach().view(*weight.shape[:3], -1).to_mkldnn()
            # its type stub lacks the input's shape, the last argument
            reorder: Any = torch._C._nn.mkldnn_reorder_conv2d_weight
            self._weight = reorder(plain, *geometry, x.shape)
            self._made_for = made_for
        out: Tensor = torch.ops.mkldnn._convolution_pointwise(x, self._weight, bias, *geometry, "none", [], "")
        return out

    def __deepcopy__(self, memo: object) -> "Packed":
        return Packed()


class Conv2d(nn.Conv2d):
    """A convolution that is faster on a CPU: where no gradient is wanted, and where it is trained in float32."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.packed = Packed()

    def forward(self, x: Tensor, *, scale: int = 1) -> Tensor:  # (N, C, H, W) -> (N, C', H', W')
        """Convolves the input, with a scale of 2 doubled before in height and width, by its nearest pixels."""
        usual = self.padding_mode == "zeros" and x.ndim == 4
        if usual and winograd.fits(x, self, scale):
            return winograd.conv2d(x, self.weight, self.bias, scale)
        if scale != 1:
            x = F.interpolate(x, scale_factor=scale, mode="nearest")
        if usual and Packed.fits(x):
            return self.packed.conv2d(x, self.weight, self.bias, self.padding, self.stride, self.dilation, self.groups)
        return super().forward(x)


class Pointwise(nn.Conv1d):
    """The same linear map at every position of an image: in the published code a one-tap convolution over tokens."""

    def __init__(self, channels: int, out_channels: int) -> None:
        super().__init__(channels, out_channels, 1)
        self.packed = Packed()

    def forward(self, x: Tensor) -> Tensor:  # (N, C, H, W) -> (N, C', H, W)
        if Packed.fits(x):
            return self.packed.conv2d(x, self.weight, self.bias, (0, 0), (1, 1), (1, 1), 1)
        return F.linear(x.permute(0, 2, 3, 1), self.weight[..., 0], self.bias).permute(0, 3, 1, 2)


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Scaled dot-product attention, `[N, heads, L, d]` each (k and v may have another L).

    In bfloat16 on a CPU, matrix products are 1.2 to 3 times as fast as PyTorch's fused kernel, if the scores that are
    computed at once fit into the cache: those of some heads, or of some queries of one head. Where gradients are
    wanted all scores are kept anyway, and parts would only have to be put together again.
    """
    if q.dtype != torch.bfloat16 or q.device.type != "cpu":
        return F.scaled_dot_product_attention(q, k, v)
    q = q * q.shape[-1] ** -0.5
    if torch.is_grad_enabled():
        return torch.softmax(q @ k.mT, dim=-1) @ v
    heads = max(1, _CACHED_SCORES // (q.shape[-2] * k.shape[-2]))
    queries = max(256, _CACHED_SCORES // k.shape[-2])  # fewer would read keys and values too often
    parts = (x.flatten(0, 1).split(heads) for x in (q, k, v))
    mixed = [
        torch.cat([torch.softmax(some @ b.mT, dim=-1) @ c for some in a.split(queries, dim=1)], dim=1)
        for a, b, c in zip(*parts, strict=True)
    ]
    return torch.cat(mixed).view(q.shape)


_CACHED_SCORES = 2**19
"""Attention scores computed at once: 1 MiB, which the allocator keeps, where larger ones go back to the system."""


class _Laid(torch.autograd.Function):
    """Each channel's map in one piece of memory, but in the gradient the channels last: convolutions wait for it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.contiguous()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient.contiguous(memory_format=torch.channels_last)


class _NarrowGroups(torch.autograd.Function):
    """Group normalisation with PyTorch's kernel, and a gradient that is made of sums by channel.

    PyTorch's own goes through one group after the other, and with the channels last in memory it is 1.5 to 4 times as
    slow where a group has one or two of them.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float) -> Tensor:
        N, C, H, W = x.shape
        out, mean, rstd = torch.native_group_norm(x, weight, bias, N, C, H * W, groups, eps)
        ctx.save_for_backward(x, weight, mean, rstd)
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None]:
        x, weight, mean, rstd = ctx.saved_tensors
        N, C, H, W = x.shape
        x, gradient = (y.permute(0, 2, 3, 1).reshape(N, H * W, C) for y in (x, gradient))
        # From here on by sample, group, and channel of the group.
        grouped = (N, mean.shape[1], -1)
        mean, rstd, weight = mean[..., None], rstd[..., None], weight.view(grouped[1:])
        of_bias = gradient.sum(1).view(grouped)
        of_weight = ((gradient * x).sum(1).view(grouped) - mean * of_bias) * rstd
        # The mean and the deviation depend on the input, too: that adds a multiple of it and a constant.
        count = H * W * weight.shape[1]
        slope = -(weight * of_weight).sum(2, keepdim=True) * rstd**2 / count
        constant = -(weight * of_bias).sum(2, keepdim=True) * rstd / count - slope * mean
        constant, slope, scale = (y.expand(of_bias.shape).reshape(N, 1, C) for y in (constant, slope, weight * rstd))
        of_x = torch.addcmul(constant, x, slope).addcmul_(gradient, scale)
        return of_x.view(N, H, W, C).permute(0, 3, 1, 2), of_weight.sum(0).view(C), of_bias.sum(0).view(C), None, None


class GroupNorm(nn.GroupNorm):
    """Group normalisation, round PyTorch's slow kernels for channels last in memory on a CPU.

    In bfloat16 these are up to 10 times slower than with each channel's map in one piece: the backward one always, the
    forward one for small maps. Two copies cost less.
    """

    def forward(self, x: Tensor) -> Tensor:  # (N, C, ...) -> the same
        if x.device.type != "cpu" or x.is_contiguous():
            return super().forward(x)
        if x.dtype == torch.bfloat16 and (torch.is_grad_enabled() or x.shape[2:].numel() < 1024):
            laid: Tensor = _Laid.apply(x)
            return super().forward(laid).contiguous(memory_format=torch.channels_last)
        large = x.ndim == 4 and len(x) * x.shape[2:].numel() >= 2048
        narrow = large and self.affine and self.num_channels <= 2 * self.num_groups
        if narrow and x.dtype == torch.float32 and torch.is_grad_enabled() and not torch.compiler.is_compiling():
            out: Tensor = _NarrowGroups.apply(x, self.weight, self.bias, self.num_groups, self.eps)
            return out
        return super().forward(x)


def norm(channels: int, groups: int) -> GroupNorm:
    """Group normalisation with the autoencoders' epsilon of 1e-6."""
    if channels % groups:
        raise UsageError(f"norm_channels is {groups}", f"It must divide every width, and {channels} is one of them")
    return GroupNorm(groups, channels, eps=1e-6)
