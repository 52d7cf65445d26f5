"""Where a denoiser looks: the attention of its layers, as maps.

The layers themselves are watched (see `blocks.Attends`), and compute what they compute unwatched, bit for bit. To look
at a step of sampling, call the network again on what the step saw.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from uldm_cli.core import blocks
from uldm_cli.core.blocks import Attends
from uldm_cli.core.unet import Downsample, ResBlock
from uldm_cli.errors import UldmError, UsageError, nearest


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
"""`see(layer, sample, probabilities)`: these are float32 `[heads, Q, K]`, whose rows sum to 1."""


@dataclass(frozen=True)
class View:
    """What is to be seen of self-attention: by default how much each position receives, on average over all there is.

    `layer`, `factor` and `head` narrow it down.
    """

    layer: str | None = None
    factor: int | None = None
    head: int | None = None
    query: tuple[int, int] | None = None
    """Where one position looks instead: x and y in the pixels of `image`."""
    image: tuple[int, int] | None = None
    """Height and width in which `query` is given."""
    token: int | None = None
    """Of cross-attention instead: how much each position looks at this token of the context."""
    rollout: bool = False
    """Follow self-attention through all layers of a resolution (Abnar & Zuidema 2020)."""


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
    resample = module.resample if isinstance(module, ResBlock) else 0
    if resample < 0 or isinstance(module, Downsample | blocks.Downsample):
        return 2.0
    if resample > 0 or isinstance(module, blocks.Upsample | nn.Upsample):
        return 0.5
    return 1.0


def chosen(there: Sequence[AttentionLayer], view: View) -> list[AttentionLayer]:
    """The layers that a view takes in.

    Raises:
        UsageError: there are none, or no such layer, resolution, head or query point; the message says which there are.
    """
    _check_point(view)
    kind = "self" if view.token is None else "cross"
    found = [layer for layer in there if layer.kind == kind]
    if not found:
        raise UsageError(f"this model has no {kind}-attention", "There is nothing to be seen")
    if view.layer is not None:
        names = [layer.name for layer in found]
        if view.layer not in names:
            near = nearest(view.layer, names)
            hint = f"Did you mean {near}? " if near else ""
            raise UsageError(f"there is no {kind}-attention in a layer {view.layer}", f"{hint}There is: {_list(names)}")
        found = [layer for layer in found if layer.name == view.layer]
    if view.factor is not None:
        factors = sorted({layer.factor for layer in found})
        if view.factor not in factors:
            raise UsageError(f"there is no {kind}-attention at factor {view.factor}", f"There is at: {_list(factors)}")
        found = [layer for layer in found if layer.factor == view.factor]
    fewest = min(found, key=lambda layer: layer.heads)
    if view.head is not None and not 0 <= view.head < fewest.heads:
        raise UsageError(
            f"not all of these layers have a head {view.head}",
            f"Layer {fewest.name} has {fewest.heads}, from 0 to {fewest.heads - 1}",
        )
    return found


def _check_point(view: View) -> None:
    if view.token is not None and (view.rollout or view.query is not None):
        raise UsageError("a token's attention can be seen neither of one point nor as a rollout", "Leave one out")
    if view.query is None:
        return
    if view.image is None:
        raise UsageError("a query point needs the size of the image in which it is", "Give the view's image")
    (x, y), (height, width) = view.query, view.image
    if not (0 <= x < width and 0 <= y < height):
        raise UsageError(f"there is no point {x},{y}", f"x is from 0 to {width - 1}, y from 0 to {height - 1}")


def _list(items: Sequence[object]) -> str:
    return ", ".join(map(str, items))


@contextmanager
def captured(backbone: nn.Module, wanted: Sequence[AttentionLayer], see: See) -> Iterator[None]:
    """Inside, every call of the backbone shows the attention of the wanted layers.

    One sample of one layer at a time: no more than that is held, unless `see` keeps it.
    """
    watched = [backbone.get_submodule(layer.name) for layer in wanted]
    try:
        for module, layer in zip(watched, wanted, strict=True):
            module.watch = partial(_show, layer, see)  # type: ignore[assignment]
        yield
    finally:
        for module in watched:
            module.__dict__.pop("watch", None)


@torch.no_grad()
def _show(layer: AttentionLayer, see: See, q: Tensor, k: Tensor) -> None:
    for sample, (queries, keys) in enumerate(zip(q, k, strict=True)):
        see(layer, sample, probabilities(queries, keys))


def probabilities(q: Tensor, k: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(d)) of `[heads, Q, d]` and `[heads, K, d]`, computed in float32: `[heads, Q, K]`."""
    return torch.softmax((q.float() * q.shape[-1] ** -0.5) @ k.float().mT, dim=-1)


def layer_maps(backbone: nn.Module, call: Callable[[], object], size: tuple[int, int], view: View) -> dict[str, Tensor]:
    """What a view shows of each layer: float32 `[N, h/factor, w/factor]` on the CPU, by the layer's name.

    Maps of self-attention are shares: their values sum to 1. A value of a token's map is the share of it in what that
    position looks at, so these sum to anything. In a rollout there is one map for each resolution, by the name
    `rollout/FACTOR`: layers of another size, the convolutions and the skip connections are not followed.

    Args:
        backbone: has the layers.
        call: calls it once, with N samples. Under guidance these are twice as many, those without condition first.
        size: h and w of the backbone's input.
        view: what to see.

    Raises:
        UsageError: as `chosen`; or the context has no such token.
        UldmError: the backbone did not compute the layers, or not on such maps.
    """
    wanted = chosen(layers(backbone), view)
    maps = _Rollout(view, size) if view.rollout else _Maps(view, size)
    with captured(backbone, wanted, maps.see):
        call()
    if missing := [layer.name for layer in wanted if layer.name not in maps.seen]:
        raise UldmError(f"the network did not show the attention of its layer {missing[0]}", "Is it compiled?")
    return maps.result()


class _Maps:
    """Gathers a map of each sample of each layer."""

    def __init__(self, view: View, size: tuple[int, int]) -> None:
        self._view, self._size = view, size
        self._maps: dict[str, list[Tensor]] = {}
        self.seen: set[str] = set()

    def see(self, layer: AttentionLayer, sample: int, attention: Tensor) -> None:
        self.seen.add(layer.name)
        height, width = (side // layer.factor for side in self._size)
        if attention.shape[1] != height * width:
            there = f"It has {attention.shape[1]} positions"
            raise UldmError(f"the attention of layer {layer.name} is not on a map of {width} x {height}", there)
        mean = attention.mean(0) if self._view.head is None else attention[self._view.head]
        self.take(layer, sample, mean, (height, width))

    def take(self, layer: AttentionLayer, sample: int, mean: Tensor, grid: tuple[int, int]) -> None:
        """Notes the attention `[Q, K]` of a layer, one head or the mean of all, whose queries lie on a grid."""
        self._maps.setdefault(layer.name, []).append(self._map(mean, grid))

    def _map(self, mean: Tensor, grid: tuple[int, int]) -> Tensor:
        if self._view.token is not None:
            tokens = mean.shape[1]
            if not 0 <= self._view.token < tokens:
                raise UsageError(f"there is no token {self._view.token}", f"The context has {tokens}, counted from 0")
            values = mean[:, self._view.token]
        elif self._view.query is not None and self._view.image is not None:
            (x, y), (height, width) = self._view.query, self._view.image
            values = mean[y * grid[0] // height * grid[1] + x * grid[1] // width]
        else:
            values = mean.mean(0)
        return values.view(grid).cpu()

    def result(self) -> dict[str, Tensor]:
        return {name: torch.stack(maps) for name, maps in self._maps.items()}


class _Rollout(_Maps):
    """Follows each sample's attention through the layers of each resolution; only their product is kept."""

    def __init__(self, view: View, size: tuple[int, int]) -> None:
        super().__init__(view, size)
        self._flows: dict[tuple[int, tuple[int, int]], dict[int, Tensor]] = {}

    def take(self, layer: AttentionLayer, sample: int, mean: Tensor, grid: tuple[int, int]) -> None:
        step = (mean + torch.eye(len(mean), device=mean.device)) / 2  # rows still sum to 1
        flows = self._flows.setdefault((layer.factor, grid), {})
        flows[sample] = step @ flows[sample] if sample in flows else step

    def result(self) -> dict[str, Tensor]:
        return {
            f"rollout/{factor}": torch.stack([self._map(flow, grid) for flow in flows.values()])
            for (factor, grid), flows in self._flows.items()
        }


def mean_map(maps: Mapping[str, Tensor], *, shares: bool = True) -> Tensor:
    """The mean of maps `[N, h, w]`, each brought to the largest size among them by bilinear interpolation.

    Args:
        maps: at least one, as `layer_maps` gives them.
        shares: of maps whose values sum to 1: a value is divided among the positions that it becomes, so that the sum
            stays, and all resolutions count alike. False for a token's maps, whose values stay as they are.
    """
    height, width = max(values.shape[1:] for values in maps.values())
    total = torch.zeros(())
    for values in maps.values():
        large = F.interpolate(values[:, None], (height, width), mode="bilinear")[:, 0]
        total = total + large * (values[0].numel() / (height * width) if shares else 1)
    return total / len(maps)
