"""Transformer blocks over the positions of a map, which read a context (Rombach et al. 2022, appendix E.2.1).

Modules carry the names of the published code, so its checkpoints load without renaming.
"""

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor, nn

from uldm_cli.core.blocks import Attends, Conv2d, GroupNorm, attention

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]
"""`attention`, or a layer's that is watched."""


def multi_head(q: Tensor, k: Tensor, v: Tensor, heads: int, attend: Attend = attention) -> Tensor:
    """Attention of `heads` equal parts of the channels, side by side. `[N, L, C]` each; k and v may have another L."""

    def split(x: Tensor) -> Tensor:  # (N, L, C) -> (N, heads, L, d)
        return x.unflatten(2, (heads, -1)).transpose(1, 2)

    return attend(split(q), split(k), split(v)).transpose(1, 2).flatten(2)


class CrossAttention(Attends):
    """Attention of tokens to a context."""

    def __init__(self, channels: int, context_dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.to_q = nn.Linear(channels, channels, bias=False)
        self.to_k = nn.Linear(context_dim, channels, bias=False)
        self.to_v = nn.Linear(context_dim, channels, bias=False)
        self.to_out = nn.Sequential(nn.Linear(channels, channels))

    def forward(self, x: Tensor, context: Tensor) -> Tensor:  # (N, L, C), (N, M, D) -> (N, L, C)
        q, k, v = self.to_q(x), self.to_k(context), self.to_v(context)
        return self.to_out(multi_head(q, k, v, self.heads, self.attend))


class GEGLU(nn.Module):
    """A linear map, each of whose outputs another one's GELU scales (Shazeer 2020)."""

    def __init__(self, channels: int, out_channels: int) -> None:
        super().__init__()
        self.proj = nn.Linear(channels, 2 * out_channels)

    def forward(self, x: Tensor) -> Tensor:  # (..., C) -> (..., C')
        value, gate = self.proj(x).chunk(2, dim=-1)
        return value * F.gelu(gate)


class FeedForward(nn.Module):
    """Two layers at every position, four times as wide between them."""

    def __init__(self, channels: int, *, gated: bool) -> None:
        super().__init__()
        wide = 4 * channels
        first = GEGLU(channels, wide) if gated else nn.Sequential(nn.Linear(channels, wide), nn.GELU())
        # What stands between them in the published code is dropout that nothing switches on.
        self.net = nn.Sequential(first, nn.Identity(), nn.Linear(wide, channels))

    def forward(self, x: Tensor) -> Tensor:  # (N, L, C) -> the same
        return self.net(x)


class TransformerBlock(nn.Module):
    """Self-attention, attention to the context, feed-forward network; each normalises first and adds to its input."""

    def __init__(self, channels: int, context_dim: int, heads: int) -> None:
        super().__init__()
        self.attn1 = CrossAttention(channels, channels, heads)
        self.ff = FeedForward(channels, gated=True)
        self.attn2 = CrossAttention(channels, context_dim, heads)
        self.attn2.kind = "cross"
        self.norm1, self.norm2, self.norm3 = (nn.LayerNorm(channels) for _ in range(3))

    def forward(self, x: Tensor, context: Tensor) -> Tensor:  # (N, L, C), (N, M, D) -> (N, L, C)
        own = self.norm1(x)
        x = x + self.attn1(own, own)
        x = x + self.attn2(self.norm2(x), context)
        return x + self.ff(self.norm3(x))


class SpatialTransformer(nn.Module):
    """Transformer blocks over all positions of a map, residual; untrained it is the identity."""

    def __init__(self, channels: int, context_dim: int, heads: int, depth: int) -> None:
        super().__init__()
        self.norm = GroupNorm(32, channels, eps=1e-6)
        self.proj_in = Conv2d(channels, channels, 1)
        self.transformer_blocks = nn.ModuleList(TransformerBlock(channels, context_dim, heads) for _ in range(depth))
        self.proj_out = Conv2d(channels, channels, 1)
        for parameter in self.proj_out.parameters():
            nn.init.zeros_(parameter)

    def forward(self, x: Tensor, context: Tensor) -> Tensor:  # (N, C, H, W), (N, M, D) -> (N, C, H, W)
        _, _, H, W = x.shape
        tokens = self.proj_in(self.norm(x)).permute(0, 2, 3, 1).flatten(1, 2)  # channels last: no copy
        for block in self.transformer_blocks:
            tokens = block(tokens, context)
        return x + self.proj_out(tokens.unflatten(1, (H, W)).permute(0, 3, 1, 2))
