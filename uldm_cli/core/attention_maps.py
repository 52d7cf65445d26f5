"""Where a denoiser looks: the attention of its layers, as maps.

The layers themselves are watched (see `blocks.Attends`), and compute what they compute unwatched, bit for bit. To look
at a step of sampling, call the network again on what the step saw.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
from torch import Tensor, nn

from uldm_cli.core import blocks
from uldm_cli.core.blocks import Attends
from uldm_cli.core.unet import Downsample, ResBlock
from uldm_cli.errors import UsageError, nearest


@dataclass(frozen=True)
class AttentionLayer:
    """A layer with attention."""

    name: str
    """Of the module, within the backbone."""
    factor: int
    """How many times smaller its map is than the backbone's input, along a side."""
    heads: int
    kind: Literal["self", "cross"]
    """Whether positions look at each other, or at a context's tokens."""


See = Callable[[AttentionLayer, int, Tensor], None]
"""`see(layer, sample, probabilities)`: these are float32 `[heads, Q, K]`, rows of which sum to 1."""


@dataclass(frozen=True)
class View:
    """What is to be seen of the attention: by default what each position receives, on average over all there is.

    `layer`, `factor` and `head` narrow it down; of the others one at most is chosen.
    """

    layer: str | None = None
    factor: int | None = None
    head: int | None = None
    query: tuple[int, int] | None = None
    """Where one position looks instead: x and y in the pixels of `image`."""
    image: tuple[int, int] | None = None
    """Height and width in which `query` is given."""
    token: int | None = None
    """How much each position looks at one token of the context instead."""
    rollout: bool = False
    """Follow attention through all layers of a size (Abnar & Zuidema 2020)."""


def layers(backbone: nn.Module) -> list[AttentionLayer]:
    """A backbone's layers with attention, in the order in which they compute. None at all is an empty list."""
    found, factor = [], 1.0
    for name, module in backbone.named_modules():
        factor *= _resizing(module)
        if isinstance(module, Attends):
            found.append(AttentionLayer(name, round(factor), module.heads, module.kind))
    return found


def _resizing(module: nn.Module) -> float:
    """How many times smaller the map is after a module."""
    if isinstance(module, Downsample | blocks.Downsample) or (isinstance(module, ResBlock) and module.resample < 0):
        return 2.0
    doubles = isinstance(module, blocks.Upsample | nn.Upsample) or (isinstance(module, ResBlock) and module.resample)
    return 0.5 if doubles else 1.0


def chosen(there: Sequence[AttentionLayer], view: View) -> list[AttentionLayer]:
    """The layers that a view takes in.

    Raises:
        UsageError: there are none, or no such layer, resolution, head, query point; the message says which there are.
    """
    return [layer for layer in there if layer.kind == ("self" if view.token is None else "cross")]


@contextmanager
def captured(backbone: nn.Module, wanted: Sequence[AttentionLayer], see: See) -> Iterator[None]:
    """Inside, every call of the backbone shows the attention of the wanted layers, one sample of one layer at a time."""
    watched = [backbone.get_submodule(layer.name) for layer in wanted]
    try:
        for module, layer in zip(watched, wanted, strict=True):
            module.watch = partial(_show, layer, see)  # type: ignore[assignment]
        yield
    finally:
        for module in watched:
            del module.watch


@torch.no_grad()
def _show(layer: AttentionLayer, see: See, q: Tensor, k: Tensor) -> None:
    for sample, (queries, keys) in enumerate(zip(q, k, strict=True)):
        see(layer, sample, probabilities(queries, keys))


def probabilities(q: Tensor, k: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(d)) of `[heads, Q, d]` and `[heads, K, d]`, computed in float32: `[heads, Q, K]`."""
    return torch.softmax((q.float() * q.shape[-1] ** -0.5) @ k.float().mT, dim=-1)


def layer_maps(backbone: nn.Module, call: Callable[[], object], size: tuple[int, int], view: View) -> dict[str, Tensor]:
    """What a view shows of each layer: float32 `[N, h/factor, w/factor]` on the CPU, by the layer's name.

    The values of a map sum to 1: they are shares of attention. (Those of a token are each a share of their own.)
    A rollout has one map a resolution, named `rollout/FACTOR`.

    Args:
        backbone: has the layers.
        call: calls it, once, with N samples. Under guidance it has twice as many, those without the condition first.
        size: h and w of the backbone's input.
        view: what to see.

    Raises:
        UsageError: as `chosen`.
    """
    maps: dict[str, list[Tensor]] = {}

    def see(layer: AttentionLayer, sample: int, attention: Tensor) -> None:
        grid = size[0] // layer.factor, size[1] // layer.factor
        maps.setdefault(layer.name, []).append(attention.mean((0, 1)).view(grid).cpu())

    with captured(backbone, chosen(layers(backbone), view), see):
        call()
    return {name: torch.stack(rows) for name, rows in maps.items()}


def mean_map(maps: dict[str, Tensor]) -> Tensor:
    """The mean of maps, each brought to the largest size among them: `[N, h, w]`.

    Interpolation is bilinear, and keeps a map's sum: a position's share is divided among those that it becomes.
    """
    height, width = max(m.shape[1:] for m in maps.values())
    return torch.stack(
        [
            torch.nn.functional.interpolate(m[:, None], (height, width), mode="bilinear")[:, 0]
            * (m.shape[1:].numel() / (height * width))
            for m in maps.values()
        ]
    ).mean(0)
