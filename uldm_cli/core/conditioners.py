"""Conditioners: what a model is told, to what its backbone takes.

Modules carry the names of the published code, so its checkpoints load without renaming.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from uldm_cli.core.blocks import Conv2d
from uldm_cli.core.transformer import FeedForward, multi_head
from uldm_cli.errors import UsageError


class ClassEmbedder(nn.Module):
    """A vector for each class, as a context of one token."""

    def __init__(self, n_classes: int, embed_dim: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(n_classes, embed_dim)

    def forward(self, labels: Tensor) -> Tensor:  # int64 (N,) -> (N, 1, D)
        _check_ids(labels, self.embedding.num_embeddings, "class")
        return self.embedding(labels)[:, None]


class TokenEncoder(nn.Module):
    """A transformer encoder with learned positions, normalisation first, over token ids.

    The published checkpoints also hold a `to_logits` that nothing uses.
    """

    def __init__(self, vocab_size: int, max_seq_len: int, n_embed: int, n_layer: int) -> None:
        super().__init__()
        self.transformer = _Transformer(vocab_size, max_seq_len, n_embed, n_layer)

    def forward(self, tokens: Tensor) -> Tensor:
        """Ids, int64 `[N, L]`, to a context `[N, L, n_embed]`.

        Raises:
            UsageError: a sequence that is too long, or an id that the vocabulary lacks.
        """
        longest = self.transformer.pos_emb["emb"].num_embeddings
        if tokens.shape[1] > longest:
            raise UsageError(f"{tokens.shape[1]} tokens are given", f"This model takes {longest} at most")
        _check_ids(tokens, self.transformer.token_emb.num_embeddings, "token")
        return self.transformer(tokens)


class _Transformer(nn.Module):
    def __init__(self, vocab_size: int, max_seq_len: int, width: int, depth: int) -> None:
        super().__init__()
        self.token_emb = nn.Embedding(vocab_size, width)
        self.pos_emb: Any = nn.ModuleDict({"emb": nn.Embedding(max_seq_len, width)})
        layers = [layer for _ in range(depth) for layer in (_SelfAttention(width), FeedForward(width, gated=False))]
        pairs = nn.ModuleList(nn.ModuleList((nn.LayerNorm(width), layer)) for layer in layers)
        self.attn_layers: Any = nn.ModuleDict({"layers": pairs})
        self.norm = nn.LayerNorm(width)

    def forward(self, tokens: Tensor) -> Tensor:  # int64 (N, L) -> (N, L, D)
        x = self.token_emb(tokens) + self.pos_emb["emb"].weight[: tokens.shape[1]]
        for norm, layer in self.attn_layers["layers"]:
            x = x + layer(norm(x))
        return self.norm(x)


class _SelfAttention(nn.Module):
    """Eight heads of 64 channels, whatever the width."""

    heads = 8

    def __init__(self, width: int) -> None:
        super().__init__()
        inner = 64 * self.heads
        self.to_q = nn.Linear(width, inner, bias=False)
        self.to_k = nn.Linear(width, inner, bias=False)
        self.to_v = nn.Linear(width, inner, bias=False)
        self.to_out = nn.Linear(inner, width)

    def forward(self, x: Tensor) -> Tensor:  # (N, L, D) -> the same
        return self.to_out(multi_head(self.to_q(x), self.to_k(x), self.to_v(x), self.heads))


class Rescaler(nn.Module):
    """Resizes a map `n_stages` times by the same factor, then may map its channels linearly."""

    def __init__(
        self, n_stages: int, method: str, multiplier: float, in_channels: int, out_channels: int | None, bias: bool
    ) -> None:
        super().__init__()
        self.n_stages, self.method, self.multiplier, self.in_channels = n_stages, method, multiplier, in_channels
        self.channel_mapper = Conv2d(in_channels, out_channels, 1, bias=bias) if out_channels else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:  # (N, C, H, W) -> (N, C', h, w)
        if x.shape[1] != self.in_channels:
            raise UsageError(f"the map has {x.shape[1]} channels", f"This model takes {self.in_channels}")
        for _ in range(self.n_stages):
            x = F.interpolate(x, scale_factor=self.multiplier, mode=self.method)
        return self.channel_mapper(x)


class FirstStage(nn.Module):
    """Marks a model whose conditions are unscaled latents of its own autoencoder: there are no weights here."""


def _check_ids(ids: Tensor, count: int, word: str) -> None:
    if ids.dtype != torch.int64:
        raise UsageError(f"{word} ids are {ids.dtype}", "They must be whole numbers, int64")
    wrong = ids[(ids < 0) | (ids >= count)]
    if len(wrong):
        raise UsageError(f"{word} {int(wrong[0])} is unknown", f"This model knows 0 to {count - 1}")
